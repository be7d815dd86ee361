//! A store that fails as object stores do, at a chosen call or by chance: a decorator for
//! [`takuma_store::Store::with_objects`].

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use takuma_store::Store;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// A late call comes so late: more than one look of anybody who waits, less than the coordinator's patience.
const LATE: Duration = Duration::from_secs(7);

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// It does not reach the store, and is answered by an error.
    Lost,
    /// It is done, and answered by an error.
    Landed,
    /// It is done some seconds later.
    Late,
    /// It is done twice, as by a proxy that tries again; the second answer is the one that comes.
    Twice,
    /// It is not done, and answered as if another writer had been quicker.
    Conflict,
    /// The coordinator dies before it.
    CrashBefore,
    /// The coordinator dies when it is done.
    CrashAfter,
    /// The coordinator dies, and seconds later, in its successor's time, the call is done.
    CrashThenLanded,
}

impl Fault {
    /// What can happen to a call that changes the store.
    pub const OF_WRITES: [Self; 8] = [
        Self::Lost,
        Self::Landed,
        Self::Late,
        Self::Twice,
        Self::Conflict,
        Self::CrashBefore,
        Self::CrashAfter,
        Self::CrashThenLanded,
    ];
    /// What can happen to a call that only asks.
    pub const OF_READS: [Self; 3] = [Self::Lost, Self::Late, Self::CrashBefore];
}

/// Which calls fail.
#[derive(Debug, Default)]
enum Plan {
    #[default]
    Nothing,
    /// The calls of these numbers, from 0.
    These(Vec<(usize, Fault)>),
    /// So many of a hundred calls are lost, or land and are answered by an error.
    Random(fastrand::Rng, u32),
    /// All calls until then.
    Outage(Instant),
}

/// One call of the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// "put runs/x/run.json", for people.
    pub what: String,
    /// It changes the store.
    pub writes: bool,
}

/// What all lives of a coordinator have in common: the count of calls and the plan.
#[derive(Debug, Default)]
pub struct Faults {
    calls: Mutex<Vec<Call>>,
    plan: Mutex<Plan>,
}

impl Faults {
    /// The calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// From now on the calls of these numbers fail.
    pub fn at(&self, faults: Vec<(usize, Fault)>) {
        *self.plan.lock().unwrap() = Plan::These(faults);
    }

    /// From now on so many of a hundred calls fail.
    pub fn by_chance(&self, seed: u64, percent: u32) {
        *self.plan.lock().unwrap() = Plan::Random(fastrand::Rng::with_seed(seed), percent);
    }

    /// The store is away for so long from now.
    pub fn outage(&self, period: Duration) {
        *self.plan.lock().unwrap() = Plan::Outage(Instant::now() + period);
    }

    /// A store as one life of a coordinator sees it. When `life` is cancelled, its calls reach nothing any more.
    pub fn over(self: &Arc<Self>, store: &Store, life: &CancellationToken) -> Store {
        let (faults, life) = (Arc::clone(self), life.clone());
        store.with_objects(|inner| Arc::new(Faulty { inner, faults, life }))
    }

    fn next(&self, what: String, writes: bool) -> Option<Fault> {
        let mut calls = self.calls.lock().unwrap();
        let number = calls.len();
        calls.push(Call { what, writes });
        match &mut *self.plan.lock().unwrap() {
            Plan::Nothing => None,
            Plan::These(faults) => faults.iter().find(|(at, _)| *at == number).map(|&(_, fault)| fault),
            Plan::Outage(until) => (Instant::now() < *until).then_some(Fault::Lost),
            Plan::Random(random, percent) => {
                let fault = if random.bool() { Fault::Lost } else { Fault::Landed };
                (random.u32(0..100) < *percent).then_some(fault)
            }
        }
    }
}

/// The decorator: one life's way to the store.
#[derive(Debug, Clone)]
struct Faulty {
    inner: Arc<dyn ObjectStore>,
    faults: Arc<Faults>,
    life: CancellationToken,
}

