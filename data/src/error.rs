//! [`DataError`]: every way a dataset cannot be made or read, split by what the user can do about it.

use std::path::PathBuf;
use std::time::Duration;

use takuma_store::StoreError;

/// Why a dataset could not be made or read. Each message names the place and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// An option is out of range.
    #[error("{option} {value} is not possible; choose {range}")]
    Option {
        /// The flag, `--size`.
        option: &'static str,
        /// As given.
        value: u64,
        /// What is possible, in words.
        range: &'static str,
    },
    /// There is nothing at the source.
    #[error("there is no {path}; give the zip, tar or folder that holds the images")]
    SourceMissing {
        /// As given.
        path: String,
    },
    /// The source is a URL that cannot be read piece by piece.
    #[error("cannot prepare from {url}; download the archive first and give its path")]
    SourceRemote {
        /// As given.
        url: String,
    },
    /// The source is a file, but no archive that we know.
    #[error(
        "{path} is not a whole zip or tar archive ({reason}); give an archive or a folder of JPEG or PNG, or download it again"
    )]
    NotAnArchive {
        /// As given.
        path: String,
        /// In words.
        reason: String,
    },
    /// The source cannot be read.
    #[error("cannot read {path}: {source}; check that the file is readable")]
    SourceUnreadable {
        /// What was read.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// Nothing of the source could be used.
    #[error(
        "{path} holds no usable image: {refused} refused{first}; give JPEG or PNG images that are at least as large as --crop"
    )]
    NoUsableImage {
        /// As given.
        path: String,
        /// Images in quarantine.
        refused: u64,
        /// The first refusal in words, with its bracket, or nothing.
        first: String,
    },
    /// Each shard needs at least one image.
    #[error("{images} usable images cannot fill {shards} shards; choose --shards {images} or fewer")]
    FewerImagesThanShards {
        /// Usable images.
        images: u64,
        /// Shards asked for.
        shards: u32,
    },
    /// A shard is written and read in one piece and must stay small.
    #[error(
        "{shards} shards would be {shard_mib} MiB each and at most {limit_mib} MiB are possible; choose --shards {least} or more"
    )]
    ShardTooLarge {
        /// Shards asked for.
        shards: u32,
        /// Size of the largest.
        shard_mib: u64,
        /// The limit.
        limit_mib: u64,
        /// The smallest possible number of shards.
        least: u64,
    },
    /// There is a dataset already.
    #[error("there is a dataset at {url} already; choose another destination or delete it first")]
    DestinationTaken {
        /// The dataset's URL.
        url: String,
    },
    /// Nothing can be written at the destination. Found before the first image is decoded.
    #[error("cannot write to {url}: {source}; choose a writable destination")]
    DestinationUnwritable {
        /// The destination's URL.
        url: String,
        /// Why.
        source: StoreError,
    },
    /// The decoded images find no room on the disk until they are written as shards.
    #[error(
        "cannot keep {needed_mib} MiB of decoded images in {folder} for the time of the job: {source}; free space there or set TMPDIR"
    )]
    Spool {
        /// The folder of the temporary file.
        folder: PathBuf,
        /// What the whole job needs.
        needed_mib: u64,
        /// The system's error.
        source: std::io::Error,
    },
    /// An archive to be written cannot be written.
    #[error("cannot write {path}: {source}; choose a writable place with enough room")]
    ArchiveUnwritable {
        /// As given.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// There is no dataset where one was expected.
    #[error("there is no dataset at {url}; make one with 'takuma dataset prepare' or 'takuma dataset synth'")]
    NoDataset {
        /// The URL that was looked at.
        url: String,
    },
    /// The manifest is not one that we can use.
    #[error("the manifest of {url} is not usable: {reason}; prepare the dataset again")]
    Manifest {
        /// The dataset's URL.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Objects differ from what the manifest says.
    #[error("{url} is damaged: {}; prepare the dataset again", faults.join("; "))]
    Damaged {
        /// The dataset's URL.
        url: String,
        /// One sentence per damaged object.
        faults: Vec<String>,
    },
    /// The dataset has no such shard.
    #[error("{url} has {shards} shards and no shard {shard}")]
    NoSuchShard {
        /// The dataset's URL.
        url: String,
        /// Asked for.
        shard: u32,
        /// What there is.
        shards: usize,
    },
    /// The shard has no such image.
    #[error("shard {shard} of {url} has {images} images and no image {index}")]
    NoSuchImage {
        /// The dataset's URL.
        url: String,
        /// Its shard.
        shard: u32,
        /// Asked for.
        index: u32,
        /// What there is.
        images: u64,
    },
    /// Images were asked for whose shard nobody wants.
    #[error(
        "shard {shard} of {url} is not among the shards that are wanted; tell the pool before images are fetched"
    )]
    Unwanted {
        /// The dataset's URL.
        url: String,
        /// Asked for.
        shard: u32,
    },
    /// The store did not give an image in time, however often it was asked.
    #[error(
        "shard {shard} of {url} could not be read for {waited:?} ({source}); mend the store, then resume the run"
    )]
    Unavailable {
        /// The dataset's URL.
        url: String,
        /// The shard that holds the image.
        shard: u32,
        /// How long the image was waited for.
        waited: Duration,
        /// What the store said last.
        source: StoreError,
    },
    /// The store failed in the middle; trying again later may help.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The caller went away.
    #[error("the job was cancelled")]
    Cancelled,
}
