//! `takuma up`: a coordinator and workers on this machine, in the foreground.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use takuma_proto::v1::{ListRunsRequest, RunStatus, StopRunRequest};
use takuma_store::Store;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::attach::Watch;
use crate::client::{Client, has_ended};
use crate::context::{Context, DEFAULT_LISTEN};
use crate::dataset::EndpointArgs;
use crate::devices::{Device, WorkerCount, assign_here, on_devices};
use crate::error::{CliError, Exit};
use crate::local::{LocalCluster, LocalOptions, default_threads, find};
use crate::output::{self, Tone};
use crate::progress::Screen;

/// A step of the slowest machine, a checkpoint to a slow store, and some.
const RUN_STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A child that dies so often within so long is not started again: the cause will not go away by itself.
const MAX_DEATHS: usize = 4;
const DEATHS_WITHIN: Duration = Duration::from_secs(60);
/// Workers on a machine without GPUs: one takes all cores.
const USUAL_WORKERS: u32 = 1;
/// Before a child that could not be started is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// `takuma up`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Stays in the foreground, and starts again whatever dies. Ctrl-C stops a running run with a checkpoint, then everything; Ctrl-C twice does not wait.
Later commands find this coordinator by themselves.

Examples:
  takuma up                                 one worker, or one a GPU
  takuma up --workers 2 --device cpu
  takuma up --store s3://bucket/takuma --endpoint http://127.0.0.1:9000")]
pub struct UpArgs {
    /// Workers to start: a number, or auto for one on each usable GPU, and 1 without GPUs
    #[arg(long, value_name = "N", default_value_t)]
    workers: WorkerCount,
    /// What they compute on: auto (GPUs where there are any), cpu, cuda, or cuda:N for one certain GPU
    #[arg(long, value_name = "DEVICE", env = "TAKUMA_DEVICE", default_value_t)]
    device: Device,
    /// Compute threads of each worker [default: the machine's cores over the workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Where runs, samples and checkpoints lie: a folder or a URL [default: a folder of takuma's own]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Where the coordinator listens; port 0 = any free one
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// How coordinator and workers write their logs
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    #[command(flatten)]
    endpoint: EndpointArgs,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum LogFormat {
    #[default]
    Text,
    Json,
}

impl UpArgs {
    /// The S3 server that was given.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint.endpoint.as_deref()
    }
}

/// Runs `takuma up` until Ctrl-C or SIGTERM.
///
/// # Errors
/// The cluster cannot be started, or nothing of it is left.
pub async fn run(args: UpArgs) -> Result<Exit, CliError> {
    let mut signals = Signals::new()?;
    let folders = directories::ProjectDirs::from("", "", "takuma")
        .ok_or_else(|| CliError::failed("this user has no home folder; set HOME"))?;
    let store = match &args.store {
        Some(store) => Store::open(store)?,
        None => Store::open(&folders.data_dir().join("store").display().to_string())?,
    };
    let state = folders.state_dir().unwrap_or(folders.data_local_dir());
    let logs: PathBuf = state.join("logs").join(args.listen.to_string().replace([':', '[', ']'], "-"));
    // Before the worker is asked anything: what is missing altogether is told first.
    find("takuma-coordinator")?;
    let devices = tokio::select! {
        devices = assign_here(args.device, args.workers, USUAL_WORKERS) => devices?,
        () = signals.next() => return Err(CliError::Interrupted("interrupted before anything was started".to_owned())),
    };
    let workers = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    let options = LocalOptions {
        listen: args.listen,
        store: store.url().to_owned(),
        devices,
        threads: args.threads.unwrap_or_else(|| default_threads(workers)),
        logs,
        log_format: match args.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        },
    };
    output::message(&format!("starting a coordinator and {}", output::count(workers.into(), "worker")));
    let cluster = tokio::select! {
        started = LocalCluster::start(&options) => started?,
        () = signals.next() => return Err(CliError::Interrupted("interrupted before everything was up".to_owned())),
    };
    save_context(cluster.client());
    summary(&cluster, &options)?;
    stay(cluster, &mut signals).await
}

fn save_context(client: &Client) {
    let context = Context { coordinator: client.address().url.clone() };
    let saved = match Context::file() {
        Some(file) => context.save(&file),
        None => Err(CliError::failed("this user has no home folder")),
    };
    if let Err(error) = saved {
        // The cluster runs all the same; only the later commands must be told its address.
        output::message(&format!("{error}; give later commands --coordinator {}", context.coordinator));
    }
}

fn summary(cluster: &LocalCluster, options: &LocalOptions) -> Result<(), CliError> {
    let threads = output::count(options.threads.into(), "thread");
    for (key, value) in [
        ("coordinator", cluster.client().address().url.clone()),
        ("workers", format!("{} of {threads}{}", options.devices.len(), on_devices(&options.devices))),
        ("store", options.store.clone()),
        ("logs", options.logs.display().to_string()),
    ] {
        output::print_line(&format!("{key:<12}{}", Tone::Name.stdout(&value)))?;
    }
    output::message("ready; in another terminal:");
    for command in
        ["dataset synth ./faces --count 5000", "run submit dcgan-celeba --data ./faces --steps 300"]
    {
        output::message(&Tone::Faint.stderr(&format!("  takuma {command}")));
    }
    Ok(())
}

