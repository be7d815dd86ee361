//! The binary: arguments, logging, signals; everything else is the library's.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use takuma_coordinator::lease::{Holder, Lease};
use takuma_coordinator::{Coordinator, Options};
use takuma_store::Store;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Forms groups of workers, hands out work, and keeps every run's state in an object store.
#[derive(Debug, Parser)]
#[command(name = "takuma-coordinator", version)]
struct Arguments {
    /// Address for workers and clients; port 0 takes a free one.
    #[arg(long, env = "TAKUMA_LISTEN", default_value = "127.0.0.1:7070")]
    listen: String,
    /// Folder or object store that holds the runs: file:///folder, s3://bucket/folder, ...
    #[arg(long, env = "TAKUMA_STORE")]
    store: String,
    /// A worker that is silent for so long is lost.
    #[arg(long, env = "TAKUMA_HEARTBEAT_TIMEOUT_MS", default_value_t = 5_000,
          value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    heartbeat_timeout_ms: u64,
    /// Wait until the coordinator that works on this store ends, then take over its runs.
    #[arg(long, env = "TAKUMA_STANDBY")]
    standby: bool,
    /// A coordinator that does not renew its lease on the store for so long has lost it.
    #[arg(long, env = "TAKUMA_LEASE_MS", default_value_t = 10_000,
          value_parser = clap::value_parser!(u64).range(1_000..=600_000))]
    lease_ms: u64,
    /// Form of the log lines on standard error.
    #[arg(long, env = "TAKUMA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Write the address that is really listened on to this file.
    #[arg(long, env = "TAKUMA_ADDRESS_FILE")]
    address_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_logging(arguments.log_format);
    match serve(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::debug!("{error:?}");
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// One sentence for a person. The program's own errors hold their causes in their words.
#[allow(clippy::print_stderr)]
fn report(error: &anyhow::Error) {
    eprintln!("error: {error}");
}

fn start_logging(format: LogFormat) {
    // h2 and hyper tell of every frame at debug.
    let default = "info,h2=warn,hyper=warn,tower=warn,object_store=warn";
    let filter = EnvFilter::try_from_env("TAKUMA_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            logs.with_target(false).with_ansi(color).init();
        }
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
}

async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    stop_on_signals(&shutdown).context("cannot listen for signals")?;
    let store = Store::open(&arguments.store)?;
    let url = store.url().to_owned();
    // A standby binds only when it works, so that workers find nobody at its address before.
    let bound =
        if arguments.standby { None } else { Some(takuma_coordinator::bind(&arguments.listen).await?) };
    let address = bound.as_ref().map_or_else(|| arguments.listen.clone(), |(_, address)| address.to_string());
    let holder = Holder::here(address)?;
    let term = Duration::from_millis(arguments.lease_ms);
    let mut lease = tokio::select! {
        lease = Lease::acquire(&store, holder, term, arguments.standby) => lease?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (listener, address) = match bound {
        Some(bound) => bound,
        None => takuma_coordinator::bind(&arguments.listen).await?,
    };
    let heartbeat_timeout_ms = arguments.heartbeat_timeout_ms;
    let options = Options { heartbeat_timeout_ms, ..Options::default() };
    let guarded = lease.guard();
    let working = async {
        let coordinator = Coordinator::open(guarded, options).await?;
        if let Some(path) = &arguments.address_file {
            write_address(path, &address.to_string())?;
        }
        tracing::info!(store = url, "listening on {address}");
        coordinator.serve(listener, shutdown).await?;
        Ok::<_, anyhow::Error>(())
    };
    tokio::select! {
        worked = working => worked?,
        () = lease.keep() => anyhow::bail!("another coordinator has taken over the store {url}; this one ends"),
    }
    lease.release().await;
    tracing::info!("stopped");
    Ok(())
}

/// Written aside and renamed: whoever waits for the file never reads half an address.
fn write_address(path: &std::path::Path, address: &str) -> anyhow::Result<()> {
    let aside = path.with_extension("part");
    let written = std::fs::write(&aside, address).and_then(|()| std::fs::rename(&aside, path));
    written.map_err(|error| anyhow::anyhow!("cannot write the address to {}: {error}", path.display()))
}

fn stop_on_signals(shutdown: &CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = shutdown.clone();
    // Named: signals. Lives as long as the process.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: no new work is taken, the runs' state is being stored");
        shutdown.cancel();
    });
    Ok(())
}
