//! Clusters of real processes for tests: the binaries of this build, on loopback, in a temporary folder.
//!
//! Every process dies with its handle; every wait has a deadline.
#![allow(clippy::unwrap_used, reason = "a harness: what fails here fails the test")]

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything a healthy process needs on a busy two-core machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A coordinator, its workers and their store.
pub struct Cluster {
    folder: TempDir,
    store: String,
    environment: Vec<(&'static str, String)>,
    coordinator: Process,
    address: String,
    workers: Vec<(String, Process)>,
}

/// Where a binary of this build lies.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    // target/release/deps/TEST -> target/release
    let release = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let path = release.join(name);
    assert!(path.is_file(), "there is no {}; run `make test`, which builds it first", path.display());
    path
}

/// A child that is killed with its handle, its log in a file.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a binary of this build.
    #[must_use]
    pub fn start(
        name: &str,
        arguments: &[&str],
        environment: &[(&'static str, String)],
        log: PathBuf,
    ) -> Self {
        let output = File::create(&log).unwrap();
        let child = Command::new(binary(name))
            .args(arguments)
            .envs(environment.iter().map(|(key, value)| (*key, value.as_str())))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    /// What it wrote so far.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = String::new();
        File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text)).unwrap();
        text
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the file that a server writes its address into.
    #[must_use]
    pub fn address(&mut self, file: &Path) -> String {
        wait_for("a server's address", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the server ended with {status}: {}", self.log());
            }
            std::fs::read_to_string(file)
                .ok()
                .map(|text| text.trim().to_owned())
                .filter(|text| !text.is_empty())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Polls until there is an answer.
///
/// # Panics
/// After two minutes without one.
pub fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(begin.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        // A poll of another process: there is no event to wait on.
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

impl Cluster {
    /// A coordinator and `workers` workers of one thread each, over a local folder.
    #[must_use]
    pub fn start(workers: u32) -> Self {
        let folder = TempDir::new().unwrap();
        let store = format!("file://{}/store", folder.path().display());
        Self::over(folder, store, Vec::new(), workers)
    }

    /// The same over another store, with the environment that reaches it.
    #[must_use]
    pub fn over(
        folder: TempDir,
        store: String,
        environment: Vec<(&'static str, String)>,
        workers: u32,
    ) -> Self {
        let file = folder.path().join("coordinator.address");
        let arguments =
            ["--listen", "127.0.0.1:0", "--store", &store, "--address-file", file.to_str().unwrap()];
        let log = folder.path().join("coordinator.log");
        let mut coordinator = Process::start("takuma-coordinator", &arguments, &environment, log);
        let address = format!("http://{}", coordinator.address(&file));
        let mut cluster = Self { folder, store, environment, coordinator, address, workers: Vec::new() };
        for number in 1..=workers {
            cluster.add_worker(&format!("worker-{number}"));
        }
        cluster
    }

    /// Starts a worker and waits until the coordinator knows it.
    pub fn add_worker(&mut self, name: &str) {
        let arguments =
            ["--coordinator", &self.address, "--name", name, "--threads", "1", "--listen", "127.0.0.1:0"];
        let log = self.folder.path().join(format!("{name}.log"));
        let worker = Process::start("takuma-worker", &arguments, &self.environment, log);
        self.workers.push((name.to_owned(), worker));
        wait_for("a worker to join", || {
            let workers = self.json(&["worker", "ls", "-o", "json"]);
            let known =
                workers.as_array().unwrap().iter().any(|w| w["name"] == name && w["status"] == "idle");
            known.then_some(())
        });
    }

    /// A worker's process.
    pub fn worker(&mut self, name: &str) -> &mut Process {
        &mut self.workers.iter_mut().find(|(known, _)| known == name).unwrap().1
    }

    /// The coordinator's process.
    pub fn coordinator(&mut self) -> &mut Process {
        &mut self.coordinator
    }

    /// Address of the coordinator, `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// URL of the store.
    #[must_use]
    pub fn store(&self) -> &str {
        &self.store
    }

    /// A path in the cluster's temporary folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command of the CLI against this cluster.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("takuma"));
        command
            .args(arguments)
            .env("TAKUMA_COORDINATOR", &self.address)
            .env("HOME", self.folder.path())
            .envs(self.environment.iter().map(|(key, value)| (*key, value.as_str())))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command of the CLI to its end.
    #[must_use]
    pub fn takuma(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; its standard output.
    #[must_use]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.takuma(arguments);
        assert!(
            output.status.success(),
            "takuma {arguments:?} ended with {}\n{}\n{}\ncoordinator:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.coordinator.log(),
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must succeed; its standard output as JSON.
    #[must_use]
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// A dataset of drawn faces in the store; its URL.
    #[must_use]
    pub fn dataset(&self, images: u32) -> String {
        let url = format!("{}/datasets/faces-{images}", self.store);
        let _report = self.ok(&["dataset", "synth", &url, "--count", &images.to_string()]);
        url
    }

    /// Waits until a run has finished `step` steps.
    pub fn wait_for_step(&self, run: &str, step: u64) {
        wait_for("a run's step", || {
            let view = self.json(&["run", "show", run, "-o", "json"]);
            assert_ne!(view["status"], "failed", "{view}");
            (view["step"].as_u64().unwrap() >= step).then_some(())
        });
    }
}