/// Keeps everything running until a signal: a child that dies is started again, and the runs go on meanwhile.
async fn stay(mut cluster: LocalCluster, signals: &mut Signals) -> Result<Exit, CliError> {
    let mut deaths = Deaths::default();
    loop {
        let death = tokio::select! {
            () = signals.next() => {
                wind_down(cluster, signals).await?;
                return Ok(Exit::Success);
            }
            death = cluster.next_death() => death?,
        };
        let mut message = death.message.clone();
        let mut pause = FIRST_PAUSE;
        loop {
            output::message(&format!("{} {message}", Tone::Bad.stderr("lost:")));
            if deaths.are_too_many(&death.name) {
                cluster.stop().await?;
                return Err(too_many_deaths(&death.name));
            }
            let started = async {
                if death.was_coordinator {
                    cluster.restart_coordinator().await
                } else {
                    cluster.start_worker(&death.name)
                }
            };
            let started = tokio::select! {
                started = started => Some(started),
                () = signals.next() => None,
            };
            match started {
                Some(Ok(())) => break,
                // It may be a matter of a moment: a port that is not free yet, memory that is just full.
                Some(Err(error)) => {
                    message = format!("{} could not be started again: {error}", death.name);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => pause *= 2,
                        () = signals.next() => {
                            wind_down(cluster, signals).await?;
                            return Ok(Exit::Success);
                        }
                    }
                }
                None => {
                    wind_down(cluster, signals).await?;
                    return Ok(Exit::Success);
                }
            }
        }
        output::message(&format!("{} is started again; the run goes on meanwhile", death.name));
    }
}

fn too_many_deaths(name: &str) -> CliError {
    CliError::failed(format!(
        "{name} died {MAX_DEATHS} times within {} s, so everything was stopped; mend the cause above, start again with \
         'takuma up', and the run goes on from its last checkpoint",
        DEATHS_WITHIN.as_secs()
    ))
}

/// When which child died.
#[derive(Debug, Default)]
struct Deaths(std::collections::HashMap<String, Vec<tokio::time::Instant>>);

impl Deaths {
    /// Notes a death; whether starting that child again makes no sense.
    fn are_too_many(&mut self, name: &str) -> bool {
        let now = tokio::time::Instant::now();
        let times = self.0.entry(name.to_owned()).or_default();
        times.push(now);
        times.retain(|&at| now - at <= DEATHS_WITHIN);
        times.len() >= MAX_DEATHS
    }
}

/// Stops what runs with a checkpoint, then the cluster. A second signal skips the waiting for the run.
///
/// # Errors
/// A child cannot be stopped.
pub async fn wind_down(cluster: LocalCluster, signals: &mut Signals) -> Result<(), CliError> {
    let client = cluster.client().clone();
    let stopping = tokio::time::timeout(RUN_STOP_TIMEOUT, stop_runs(&client));
    tokio::select! {
        stopped = stopping => match stopped {
            Ok(Ok(())) => {}
            Ok(Err(error)) => output::message(&format!("a run could not be stopped: {error}")),
            Err(_) => output::message("the run does not stop in time; it can be resumed from its last checkpoint"),
        },
        () = signals.next() => output::message("not waiting; the run can be resumed from its last checkpoint"),
    }
    output::message("stopping workers and coordinator");
    cluster.stop().await
}

async fn stop_runs(client: &Client) -> Result<(), CliError> {
    let runs = client.call(client.control().list_runs(ListRunsRequest {})).await?.runs;
    let active = runs.into_iter().filter(|run| {
        matches!(run.status(), RunStatus::Preparing | RunStatus::Running | RunStatus::Stopping)
    });
    for run in active {
        output::message(&format!("stopping run {} with a checkpoint (again Ctrl-C: do not wait)", run.name));
        let asked = client.call(client.control().stop_run(StopRunRequest { run: run.name.clone() })).await?;
        let mut last = asked;
        let mut watch = Watch::new(client, &run.name, Duration::ZERO);
        let screen = Screen::stderr();
        while !has_ended(&last) {
            if let Some(now) = watch.next(&screen).await?.run {
                last = now;
            }
        }
        output::message(&format!("'takuma run resume {}' goes on from step {}", run.name, last.step));
    }
    Ok(())
}

/// The signals that mean "stop": Ctrl-C, SIGTERM, and the terminal's end.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over from their defaults.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn new() -> Result<Self, CliError> {
        let take = |kind| signal(kind).map_err(|error| CliError::io("watch for signals", error));
        Ok(Self {
            interrupt: take(SignalKind::interrupt())?,
            terminate: take(SignalKind::terminate())?,
            hangup: take(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
