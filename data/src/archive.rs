//! Where images come from: a zip, a tar (gzipped or not) or a folder, listed by name and read by place.
//!
//! Entries are only ever read into memory, never written to disk under their own names. Reads are
//! positioned, so that all threads read one archive at once.

mod tar_index;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::read::{DeflateDecoder, GzDecoder};
use rawzip::{CompressionMethod, FileReader, ZipArchive, ZipArchiveEntryWayfinder};

use crate::progress::Job;
use crate::quarantine::{Reason, Refusal};
use crate::{DataError, Progress, Stage};

/// Largest image file, packed or unpacked: JPEGs of 64 Mpixel stay below.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// The images of a source, in the order of their names.
pub(crate) struct Archive {
    reader: Reader,
    entries: Vec<Entry>,
    /// Files whose names are not those of images.
    pub(crate) ignored: u64,
}

enum Reader {
    Zip(ZipArchive<FileReader>),
    Tar(File),
    Folder(PathBuf),
}

struct Entry {
    name: Box<str>,
    place: Place,
}

enum Place {
    Zip { wayfinder: ZipArchiveEntryWayfinder, method: CompressionMethod, encrypted: bool, crc32: u32 },
    Tar { offset: u64, bytes: u64 },
    Folder,
}

impl Archive {
    /// Lists a source's images.
    pub(crate) fn open(source: &str, job: &Job) -> Result<Self, DataError> {
        let path = local_path(source)?;
        let mut listing = Listing { job, entries: Vec::new(), ignored: 0 };
        let unreadable = |source| unreadable(&path, source);
        let metadata = match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::SourceMissing { path: source.to_owned() });
            }
            other => other.map_err(unreadable)?,
        };
        let reader = if metadata.is_dir() {
            list_folder(&path, &mut listing)?;
            Reader::Folder(path)
        } else {
            open_file(source, &path, &mut listing)?
        };
        let Listing { mut entries, ignored, .. } = listing;
        entries.sort_by(|a, b| a.order().cmp(&b.order()));
        Ok(Self { reader, entries, ignored })
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn name(&self, index: usize) -> &str {
        &self.entries[index].name
    }

    /// Reads one file whole into `out`.
    pub(crate) fn read(&self, index: usize, out: &mut Vec<u8>) -> Result<(), Refusal> {
        out.clear();
        let entry = &self.entries[index];
        match (&self.reader, &entry.place) {
            (Reader::Zip(zip), Place::Zip { wayfinder, method, encrypted, .. }) => {
                if *encrypted {
                    return Err(Refusal::new(Reason::Unreadable, "it is encrypted"));
                }
                read_zip(zip, *wayfinder, *method, out)
            }
            (Reader::Tar(file), Place::Tar { offset, bytes }) => {
                bound(*bytes)?;
                out.resize(*bytes as usize, 0);
                file.read_exact_at(out, *offset).map_err(|error| unread(&error))
            }
            (Reader::Folder(folder), Place::Folder) => {
                let file = File::open(folder.join(&*entry.name)).map_err(|error| unread(&error))?;
                let bytes = file.metadata().map_err(|error| unread(&error))?.len();
                bound(bytes)?;
                fill(file, bytes, out)
            }
            _ => Err(Refusal::new(Reason::Unreadable, "it lies in another archive")),
        }
    }
}

impl Entry {
    /// By name; equal names by content, so that the order inside a zip never matters.
    fn order(&self) -> (&str, u64, u64) {
        match &self.place {
            Place::Zip { wayfinder, crc32, .. } => {
                (&self.name, u64::from(*crc32), wayfinder.uncompressed_size_hint())
            }
            Place::Tar { offset, bytes } => (&self.name, *offset, *bytes),
            Place::Folder => (&self.name, 0, 0),
        }
    }
}

/// What a scan has found so far.
struct Listing<'a> {
    job: &'a Job,
    entries: Vec<Entry>,
    ignored: u64,
}

