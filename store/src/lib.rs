//! takuma's one door to object stores.
//!
//! A [`Store`] is a folder in an object store: `file://` on this machine, `s3://` (any S3-compatible
//! server), `gs://`, `az://`, or memory for tests. Objects are whole: small enough to read and write
//! in one piece, visible only when complete; a part can be read alone. [`Store::create`] is the commit point: of several
//! writers exactly one succeeds.
//!
//! Credentials and endpoint come from the usual `AWS_*`, `GOOGLE_*` and `AZURE_*` variables.

mod error;
mod versioned;

use std::ops::Range;
use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutPayload, RetryConfig};
use url::Url;

pub use error::StoreError;
pub use versioned::Version;

/// A request that got no answer for so long is dead; objects are at most some tens of megabytes.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After this the error reaches the caller, who knows whether waiting longer makes sense.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// A folder in an object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    folder: Path,
    url: String,
}

/// One object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name relative to the store's folder, `samples/step-000050.png`.
    pub name: String,
    /// Size of the object.
    pub size_bytes: u64,
}

/// What became of a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// The object is ours.
    New,
    /// Somebody wrote it before; it is unchanged.
    Exists,
}

impl Store {
    /// Opens the folder behind a URL; a path without a scheme is a local one. Nothing is read or made yet.
    ///
    /// # Errors
    /// [`StoreError::Url`] when the URL names no store that takuma knows, or its settings are incomplete.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        let parsed = parse(url)?;
        let refused = |source| StoreError::settings(url, source);
        let (scheme, folder) = ObjectStoreScheme::parse(&parsed).map_err(|_| StoreError::scheme(url))?;
        choose_tls_provider();
        let objects: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::Local => Arc::new(LocalFileSystem::new().with_fsync(true)),
            ObjectStoreScheme::Memory => Arc::new(InMemory::new()),
            ObjectStoreScheme::AmazonS3 => Arc::new(
                AmazonS3Builder::from_env()
                    .with_url(parsed.as_str())
                    .with_client_options(client_options())
                    .with_retry(retry())
                    .build()
                    .map_err(refused)?,
            ),
            ObjectStoreScheme::GoogleCloudStorage => Arc::new(
                GoogleCloudStorageBuilder::from_env()
                    .with_url(parsed.as_str())
                    .with_client_options(client_options())
                    .with_retry(retry())
                    .build()
                    .map_err(refused)?,
            ),
            ObjectStoreScheme::MicrosoftAzure => Arc::new(
                MicrosoftAzureBuilder::from_env()
                    .with_url(parsed.as_str())
                    .with_client_options(client_options())
                    .with_retry(retry())
                    .build()
                    .map_err(refused)?,
            ),
            _ => return Err(StoreError::scheme(url)),
        };
        Ok(Self { objects, folder, url: parsed.as_str().trim_end_matches('/').to_owned() })
    }

    /// An empty store in this process's memory, for tests.
    #[must_use]
    pub fn memory() -> Self {
        Self { objects: Arc::new(InMemory::new()), folder: Path::default(), url: "memory://".to_owned() }
    }

    /// The same store behind another [`ObjectStore`]: decorators that inject faults or count calls.
    #[must_use]
    pub fn with_objects(&self, wrap: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>) -> Self {
        Self { objects: wrap(Arc::clone(&self.objects)), ..self.clone() }
    }

    /// A folder inside this one.
    #[must_use]
    pub fn at(&self, folder: &str) -> Self {
        let url = format!("{}/{}", self.url.trim_end_matches('/'), folder);
        Self { objects: Arc::clone(&self.objects), folder: self.path(folder), url }
    }

    /// The folder's URL, without a slash at the end.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The folder's last part: a dataset's or a run's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.url.rsplit('/').next().unwrap_or_default()
    }

    /// The local path, if the store is a local folder.
    #[must_use]
    pub fn local_path(&self) -> Option<std::path::PathBuf> {
        Url::parse(&self.url).ok().filter(|url| url.scheme() == "file")?.to_file_path().ok()
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the store does not answer.
    pub async fn get(&self, object: &str) -> Result<Bytes, StoreError> {
        let read = async { self.objects.get(&self.path(object)).await?.bytes().await };
        read.await.map_err(|source| self.failed("read", object, source))
    }

    /// Reads a part of an object. Where the object ends inside of `range`, what there is of it is returned.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], the object ends before `range` begins, or the store does not answer.
    pub async fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let read = self.objects.get_range(&self.path(object), range).await;
        read.map_err(|source| self.failed("read", object, source))
    }

    /// Reads a whole object, or `None` where there is none.
    ///
    /// # Errors
    /// The store does not answer or refuses.
    pub async fn get_if_exists(&self, object: &str) -> Result<Option<Bytes>, StoreError> {
        match self.get(object).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Size of an object, or `None` where there is none.
    ///
    /// # Errors
    /// The store does not answer or refuses.
    pub async fn size_bytes(&self, object: &str) -> Result<Option<u64>, StoreError> {
        match self.objects.head(&self.path(object)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("read", object, source)),
        }
    }

    /// Writes a whole object, replacing what was there.
    ///
    /// # Errors
    /// The store does not answer, refuses, or is full.
    pub async fn put(&self, object: &str, content: impl Into<PutPayload>) -> Result<(), StoreError> {
        match self.objects.put(&self.path(object), content.into()).await {
            Ok(_) => Ok(()),
            Err(source) => Err(self.failed("write", object, source)),
        }
    }

    /// Writes a whole object if there is none of that name yet.
    ///
    /// # Errors
    /// The store does not answer, refuses, is full, or knows no conditional writes.
    pub async fn create(&self, object: &str, content: impl Into<PutPayload>) -> Result<Created, StoreError> {
        let version = self.create_versioned(object, content).await?;
        Ok(version.map_or(Created::Exists, |_| Created::New))
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// The store does not answer or refuses.
    pub async fn delete(&self, object: &str) -> Result<(), StoreError> {
        match self.objects.delete(&self.path(object)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed("delete", object, source)),
        }
    }

    /// Lets go of a folder that holds no object any more. Only local stores have folders that can be empty; one that is
    /// not, or cannot be removed, stays.
    pub async fn forget_folder(&self, folder: &str) {
        let Some(path) = self.at(folder).local_path() else { return };
        let removed = tokio::task::spawn_blocking(move || {
            // Those inside first.
            for inside in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                std::fs::remove_dir(inside.path()).ok();
            }
            std::fs::remove_dir(&path).ok();
        });
        removed.await.ok();
    }

    /// Every object below a folder ("" = this one), by name.
    ///
    /// # Errors
    /// The store does not answer or refuses.
    pub async fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        let below = self.path(folder);
        let metas: Vec<_> = self
            .objects
            .list(Some(&below))
            .try_collect()
            .await
            .map_err(|source| self.failed("list", folder, source))?;
        let mut entries: Vec<Entry> = metas
            .into_iter()
            .filter_map(|meta| {
                let parts: Vec<String> =
                    meta.location.prefix_match(&self.folder)?.map(|part| part.as_ref().to_owned()).collect();
                Some(Entry { name: parts.join("/"), size_bytes: meta.size })
            })
            .collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Names of the folders directly below a folder, by name.
    ///
    /// # Errors
    /// The store does not answer or refuses.
    pub async fn list_folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let listing = self
            .objects
            .list_with_delimiter(Some(&self.path(folder)))
            .await
            .map_err(|source| self.failed("list", folder, source))?;
        let mut names: Vec<String> =
            listing.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    fn path(&self, object: &str) -> Path {
        object
            .split('/')
            .filter(|part| !part.is_empty())
            .fold(self.folder.clone(), |path, part| path.join(part))
    }

    fn object_url(&self, object: &str) -> String {
        if object.is_empty() { self.url.clone() } else { format!("{}/{object}", self.url) }
    }

    fn failed(&self, action: &'static str, object: &str, source: object_store::Error) -> StoreError {
        StoreError::from_object_store(action, self.object_url(object), source)
    }
}

