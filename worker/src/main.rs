//! `takuma-worker`: joins a coordinator and trains what it is told to.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand, ValueEnum};
use takuma_worker::collective::RingListener;
use takuma_worker::control::{LogForwarder, Options, serve};
use takuma_worker::device::{self, DeviceChoice, Inventory};
use takuma_worker::supervise;
use tikv_jemallocator::Jemalloc;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Serves libtorch as well: the executable's `malloc` is the one that its libraries find.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Read by jemalloc at its start: freed memory is kept. A step frees and takes the same tens of megabytes
/// some hundred times; giving them back and faulting them in again cost 5% of an iteration.
#[unsafe(export_name = "malloc_conf")]
static MALLOC_CONF: &[u8; 36] = b"dirty_decay_ms:-1,muzzy_decay_ms:-1\0";

/// Joins a coordinator and trains what it is told to, until it is stopped.
#[derive(Debug, Parser)]
#[command(name = "takuma-worker", version)]
struct Args {
    /// The coordinator's address.
    #[arg(long, env = "TAKUMA_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    coordinator: String,
    /// Name to appear under; by default the coordinator picks worker-1, worker-2, ...
    #[arg(long, env = "TAKUMA_WORKER_NAME", default_value = "")]
    name: String,
    /// What computes: auto, cpu, cuda or cuda:N. auto takes the first GPU if there is one; a GPU that is there and
    /// cannot be used is an error.
    #[arg(long, env = "TAKUMA_DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Compute threads; by default one for each processor.
    #[arg(long, env = "TAKUMA_THREADS")]
    threads: Option<u32>,
    /// Where this worker listens for its neighbours in the ring.
    #[arg(long, env = "TAKUMA_LISTEN", default_value = "0.0.0.0:0")]
    listen: String,
    /// HOST or HOST:PORT where the neighbours reach it; by default the local address of the connection
    /// to the coordinator, and the port that it listens on.
    #[arg(long, env = "TAKUMA_ADVERTISE")]
    advertise: Option<String>,
    /// How log lines look.
    #[arg(long, env = "TAKUMA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lists what a worker can compute on here, and ends.
    Devices {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(Command::Devices { json }) = args.command {
        return list_devices(json);
    }
    let (forwarder, log_lines) = LogForwarder::new();
    start_logging(args.log_format, forwarder.clone());
    // A GPU can hang so that only the end of its process helps; then the parent starts the worker again.
    if let Some(code) = supervise::run(args.device.may_be_gpu()) {
        return code;
    }
    match run(args, forwarder, log_lines) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn list_devices(json: bool) -> ExitCode {
    let inventory = Inventory::take();
    let lines = match serde_json::to_string(&inventory) {
        Ok(object) if json => vec![object],
        _ => inventory.lines(),
    };
    let mut out = std::io::stdout().lock();
    let is_written = lines.iter().all(|line| writeln!(out, "{line}").is_ok());
    if is_written { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(
    args: Args,
    forwarder: LogForwarder,
    log_lines: tokio::sync::mpsc::Receiver<takuma_proto::v1::LogLine>,
) -> anyhow::Result<()> {
    // Before anything else: libtorch decides at the first question whether it has CUDA.
    let device = args.device.open()?;
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let threads = args.threads.unwrap_or(processors).max(1);
    takuma_worker::torch::configure(threads);
    let listener = Arc::new(RingListener::bind(&args.listen)?);
    let coordinator = if args.coordinator.contains("://") {
        args.coordinator
    } else {
        format!("http://{}", args.coordinator)
    };
    let options = Options {
        coordinator,
        name: args.name,
        advertise: args.advertise.filter(|host| host != "auto"),
        threads,
        device,
    };
    tracing::info!(threads, "computing on {}", device::name(device));
    // The control side is light: one thread beside the trainer's.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        tokio::spawn(cancel_on_signal(shutdown.clone()));
        serve(options, listener, forwarder, log_lines, shutdown).await
    })?;
    // A trainer in the middle of a step must not hold up the end of the process.
    runtime.shutdown_background();
    Ok(())
}

/// Cancels on the first SIGTERM or Ctrl-C.
async fn cancel_on_signal(shutdown: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            shutdown.cancel();
        }
        (Err(error), _) | (_, Err(error)) => tracing::warn!("signals are not handled: {error}"),
    }
}

fn start_logging(format: LogFormat, forwarder: LogForwarder) {
    let filter = EnvFilter::try_from_env("TAKUMA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let output = tracing_subscriber::fmt::layer().with_ansi(color).with_writer(std::io::stderr);
    let output = match format {
        LogFormat::Text => output.with_target(false).boxed(),
        LogFormat::Json => output.json().boxed(),
    };
    tracing_subscriber::registry().with(output.with_filter(filter)).with(forwarder).init();
}
