//! Clusters of real processes for tests: the binaries of this build, on loopback, in a temporary folder.
//!
//! Every process dies with its handle; every wait has a deadline.
#![allow(clippy::unwrap_used, reason = "a harness: what fails here fails the test")]

mod proxy;
mod throttle;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub use proxy::Proxy;
use serde_json::Value;
use tempfile::TempDir;
pub use throttle::Throttle;

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

    /// Sends a signal by its name: "STOP", "CONT", "TERM".
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Whether it was stopped by a signal.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        // The state follows the program's name, which is in brackets.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
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

fn lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// An address that was free a moment ago.
fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
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

    /// Starts a worker and waits until the coordinator knows it as idle.
    pub fn add_worker(&mut self, name: &str) {
        self.start_worker(name, &["--listen", "127.0.0.1:0"], None);
        wait_for("a worker to join", || {
            let workers = self.json(&["worker", "ls", "-o", "json"]);
            let known =
                workers.as_array().unwrap().iter().any(|w| w["name"] == name && w["status"] == "idle");
            known.then_some(())
        });
    }

    /// Starts a worker that may be taken into a run at once.
    pub fn add_worker_now(&mut self, name: &str) {
        self.start_worker(name, &["--listen", "127.0.0.1:0"], None);
    }

    /// Starts a worker with more in its environment, and waits as [`Cluster::add_worker`] does.
    pub fn add_worker_with(&mut self, name: &str, variable: &'static str, value: &str) {
        self.environment.push((variable, value.to_owned()));
        self.add_worker(name);
        self.environment.pop();
    }

    /// Starts a worker that strikes itself at a place in a step (see the worker's `fault.rs`).
    pub fn add_doomed_worker(&mut self, name: &str, fault: &str) {
        self.start_worker(name, &["--listen", "127.0.0.1:0"], Some(fault));
    }

    /// Starts a worker that its neighbours reach through a proxy, with faults of its own where they are given.
    pub fn add_worker_behind(&mut self, name: &str, proxy: &Proxy, faults: Option<&str>) {
        let listening = free_address();
        proxy.forward_to(listening.parse().unwrap());
        let advertised = proxy.address().to_string();
        self.start_worker(name, &["--listen", &listening, "--advertise", &advertised], faults);
    }

    fn start_worker(&mut self, name: &str, listen: &[&str], fault: Option<&str>) {
        // Where there is a GPU, too: bits and times are a processor's.
        let mut arguments = vec!["--coordinator", &self.address, "--name", name, "--threads", "1"];
        arguments.extend(["--device", "cpu"]);
        arguments.extend(listen);
        let log = self.folder.path().join(format!("{name}.log"));
        let mut environment = self.environment.clone();
        environment.extend(fault.map(|fault| ("TAKUMA_FAULT", fault.to_owned())));
        let worker = Process::start("takuma-worker", &arguments, &environment, log);
        self.workers.retain(|(known, _)| known != name);
        self.workers.push((name.to_owned(), worker));
    }

    /// Kills the coordinator, and starts another on the same address and store after `pause`.
    pub fn restart_coordinator(&mut self, pause: Duration) {
        self.coordinator.kill();
        // The time without a coordinator is what the test is about.
        std::thread::sleep(pause);
        let file = self.folder.path().join("coordinator.address");
        std::fs::remove_file(&file).unwrap();
        let listen = self.address.trim_start_matches("http://").to_owned();
        let arguments =
            ["--listen", &listen, "--store", &self.store, "--address-file", file.to_str().unwrap()];
        let log = self.folder.path().join("coordinator-again.log");
        self.coordinator = Process::start("takuma-coordinator", &arguments, &self.environment, log);
        let _address = self.coordinator.address(&file);
    }

    /// The events of a run that lie in the store.
    #[must_use]
    pub fn events(&self, run: &str) -> Vec<Value> {
        lines(&self.path(&format!("store/runs/{run}/events.jsonl")))
    }

    /// The metrics of a run that lie in the store.
    #[must_use]
    pub fn metrics(&self, run: &str) -> Vec<Value> {
        lines(&self.path(&format!("store/runs/{run}/metrics.jsonl")))
    }

    /// Workers that were started and not replaced.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.workers.len()
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
        if !self.takuma(&["dataset", "inspect", &url]).status.success() {
            let _report = self.ok(&["dataset", "synth", &url, "--count", &images.to_string()]);
        }
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
