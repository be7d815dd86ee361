//! [`Fetch`]: the images of one step on their way, from resident shards or one by one.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use takuma_core::slots::ImageRef;
use takuma_store::StoreError;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::shelves::{Look, Shelves};
use super::{Inner, Pauses};
use crate::DataError;
use crate::progress::blocking;

/// How much later than the fetch's own deadline a waiting thread gives up on the runtime.
const GRACE: Duration = Duration::from_secs(5);

/// Images on their way. Goes on in the background until somebody waits for it; dropping it ends it.
#[derive(Debug)]
#[must_use = "dropping a fetch ends it"]
pub struct Fetch<T> {
    pool: Arc<Inner>,
    begin_waiting: oneshot::Sender<()>,
    result: mpsc::Receiver<Result<T, DataError>>,
    first_shard: u32,
    _task: AbortOnDropHandle<()>,
}

impl<T: Send + 'static> Fetch<T> {
    pub(super) fn start(
        pool: &Arc<Inner>,
        places: Vec<ImageRef>,
        finish: impl FnOnce(Vec<Bytes>) -> T + Send + 'static,
    ) -> Self {
        let (begin_waiting, waiting) = oneshot::channel();
        let (reply, result) = mpsc::sync_channel(1);
        let first_shard = places.first().map_or(0, |place| place.shard);
        let inner = Arc::clone(pool);
        let task = pool.runtime.spawn(async move {
            let outcome = match inner.images(places, waiting).await {
                Ok(images) => blocking(move || Ok(finish(images))).await,
                Err(error) => Err(error),
            };
            // Room for one is there; an error means that the fetch was dropped just now.
            reply.try_send(outcome).ok();
        });
        let _task = AbortOnDropHandle::new(task);
        Self { pool: Arc::clone(pool), begin_waiting, result, first_shard, _task }
    }
}

impl<T> Fetch<T> {
    /// Blocks this thread until the images are there, for [`super::PoolLimits::fetch_timeout`] at most. That
    /// begins to run now, however long the fetch has been going on. Not for async code.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if any wanted shard is known to be damaged by now, even if these images
    /// lie elsewhere; [`DataError::Unavailable`]; [`DataError::Unwanted`]; [`DataError::Cancelled`] if the
    /// pool was closed or its runtime has ended; a shard or image that the dataset does not have.
    pub fn wait(self) -> Result<T, DataError> {
        // An error means that the fetch is done already.
        self.begin_waiting.send(()).ok();
        let patience = self.pool.limits.fetch_timeout;
        let fetched = match self.result.recv_timeout(patience + GRACE) {
            Ok(result) => result?,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(self.pool.unavailable(self.first_shard, patience, None));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(DataError::Cancelled),
        };
        let faults = self.pool.shelves.borrow().faults();
        if faults.is_empty() { Ok(fetched) } else { Err(self.pool.dataset.damaged(faults)) }
    }
}

impl Inner {
    /// The images in the order of their places.
    async fn images(
        &self,
        places: Vec<ImageRef>,
        waiting: oneshot::Receiver<()>,
    ) -> Result<Vec<Bytes>, DataError> {
        let expired = CancellationToken::new();
        let clock = async {
            // An error means that the fetch was dropped, and this task ends with it.
            waiting.await.ok();
            sleep(self.limits.fetch_timeout).await;
            expired.cancel();
            std::future::pending::<()>().await;
        };
        let images = futures::stream::iter(places)
            .map(|place| self.image(place, &expired))
            .buffered(self.limits.reads)
            .try_collect();
        tokio::select! {
            images = images => images,
            () = clock => unreachable!("the clock runs until the images are there"),
        }
    }

    /// One image: from its shard if that is here or comes first, read alone otherwise; asks the store again
    /// and again until `expired`.
    async fn image(&self, place: ImageRef, expired: &CancellationToken) -> Result<Bytes, DataError> {
        self.dataset.entry_of(place)?;
        let mut shelves = self.shelves.subscribe();
        let mut pauses = Pauses::new(&self.limits);
        let mut pause = Duration::ZERO;
        let mut trouble = None;
        loop {
            tokio::select! {
                biased;
                image = self.resident(place, &mut shelves) => return image,
                () = expired.cancelled() => {
                    return Err(self.unavailable(place.shard, self.limits.fetch_timeout, trouble));
                }
                read = self.read_alone(place, pause) => match read {
                    Ok(pixels) => return Ok(pixels),
                    Err(DataError::Store(error)) => {
                        tracing::debug!("{error}; asking again");
                        trouble = Some(error);
                        pause = pauses.next();
                    }
                    Err(error) => return Err(error),
                },
            }
        }
    }

    /// The image from its shard, as soon as that is here.
    async fn resident(
        &self,
        place: ImageRef,
        shelves: &mut watch::Receiver<Shelves>,
    ) -> Result<Bytes, DataError> {
        let settled = |shelves: &Shelves| !matches!(shelves.look(place.shard), Look::Loading);
        let Ok(shelves) = shelves.wait_for(settled).await else {
            return Err(DataError::Cancelled);
        };
        match shelves.look(place.shard) {
            Look::Resident(shard) => Ok(shard.image_slice(place.index)),
            Look::Damaged(faults) => Err(self.dataset.damaged(faults)),
            Look::Unwanted => {
                Err(DataError::Unwanted { url: self.dataset.url().to_owned(), shard: place.shard })
            }
            Look::Loading | Look::Closed => Err(DataError::Cancelled),
        }
    }

    /// One attempt to read an image alone, after a pause.
    async fn read_alone(&self, place: ImageRef, pause: Duration) -> Result<Bytes, DataError> {
        sleep(pause).await;
        let waited = self.limits.read_timeout;
        let pixels = match timeout(waited, self.dataset.read_image(place)).await {
            Ok(read) => read?,
            Err(_) => return Err(self.no_answer(place.shard, waited).into()),
        };
        let sum = (place.index, crc32c::crc32c(&pixels));
        let mut from_shard = None;
        // Nobody waits for a note, so nobody is woken.
        self.shelves.send_if_modified(|shelves| {
            from_shard = shelves.read_alone(place.shard, sum);
            false
        });
        Ok(from_shard.unwrap_or(pixels))
    }

    fn unavailable(&self, shard: u32, waited: Duration, trouble: Option<StoreError>) -> DataError {
        let source = trouble.unwrap_or_else(|| self.no_answer(shard, waited));
        DataError::Unavailable { url: self.dataset.url().to_owned(), shard, waited, source }
    }
}
