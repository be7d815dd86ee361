//! The command `takuma`, as a library so that tests can reach its parts.
//!
//! One module a noun. Talks to the coordinator over gRPC and to stores for datasets; never links libtorch.

pub mod attach;
mod chaos;
pub mod checkpoint;
pub mod client;
pub mod context;
pub mod dataset;
pub mod demo;
pub mod devices;
pub mod doctor;
pub mod error;
pub mod json;
pub mod local;
pub mod object;
pub mod output;
pub mod progress;
pub mod run;
pub mod sample;
pub mod settings;
pub mod up;
pub mod worker;

use std::ffi::OsString;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use error::{CliError, Exit};

/// Trains image generators on many machines at once.
#[derive(Debug, Parser)]
#[command(
    name = "takuma",
    version,
    about = "Trains image generators on many machines at once",
    after_help = "\
Start here:
  takuma demo                  pictures in a few minutes, nothing needed
  takuma up --workers 2        a cluster on this machine; then, in another terminal:
  takuma run submit dcgan-celeba --data ./celeba

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 coordinator unreachable."
)]
pub struct Cli {
    #[command(flatten)]
    coordinator: context::CoordinatorArgs,
    #[command(subcommand)]
    command: Command,
}

// Boxed where the arguments are many: one of these exists a process, but clippy cannot know.
#[derive(Debug, Subcommand)]
enum Command {
    /// Draw faces, start a local cluster, train a little, show where the pictures are
    Demo(demo::DemoArgs),
    /// Start a coordinator and workers on this machine
    Up(up::UpArgs),
    /// Prepare, draw, inspect and verify datasets
    Dataset(Box<dataset::DatasetArgs>),
    /// Submit, list, follow, stop, resume, fork and audit runs
    Run(Box<run::RunArgs>),
    /// List and download a run's pictures
    Sample(sample::SampleArgs),
    /// List, verify and download a run's checkpoints
    Checkpoint(checkpoint::CheckpointArgs),
    /// List and drain the connected workers
    Worker(worker::WorkerArgs),
    /// Look over this machine and the cluster, and say what is wrong and what to do
    Doctor(doctor::DoctorArgs),
    /// Print the completion script of a shell
    #[command(
        after_help = "Example:\n  takuma completions bash > ~/.local/share/bash-completion/completions/takuma"
    )]
    Completions {
        /// Of which shell
        shell: Shell,
    },
}

/// Runs the command line and returns how the process should end.
pub fn main_with(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    output::settle_colours();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and they are no wrong usage. A closed output is none either.
            error.print().ok();
            return if error.use_stderr() { Exit::Usage } else { Exit::Success };
        }
    };
    if let Some(endpoint) = cli.endpoint() {
        for variable in ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"] {
            // SAFETY: no other thread exists yet; the runtime below is the first to start any.
            unsafe { std::env::set_var(variable, endpoint) };
        }
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&CliError::io("start the program's threads", error)),
    };
    // On this thread: `local` ties its children's life to it.
    let result = runtime.block_on(cli.run());
    // What still blocks (a read of the terminal) must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit,
        Err(error) => report(&error),
    }
}

impl Command {
    /// The name of a command that has no use for a coordinator's address.
    fn works_alone(&self) -> Option<&'static str> {
        match self {
            Self::Demo(_) => Some("demo"),
            Self::Up(_) => Some("up"),
            Self::Dataset(_) => Some("dataset"),
            Self::Completions { .. } => Some("completions"),
            Self::Run(_) | Self::Sample(_) | Self::Checkpoint(_) | Self::Worker(_) | Self::Doctor(_) => None,
        }
    }
}

impl Cli {
    fn endpoint(&self) -> Option<&str> {
        match &self.command {
            Command::Dataset(args) => args.endpoint(),
            Command::Up(args) => args.endpoint(),
            Command::Doctor(args) => args.endpoint(),
            _ => None,
        }
    }

    async fn run(self) -> Result<Exit, CliError> {
        let at = &self.coordinator;
        if let (Some(given), Some(noun)) = (&at.coordinator, self.command.works_alone()) {
            let message = format!("'takuma {noun}' talks to no coordinator; leave --coordinator {given} out");
            return Err(CliError::Usage(message));
        }
        match self.command {
            Command::Demo(args) => demo::run(args).await,
            Command::Up(args) => up::run(args).await,
            Command::Dataset(args) => dataset::run(*args).await,
            Command::Run(args) => run::run(*args, at).await,
            Command::Sample(args) => sample::run(args, at).await,
            Command::Checkpoint(args) => checkpoint::run(args, at).await,
            Command::Worker(args) => worker::run(args, at).await,
            Command::Doctor(args) => doctor::run(args, at).await,
            Command::Completions { shell } => completions(shell),
        }
    }
}

fn completions(shell: Shell) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "takuma", &mut script);
    output::print_line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(Exit::Success)
}

/// Says the error in one sentence; with `RUST_BACKTRACE` also what lay beneath.
fn report(error: &CliError) -> Exit {
    match error {
        CliError::OutputClosed => {}
        CliError::Interrupted(text) => output::message(text),
        error => {
            output::message(&format!("{} {error}", output::Tone::Bad.stderr("error:")));
            if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| !value.is_empty() && value != "0") {
                let mut cause = std::error::Error::source(error);
                while let Some(source) = cause {
                    output::message(&format!("  caused by: {source}"));
                    cause = source.source();
                }
            }
        }
    }
    error.exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
