//! `takuma-s3`: the S3 server of the tests and of `deploy/compose.yaml`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use takuma_s3::Settings;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A small S3 server for tests and trials. Conditional writes are atomic; nothing is replicated.
#[derive(Parser)]
#[command(name = "takuma-s3", version)]
struct Arguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9000")]
    listen: String,
    /// The folder to keep buckets in.
    #[arg(long, value_name = "DIR")]
    root: PathBuf,
    /// A bucket to make at the start; may be given several times.
    #[arg(long, value_name = "NAME", default_value = "takuma")]
    bucket: Vec<String>,
    /// A file to write the address to, once the server listens.
    #[arg(long, value_name = "FILE")]
    address_file: Option<PathBuf>,
    /// The access key that is let in.
    #[arg(long, env = "AWS_ACCESS_KEY_ID", value_name = "KEY")]
    access_key: String,
    /// Its secret; better given by the environment, where other users cannot read it.
    #[arg(long, env = "AWS_SECRET_ACCESS_KEY", value_name = "SECRET", hide_env_values = true)]
    secret_key: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run(Arguments::parse()).await else { return ExitCode::SUCCESS };
    // Nobody is left to tell when standard error is closed.
    writeln!(std::io::stderr(), "error: {error:#}").ok();
    ExitCode::FAILURE
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    let stop = CancellationToken::new();
    stop_on_signals(stop.clone())?;
    let listener = TcpListener::bind(&arguments.listen).await.with_context(|| {
        format!("cannot listen on {}; choose another port with --listen", arguments.listen)
    })?;
    let address = listener.local_addr().context("cannot read the address back")?.to_string();
    if let Some(file) = &arguments.address_file {
        write_whole(file, &address).with_context(|| format!("cannot write {}", file.display()))?;
    }
    writeln!(std::io::stdout(), "listening on {address}").context("cannot write to standard output")?;

    let settings = Settings {
        root: arguments.root,
        buckets: arguments.bucket,
        access_key: arguments.access_key,
        secret_key: arguments.secret_key,
        fenced: true,
    };
    takuma_s3::serve(listener, &settings, stop).await.context("cannot start")
}

/// Cancels `stop` at the first SIGINT or SIGTERM.
fn stop_on_signals(stop: CancellationToken) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    // Lives as long as the process.
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
    });
    Ok(())
}

/// Writes a file that readers see whole or not at all.
fn write_whole(file: &Path, content: &str) -> std::io::Result<()> {
    let half = file.with_extension("part");
    std::fs::write(&half, content)?;
    std::fs::rename(half, file)
}
