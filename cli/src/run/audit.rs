//! `run audit`: whether every step of a run was fed the images that were due, whatever happened to its workers.
//!
//! Each step's metrics carry a sum over what fed its slots. The same sum follows from the dataset, the seed and the
//! step alone, so the coordinator's word is not needed for it, nor that of the workers who came and went.

use serde::{Deserialize, Serialize};
use takuma_core::dataset::DatasetManifest;
use takuma_core::layout::{DATASET_MANIFEST, METRICS_FILE, RUN_FILE};
use takuma_core::record::{RunRecord, RunStatus};
use takuma_core::slots::{EpochOrder, SlotMap, SlotRange};

use super::RunName;
use crate::client::Client;
use crate::error::{CliError, Exit};
use crate::object::Reading;
use crate::output::{self, Format, OutputArgs};

/// Metrics of some ten million steps; manifests are far smaller.
const OBJECT_BYTES_MAX: u64 = 4 << 30;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  takuma run audit calm-otter-3\n  takuma run audit calm -o json")]
pub(super) struct AuditArgs {
    #[command(flatten)]
    name: RunName,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is read of a line of metrics.
#[derive(Deserialize)]
struct Line {
    step: u64,
    fed: Option<u64>,
    generation: u64,
}

/// The first thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    kind: &'static str,
    /// Of `metrics.jsonl`, from 1.
    line: u64,
    step: u64,
    message: String,
}

/// What an audit found, as `-o json` prints it.
#[derive(Debug, Serialize)]
struct AuditJson<'a> {
    run: &'a str,
    ok: bool,
    steps: u64,
    images: u64,
    first_step: u64,
    last_step: u64,
    error: Option<Finding>,
}

pub(super) async fn audit(client: &Client, args: AuditArgs) -> Result<Exit, CliError> {
    let run = client.run(&args.name.run).await?.name;
    let read =
        async |object: &str| Reading::open(client, &run, object, OBJECT_BYTES_MAX).await?.whole().await;
    let damaged = |object: &str, why: String| {
        CliError::failed(format!("{object} of run {run} cannot be read: {why}; it cannot be audited"))
    };
    let record = RunRecord::from_json(&read(RUN_FILE).await?).map_err(|why| damaged(RUN_FILE, why))?;
    let dataset: DatasetManifest = serde_json::from_slice(&read(DATASET_MANIFEST).await?)
        .map_err(|error| damaged(DATASET_MANIFEST, error.to_string()))?;
    if dataset.digest != record.dataset.digest {
        let data = &record.config.data;
        return Err(CliError::failed(format!(
            "the dataset at {data} is not the one that run {run} was trained on; it cannot be audited without that"
        )));
    }
    let slots =
        record.config.slot_map(&dataset).map_err(|error| damaged(DATASET_MANIFEST, error.to_string()))?;
    let metrics = read(METRICS_FILE).await?;
    let first_step = record.origin.as_ref().map_or(0, |origin| origin.step) + 1;
    let (last_step, finding) = check(&slots, record.config.global_batch, first_step, &metrics);
    let finding = finding.or_else(|| unfinished(&record, last_step));
    let steps = last_step + 1 - first_step;
    let images = steps * u64::from(record.config.global_batch);
    if args.output.format == Format::Json {
        let (run, ok, error) = (run.as_str(), finding.is_none(), finding.clone());
        output::print_json(&AuditJson { run, ok, steps, images, first_step, last_step, error })?;
    }
    if let Some(finding) = finding {
        return Err(CliError::failed(format!("run {run} does not pass its audit: {}", finding.message)));
    }
    if args.output.format != Format::Json {
        let (steps, images) = (output::count(steps, "step"), output::count(images, "image"));
        output::print_line(&format!("{steps}, {images}, every image of an epoch at most once: ok"))?;
    }
    Ok(Exit::Success)
}

/// The orders of the epoch that was looked at last: steps come in order, so each is computed once.
struct Due<'a> {
    slots: &'a SlotMap,
    all: SlotRange,
    orders: Vec<EpochOrder>,
}

