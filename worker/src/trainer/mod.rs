//! The step loop and what it stands on: groups, batches, gradient exchange, optimizer, samples.

mod agree;
mod ahead;
mod buckets;
mod device_buckets;
mod exchange;
mod fault;
mod feed;
mod meet;
mod messages;
mod optimizer;
mod painter;
mod picture;
mod progress;
mod resident;
mod samples;
mod spool;
mod staging;
mod stopper;
mod thread;

pub use buckets::{GradientBuckets, SumOrder, SummedGradients};
pub use exchange::{DeviceSum, Exchange};
pub use feed::Feed;
pub use messages::{Command, JobError, Note, Seat, panic_words};
pub use optimizer::Adam;
pub use progress::{Now, Progress};
pub use spool::{Spool, Stamp};
pub use stopper::Stopper;
pub use thread::{Parts, Trainer};
