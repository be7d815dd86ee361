//! A coordinator and workers as children of this process: started, watched, stopped together.
//!
//! Knows nothing of what runs on them. The children die with this process, however it ends.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use takuma_proto::v1::ListWorkersRequest;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::client::Client;
use crate::context::Address;
use crate::devices::Device;
use crate::error::CliError;

/// The coordinator reads its store before it listens; a slow one answers within 30 s or not at all.
const COORDINATOR_TIMEOUT: Duration = Duration::from_secs(45);
/// Loading libtorch takes a second from a warm disk and half a minute from a cold one.
const WORKERS_TIMEOUT: Duration = Duration::from_secs(90);
/// Short against starting a process.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A worker says goodbye and exits at its next step; a step takes up to 18 s on a slow machine.
const WORKER_STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// The coordinator only has to write down its state.
const COORDINATOR_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Enough to hold the error and what led to it.
const TAIL_LINES: usize = 6;
const TAIL_BYTES: u64 = 16 << 10;
/// Names the folder of the programs, where they are not beside `takuma`.
const BIN_DIR_VARIABLE: &str = "TAKUMA_BIN_DIR";

/// What to start.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Where the coordinator listens; port 0 = any free one.
    pub listen: SocketAddr,
    /// URL of the store.
    pub store: String,
    /// The workers, by what each computes on: worker-1 first.
    pub devices: Vec<Device>,
    /// Compute threads of each.
    pub threads: u32,
    /// Folder of the children's logs.
    pub logs: PathBuf,
    /// `text` or `json`.
    pub log_format: &'static str,
}

/// One child.
#[derive(Debug)]
struct Member {
    name: String,
    child: Child,
    log: PathBuf,
}

/// The running children.
#[derive(Debug)]
pub struct LocalCluster {
    options: LocalOptions,
    /// Where the coordinator really listens.
    listens: SocketAddr,
    coordinator: Member,
    workers: Vec<Member>,
    client: Client,
}

/// A child that ended by itself.
#[derive(Debug)]
pub struct Death {
    /// Which.
    pub name: String,
    /// Which, how, and the end of its log.
    pub message: String,
    /// Without it nothing goes on.
    pub was_coordinator: bool,
}

/// Compute threads for each worker, so that together they use the machine once.
#[must_use]
pub fn default_threads(workers: u32) -> u32 {
    let cores = std::thread::available_parallelism()
        .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
    (cores / workers.max(1)).max(1)
}

impl LocalCluster {
    /// Starts everything and waits until every worker is connected. Dropping the future kills the children.
    ///
    /// Must be awaited on the main thread: the kernel ties the children's life to the thread that starts them.
    ///
    /// # Errors
    /// A program is missing, the port is in use, a child ended (with the end of its log), or the time is up.
    pub async fn start(options: &LocalOptions) -> Result<Self, CliError> {
        find("takuma-coordinator")?;
        find("takuma-worker")?;
        refuse_taken_port(options.listen)?;
        std::fs::create_dir_all(&options.logs)
            .map_err(|error| CliError::io(format_args!("make {}", options.logs.display()), error))?;
        let (coordinator, listens) = start_coordinator(options, options.listen).await?;
        let address = Address::parse(&reachable(listens).to_string(), "started here")?;
        let mut workers = Vec::new();
        for number in 1..=options.devices.len() {
            workers.push(start_worker(options, &format!("worker-{number}"), &address.url)?);
        }
        let (client, _) = Client::connect(address).await?;
        let mut cluster = Self { options: options.clone(), listens, coordinator, workers, client };
        cluster.wait_for_workers().await?;
        Ok(cluster)
    }