impl Due<'_> {
    /// What the entries of all slots make at a step, 1 for the first.
    fn fed(&mut self, step: u64) -> u64 {
        let index = step - 1;
        let epoch = self.slots.epoch_of(index);
        if self.orders.first().is_none_or(|order| order.epoch() != epoch) {
            self.orders = self.slots.epoch_orders(epoch, self.all);
        }
        self.slots.fed_sum(&self.orders, index)
    }
}

/// The last step that is as it must be, and the first thing that is wrong.
fn check(slots: &SlotMap, global_batch: u32, first_step: u64, metrics: &[u8]) -> (u64, Option<Finding>) {
    let mut due = Due { slots, all: SlotRange { first: 0, count: global_batch }, orders: Vec::new() };
    let mut last = first_step - 1;
    let lines = metrics.split(|&byte| byte == b'\n').zip(1u64..).filter(|(line, _)| !line.is_empty());
    for (line, number) in lines {
        let step = last + 1;
        let found = |kind, step, message| (last, Some(Finding { kind, line: number, step, message }));
        let place = format!("line {number} of {METRICS_FILE}");
        let line: Line = match serde_json::from_slice(line) {
            Ok(line) => line,
            Err(error) => return found("unreadable_line", step, format!("{place} cannot be read: {error}")),
        };
        if line.step > step {
            let message = format!("step {step} is missing: {place} is step {}", line.step);
            return found("missing_step", step, message);
        }
        if line.step < step {
            return found("repeated_step", line.step, format!("{place} is step {} once more", line.step));
        }
        let Some(fed) = line.fed else {
            return found("no_ledger", step, format!("{place} does not tell what step {step} was fed"));
        };
        let expected = due.fed(step);
        if fed != expected {
            let generation = line.generation;
            let message = format!(
                "step {step} was fed other images than due: the ledger in {place} (generation {generation}) is {fed}, \
                 but must be {expected}"
            );
            return found("other_images", step, message);
        }
        last = step;
    }
    (last, None)
}

/// A run that has ended has metrics up to its end.
fn unfinished(record: &RunRecord, last: u64) -> Option<Finding> {
    let complete = matches!(record.status, RunStatus::Succeeded | RunStatus::Stopped);
    (complete && last < record.step).then(|| Finding {
        kind: "missing_step",
        line: 0,
        step: last + 1,
        message: format!(
            "{METRICS_FILE} ends at step {last}, but the run has finished {} steps",
            record.step
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: u32 = 4;

    fn slots() -> SlotMap {
        SlotMap::new(BATCH, 7, &[5, 5, 5, 5]).unwrap()
    }

    fn line(step: u64, fed: u64) -> String {
        format!("{{\"step\":{step},\"fed\":{fed},\"generation\":3,\"d_loss\":null}}\n")
    }

    fn lines(steps: impl IntoIterator<Item = u64>) -> String {
        steps.into_iter().map(|step| line(step, slots().expected_fed(step - 1))).collect()
    }

    fn finding(metrics: &str) -> Finding {
        check(&slots(), BATCH, 1, metrics.as_bytes()).1.expect("something is wrong")
    }

    #[test]
    fn steps_over_several_epochs_pass() {
        assert_eq!(check(&slots(), BATCH, 1, lines(1..=12).as_bytes()), (12, None));
        assert_eq!(check(&slots(), BATCH, 8, lines(8..=12).as_bytes()), (12, None), "a fork begins later");
        assert_eq!(check(&slots(), BATCH, 1, b""), (0, None));
    }

    #[test]
    fn the_first_error_is_named_with_its_place() {
        let found = finding(&lines([1, 2, 4]));
        assert_eq!((found.kind, found.line, found.step), ("missing_step", 3, 3));
        let found = finding(&lines([1, 2, 2, 3]));
        assert_eq!((found.kind, found.line, found.step), ("repeated_step", 3, 2));
        // The images of step 2 fed step 3.
        let found = finding(&(lines([1, 2]) + &line(3, slots().expected_fed(1))));
        assert_eq!((found.kind, found.line, found.step), ("other_images", 3, 3));
        assert!(found.message.starts_with("step 3 was fed other images than due"), "{}", found.message);
        let found = finding(&(lines([1]) + "{\"step\":2,\"generation\":1}\n"));
        assert_eq!((found.kind, found.step), ("no_ledger", 2));
        assert_eq!(finding("torn").kind, "unreadable_line");
    }
}