fn no_answer() -> Error {
    Error::Generic { store: "faulty", source: "the connection was reset".into() }
}

impl Faulty {
    /// Does a call, or what the plan says instead of it.
    async fn call<T, F>(
        &self,
        what: String,
        conflict: Option<Error>,
        call: impl Fn(Arc<dyn ObjectStore>) -> F,
    ) -> Result<T>
    where
        T: Send,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        if self.life.is_cancelled() {
            return std::future::pending().await;
        }
        let done = || call(Arc::clone(&self.inner));
        match self.faults.next(what, conflict.is_some()) {
            None => done().await,
            Some(Fault::Lost) => Err(no_answer()),
            Some(Fault::Landed) => done().await.and(Err(no_answer())),
            Some(Fault::Late) => {
                sleep(LATE).await;
                done().await
            }
            Some(Fault::Twice) => {
                done().await.ok();
                done().await
            }
            Some(Fault::Conflict) => Err(conflict.unwrap_or_else(no_answer)),
            Some(Fault::CrashBefore) => self.die().await,
            Some(Fault::CrashAfter) => {
                done().await.ok();
                self.die().await
            }
            Some(Fault::CrashThenLanded) => {
                let late = done();
                // Not of this life any more: a packet on its way.
                tokio::spawn(async move {
                    sleep(LATE).await;
                    late.await.ok();
                });
                self.die().await
            }
        }
    }

    async fn die<T>(&self) -> T {
        self.life.cancel();
        std::future::pending().await
    }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

fn conflict(path: &Path, mode: &PutMode) -> Error {
    let (path, source) = (path.to_string(), "409 Conflict".into());
    match mode {
        PutMode::Create => Error::AlreadyExists { path, source },
        _ => Error::Precondition { path, source },
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let kind = match options.mode {
            PutMode::Create => "create",
            PutMode::Update(_) => "replace",
            PutMode::Overwrite => "put",
        };
        let conflict = conflict(path, &options.mode);
        let path = path.clone();
        self.call(format!("{kind} {path}"), Some(conflict), move |inner| {
            let (path, payload, options) = (path.clone(), payload.clone(), options.clone());
            async move { inner.put_opts(&path, payload, options).await }
        })
        .await
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented { operation: "multipart".into(), implementer: "Faulty".into() })
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let path = path.clone();
        self.call(format!("get {path}"), None, move |inner| {
            let (path, options) = (path.clone(), options.clone());
            async move { inner.get_opts(&path, options).await }
        })
        .await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let deleted = paths.then(move |path| {
            let this = this.clone();
            async move {
                let path = path?;
                let conflict = conflict(&path, &PutMode::Overwrite);
                let gone = path.clone();
                this.call(format!("delete {path}"), Some(conflict), move |inner| {
                    let path = path.clone();
                    async move { inner.delete(&path).await }
                })
                .await?;
                Ok(gone)
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            let what = format!("list {}", prefix.as_ref().map_or("", |prefix| prefix.as_ref()));
            let call = move |inner: Arc<dyn ObjectStore>| {
                let prefix = prefix.clone();
                async move { inner.list(prefix.as_ref()).try_collect::<Vec<_>>().await }
            };
            let metas = this.call(what, None, call).await?;
            Ok::<_, Error>(stream::iter(metas.into_iter().map(Ok)))
        };
        stream::once(listed).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let prefix = prefix.cloned();
        let what = format!("list folders {}", prefix.as_ref().map_or("", |prefix| prefix.as_ref()));
        self.call(what, None, move |inner| {
            let prefix = prefix.clone();
            async move { inner.list_with_delimiter(prefix.as_ref()).await }
        })
        .await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let conflict = conflict(to, &PutMode::Overwrite);
        let (from, to) = (from.clone(), to.clone());
        self.call(format!("copy {from} {to}"), Some(conflict), move |inner| {
            let (from, to, options) = (from.clone(), to.clone(), options.clone());
            async move { inner.copy_opts(&from, &to, options).await }
        })
        .await
    }
}
