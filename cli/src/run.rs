//! `takuma run`: submit, look at, stop and resume runs.

mod audit;
mod control;
mod fork;
mod list;
mod logs;
mod plan;
mod submit;

use clap::{Args, Subcommand};

use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::output::{ListArgs, OutputArgs};

pub use plan::describe as describe_plan;
pub use submit::submit_config;

/// `takuma run`, alone: `run ls`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    list: ListArgs,
    #[command(subcommand)]
    verb: Option<RunVerb>,
}

/// What is done with runs.
#[derive(Debug, Subcommand)]
enum RunVerb {
    /// Start a run, after showing what it will do, and follow it
    Submit(Box<submit::SubmitArgs>),
    /// List runs, newest first
    #[command(visible_alias = "list")]
    Ls(OutputArgs),
    /// Show everything about one run
    #[command(
        visible_alias = "get",
        after_help = "Examples:\n  takuma run show calm-otter-3\n  takuma run show calm -o json"
    )]
    Show(list::ShowArgs),
    /// Follow a run's progress; Ctrl-C detaches, the run goes on
    #[command(visible_alias = "attach")]
    Watch(RunName),
    /// Print what the workers logged
    #[command(
        after_help = "Examples:\n  takuma run logs calm-otter-3 -f\n  takuma run logs calm-otter-3 --rank 1 --level warn --tail 50"
    )]
    Logs(logs::LogsArgs),
    /// Stop a run at its next step, with a checkpoint to resume from
    Stop(control::StopArgs),
    /// Go on with a stopped or failed run from its newest checkpoint, and follow it
    Resume(control::ResumeArgs),
    /// Start a new run from another run's checkpoint, and follow it
    Fork(fork::ForkArgs),
    /// Check that every step was fed the images that were due: exit 1 if not
    Audit(audit::AuditArgs),
    /// Wait until a run has ended: exit 0 if it succeeded, 1 if it failed or was stopped
    Wait(control::WaitArgs),
}

/// A run on the command line.
#[derive(Debug, Args)]
struct RunName {
    /// The run's name, or the beginning of it
    #[arg(value_name = "RUN")]
    run: String,
}

/// Runs `takuma run ...`.
///
/// # Errors
/// As the verb.
pub async fn run(args: RunArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    // Wrong settings are told before a coordinator is asked for.
    let list = args.list.settle(args.verb.is_some())?;
    let verb = match args.verb.unwrap_or(RunVerb::Ls(list)) {
        RunVerb::Submit(submit) => return submit::submit(*submit, at).await,
        RunVerb::Fork(fork) => return fork::fork(fork, at).await,
        verb => verb,
    };
    let (client, _) = Client::connect(at.address()?).await?;
    match verb {
        RunVerb::Submit(_) | RunVerb::Fork(_) => unreachable!("handled before connecting"),
        RunVerb::Audit(audit) => audit::audit(&client, audit).await,
        RunVerb::Ls(output) => list::ls(&client, output.format).await,
        RunVerb::Show(show) => list::show(&client, show).await,
        RunVerb::Watch(name) => control::watch(&client, &name.run).await,
        RunVerb::Logs(logs) => logs::logs(&client, logs).await,
        RunVerb::Stop(stop) => control::stop(&client, stop).await,
        RunVerb::Resume(resume) => control::resume(&client, resume).await,
        RunVerb::Wait(wait) => control::wait(&client, wait).await,
    }
}
