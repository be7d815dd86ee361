//! [`Guarded`]: a store whose writes wait while the lease is not valid, and [`Validity`], which says whether it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::stream::{BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::time::{Instant, sleep};

/// A moment on two clocks. The time since then is what the one says that shows more.
///
/// The system's clock since its boot counts while the machine sleeps, when other coordinators' terms go on. tokio's
/// does not, but is the one that tests pause and move.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// tokio's, for its timers.
    pub instant: Instant,
    since_boot: Duration,
}

impl Moment {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self { instant: Instant::now(), since_boot: since_boot() }
    }

    /// How long after `earlier` it is.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Duration {
        let ticked = self.instant.saturating_duration_since(earlier.instant);
        ticked.max(self.since_boot.saturating_sub(earlier.since_boot))
    }
}

#[cfg(target_os = "linux")]
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}

/// tokio's clock alone.
#[cfg(not(target_os = "linux"))]
fn since_boot() -> Duration {
    Duration::ZERO
}

/// Until when the lease is valid, shared by its holder and its guards.
#[derive(Debug, Clone)]
pub struct Validity {
    start: Moment,
    until_ms: Arc<AtomicU64>,
}

impl Validity {
    /// Valid for `term` from `start` on.
    #[must_use]
    pub fn new(start: Moment, term: Duration) -> Self {
        let valid = Self { start, until_ms: Arc::default() };
        valid.extend(start, term);
        valid
    }

    /// Valid for `term` from `asked` on.
    pub fn extend(&self, asked: Moment, term: Duration) {
        let until = asked.since(&self.start) + term;
        self.until_ms.store(until.as_millis() as u64, Ordering::SeqCst);
    }

    /// Whether somebody else may hold it by now.
    #[must_use]
    pub fn is_over(&self) -> bool {
        Moment::now().since(&self.start).as_millis() as u64 >= self.until_ms.load(Ordering::SeqCst)
    }
}

/// A store whose writes wait for a valid lease.
#[derive(Debug)]
pub struct Guarded {
    /// The store.
    pub inner: Arc<dyn ObjectStore>,
    /// Of its lease.
    pub valid: Validity,
}

/// How often a held back write looks again.
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Guarded {
    async fn wait(&self) {
        while self.valid.is_over() {
            sleep(LOOK_EVERY).await;
        }
    }
}

impl std::fmt::Display for Guarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guarded({})", self.inner)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Guarded {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.wait().await;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.wait().await;
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let valid = self.valid.clone();
        let guarded = locations.then(move |location| {
            let valid = valid.clone();
            async move {
                while valid.is_over() {
                    sleep(LOOK_EVERY).await;
                }
                location
            }
        });
        self.inner.delete_stream(guarded.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.wait().await;
        self.inner.copy_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(ticked: Duration, slept: Duration) -> Moment {
        let now = Moment::now();
        Moment { instant: now.instant + ticked, since_boot: now.since_boot + ticked + slept }
    }

    #[test]
    fn a_machine_s_sleep_counts() {
        let second = Duration::from_secs(1);
        let (before, after) = (moment(Duration::ZERO, Duration::ZERO), moment(second, 60 * second));
        assert!(after.since(&before) >= 61 * second);
        assert_eq!(before.since(&after), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn time_that_a_test_moves_counts() {
        let valid = Validity::new(Moment::now(), Duration::from_secs(9));
        assert!(!valid.is_over());
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(valid.is_over());
    }
}
