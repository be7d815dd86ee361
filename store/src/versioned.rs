//! Replacing exactly the version of an object that was read: what leases and fenced commits are made of.

use std::fs::TryLockError;
use std::time::Duration;

use bytes::Bytes;
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload, PutResult, UpdateVersion};

use crate::{Store, StoreError};

/// Guards replacements in a local folder, which has no conditional writes of its own.
const LOCK_FILE: &str = ".takuma-lock";
/// The lock is held for one write at a time, which takes milliseconds. A holder that was stopped in the middle of it
/// (SIGSTOP) is not waited for longer than this: the caller knows whether to try on.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// One version of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(UpdateVersion);

impl Version {
    fn of(written: PutResult) -> Self {
        Self(written.into())
    }
}

impl Store {
    /// Reads a whole object with the version that it has, or `None` where there is none.
    ///
    /// # Errors
    /// The store does not answer or refuses.
    pub async fn get_versioned(&self, object: &str) -> Result<Option<(Bytes, Version)>, StoreError> {
        let read = async {
            let result = self.objects.get(&self.path(object)).await?;
            let version =
                UpdateVersion { e_tag: result.meta.e_tag.clone(), version: result.meta.version.clone() };
            Ok::<_, object_store::Error>((result.bytes().await?, Version(version)))
        };
        match read.await {
            Ok(read) => Ok(Some(read)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("read", object, source)),
        }
    }

    /// Writes a whole object if there is none of that name yet, and returns its version; `None` if there is one.
    ///
    /// # Errors
    /// The store does not answer, refuses, is full, or knows no conditional writes.
    pub async fn create_versioned(
        &self,
        object: &str,
        content: impl Into<PutPayload>,
    ) -> Result<Option<Version>, StoreError> {
        let (path, options) = (self.path(object), PutOptions::from(PutMode::Create));
        match self.objects.put_opts(&path, content.into(), options).await {
            Ok(written) => Ok(Some(Version::of(written))),
            // S3 answers 409 also to a write that meets another one under way, which may come to nothing.
            Err(object_store::Error::AlreadyExists { .. }) => match self.size_bytes(object).await? {
                Some(_) => Ok(None),
                None => Err(StoreError::Busy { action: "write", url: self.object_url(object) }),
            },
            Err(source) => Err(self.failed("write", object, source)),
        }
    }

    /// Writes a whole object in place of one version of it; `false` if it has another version by now, or none.
    ///
    /// # Errors
    /// As [`Store::replace_versioned`].
    pub async fn replace(
        &self,
        object: &str,
        content: impl Into<PutPayload>,
        version: &Version,
    ) -> Result<bool, StoreError> {
        Ok(self.replace_versioned(object, content, version).await?.is_some())
    }

    /// Writes a whole object in place of one version of it and returns the new one; `None` if it has another version
    /// by now, or none.
    ///
    /// An answer that got lost looks like a failure although the write landed: read back and compare. Stores may
    /// derive the version from the content: two contents that are to be told apart must differ.
    ///
    /// # Errors
    /// The store does not answer, refuses, is full, or knows no conditional writes.
    pub async fn replace_versioned(
        &self,
        object: &str,
        content: impl Into<PutPayload>,
        version: &Version,
    ) -> Result<Option<Version>, StoreError> {
        if self.local_path().is_some() {
            return self.replace_locally(object, content.into(), version).await;
        }
        let options = PutOptions::from(PutMode::Update(version.0.clone()));
        match self.objects.put_opts(&self.path(object), content.into(), options).await {
            Ok(written) => Ok(Some(Version::of(written))),
            Err(object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("write", object, source)),
        }
    }

    async fn replace_locally(
        &self,
        object: &str,
        content: PutPayload,
        version: &Version,
    ) -> Result<Option<Version>, StoreError> {
        let _held = self.lock_folder().await?;
        match self.get_versioned(object).await? {
            Some((_, present)) if present == *version => {}
            _ => return Ok(None),
        }
        let written = self.objects.put(&self.path(object), content).await;
        written
            .map(|written| Some(Version::of(written)))
            .map_err(|source| self.failed("write", object, source))
    }

    /// The folder's lock, until the returned file is dropped; other processes wait for it. It is asked for again and
    /// again, since a thread that waits in the system could not be called back.
    async fn lock_folder(&self) -> Result<std::fs::File, StoreError> {
        let path = self.local_path().unwrap_or_default();
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            let source = object_store::Error::Generic { store: "local", source };
            self.failed("lock", LOCK_FILE, source)
        };
        let opened = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&path)?;
            std::fs::File::create(path.join(LOCK_FILE))
        });
        let file =
            opened.await.map_err(|error| failed(error.into()))?.map_err(|error| failed(error.into()))?;
        let deadline = tokio::time::Instant::now() + LOCK_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(failed(error.into())),
                Err(TryLockError::WouldBlock) if tokio::time::Instant::now() > deadline => {
                    return Err(StoreError::Busy { action: "lock", url: self.object_url(LOCK_FILE) });
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_PAUSE).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn only_the_version_that_was_read_is_replaced(store: Store) {
        assert_eq!(store.get_versioned("lease").await.unwrap(), None);
        store.put("lease", "one").await.unwrap();
        let (_, one) = store.get_versioned("lease").await.unwrap().unwrap();
        assert!(store.replace("lease", "two", &one).await.unwrap());
        assert!(!store.replace("lease", "three", &one).await.unwrap());
        let (content, two) = store.get_versioned("lease").await.unwrap().unwrap();
        assert_eq!(content, "two");
        store.delete("lease").await.unwrap();
        assert!(!store.replace("lease", "four", &two).await.unwrap());
    }

    #[tokio::test]
    async fn memory_replaces_by_version() {
        only_the_version_that_was_read_is_replaced(Store::memory()).await;
    }

    #[tokio::test]
    async fn a_folder_replaces_by_version_with_one_winner_of_many() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        only_the_version_that_was_read_is_replaced(store.clone()).await;
        store.put("raced", "old").await.unwrap();
        let (_, old) = store.get_versioned("raced").await.unwrap().unwrap();
        let writers = (0..16).map(|writer| {
            let (store, old) = (store.clone(), old.clone());
            tokio::spawn(
                async move { store.replace("raced", format!("writer {writer}"), &old).await.unwrap() },
            )
        });
        let won: usize =
            futures::future::join_all(writers).await.into_iter().map(|won| usize::from(won.unwrap())).sum();
        assert_eq!(won, 1);
    }
}
