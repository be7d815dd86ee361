//! `takuma demo --chaos`: the same exact run twice, the second time with a worker and the coordinator killed.

use std::time::Duration;

use takuma_core::config::RunConfig;
use takuma_proto::v1::{RunStatus, RunView};

use crate::attach::{self, Ended};
use crate::client::{Client, has_ended};
use crate::error::{CliError, Exit};
use crate::local::LocalCluster;
use crate::output::{self, Tone};
use crate::progress::Screen;
use crate::run::submit_config;

/// Long enough that whoever was killed is back before the end.
pub const STEPS: u64 = 300;
/// The one that is killed.
const VICTIM: &str = "worker-2";
/// How long the run is without a coordinator.
const HEADLESS: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Trains twice and compares.
///
/// # Errors
/// A run failed, or the two differ.
pub async fn run(cluster: &mut LocalCluster, config: &RunConfig) -> Result<Exit, CliError> {
    output::message("first       the run with nothing in its way");
    let calm = train(cluster, config, false).await?;
    output::message("second      the same run; a worker and the coordinator are killed");
    let stormy = train(cluster, config, true).await?;
    for (name, run) in [("calm", &calm), ("stormy", &stormy)] {
        let line =
            format!("{} {} steps in {}", run.weights_sha256, run.step, output::duration(run.elapsed_s));
        output::print_line(&format!("{}{line}", Tone::Name.stdout(&format!("{name:<12}"))))?;
    }
    if calm.weights_sha256.is_empty() || calm.weights_sha256 != stormy.weights_sha256 {
        return Err(CliError::failed(format!(
            "the two runs differ; 'takuma run show' and the logs of {} and {} may tell why",
            calm.name, stormy.name
        )));
    }
    output::message("the same weights, to the bit");
    Ok(Exit::Success)
}

/// One run to its end.
async fn train(cluster: &mut LocalCluster, config: &RunConfig, storm: bool) -> Result<RunView, CliError> {
    let client = cluster.client().clone();
    let (run, _) = submit_config(&client, config, "", false).await?;
    let mut screen = Screen::stderr();
    let follow = attach::follow(&client, &run.name, &mut screen);
    let trouble = async {
        if storm {
            strike(cluster, &client, &run).await?;
        }
        // What is left is the run's.
        std::future::pending::<Result<Ended, CliError>>().await
    };
    let ended = tokio::select! {
        ended = follow => ended?,
        failed = trouble => failed?,
    };
    match ended {
        Ended::Run(run) if run.status() == RunStatus::Succeeded => Ok(*run),
        Ended::Run(run) => {
            Err(CliError::failed(format!("run {} ended: {}", run.name, output::visible(&run.error))))
        }
        Ended::Detached => Err(CliError::Interrupted("interrupted".to_owned())),
    }
}

/// Kills a worker after a quarter of the run and the coordinator at its half, and brings both back.
async fn strike(cluster: &mut LocalCluster, client: &Client, run: &RunView) -> Result<(), CliError> {
    reach(client, run, run.steps / 4).await?;
    output::message(&Tone::Bad.stderr(&format!("kill -9 {VICTIM}")));
    cluster.kill_worker(VICTIM).await?;
    reach(client, run, run.steps * 2 / 5).await?;
    output::message(&Tone::Good.stderr(&format!("{VICTIM} comes back")));
    cluster.start_worker(VICTIM)?;
    reach(client, run, run.steps * 3 / 5).await?;
    output::message(&Tone::Bad.stderr("kill -9 coordinator"));
    cluster.kill_coordinator().await?;
    tokio::time::sleep(HEADLESS).await;
    output::message(&Tone::Good.stderr("the coordinator comes back; the workers never stopped"));
    cluster.restart_coordinator().await
}

/// Waits until the run has finished `step` steps.
async fn reach(client: &Client, run: &RunView, step: u64) -> Result<(), CliError> {
    loop {
        let now = client.run(&run.name).await?;
        if now.step >= step || has_ended(&now) {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
