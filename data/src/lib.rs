//! takuma's data path: archives of images in, shards of raw pixels out, and the shards' reader.
//!
//! [`prepare`] decodes, crops and resizes every image of a zip, tar or folder once, shuffles once, and
//! writes shards with a manifest; [`synth`] does the same with faces drawn by program. [`Dataset`] is
//! how programs read the result, [`ShardPool`] how trainers do; [`inspect`] and [`verify`] are for people.
//!
//! Equal input and options give equal bytes, whatever the number of threads or the order inside an
//! archive. Memory does not grow with the number of images. Knows nothing of models or of libtorch.

mod archive;
mod canvas;
mod dataset;
mod decode;
mod error;
mod face;
mod jpeg;
mod pool;
mod prepare;
mod progress;
mod quarantine;
mod shard;
mod spool;
mod synth;
mod write;

pub use dataset::{Dataset, Inspection, VerifyReport, inspect, verify};
pub use error::DataError;
pub use pool::{Fetch, PoolLimits, PoolStatus, ShardPool};
pub use prepare::{PrepareOptions, PrepareReport, prepare, prepare_with_threads};
pub use progress::{Progress, Stage};
pub use quarantine::{Quarantined, Reason};
pub use shard::Shard;
pub use synth::{SynthOptions, synth, synth_archive};
