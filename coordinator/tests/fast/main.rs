//! A worker that trains a thousand steps a second and more: the real coordinator, in a process of its own, keeps up with
//! it over real connections, and what it costs is printed.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.
#![allow(clippy::print_stdout)] // The figures are what it is for.

// The real worker's spool, which needs no libtorch but lies in a crate that does.
mod outage;
#[allow(dead_code)]
#[path = "../../../worker/src/trainer/spool.rs"]
mod spool;
#[path = "../support/mod.rs"]
mod support;
mod worker;

/// What the spool knows of checkpoints.
mod checkpoint {
    /// A checkpoint that lies in the store.
    pub struct Finished {
        pub step: u64,
        pub parts: Vec<takuma_proto::v1::ObjectPart>,
        pub weights_sha256: String,
    }
}

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use support::cluster::{Cluster, RUN};
use support::{Place, Server, write_dataset};
use takuma_core::config::{Recipe, RunConfig};
use takuma_proto::v1;
use takuma_store::Store;
use tokio::io::{AsyncBufReadExt, BufReader};

/// Two hours of celebrity faces at a step a second: the original's run.
const STEPS: u64 = 6_330;

fn config(store_url: &str) -> RunConfig {
    RunConfig {
        steps: Some(STEPS),
        sample_every: 50,
        checkpoint_every: 500,
        ..RunConfig::new(Recipe::DcganTiny, format!("{store_url}/datasets/faces"))
    }
}

/// What a run cost.
struct Cost {
    steps_per_s: f64,
    /// From the last step to the run's end.
    tail: Duration,
    coordinator_cpu_s: f64,
    /// What a client that watches was sent.
    updates: usize,
    /// Jobs and bytes of grids that waited for the store at the worst moment.
    most: (u64, u64),
}

/// Trains the run against a coordinator on `store`, as seen by processes with `env`.
async fn run(store: &Store, url: &str, env: &[(&str, String)], pace: Duration) -> Cost {
    let env = [env, &[("TAKUMA_LOG", "info,takuma_coordinator::files=debug".to_owned())]].concat();
    let (mut server, mut child) = Server::spawn_with(url, &env).await;
    let working = tokio::spawn(worker::train(server.address, store.clone(), pace));
    let config = config(url);
    server.submit(&config, RUN).await;
    let request = v1::WatchRunRequest { run: RUN.into() };
    let mut stream = server.control.watch_run(request).await.unwrap().into_inner();
    let mut updates = 0;
    while let Some(update) = stream.message().await.unwrap() {
        updates += 1;
        let run = update.run.unwrap();
        assert_ne!(run.status(), v1::RunStatus::Failed, "{}", run.error);
    }
    let ended = Instant::now();
    let times = working.await.unwrap();
    let coordinator_cpu_s = cpu_s(child.id().unwrap());
    let cluster = Cluster { store: store.clone(), ..Cluster::default() };
    // The record of the end is written behind the news of it.
    let written = async {
        while let Err(reason) = cluster.check(&config).await {
            assert!(reason.starts_with("the record"), "{reason}");
            tokio::task::yield_now().await;
        }
    };
    support::soon("the last record", written).await;
    let ended_log = async {
        loop {
            if let Some(most) = support::most_that_waited(&server.log.lock().unwrap()) {
                return most;
            }
            tokio::task::yield_now().await;
        }
    };
    let most = support::soon("the writer's end", ended_log).await;
    child.kill().await.unwrap();
    let training = ended - times.started;
    let steps_per_s = STEPS as f64 / training.as_secs_f64();
    Cost { steps_per_s, tail: ended - times.last_step, coordinator_cpu_s, updates, most }
}

/// User and system time of a process.
fn cpu_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

fn tell(what: &str, cost: &Cost) {
    println!(
        "{what}: {:.0} steps/s, end {:.2} s after the last step, coordinator {:.2} s of a core, {} updates to a watcher, \
         at most {} jobs and {:.1} MB of grids waited",
        cost.steps_per_s,
        cost.tail.as_secs_f64(),
        cost.coordinator_cpu_s,
        cost.updates,
        cost.most.0,
        cost.most.1 as f64 / 1e6
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_folder_keeps_up() {
    let place = Place::new().await;
    let cost = run(&place.store, place.store.url(), &[], Duration::ZERO).await;
    tell("local folder", &cost);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_s3_server_keeps_up() {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_takuma-coordinator")).with_file_name("takuma-s3");
    if !program.exists() {
        println!("left out: takuma-s3 is not built");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut server = tokio::process::Command::new(program)
        .args(["--listen", "127.0.0.1:0", "--access-key", "key", "--secret-key", "secret", "--root"])
        .arg(root.path())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let line = support::soon("the address", lines.next_line()).await.unwrap().unwrap();
    let endpoint = format!("http://{}", line.strip_prefix("listening on ").unwrap());
    let env = [
        ("AWS_ENDPOINT", endpoint.clone()),
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    let builder = AmazonS3Builder::new().with_endpoint(endpoint).with_allow_http(true);
    let builder =
        builder.with_bucket_name("takuma").with_access_key_id("key").with_secret_access_key("secret");
    rustls_of_tests();
    let client: Arc<dyn ObjectStore> = Arc::new(builder.build().unwrap());
    let store = Store::memory().with_objects(|_| client);
    write_dataset(&store, "one").await;
    let cost = run(&store, "s3://takuma", &env, Duration::ZERO).await;
    tell("S3 server", &cost);
}

/// The client asks for it even when it speaks plain http: opening any store installs it.
fn rustls_of_tests() {
    Store::open("s3://takuma").ok();
}