    /// Starts a worker, in place of one of that name that has ended. It joins whatever run is at work.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_worker(&mut self, name: &str) -> Result<(), CliError> {
        let worker = start_worker(&self.options, name, &self.client.address().url)?;
        self.workers.retain(|member| member.name != name);
        self.workers.push(worker);
        Ok(())
    }

    /// Starts a coordinator on the address of the one that has ended; workers find it again.
    ///
    /// # Errors
    /// The program cannot be started, or does not listen.
    pub async fn restart_coordinator(&mut self) -> Result<(), CliError> {
        (self.coordinator, _) = start_coordinator(&self.options, self.listens).await?;
        Ok(())
    }

    /// SIGKILL for a worker, as a person who wants to see what happens.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn kill_worker(&mut self, name: &str) -> Result<(), CliError> {
        let failed = |error| CliError::io("kill a worker", error);
        if let Some(index) = self.workers.iter().position(|member| member.name == name) {
            self.workers.remove(index).child.kill().await.map_err(failed)?;
        }
        Ok(())
    }

    /// SIGKILL for the coordinator.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn kill_coordinator(&mut self) -> Result<(), CliError> {
        self.coordinator.child.kill().await.map_err(|error| CliError::io("kill the coordinator", error))
    }

    /// The coordinator's client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Workers that still run.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    async fn wait_for_workers(&mut self) -> Result<(), CliError> {
        let deadline = Instant::now() + WORKERS_TIMEOUT;
        let wanted = self.workers.len();
        loop {
            for member in std::iter::once(&mut self.coordinator).chain(&mut self.workers) {
                if let Some(status) =
                    member.child.try_wait().map_err(|error| CliError::io("watch a child", error))?
                {
                    return Err(CliError::failed(member.obituary(status)));
                }
            }
            let listed =
                self.client.call(self.client.control().list_workers(ListWorkersRequest {})).await?.workers;
            let connected = listed.iter().filter(|worker| worker.status != "lost").count();
            if connected >= wanted {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let logs = self.coordinator.log.parent().unwrap_or(Path::new(".")).display().to_string();
                return Err(CliError::failed(format!(
                    "only {connected} of {wanted} workers connected within {} s; their logs are in {logs}",
                    WORKERS_TIMEOUT.as_secs()
                )));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until a child ends by itself. May be dropped and called again.
    ///
    /// # Errors
    /// The children cannot be watched.
    pub async fn next_death(&mut self) -> Result<Death, CliError> {
        let failed = |error| CliError::io("watch the children", error);
        let waits: Vec<_> = self.workers.iter_mut().map(|member| Box::pin(member.child.wait())).collect();
        let any_worker = async {
            // Waiting for the first of none is waiting for ever.
            if waits.is_empty() {
                std::future::pending().await
            } else {
                futures::future::select_all(waits).await
            }
        };
        let (index, status) = tokio::select! {
            status = self.coordinator.child.wait() => {
                let message = self.coordinator.obituary(status.map_err(failed)?);
                let name = self.coordinator.name.clone();
                return Ok(Death { name, message, was_coordinator: true });
            }
            (status, index, _) = any_worker => {
                (index, status.map_err(failed)?)
            }
        };
        let member = self.workers.remove(index);
        let message = member.obituary(status);
        Ok(Death { name: member.name, message, was_coordinator: false })
    }

    /// Stops the workers, then the coordinator: asked first, killed after a while.
    ///
    /// # Errors
    /// A child cannot be waited for.
    pub async fn stop(mut self) -> Result<(), CliError> {
        self.workers.iter().for_each(Member::ask_to_stop);
        let deadline = Instant::now() + WORKER_STOP_TIMEOUT;
        for member in &mut self.workers {
            member.wait_or_kill(deadline).await?;
        }
        self.coordinator.ask_to_stop();
        self.coordinator.wait_or_kill(Instant::now() + COORDINATOR_STOP_TIMEOUT).await
    }
}

impl Member {
    fn ask_to_stop(&self) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = pid {
            // It may have ended in this moment; waiting for it tells.
            kill_process(pid, Signal::TERM).ok();
        }
    }

    async fn wait_or_kill(&mut self, deadline: Instant) -> Result<(), CliError> {
        let failed = |error| CliError::io("stop a child", error);
        match tokio::time::timeout_at(deadline, self.child.wait()).await {
            Ok(status) => status.map(drop).map_err(failed),
            Err(_) => {
                crate::output::message(&format!("{} does not stop and is killed", self.name));
                self.child.kill().await.map_err(failed)
            }
        }
    }

    fn obituary(&self, status: ExitStatus) -> String {
        let tail = tail(&self.log);
        let log = self.log.display();
        let how = how_it_ended(status);
        if tail.is_empty() {
            return format!("{} {how} without a word in its log {log}", self.name);
        }
        format!("{} {how}; its log {log} ends with:\n{}", self.name, tail.join("\n"))
    }
}

