//! A small S3 server for tests and trials: buckets are folders of one root folder, objects are files.
//!
//! The files are served by `s3s-fs`. What it lacks is added here: of several conditional writes of one
//! key that race, exactly one succeeds ([`Fenced`]). It is no server for data that matters.

mod fenced;
mod serve;

pub use fenced::Fenced;
pub use serve::{S3Error, Settings, serve};
