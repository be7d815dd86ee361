//! Where the files of a tar lie.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};

use super::{Listing, Place, Reader, Trouble};

/// Lists a plain tar's regular files.
pub(super) fn list(mut file: File, listing: &mut Listing) -> Result<Reader, Trouble<String>> {
    let theirs = |error: std::io::Error| Trouble::Theirs(error.to_string());
    file.seek(SeekFrom::Start(0)).map_err(theirs)?;
    let length = file.metadata().map_err(theirs)?.len();
    let mut archive = tar::Archive::new(BufReader::new(file.try_clone().map_err(theirs)?));
    for entry in archive.entries_with_seek().map_err(theirs)? {
        let entry = entry.map_err(theirs)?;
        if entry.header().entry_type() != tar::EntryType::Regular {
            continue;
        }
        let (offset, bytes) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(bytes).is_none_or(|end| end > length) {
            return Err(Trouble::Theirs("it ends in the middle of a file".to_owned()));
        }
        listing.add(&String::from_utf8_lossy(&entry.path_bytes()), Place::Tar { offset, bytes })?;
    }
    Ok(Reader::Tar(file))
}
