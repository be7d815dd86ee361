//! Images, archives and stores made by the tests themselves.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses its part")]

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use jpeg_encoder::{ColorType, Encoder};
use rawzip::{CompressionMethod, ZipArchiveWriter};
use takuma_data::{DataError, Dataset, PrepareOptions, PrepareReport, Quarantined, prepare_with_threads};
use takuma_store::Store;

/// A picture that differs at every place and for every `number`.
pub fn pattern(width: u32, height: u32, number: u32) -> Vec<u8> {
    let pixel =
        |x: u32, y: u32| [(x + number * 7) as u8, (y * 2 + number * 3) as u8, (x + y + number * 31) as u8];
    (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect()
}

/// Pixels as a JPEG of any kind.
pub fn jpeg(
    pixels: &[u8],
    sides: (u32, u32),
    color: ColorType,
    tune: impl FnOnce(&mut Encoder<&mut Vec<u8>>),
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, 95);
    tune(&mut encoder);
    encoder.encode(pixels, sides.0 as u16, sides.1 as u16, color).unwrap();
    bytes
}

/// A small valid JPEG.
pub fn photo(number: u32) -> Vec<u8> {
    jpeg(&pattern(178, 218, number), (178, 218), ColorType::Rgb, |_| {})
}

/// Pixels as a PNG.
pub fn png(pixels: &[u8], sides: (u32, u32), color: png::ColorType, depth: png::BitDepth) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, sides.0, sides.1);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == png::ColorType::Indexed {
        encoder.set_palette(vec![10, 20, 30, 200, 100, 50]);
    }
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(pixels).unwrap();
    writer.finish().unwrap();
    bytes
}

/// A zip of files, in the order given.
pub fn zip(path: &Path, files: &[(String, Vec<u8>)], method: CompressionMethod) {
    let mut zip = ZipArchiveWriter::new(std::fs::File::create(path).unwrap());
    for (name, content) in files {
        let (mut entry, config) = zip.new_file(name.as_str()).compression_method(method).start().unwrap();
        let output = if method == CompressionMethod::DEFLATE {
            let packer = flate2::write::DeflateEncoder::new(&mut entry, flate2::Compression::fast());
            let mut writer = config.wrap(packer);
            writer.write_all(content).unwrap();
            let (packer, output) = writer.finish().unwrap();
            packer.finish().unwrap();
            output
        } else {
            let mut writer = config.wrap(&mut entry);
            writer.write_all(content).unwrap();
            writer.finish().unwrap().1
        };
        entry.finish(output).unwrap();
    }
    zip.finish().unwrap();
}

/// `count` photographs by name.
pub fn photos(count: u32) -> Vec<(String, Vec<u8>)> {
    (0..count).map(|number| (format!("img_align_celeba/{number:06}.jpg"), photo(number))).collect()
}

/// A folder for one test, its source and its destination.
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn store(&self, name: &str) -> Store {
        Store::open(self.path(name).to_str().unwrap()).unwrap()
    }

    /// Files as a folder `source`, unpacked.
    pub fn folder(&self, files: &[(String, Vec<u8>)]) -> PrepareOptions {
        for (name, content) in files {
            let path = self.path("source").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        self.options("source")
    }

    /// Options for a small job from `source`.
    pub fn options(&self, source: &str) -> PrepareOptions {
        PrepareOptions {
            source: self.path(source).to_str().unwrap().to_owned(),
            shards: 1,
            ..PrepareOptions::default()
        }
    }
}

pub async fn prepare(
    options: PrepareOptions,
    threads: usize,
    store: &Store,
) -> Result<PrepareReport, DataError> {
    prepare_with_threads(options, NonZeroUsize::new(threads).unwrap(), store, |_| {}).await
}

/// The quarantine list.
pub async fn refused(store: &Store) -> Vec<Quarantined> {
    let lines = store.get("quarantine.jsonl").await.unwrap();
    String::from_utf8(lines.to_vec())
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Prepares one file alone at full size (no crop beyond the square) and gives its pixels.
pub async fn pixels_of(name: &str, file: Vec<u8>, size: u32) -> Vec<u8> {
    let bench = Bench::new();
    let options = PrepareOptions { crop: 0, size, ..bench.folder(&[(name.to_owned(), file)]) };
    let store = bench.store("out");
    prepare(options, 1, &store).await.unwrap();
    Dataset::open(store).await.unwrap().load_shard(0).await.unwrap().image(0).to_vec()
}

/// Largest difference of two pictures.
pub fn distance(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| a.abs_diff(b)).max().unwrap()
}
