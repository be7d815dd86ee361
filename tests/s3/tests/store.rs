//! `takuma_store::Store`, opened as users open it (an `s3://` URL and `AWS_*` variables), against `takuma-s3`.
//!
//! A process's environment must not change while its threads run, so each test starts itself again as a
//! child whose environment names the server.

// The helpers of a test fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use takuma_store::{Created, Store, StoreError};

/// Set in the child: its tests run their bodies.
const INSIDE: &str = "TAKUMA_S3_TEST_INSIDE";

/// The server program, killed when dropped.
struct Server {
    process: Child,
    endpoint: String,
    _root: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_takuma-s3"))
            .args([
                "--listen",
                "127.0.0.1:0",
                "--bucket",
                "takuma",
                "--access-key",
                "key",
                "--secret-key",
                "secret",
            ])
            .arg("--root")
            .arg(root.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        Self { process, endpoint: format!("http://{address}"), _root: root }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Runs `body` with a store on a fresh server, in a child process of its own.
fn with_store<F: Future<Output = ()>>(test: &str, body: impl FnOnce(Store) -> F) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(body(Store::open("s3://takuma/folder").unwrap()));
    }
    let server = Server::start();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact"])
        .env(INSIDE, "1")
        .env("AWS_ENDPOINT", &server.endpoint)
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .env("AWS_REGION", "us-east-1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{told}{}", String::from_utf8_lossy(&child.stderr));
    assert!(told.contains("1 passed"), "no test is named {test}: {told}");
}

#[test]
fn s3_keeps_the_store_contract() {
    with_store("s3_keeps_the_store_contract", |store| async move {
        assert!(matches!(store.get("a/b").await, Err(StoreError::NotFound { .. })));
        store.put("a/b", "one").await.unwrap();
        store.put("a/b", "two").await.unwrap();
        assert_eq!(store.create("a/b", "three").await.unwrap(), Created::Exists);
        assert_eq!(store.create("a/c", "three").await.unwrap(), Created::New);
        assert_eq!(store.get("a/b").await.unwrap(), "two");
        assert_eq!(store.at("a").get("c").await.unwrap(), "three");
        assert_eq!(store.size_bytes("a/c").await.unwrap(), Some(5));
        assert_eq!(store.size_bytes("a/d").await.unwrap(), None);
        let names: Vec<_> = store.list("").await.unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["a/b", "a/c"]);
        assert_eq!(store.list("none").await.unwrap(), []);
        assert_eq!(store.list_folders("").await.unwrap(), ["a"]);
        store.delete("a/b").await.unwrap();
        store.delete("a/b").await.unwrap();
        assert_eq!(store.get_if_exists("a/b").await.unwrap(), None);
    });
}

#[test]
fn forty_megabyte_object_comes_back_whole() {
    with_store("forty_megabyte_object_comes_back_whole", |store| async move {
        let content: Vec<u8> =
            (0..10_000_000_u32).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        store.put("large", content.clone()).await.unwrap();
        // Compared outside of assert_eq!, which would print both.
        assert!(store.get("large").await.unwrap() == content);
    });
}

#[test]
fn listing_goes_on_after_the_first_thousand() {
    with_store("listing_goes_on_after_the_first_thousand", |store| async move {
        use futures::StreamExt;
        let names: Vec<String> = (0..1203).map(|i| format!("many/{i:05}")).collect();
        futures::stream::iter(&names)
            .for_each_concurrent(32, |name| {
                let store = store.clone();
                async move { store.put(name, "x").await.unwrap() }
            })
            .await;
        let listed: Vec<_> = store.list("many").await.unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(listed, names);
    });
}

#[test]
fn address_file_names_a_bound_port() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("address");
    let mut process = Command::new(env!("CARGO_BIN_EXE_takuma-s3"))
        .args(["--listen", "127.0.0.1:0", "--access-key", "key", "--secret-key", "secret"])
        .arg("--root")
        .arg(folder.path().join("root"))
        .arg("--address-file")
        .arg(&file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The file is written before this line.
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = std::fs::read_to_string(&file).unwrap();
    let connected = std::net::TcpStream::connect(&address);
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(connected.is_ok(), "{address}: {connected:?}");
}