fn how_it_ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(9)) => "was killed (signal 9; the kernel does so when memory runs out)".to_owned(),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The last lines of a log; none where it cannot be read.
fn tail(log: &Path) -> Vec<String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut end = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&end);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(TAIL_LINES))
        .map(|line| format!("  {}", crate::output::visible(&console::strip_ansi_codes(line))))
        .collect()
}

/// Where a program of takuma's own is.
///
/// # Errors
/// It is not there.
pub fn find(program: &str) -> Result<PathBuf, CliError> {
    let folder = match std::env::var_os(BIN_DIR_VARIABLE) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let own = std::env::current_exe().and_then(|own| own.canonicalize());
            let own = own.map_err(|error| CliError::io("find this program's own folder", error))?;
            own.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let path = folder.join(program);
    if !path.is_file() {
        return Err(CliError::failed(format!(
            "there is no {program} in {}; build it with 'make build', or name its folder in {BIN_DIR_VARIABLE}",
            folder.display()
        )));
    }
    Ok(path)
}

/// Tells a taken port before anything is started. The coordinator's own bind still decides.
fn refuse_taken_port(listen: SocketAddr) -> Result<(), CliError> {
    match std::net::TcpListener::bind(listen) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(CliError::failed(format!(
            "{listen} is in use, perhaps by another 'takuma up'; stop that one, or choose another port with --listen"
        ))),
        Err(error) => {
            Err(CliError::io(format_args!("listen on {listen}; choose another address with --listen"), error))
        }
    }
}

fn remove_if_there(file: &Path) -> Result<(), CliError> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(CliError::io(format_args!("remove {}", file.display()), error))
        }
        _ => Ok(()),
    }
}

fn spawn(name: String, mut command: Command, logs: &Path) -> Result<Member, CliError> {
    let log = logs.join(format!("{name}.log"));
    let failed = |error| CliError::io(format_args!("write {}", log.display()), error);
    // A child that is started again goes on in the log that tells of its first end.
    let out = File::options().create(true).append(true).open(&log).map_err(failed)?;
    let err = out.try_clone().map_err(failed)?;
    command.stdin(Stdio::null()).stdout(out).stderr(err).kill_on_drop(true);
    // Their logs are files, also for a program that does not look.
    command.env("NO_COLOR", "1");
    // Ctrl-C in the terminal is for us alone: we stop the children in the right order.
    command.process_group(0);
    let parent = std::process::id();
    // SAFETY: between fork and exec only two system calls are made, both async-signal-safe, and nothing
    // is allocated: an error made from a raw code holds no heap.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above took effect.
            let orphan =
                rustix::process::getppid().is_none_or(|now| now.as_raw_nonzero().get() as u32 != parent);
            if orphan { Err(rustix::io::Errno::SRCH.into()) } else { Ok(()) }
        });
    }
    let child = command.spawn().map_err(|error| CliError::io(format_args!("start {name}"), error))?;
    Ok(Member { name, child, log })
}

async fn start_coordinator(
    options: &LocalOptions,
    listen: SocketAddr,
) -> Result<(Member, SocketAddr), CliError> {
    let address_file = options.logs.join("coordinator.address");
    remove_if_there(&address_file)?;
    let mut command = Command::new(find("takuma-coordinator")?);
    command.args(["--listen", &listen.to_string(), "--store", &options.store]);
    command.arg("--address-file").arg(&address_file).args(["--log-format", options.log_format]);
    let mut coordinator = spawn("coordinator".to_owned(), command, &options.logs)?;
    let address = wait_for_address(&mut coordinator, &address_file).await?;
    Ok((coordinator, address))
}

