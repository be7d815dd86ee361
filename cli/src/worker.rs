//! `takuma worker`: who is connected, and who is to get no more work.

use std::time::Duration;

use clap::{Args, Subcommand};
use takuma_proto::v1::{DrainWorkerRequest, ListWorkersRequest, WorkerView};

use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::json::WorkerJson;
use crate::output::{self, Format, ListArgs, OutputArgs, Table, Tone};

/// `takuma worker`, alone: `worker ls`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    list: ListArgs,
    #[command(subcommand)]
    verb: Option<WorkerVerb>,
}

#[derive(Debug, Subcommand)]
enum WorkerVerb {
    /// List workers, with what they do and where their time goes
    #[command(visible_alias = "list")]
    Ls(OutputArgs),
    /// Give a worker no more work: its run goes on without it after a step, and nothing is lost
    #[command(after_help = "\
A drained worker stays connected and idle until its process ends. A new process under its name gets work again, and so
does every worker after a restart of the coordinator.

Examples:
  takuma worker drain worker-2
  takuma worker drain worker-2 --no-wait")]
    Drain(DrainArgs),
}

#[derive(Debug, Args)]
struct DrainArgs {
    /// The worker's full name; 'takuma worker ls' lists them
    name: String,
    /// Only ask for it; do not wait until the worker is out of its run
    #[arg(long)]
    no_wait: bool,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// A change takes a step or two; a person does not see a fifth of a second.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Runs `takuma worker ...`.
///
/// # Errors
/// The coordinator refuses or cannot be reached.
pub async fn run(args: WorkerArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    let list = args.list.settle(args.verb.is_some())?;
    let (client, _) = Client::connect(at.address()?).await?;
    match args.verb.unwrap_or(WorkerVerb::Ls(list)) {
        WorkerVerb::Ls(output) => ls(&client, output).await,
        WorkerVerb::Drain(drain_args) => drain(&client, drain_args).await,
    }
}

async fn list(client: &Client) -> Result<Vec<WorkerView>, CliError> {
    Ok(client.call(client.control().list_workers(ListWorkersRequest {})).await?.workers)
}

async fn drain(client: &Client, args: DrainArgs) -> Result<Exit, CliError> {
    let name = &args.name;
    client.call(client.control().drain_worker(DrainWorkerRequest { worker: name.clone() })).await?;
    if args.no_wait {
        output::message(&format!("worker {name} was asked to finish; 'takuma worker ls' shows when it has"));
        return Ok(Exit::Success);
    }
    let mut run = String::new();
    let out = async {
        loop {
            let workers = list(client).await?;
            let Some(worker) = workers.iter().find(|worker| worker.name == *name && worker.status != "lost")
            else {
                return Ok::<_, CliError>("is gone");
            };
            if worker.run.is_empty() {
                return Ok("is drained");
            }
            if run != worker.run {
                run.clone_from(&worker.run);
                output::message(&format!("worker {name} leaves run {run} after a step; waiting for that"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let how = tokio::time::timeout(args.timeout, out).await;
    let Ok(how) = how else {
        let limit = humantime::format_duration(args.timeout);
        return Err(CliError::failed(format!(
            "worker {name} is still part of run {run} after {limit}; 'takuma run logs {run}' may tell why, and the same \
             command waits on"
        )));
    };
    let how = how?;
    let after = if run.is_empty() { String::new() } else { format!("; run {run} goes on without it") };
    output::message(&output::visible(&format!("worker {name} {how}{after}")));
    Ok(Exit::Success)
}

async fn ls(client: &Client, output: OutputArgs) -> Result<Exit, CliError> {
    let workers = list(client).await?;
    if output.format == Format::Json {
        output::print_json(&workers.iter().map(WorkerJson::from).collect::<Vec<_>>())?;
    } else if workers.is_empty() {
        let address = &client.address().url;
        output::message(&format!("no workers; connect one with 'takuma-worker --coordinator {address}'"));
    } else {
        output::print_table(&table(&workers, output.format))?;
    }
    Ok(Exit::Success)
}

fn table(workers: &[WorkerView], format: Format) -> Table {
    let short = ["NAME", "STATUS", "RUN", "RANK", "SLOTS", "STEP", "DEVICE", "THREADS", "AGE"];
    let more = ["HOST", "PID", "COMPUTE_S", "DATA_S", "EXCHANGE_S", "HEARTBEAT"];
    let wide = format == Format::Wide;
    let headers: Vec<_> = short.into_iter().chain(more.into_iter().filter(|_| wide)).collect();
    let mut table = Table::new(&headers);
    for worker in workers {
        let json = WorkerJson::from(worker);
        let plain = |text: String| (text, Tone::Plain);
        let seconds =
            |value: Option<f32>| (value.map_or_else(String::new, |s| format!("{s:.3}")), Tone::Plain);
        let tone = match worker.status.as_str() {
            "lost" => Tone::Bad,
            "training" => Tone::Good,
            "leaving" | "drained" => Tone::Warning,
            _ => Tone::Plain,
        };
        let mut row = vec![
            (worker.name.clone(), Tone::Name),
            (worker.status.clone(), tone),
            plain(worker.run.clone()),
            plain(json.rank.map_or_else(String::new, |rank| rank.to_string())),
            plain(json.slot_count.map_or_else(String::new, |slots| slots.to_string())),
            plain(json.step.map_or_else(String::new, |step| step.to_string())),
            plain(worker.device.clone()),
            plain(worker.threads.to_string()),
            plain(output::duration(worker.connected_s)),
        ];
        if wide {
            row.extend([
                plain(worker.host.clone()),
                plain(worker.pid.to_string()),
                seconds(json.compute_s),
                seconds(json.data_s),
                seconds(json.exchange_s),
                plain(format!("{:.1}s ago", worker.heartbeat_age_s)),
            ]);
        }
        table.row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_worker_has_dashes_where_there_is_no_run() {
        console::set_colors_enabled(false);
        let worker = WorkerView {
            name: "worker-1".into(),
            status: "idle".into(),
            device: "cpu".into(),
            threads: 2,
            rank: -1,
            connected_s: 61.0,
            ..WorkerView::default()
        };
        assert_eq!(
            table(&[worker], Format::Table).lines(),
            [
                "NAME      STATUS  RUN  RANK  SLOTS  STEP  DEVICE  THREADS  AGE",
                "worker-1  idle    -    -     -      -     cpu     2        1m01s",
            ]
        );
    }
}
