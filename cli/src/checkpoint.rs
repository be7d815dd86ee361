//! `takuma checkpoint`: what a run can be resumed from.

use clap::{Args, Subcommand};
use takuma_proto::v1::ListCheckpointsRequest;

use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::json::CheckpointJson;
use crate::output::{self, Format, OutputArgs, Table, Tone};

/// `takuma checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    #[command(flatten)]
    coordinator: CoordinatorArgs,
    #[command(subcommand)]
    verb: CheckpointVerb,
}

#[derive(Debug, Subcommand)]
enum CheckpointVerb {
    /// List a run's checkpoints, by step
    #[command(visible_alias = "list")]
    Ls {
        /// The run's name, or the beginning of it
        run: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Runs `takuma checkpoint ...`.
///
/// # Errors
/// There is no such run, or the coordinator cannot be reached.
pub async fn run(args: CheckpointArgs) -> Result<Exit, CliError> {
    let CheckpointVerb::Ls { run, output } = args.verb;
    let (client, _) = Client::connect(args.coordinator.address()?).await?;
    let request = ListCheckpointsRequest { run: run.clone() };
    let checkpoints = client.call(client.control().list_checkpoints(request)).await?.checkpoints;
    if output.format == Format::Json {
        output::print_json(&checkpoints.iter().map(CheckpointJson::from).collect::<Vec<_>>())?;
        return Ok(Exit::Success);
    }
    if checkpoints.is_empty() {
        output::message(&format!("run {run} has no checkpoint yet"));
        return Ok(Exit::Success);
    }
    let wide = output.format == Format::Wide;
    let headers = ["STEP", "SIZE", "AGE", "URL", "WEIGHTS_SHA256"];
    let mut table = Table::new(&headers[..if wide { 5 } else { 4 }]);
    for checkpoint in &checkpoints {
        let age_s = (output::now_unix_s() - checkpoint.created_unix_s).max(0.0);
        let mut row = vec![
            (checkpoint.step.to_string(), Tone::Name),
            (output::bytes(checkpoint.size_bytes), Tone::Plain),
            (output::duration(age_s), Tone::Plain),
            (checkpoint.url.clone(), Tone::Plain),
        ];
        if wide {
            row.push((checkpoint.weights_sha256.clone(), Tone::Plain));
        }
        table.row(row);
    }
    output::print_table(&table)?;
    Ok(Exit::Success)
}