fn start_worker(options: &LocalOptions, name: &str, coordinator: &str) -> Result<Member, CliError> {
    let mut command = Command::new(find("takuma-worker")?);
    match device_of(options, name) {
        // What the worker does by itself.
        Device::Auto => {}
        device => {
            command.args(["--device", &device.to_string()]);
        }
    }
    command.args(["--coordinator", coordinator, "--name", name, "--threads", &options.threads.to_string()]);
    command.args(["--listen", "127.0.0.1:0", "--log-format", options.log_format]);
    spawn(name.to_owned(), command, &options.logs)
}

/// What the worker of that name computes on. One that comes in place of another takes its device over.
fn device_of(options: &LocalOptions, name: &str) -> Device {
    let number = name.strip_prefix("worker-").and_then(|number| number.parse::<usize>().ok());
    number.and_then(|number| options.devices.get(number.checked_sub(1)?).copied()).unwrap_or_default()
}

async fn wait_for_address(coordinator: &mut Member, file: &Path) -> Result<SocketAddr, CliError> {
    let written = async {
        loop {
            if let Ok(text) = std::fs::read_to_string(file)
                && let Ok(address) = text.trim().parse::<SocketAddr>()
            {
                return address;
            }
            sleep(LOOK_EVERY).await;
        }
    };
    let address = tokio::select! {
        address = timeout(COORDINATOR_TIMEOUT, written) => address,
        status = coordinator.child.wait() => {
            let status = status.map_err(|error| CliError::io("watch the coordinator", error))?;
            return Err(CliError::failed(coordinator.obituary(status)));
        }
    };
    address.map_err(|_| {
        CliError::failed(format!(
            "the coordinator did not listen within {} s; its log is {}",
            COORDINATOR_TIMEOUT.as_secs(),
            coordinator.log.display()
        ))
    })
}

/// Where to reach a listener from this machine: "all addresses" is none to connect to.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let host = match listen.ip() {
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(host, listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_port_is_told_with_the_remedy() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let message = refuse_taken_port(taken.local_addr().unwrap()).unwrap_err().to_string();
        assert!(message.contains("is in use") && message.contains("--listen"), "{message}");
    }

    #[test]
    fn tail_keeps_the_last_lines_of_a_long_log() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let text: String = (0..10_000).map(|line| format!("line {line}\n\n")).collect();
        std::fs::write(log.path(), text).unwrap();
        let tail = tail(log.path());
        assert_eq!((tail.len(), tail.last().map(String::as_str)), (TAIL_LINES, Some("  line 9999")));
    }

    #[test]
    fn listener_on_all_addresses_is_reached_over_loopback() {
        assert_eq!(reachable("0.0.0.0:7070".parse().unwrap()).to_string(), "127.0.0.1:7070");
        assert_eq!(reachable("10.0.0.2:1".parse().unwrap()).to_string(), "10.0.0.2:1");
    }

    #[test]
    fn worker_that_is_started_again_gets_the_device_that_it_had() {
        let options = LocalOptions {
            listen: "127.0.0.1:0".parse().unwrap(),
            store: String::new(),
            devices: vec![Device::Cuda(Some(0)), Device::Cuda(Some(3))],
            threads: 1,
            logs: PathBuf::new(),
            log_format: "text",
        };
        let devices = ["worker-1", "worker-2", "worker-3", "other"].map(|name| device_of(&options, name));
        assert_eq!(devices, [Device::Cuda(Some(0)), Device::Cuda(Some(3)), Device::Auto, Device::Auto]);
    }

    #[test]
    fn workers_never_get_less_than_one_thread() {
        assert_eq!(default_threads(100_000), 1);
        assert!(default_threads(1) >= default_threads(2));
    }
}
