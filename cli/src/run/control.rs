//! `run watch`, `stop`, `resume` and `wait`.

use std::time::Duration;

use takuma_proto::v1::{ResumeRunRequest, RunStatus, RunView, StopRunRequest};

use super::RunName;
use super::submit::{detached, follow_to_end};
use crate::attach::{self, RECONNECT_FOR, Watch};
use crate::client::{Client, has_ended, status_name};
use crate::error::{CliError, Exit};
use crate::json::RunJson;
use crate::output::{self, Format, OutputArgs};
use crate::progress::{self, Screen};

#[derive(Debug, clap::Args)]
pub(super) struct StopArgs {
    #[command(flatten)]
    name: RunName,
    /// Only ask for the stop; do not wait for the checkpoint
    #[arg(long)]
    no_wait: bool,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

#[derive(Debug, clap::Args)]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    name: RunName,
    /// Return at once and print the run's name
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct WaitArgs {
    #[command(flatten)]
    name: RunName,
    /// Give up after this time and exit 1: 90s, 10m, 2h [default: as long as it takes]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn watch(client: &Client, run: &str) -> Result<Exit, CliError> {
    let name = client.run(run).await?.name;
    follow_to_end(client, &name, Format::Table, false).await
}

pub(super) async fn stop(client: &Client, args: StopArgs) -> Result<Exit, CliError> {
    let request = StopRunRequest { run: args.name.run };
    let run = client.call(client.control().stop_run(request)).await?;
    if args.no_wait {
        output::message(&format!("run {} was asked to stop", run.name));
        return Ok(Exit::Success);
    }
    let run = if has_ended(&run) { run } else { until_ended(client, &run.name, Some(args.timeout)).await? };
    let name = &run.name;
    match run.status() {
        RunStatus::Stopped => {
            let kept = if run.has_checkpoint {
                format!("with a checkpoint at step {}", run.checkpoint_step)
            } else {
                "before its first checkpoint".to_owned()
            };
            output::message(&format!("run {name} is stopped at {} {kept}", progress::position(&run)));
            attach::next_commands(name, &["run resume {}", "sample download {}"]);
            Ok(Exit::Success)
        }
        RunStatus::Succeeded => {
            output::message(&format!("run {name} reached its last step before it could be stopped"));
            Ok(Exit::Success)
        }
        _ => attach::conclude(&run),
    }
}

pub(super) async fn resume(client: &Client, args: ResumeArgs) -> Result<Exit, CliError> {
    let request = ResumeRunRequest { run: args.name.run };
    let run = client.call(client.control().resume_run(request)).await?;
    if args.detach {
        return detached(&run, args.output.format);
    }
    output::message(&format!("run {} goes on from step {}; Ctrl-C detaches", run.name, run.step));
    follow_to_end(client, &run.name, args.output.format, false).await
}

pub(super) async fn wait(client: &Client, args: WaitArgs) -> Result<Exit, CliError> {
    let name = client.run(&args.name.run).await?.name;
    let run = until_ended(client, &name, args.timeout).await?;
    if args.output.format == Format::Json {
        output::print_json(&RunJson::from(&run))?;
    }
    attach::conclude(&run)
}

/// The run's last state, or an error that tells the present one when the time is up.
async fn until_ended(client: &Client, name: &str, timeout: Option<Duration>) -> Result<RunView, CliError> {
    let screen = Screen::stderr();
    let mut watch = Watch::new(client, name, RECONNECT_FOR);
    let mut seen: Option<RunView> = None;
    let ended = async {
        loop {
            if let Some(run) = watch.next(&screen).await?.run {
                if has_ended(&run) {
                    return Ok(run);
                }
                seen = Some(run);
            }
        }
    };
    let Some(limit) = timeout else { return ended.await };
    if let Ok(result) = tokio::time::timeout(limit, ended).await {
        return result;
    }
    let state = seen.map_or_else(
        || "its state is not known".to_owned(),
        |run| format!("it is {} at step {}", status_name(run.status()), progress::position(&run)),
    );
    let limit = humantime::format_duration(limit);
    Err(CliError::failed(format!(
        "run {name} has not ended within {limit}: {state}; wait longer with 'takuma run wait {name}'"
    )))
}
