//! Conditional writes that race: one winner each, for creation and for replacement.

// The helpers of a test fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const WRITERS: usize = 16;
const KEYS: usize = 50;

fn client(endpoint: &str, secret_key: &str) -> AmazonS3 {
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
struct Served {
    endpoint: String,
    client: Arc<AmazonS3>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), takuma_s3::S3Error>>,
    _root: tempfile::TempDir,
}

impl Served {
    async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let settings = takuma_s3::Settings {
            root: root.path().to_owned(),
            buckets: vec!["races".into()],
            access_key: "key".into(),
            secret_key: "secret".into(),
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
    async fn winners(&self, key: &str, mode: &PutMode) -> usize {
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

    async fn stop(self) {
        self.stop.cancel();
        self.server.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_racing_creations_one_succeeds() {
    let served = Served::start().await;
    for key in 0..KEYS {
        assert_eq!(served.winners(&format!("created/{key}"), &PutMode::Create).await, 1, "key {key}");
    }
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_racing_replacements_of_one_version_one_succeeds() {
    let served = Served::start().await;
    for key in 0..KEYS {
        let key = format!("replaced/{key}");
        let first = served.client.put(&Path::from(key.as_str()), "first".into()).await.unwrap();
        let version = PutMode::Update(UpdateVersion { e_tag: first.e_tag, version: None });
        assert_eq!(served.winners(&key, &version).await, 1, "{key}");
    }
    served.stop().await;
}

#[tokio::test]
async fn wrong_secret_is_refused() {
    let served = Served::start().await;
    let error = client(&served.endpoint, "guess").put(&Path::from("x"), "y".into()).await.unwrap_err();
    assert!(matches!(error, object_store::Error::PermissionDenied { .. }), "{error}");
    served.stop().await;
}