impl Listing<'_> {
    fn add(&mut self, name: &str, place: Place) -> Result<(), DataError> {
        self.job.check()?;
        if is_image_name(name) {
            self.entries.push(Entry { name: name.into(), place });
            let done = self.entries.len() as u64;
            self.job.report(Progress { stage: Stage::Scanning, done, total: None, quarantined: 0 });
        } else {
            self.ignored += 1;
        }
        Ok(())
    }
}

/// JPEG and PNG by extension, outside of hidden folders and of macOS's resource forks.
fn is_image_name(name: &str) -> bool {
    let hidden = name.split('/').any(|part| part == "__MACOSX" || part.starts_with('.') && part.len() > 1);
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    !hidden && ["jpg", "jpeg", "jpe", "png"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

fn local_path(source: &str) -> Result<PathBuf, DataError> {
    match source.split_once("://") {
        None => Ok(PathBuf::from(source)),
        Some(("file", _)) => url::Url::parse(source)
            .ok()
            .and_then(|url| url.to_file_path().ok())
            .ok_or_else(|| DataError::SourceMissing { path: source.to_owned() }),
        Some(_) => Err(DataError::SourceRemote { url: source.to_owned() }),
    }
}

fn open_file(source: &str, path: &Path, listing: &mut Listing) -> Result<Reader, DataError> {
    let unreadable = |error| unreadable(path, error);
    let not_archive = |reason: String| DataError::NotAnArchive { path: source.to_owned(), reason };
    let file = File::open(path).map_err(unreadable)?;
    let mut head = [0u8; 512];
    let read = (&file).take(head.len() as u64).read(&mut head).map_err(unreadable)?;
    let head = &head[..read];
    if head.starts_with(&[0x1F, 0x8B]) {
        // A gzipped tar has no places to read from: unpack it into a file without a name.
        let mut plain = tempfile::tempfile().map_err(|error| no_room(path, error))?;
        let whole = File::open(path).map_err(unreadable)?;
        copy(listing.job, GzDecoder::new(whole), &mut plain)
            .map_err(|error| error.unwrap_or_else(|error| gunzip_failed(source, path, error)))?;
        return tar_index::list(plain, listing).map_err(|error| error.unwrap_or_else(not_archive));
    }
    if head.get(257..262) == Some(b"ustar") {
        return tar_index::list(file, listing).map_err(|error| error.unwrap_or_else(not_archive));
    }
    list_zip(file, listing).map_err(|error| error.unwrap_or_else(not_archive))
}

/// An error of ours, or what the format's reader said.
pub(crate) enum Trouble<E> {
    Ours(DataError),
    Theirs(E),
}

impl<E> Trouble<E> {
    fn unwrap_or_else(self, theirs: impl FnOnce(E) -> DataError) -> DataError {
        match self {
            Self::Ours(error) => error,
            Self::Theirs(error) => theirs(error),
        }
    }
}

impl<E> From<DataError> for Trouble<E> {
    fn from(error: DataError) -> Self {
        Self::Ours(error)
    }
}

fn copy(job: &Job, mut from: impl Read, to: &mut File) -> Result<(), Trouble<std::io::Error>> {
    let mut block = vec![0u8; 1 << 20];
    loop {
        job.check()?;
        let read = from.read(&mut block).map_err(Trouble::Theirs)?;
        if read == 0 {
            return Ok(());
        }
        std::io::Write::write_all(to, &block[..read]).map_err(Trouble::Theirs)?;
    }
}

fn gunzip_failed(source: &str, path: &Path, error: std::io::Error) -> DataError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => no_room(path, error),
        _ => DataError::NotAnArchive { path: source.to_owned(), reason: error.to_string() },
    }
}

fn no_room(path: &Path, source: std::io::Error) -> DataError {
    let needed_mib = std::fs::metadata(path).map_or(0, |metadata| metadata.len() >> 20);
    DataError::Spool { folder: std::env::temp_dir(), needed_mib, source }
}