fn parse(url: &str) -> Result<Url, StoreError> {
    if url.contains("://") {
        return Url::parse(url).map_err(|_| StoreError::scheme(url));
    }
    let path = std::path::absolute(url).map_err(|_| StoreError::scheme(url))?;
    let absolute = Url::from_file_path(path).map_err(|()| StoreError::scheme(url))?;
    // Parsed once more, because only that takes `..` out; object names cannot hold it.
    Url::parse(absolute.as_str()).map_err(|_| StoreError::scheme(url))
}

fn client_options() -> ClientOptions {
    // Plain http is for servers on the user's own network; an https endpoint is not weakened by it.
    ClientOptions::new()
        .with_allow_http(true)
        .with_timeout(REQUEST_TIMEOUT)
        .with_connect_timeout(CONNECT_TIMEOUT)
}

/// Makes ring the process's cryptography for https, unless the program has chosen one before.
fn choose_tls_provider() {
    static CHOSEN: Once = Once::new();
    CHOSEN.call_once(|| {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // The error says that somebody else was quicker: then theirs is used.
            rustls::crypto::ring::default_provider().install_default().ok();
        }
    });
}

fn retry() -> RetryConfig {
    RetryConfig { retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One suite for every kind of store.
    async fn keeps_the_contract(store: Store) {
        assert!(matches!(store.get("a/b").await, Err(StoreError::NotFound { .. })));
        assert_eq!(store.get_if_exists("a/b").await.unwrap(), None);
        store.put("a/b", "one").await.unwrap();
        store.put("a/b", "two").await.unwrap();
        assert_eq!(store.get("a/b").await.unwrap(), "two");
        assert_eq!(store.get_range("a/b", 1..3).await.unwrap(), "wo");
        assert_eq!(store.get_range("a/b", 2..9).await.unwrap(), "o");
        assert!(matches!(store.get_range("a/b", 3..4).await, Err(StoreError::Failed { .. })));
        assert!(matches!(store.get_range("a/x", 0..1).await, Err(StoreError::NotFound { .. })));
        assert_eq!(store.create("a/b", "three").await.unwrap(), Created::Exists);
        assert_eq!(store.create("a/c", "three").await.unwrap(), Created::New);
        assert_eq!(store.get("a/b").await.unwrap(), "two");
        assert_eq!(store.at("a").get("c").await.unwrap(), "three");
        assert_eq!(store.size_bytes("a/c").await.unwrap(), Some(5));
        let names: Vec<_> = store.list("").await.unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["a/b", "a/c"]);
        assert_eq!(store.list("none").await.unwrap(), []);
        assert_eq!(store.list_folders("").await.unwrap(), ["a"]);
        store.delete("a/b").await.unwrap();
        store.delete("a/b").await.unwrap();
        assert_eq!(store.get_if_exists("a/b").await.unwrap(), None);
    }

    #[tokio::test]
    async fn memory_keeps_the_contract() {
        keeps_the_contract(Store::memory()).await;
    }

    #[tokio::test]
    async fn local_folder_keeps_the_contract() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("file://{}", folder.path().display())).unwrap();
        keeps_the_contract(store).await;
    }

    #[tokio::test]
    async fn plain_path_is_a_local_folder() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        assert_eq!(store.url(), format!("file://{}", folder.path().display()));
        assert_eq!(store.local_path().unwrap(), folder.path());
    }

    #[test]
    fn path_through_a_parent_folder_is_a_local_folder() {
        assert_eq!(Store::open("/a/b/../c").unwrap().url(), "file:///a/c");
    }

    #[tokio::test]
    async fn unwritable_folder_is_told_with_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let store = Store::open(file.path().to_str().unwrap()).unwrap();
        let message = store.put("x", "y").await.unwrap_err().to_string();
        assert!(message.starts_with("cannot write file://"), "{message}");
    }

    #[test]
    fn https_stores_find_a_tls_provider() {
        for url in ["s3://bucket/folder", "https://s3.eu-west-1.amazonaws.com/bucket", "gs://bucket/folder"] {
            assert_eq!(Store::open(url).unwrap().url(), url);
        }
    }

    #[test]
    fn unknown_scheme_lists_the_known_ones() {
        let message = Store::open("ftp://host/x").unwrap_err().to_string();
        assert!(message.contains("ftp://host/x") && message.contains("s3://"), "{message}");
    }
}
