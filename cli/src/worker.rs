//! `takuma worker`: who is connected.

use clap::{Args, Subcommand};
use takuma_proto::v1::{ListWorkersRequest, WorkerView};

use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::json::WorkerJson;
use crate::output::{self, Format, OutputArgs, Table, Tone};

/// `takuma worker`, alone: `worker ls`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct WorkerArgs {
    #[command(flatten)]
    coordinator: CoordinatorArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(subcommand)]
    verb: Option<WorkerVerb>,
}

#[derive(Debug, Subcommand)]
enum WorkerVerb {
    /// List workers, with what they do and where their time goes
    #[command(visible_alias = "list")]
    Ls(OutputArgs),
}

/// Runs `takuma worker ...`.
///
/// # Errors
/// The coordinator refuses or cannot be reached.
pub async fn run(args: WorkerArgs) -> Result<Exit, CliError> {
    let WorkerVerb::Ls(output) = args.verb.unwrap_or(WorkerVerb::Ls(args.output));
    let (client, _) = Client::connect(args.coordinator.address()?).await?;
    let workers = client.call(client.control().list_workers(ListWorkersRequest {})).await?.workers;
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
