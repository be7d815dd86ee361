//! [`ShardPool`]: the shards behind a worker's slots, usable before they are here.
//!
//! A worker that takes over slots goes on at once: while a shard is still loading, single images are read
//! from it alone. What was read alone could not be verified, so its CRC32C is kept and held against the
//! verified shard when that has come; damage of any kind is an error at the next access, late but surely.
//! (A worker that gives a shard away before it came forgets these sums. The shard itself is verified by
//! its next owner.)
//!
//! The store's faults are waited out: loading goes on for as long as a shard is wanted, and an access until
//! its deadline. Knows nothing of steps and slots; see the worker's `Feed` for them.

mod fetch;
mod shelves;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use takuma_core::layout::shard_file;
use takuma_core::slots::ImageRef;
use takuma_store::StoreError;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::progress::blocking;
use crate::{DataError, Dataset, Shard};
pub use fetch::Fetch;
use shelves::Shelves;

/// Loading is told no more often than this, and when it is done.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// How hard a pool tries.
#[derive(Debug, Clone)]
pub struct PoolLimits {
    /// Shards under way from the store at the same time. Bounds memory beside the resident shards, and what
    /// verifying them takes from the trainer's processors.
    pub loads: usize,
    /// Images of one fetch under way at the same time.
    pub reads: usize,
    /// After this a whole shard is asked for anew.
    pub load_timeout: Duration,
    /// After this a single image is asked for anew.
    pub read_timeout: Duration,
    /// How long [`Fetch::wait`] waits. Must be shorter than peers wait for this worker, or they call it lost
    /// before it can say why.
    pub fetch_timeout: Duration,
    /// Upper bound of the pause after the first failure; it doubles with each.
    pub first_pause: Duration,
    /// Where doubling ends.
    pub longest_pause: Duration,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            loads: 4,
            // A usual batch at once: one round trip, whatever the distance.
            reads: 64,
            // 128 MiB, the largest shard, in this time are 9 Mbit/s.
            load_timeout: Duration::from_secs(120),
            read_timeout: Duration::from_secs(5),
            fetch_timeout: Duration::from_secs(30),
            first_pause: Duration::from_millis(50),
            longest_pause: Duration::from_secs(2),
        }
    }
}

/// How far the loading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStatus {
    /// Wanted shards that are here and verified.
    pub resident: usize,
    /// Wanted shards.
    pub wanted: usize,
}

impl std::fmt::Display for PoolStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} shards resident", self.resident, self.wanted)
    }
}

/// Shards of one dataset that somebody wants: here or on their way.
///
/// First [`ShardPool::want`], then [`ShardPool::fetch`]. Work happens on the runtime whose handle was
/// given and ends with the pool.
#[derive(Debug)]
pub struct ShardPool {
    inner: Arc<Inner>,
}

/// What background tasks share with the pool.
#[derive(Debug)]
struct Inner {
    dataset: Dataset,
    runtime: Handle,
    limits: PoolLimits,
    shelves: watch::Sender<Shelves>,
    loads: Semaphore,
    told: Mutex<Told>,
}

/// For lines about the loading.
#[derive(Debug)]
struct Told {
    begun: Instant,
    last: Instant,
}

impl ShardPool {
    /// An empty pool. `runtime` needs its timer.
    #[must_use]
    pub fn new(dataset: Dataset, runtime: Handle, limits: PoolLimits) -> Self {
        let now = Instant::now();
        Self {
            inner: Arc::new(Inner {
                dataset,
                runtime,
                shelves: watch::Sender::new(Shelves::default()),
                loads: Semaphore::new(limits.loads.max(1)),
                limits: PoolLimits { reads: limits.reads.max(1), ..limits },
                told: Mutex::new(Told { begun: now, last: now }),
            }),
        }
    }

    /// Makes `shards` the wanted ones: starts to load what is missing and drops everything else. Returns at
    /// once. A shard that the dataset does not have is an error at the next access.
    pub fn want(&self, shards: impl IntoIterator<Item = u32>) {
        let wanted: BTreeSet<u32> = shards.into_iter().collect();
        let mut cleared = Vec::new();
        let mut begun = false;
        self.inner.shelves.send_modify(|shelves| {
            cleared = shelves.want(&wanted, |shard| {
                begun = true;
                let loading = Arc::clone(&self.inner).load(shard);
                AbortOnDropHandle::new(self.inner.runtime.spawn(loading))
            });
        });
        if begun {
            let now = Instant::now();
            *self.inner.told.lock().unwrap_or_else(PoisonError::into_inner) = Told { begun: now, last: now };
        }
        // Tens of megabytes each: given back without the lock.
        drop(cleared);
    }

