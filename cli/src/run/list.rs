//! `run ls` and `run show`.

use takuma_proto::v1::{ListRunsRequest, RunStatus, RunView};

use super::RunName;
use crate::client::{Client, status_name};
use crate::error::{CliError, Exit};
use crate::json::RunJson;
use crate::output::{self, Format, OutputArgs, Table, Tone};
use crate::progress;

#[derive(Debug, clap::Args)]
pub(super) struct ShowArgs {
    #[command(flatten)]
    name: RunName,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn ls(client: &Client, format: Format) -> Result<Exit, CliError> {
    let runs = client.call(client.control().list_runs(ListRunsRequest {})).await?.runs;
    if format == Format::Json {
        output::print_json(&runs.iter().map(RunJson::from).collect::<Vec<_>>())?;
    } else if runs.is_empty() {
        output::message("no runs yet; start one with 'takuma run submit dcgan-celeba --data URL'");
    } else {
        output::print_table(&table(&runs, format, output::now_unix_s()))?;
    }
    Ok(Exit::Success)
}

fn table(runs: &[RunView], format: Format, now_unix_s: f64) -> Table {
    let short = ["NAME", "STATUS", "PROGRESS", "ETA", "WORKERS", "IT/S", "AGE"];
    let more = ["RECIPE", "BATCH", "D_LOSS", "G_LOSS", "CHECKPOINT", "WAITS FOR", "DATA"];
    let wide = format == Format::Wide;
    let headers: Vec<_> = short.into_iter().chain(more.into_iter().filter(|_| wide)).collect();
    let mut table = Table::new(&headers);
    for run in runs {
        let plain = |text: String| (text, Tone::Plain);
        let number =
            |value: Option<f64>| plain(value.map_or_else(String::new, |value| format!("{value:.3}")));
        let mut row = vec![
            (run.name.clone(), Tone::Name),
            (status_name(run.status()).to_owned(), tone(run.status())),
            plain(progress::position(run)),
            plain(run.eta_s.map_or_else(String::new, output::duration)),
            plain(run.workers.to_string()),
            plain(progress::speed(run).unwrap_or_default()),
            plain(output::duration((now_unix_s - run.created_unix_s).max(0.0))),
        ];
        if wide {
            let checkpoint = if run.has_checkpoint { run.checkpoint_step.to_string() } else { String::new() };
            row.extend([
                plain(run.recipe.clone()),
                plain(run.global_batch.to_string()),
                number(run.d_loss),
                number(run.g_loss),
                plain(checkpoint),
                plain(run.waiting_for.clone()),
                plain(run.data.clone()),
            ]);
        }
        table.row(row);
    }
    table
}

fn tone(status: RunStatus) -> Tone {
    match status {
        RunStatus::Running | RunStatus::Succeeded => Tone::Good,
        RunStatus::Queued
        | RunStatus::Preparing
        | RunStatus::Stopping
        | RunStatus::Stopped
        | RunStatus::Waiting => Tone::Warning,
        RunStatus::Failed => Tone::Bad,
        RunStatus::Unspecified => Tone::Faint,
    }
}

pub(super) async fn show(client: &Client, args: ShowArgs) -> Result<Exit, CliError> {
    let run = client.run(&args.name.run).await?;
    match args.output.format {
        Format::Json => output::print_json(&RunJson::from(&run))?,
        format => {
            for (key, value, tone) in details(&run, format) {
                output::print_line(&format!("{key:<12}{}", tone.stdout(&output::visible(&value))))?;
            }
        }
    }
    Ok(Exit::Success)
}

/// Name, value and tone of everything that is known about a run.
fn details(run: &RunView, format: Format) -> Vec<(&'static str, String, Tone)> {
    let plain = |key, value: String| (key, value, Tone::Plain);
    let mut lines = vec![
        ("name", run.name.clone(), Tone::Name),
        ("status", status_name(run.status()).to_owned(), tone(run.status())),
        ("error", run.error.clone(), Tone::Bad),
        plain("waits", progress::waiting(run).unwrap_or_default()),
        plain("recipe", run.recipe.clone()),
        plain("forked from", run.origin.clone()),
        plain(
            "exact",
            if run.exact { "the same bits whatever workers train".to_owned() } else { String::new() },
        ),
        plain("progress", format!("{}, epoch {}", progress::position(run), run.epoch + 1)),
        plain("pace", progress::pace(run)),
        plain("images/s", run.images_per_s.map_or_else(String::new, |speed| format!("{speed:.0}"))),
        plain("losses", progress::losses(run)),
        plain("time", progress::time_split(run)),
        plain("trained", output::duration(run.elapsed_s)),
        plain("workers", run.workers.to_string()),
        plain("batch", format!("{} images over all workers", run.global_batch)),
        plain("seed", run.seed.to_string()),
        plain(
            "checkpoint",
            if run.has_checkpoint { format!("step {}", run.checkpoint_step) } else { String::new() },
        ),
        plain("weights", run.weights_sha256.clone()),
        plain("data", run.data.clone()),
        plain("store", run.store.clone()),
        plain("submitted", output::timestamp(run.created_unix_s)),
    ];
    if format == Format::Wide {
        lines.push(plain("id", run.id.clone()));
        lines.push(plain("generation", run.generation.to_string()));
        lines.push(plain("config", run.config_json.clone()));
    }
    lines.retain(|(_, value, _)| !value.is_empty());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> RunView {
        RunView {
            name: "calm-otter-3".into(),
            status: RunStatus::Running.into(),
            step: 150,
            steps: 300,
            workers: 2,
            eta_s: Some(130.0),
            mean_step_s: Some(0.5),
            created_unix_s: 1_000.0,
            ..RunView::default()
        }
    }

    #[test]
    fn list_has_the_documented_columns() {
        console::set_colors_enabled(false);
        assert_eq!(
            table(&[run()], Format::Table, 1_300.0).lines(),
            [
                "NAME          STATUS   PROGRESS     ETA    WORKERS  IT/S  AGE",
                "calm-otter-3  running  150/300 50%  2m10s  2        2.00  5m00s",
            ]
        );
    }

    #[test]
    fn wide_list_adds_columns_and_keeps_the_others() {
        console::set_colors_enabled(false);
        let lines = table(&[run()], Format::Wide, 1_300.0).lines();
        assert!(
            lines[0].starts_with("NAME          STATUS") && lines[0].contains("CHECKPOINT"),
            "{}",
            lines[0]
        );
    }

    #[test]
    fn details_leave_out_what_is_not_known() {
        let keys: Vec<_> = details(&run(), Format::Table).into_iter().map(|(key, ..)| key).collect();
        assert!(
            keys.contains(&"progress") && !keys.contains(&"error") && !keys.contains(&"weights"),
            "{keys:?}"
        );
    }
}
