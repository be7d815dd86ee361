//! A store with doors: reads of shards wait, fail, or come out wrong, as a test says.
#![allow(missing_docs, dead_code, clippy::unwrap_used, reason = "each test program uses its part")]

use std::fmt::{Display, Formatter};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use takuma_store::Store;
use tokio::sync::{Semaphore, watch};

/// More than any test reads.
const ALL: usize = 1 << 20;

/// What reads of one kind go through.
#[derive(Debug)]
pub struct Door {
    permits: Semaphore,
    failures: AtomicU32,
    /// Reads until now, failed ones too.
    pub calls: AtomicU32,
    /// Reads that wait at the door.
    pub waiting: watch::Sender<u32>,
}

impl Door {
    fn shut() -> Self {
        Self {
            permits: Semaphore::new(0),
            failures: AtomicU32::new(0),
            calls: AtomicU32::new(0),
            waiting: watch::Sender::new(0),
        }
    }

    /// Lets `reads` more through.
    pub fn pass(&self, reads: usize) {
        self.permits.add_permits(reads);
    }

    pub fn open(&self) {
        self.pass(ALL);
    }

    /// Lets the next `reads` fail, before they come to the door.
    pub fn fail(&self, reads: u32) {
        self.failures.store(reads, Ordering::SeqCst);
    }

    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }

    async fn go_through(&self) -> Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let one_less = |failures: u32| failures.checked_sub(1);
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok() {
            return Err(object_store::Error::Generic { store: "faults", source: "planted fault".into() });
        }
        let _counted = Counted::new(&self.waiting);
        self.permits.acquire().await.unwrap().forget();
        Ok(())
    }
}

/// One more for as long as it lives.
struct Counted(watch::Sender<u32>);

impl Counted {
    fn new(count: &watch::Sender<u32>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Memory of a whole shard, counted.
struct Owned {
    bytes: Bytes,
    _counted: Counted,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The handles of a [`doors`] store. Both doors are shut at first.
#[derive(Debug)]
pub struct Doors {
    /// Reads of whole shards.
    pub whole: Door,
    /// Reads of single images.
    pub single: Door,
    /// Single images come with a wrong byte.
    pub spoil_singles: AtomicBool,
    /// Whole shards in memory.
    pub alive: watch::Sender<u32>,
}

/// `store` behind doors; only reads of shards go through them.
pub fn doors(store: &Store) -> (Store, Arc<Doors>) {
    let doors = Arc::new(Doors {
        whole: Door::shut(),
        single: Door::shut(),
        spoil_singles: AtomicBool::new(false),
        alive: watch::Sender::new(0),
    });
    let handles = Arc::clone(&doors);
    (store.with_objects(|objects| Arc::new(Behind { objects, doors })), handles)
}

#[derive(Debug)]
struct Behind {
    objects: Arc<dyn ObjectStore>,
    doors: Arc<Doors>,
}

impl Display for Behind {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} behind doors", self.objects)
    }
}

/// The same result with other bytes.
async fn with_bytes(result: GetResult, change: impl FnOnce(Bytes) -> Bytes) -> Result<GetResult> {
    let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
    let extensions = result.extensions.clone();
    let bytes = change(result.bytes().await?);
    let payload = GetResultPayload::Stream(futures::stream::iter([Ok(bytes)]).boxed());
    Ok(GetResult { payload, meta, range, attributes, extensions })
}

#[async_trait]
impl ObjectStore for Behind {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if !location.as_ref().ends_with(".safetensors") {
            return self.objects.get_opts(location, options).await;
        }
        if options.range.is_some() {
            self.doors.single.go_through().await?;
            let result = self.objects.get_opts(location, options).await?;
            let spoil = self.doors.spoil_singles.load(Ordering::SeqCst);
            return with_bytes(result, |bytes| {
                let mut bytes = bytes.to_vec();
                bytes[0] ^= u8::from(spoil);
                bytes.into()
            })
            .await;
        }
        self.doors.whole.go_through().await?;
        let result = self.objects.get_opts(location, options).await?;
        let _counted = Counted::new(&self.doors.alive);
        with_bytes(result, |bytes| Bytes::from_owner(Owned { bytes, _counted })).await
    }

    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.objects.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.objects.put_multipart_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.objects.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.objects.copy_opts(from, to, options).await
    }
}