fn list_zip(file: File, listing: &mut Listing) -> Result<Reader, Trouble<String>> {
    let theirs = |error: rawzip::Error| Trouble::Theirs(error.to_string());
    let mut buffer = vec![0u8; rawzip::RECOMMENDED_BUFFER_SIZE];
    let zip = ZipArchive::from_file(file, &mut buffer).map_err(theirs)?;
    let mut entries = zip.entries(&mut buffer);
    while let Some(entry) = entries.next_entry().map_err(theirs)? {
        if entry.is_dir() {
            continue;
        }
        let place = Place::Zip {
            wayfinder: entry.wayfinder(),
            method: entry.compression_method(),
            encrypted: entry.flags().is_encrypted(),
            crc32: entry.crc32(),
        };
        listing.add(&String::from_utf8_lossy(entry.file_path().as_ref()), place)?;
    }
    Ok(Reader::Zip(zip))
}

fn list_folder(root: &Path, listing: &mut Listing) -> Result<(), DataError> {
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let here = root.join(&folder);
        for item in std::fs::read_dir(&here).map_err(|error| unreadable(&here, error))? {
            let item = item.map_err(|error| unreadable(&here, error))?;
            let path = folder.join(item.file_name());
            let kind = item.file_type().map_err(|error| unreadable(&here, error))?;
            // Links to folders are not followed: they may lead in circles.
            let is_file = kind.is_file() || kind.is_symlink() && root.join(&path).is_file();
            match path.to_str() {
                Some(name) if is_file => listing.add(name, Place::Folder)?,
                _ if kind.is_dir() => folders.push(path),
                _ => listing.ignored += 1,
            }
        }
    }
    Ok(())
}

fn read_zip(
    zip: &ZipArchive<FileReader>,
    wayfinder: ZipArchiveEntryWayfinder,
    method: CompressionMethod,
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let (packed, bytes) = (wayfinder.compressed_size_hint(), wayfinder.uncompressed_size_hint());
    bound(packed)?;
    bound(bytes)?;
    let broken = |error: rawzip::Error| Refusal::new(Reason::Unreadable, error.to_string());
    let entry = zip.get_entry(wayfinder).map_err(broken)?;
    match method {
        CompressionMethod::STORE => fill(entry.verifying_reader(entry.reader()), bytes, out),
        CompressionMethod::DEFLATE => {
            let unpacked = DeflateDecoder::new_with_buf(entry.reader(), vec![0; 16 << 10]);
            fill(entry.verifying_reader(unpacked), bytes, out)
        }
        other => Err(Refusal::new(Reason::Unreadable, format!("compression {other:?} is not supported"))),
    }
}

/// Reads a whole file that says how large it is, and no byte more.
fn fill(from: impl Read, bytes: u64, out: &mut Vec<u8>) -> Result<(), Refusal> {
    // One more than promised, so that the end (and with it the checksum) is seen without growing.
    out.reserve(bytes as usize + 1);
    from.take(bytes + 1).read_to_end(out).map_err(|error| unread(&error))?;
    match (out.len() as u64).cmp(&bytes) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(Refusal::new(Reason::Unreadable, "it is shorter than it says")),
        std::cmp::Ordering::Greater => Err(Refusal::new(Reason::TooLarge, "it is larger than it says")),
    }
}

fn bound(bytes: u64) -> Result<(), Refusal> {
    if bytes <= MAX_FILE_BYTES {
        return Ok(());
    }
    let why = format!("{} MiB; at most {} are accepted", bytes >> 20, MAX_FILE_BYTES >> 20);
    Err(Refusal::new(Reason::TooLarge, why))
}

fn unread(error: &std::io::Error) -> Refusal {
    Refusal::new(Reason::Unreadable, error.to_string())
}

fn unreadable(path: &Path, source: std::io::Error) -> DataError {
    DataError::SourceUnreadable { path: path.display().to_string(), source }
}