    /// Starts to get images whose shards are wanted, and does `finish` with them in the background.
    ///
    /// # Shapes
    /// `finish` receives one `[height, width, channels]`, u8, for each of `places`, in their order.
    pub fn fetch<T: Send + 'static>(
        &self,
        places: Vec<ImageRef>,
        finish: impl FnOnce(Vec<Bytes>) -> T + Send + 'static,
    ) -> Fetch<T> {
        Fetch::start(&self.inner, places, finish)
    }

    /// How far the loading is.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        self.inner.shelves.borrow().status()
    }

    /// The wanted shards by number, once all of them are here and verified.
    #[must_use]
    pub fn resident(&self) -> Option<Vec<(u32, Shard)>> {
        self.inner.shelves.borrow().resident()
    }

    /// Waits until all wanted shards are resident or the time is over, and says how far the loading is then.
    ///
    /// # Errors
    /// [`DataError::Damaged`]; [`DataError::Cancelled`] if the pool was closed meanwhile.
    pub async fn loaded(&self, within: Duration) -> Result<PoolStatus, DataError> {
        let mut shelves = self.inner.shelves.subscribe();
        let done = |shelves: &Shelves| {
            let PoolStatus { resident, wanted } = shelves.status();
            resident == wanted || !shelves.faults().is_empty()
        };
        // Over or not is told by the status.
        drop(timeout(within, shelves.wait_for(done)).await);
        let shelves = self.inner.shelves.borrow();
        let faults = shelves.faults();
        if shelves.is_closed() {
            Err(DataError::Cancelled)
        } else if faults.is_empty() {
            Ok(shelves.status())
        } else {
            Err(self.inner.dataset.damaged(faults))
        }
    }

    /// Drops all shards and ends all background work; whoever waits gets [`DataError::Cancelled`].
    pub fn close(&self) {
        let mut cleared = None;
        self.inner.shelves.send_modify(|shelves| cleared = Some(shelves.close()));
        drop(cleared);
    }
}

impl Drop for ShardPool {
    fn drop(&mut self) {
        self.close();
    }
}

impl Inner {
    /// Loads one shard and puts it on its shelf; tries for as long as it is wanted.
    async fn load(self: Arc<Self>, number: u32) {
        let loaded = match self.read_whole(number).await {
            Ok(shard) => self.compare(number, shard).await,
            Err(fault) => Err(fault),
        };
        self.shelves.send_modify(|shelves| match loaded {
            Ok(shard) => shelves.put(number, shard),
            Err(fault) => shelves.condemn(number, fault),
        });
        self.tell();
    }

    /// The verified shard, or in words what is wrong with it.
    async fn read_whole(&self, number: u32) -> Result<Shard, String> {
        let mut pauses = Pauses::new(&self.limits);
        let mut told = false;
        loop {
            let error = {
                let Ok(_permit) = self.loads.acquire().await else {
                    return Err(format!("shard {number} was not loaded"));
                };
                let waited = self.limits.load_timeout;
                match timeout(waited, self.dataset.check_shard(number)).await {
                    Ok(Ok(checked)) => return checked,
                    Ok(Err(DataError::Store(error))) => error,
                    Ok(Err(error)) => return Err(error.to_string()),
                    Err(_) => self.no_answer(number, waited),
                }
            };
            // One line for an outage, not one for every attempt.
            if told {
                tracing::debug!("{error}; trying again");
            } else {
                tracing::warn!("shard {number} is not loaded yet: {error}; trying again");
            }
            told = true;
            tokio::time::sleep(pauses.next()).await;
        }
    }

    /// Holds images that were read alone until now against the whole shard.
    async fn compare(&self, number: u32, shard: Shard) -> Result<Shard, String> {
        let mut sums = Default::default();
        self.shelves.send_if_modified(|shelves| {
            sums = shelves.take_sums(number);
            false
        });
        let compared = blocking(move || Ok((shelves::differing(&shard, &sums), shard))).await;
        match compared.map_err(|error| error.to_string())? {
            (None, shard) => Ok(shard),
            (Some(index), _) => Err(shelves::other_pixels(number, index)),
        }
    }

    /// A line about the loading, now and then and at its end.
    fn tell(&self) {
        let status = self.shelves.borrow().status();
        if status.wanted == 0 {
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if status.resident == status.wanted {
            tracing::info!("{status} after {:.1} s", told.begun.elapsed().as_secs_f64());
        } else if told.last.elapsed() >= TELL_EVERY {
            tracing::info!("{status}");
            told.last = Instant::now();
        }
    }

    fn no_answer(&self, shard: u32, waited: Duration) -> StoreError {
        let url = format!("{}/{}", self.dataset.url(), shard_file(shard));
        StoreError::NoAnswer { action: "read", url, waited }
    }
}

/// Pauses between attempts: doubling, with full jitter, so that a group does not come back in one wave.
struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    fn new(limits: &PoolLimits) -> Self {
        Self { next: limits.first_pause, longest: limits.longest_pause }
    }

    fn next(&mut self) -> Duration {
        let pause = self.next.mul_f64(fastrand::f64());
        self.next = (self.next * 2).min(self.longest);
        pause
    }
}
