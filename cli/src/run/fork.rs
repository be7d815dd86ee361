//! `run fork`: a new run that starts from another run's checkpoint.

use takuma_core::config::RunConfig;
use takuma_proto::v1::ListCheckpointsRequest;

use super::submit::{LaunchArgs, Origin};
use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::settings::{self, Layer};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A fork goes on with the images and the noise of its origin: it keeps recipe, data, global_batch and seed. Everything
else may be set anew.

Examples:
  takuma run fork calm-otter-3@500 --set learning_rate=0.0001 --name slower
  takuma run fork calm-otter-3 --set steps=12660 -d -y          from the newest checkpoint, twice as long")]
pub(super) struct ForkArgs {
    /// The run, or the beginning of its name, and the step of its checkpoint [default: the newest]
    #[arg(value_name = "RUN[@STEP]")]
    origin: String,
    /// A setting that differs from the origin's; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    launch: LaunchArgs,
}

pub(super) async fn fork(args: ForkArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    let (run, step) = parse(&args.origin)?;
    let pairs = Layer::from_pairs(&args.set)?;
    args.launch.check_terminal()?;
    let (client, _) = Client::connect(at.address()?).await?;
    let run = client.run(run).await?;
    let unreadable = |error: takuma_core::config::ConfigError| {
        CliError::failed(format!("the settings of run {} came damaged: {error}; update takuma", run.name))
    };
    let before = RunConfig::from_json(&run.config_json).map_err(unreadable)?;
    let config = settings::resolve(&[Layer::from_config(&before, format!("of run {}", run.name)), pairs])?;
    let step = match step {
        Some(step) => step,
        None => newest(&client, &run.name).await?,
    };
    args.launch.launch(&client, &config, Origin { run: run.name, step }).await
}

/// `calm-otter-3@500` into its parts.
fn parse(origin: &str) -> Result<(&str, Option<u64>), CliError> {
    let Some((run, step)) = origin.split_once('@') else { return Ok((origin, None)) };
    let step = step.parse().map_err(|_| {
        CliError::Usage(format!(
            "'{origin}' is no checkpoint: '{step}' is no step; write RUN@STEP, for example calm-otter-3@500"
        ))
    })?;
    Ok((run, Some(step)))
}

async fn newest(client: &Client, run: &str) -> Result<u64, CliError> {
    let request = ListCheckpointsRequest { run: run.to_owned() };
    let checkpoints = client.call(client.control().list_checkpoints(request)).await?.checkpoints;
    checkpoints.iter().map(|checkpoint| checkpoint.step).max().ok_or_else(|| {
        CliError::failed(format!(
            "run {run} has no checkpoint yet to start from; 'takuma run stop {run}' writes one"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_is_a_run_with_or_without_a_step() {
        assert_eq!(parse("calm@500").unwrap(), ("calm", Some(500)));
        assert_eq!(parse("calm").unwrap(), ("calm", None));
        let error = parse("calm@last").unwrap_err().to_string();
        assert!(error.contains("'last' is no step; write RUN@STEP"), "{error}");
    }
}
