//! The step loop and what it stands on: batches, gradient exchange, optimizer, samples.

mod buckets;
mod exchange;
mod feed;
mod job;
mod optimizer;
mod progress;
mod samples;

pub use buckets::{GradientBuckets, SummedGradients};
pub use exchange::Exchange;
pub use feed::Feed;
pub use job::{Job, JobError, Outcome, Reports};
pub use optimizer::Adam;
pub use progress::{Now, Progress};
