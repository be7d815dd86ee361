//! The server in this process, and writers that race.

#![allow(dead_code)] // Each test program uses its part.

use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ObjectStore, PutMode, PutOptions};
use takuma_store::Store;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Writers of one key.
pub const WRITERS: usize = 16;
/// Keys that are raced for.
pub const KEYS: usize = 50;

pub fn client(endpoint: &str, secret_key: &str) -> AmazonS3 {
    AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_bucket_name("races")
        .with_access_key_id("key")
        .with_secret_access_key(secret_key)
        .build()
        .unwrap()
}

/// A server in this process and a client of it.
pub struct Served {
    pub endpoint: String,
    pub client: Arc<AmazonS3>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), takuma_s3::S3Error>>,
    _root: tempfile::TempDir,
}

impl Served {
    pub async fn start() -> Self {
        Self::start_with(true).await
    }

    pub async fn start_with(fenced: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let settings = takuma_s3::Settings {
            root: root.path().to_owned(),
            buckets: vec!["races".into()],
            access_key: "key".into(),
            secret_key: "secret".into(),
            fenced,
        };
        let stop = CancellationToken::new();
        let until = stop.clone();
        let server = tokio::spawn(async move { takuma_s3::serve(listener, &settings, until).await });
        // The client asks for it even when it speaks plain http; the second test finds it installed.
        rustls::crypto::ring::default_provider().install_default().ok();
        let client = Arc::new(client(&endpoint, "secret"));
        Self { endpoint, client, stop, server, _root: root }
    }

    /// How many of [`WRITERS`] concurrent writes of one key succeed.
    pub async fn winners(&self, key: &str, mode: &PutMode) -> usize {
        let writes = (0..WRITERS).map(|writer| {
            let (client, key, options) =
                (Arc::clone(&self.client), Path::from(key), PutOptions::from(mode.clone()));
            tokio::spawn(
                async move { client.put_opts(&key, format!("writer {writer}").into(), options).await },
            )
        });
        let mut winners = 0;
        for write in futures::future::join_all(writes).await {
            match write.unwrap() {
                Ok(_) => winners += 1,
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                }
                Err(error) => panic!("a loser is told so, not {error}"),
            }
        }
        winners
    }

    /// The store in the server's bucket.
    pub fn store(&self) -> Store {
        let client: Arc<dyn ObjectStore> = self.client.clone();
        Store::memory().with_objects(|_| client)
    }

    pub async fn stop(self) {
        self.stop.cancel();
        self.server.await.unwrap().unwrap();
    }
}
