//! Where objects lie, relative to the store's URL. One place, so that no two programs disagree.

use crate::ids::{Generation, Step};

/// Folder of all runs.
pub const RUNS_FOLDER: &str = "runs";

/// Folder of a run.
#[must_use]
pub fn run_folder(run: &str) -> String {
    format!("{RUNS_FOLDER}/{run}")
}

/// The run's state, as `run.json` in its folder.
pub const RUN_FILE: &str = "run.json";
/// What happened, one JSON object a line.
pub const EVENTS_FILE: &str = "events.jsonl";
/// One JSON object a step.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The cost-vs-iteration plot.
pub const PLOT_FILE: &str = "cost_vs_iteration.png";
/// Grid of the first real images.
pub const REALS_FILE: &str = "samples/reals.png";
/// Folder of the TensorBoard event files.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";
/// Folder of the grids.
pub const SAMPLES_FOLDER: &str = "samples";
/// Folder of the checkpoints.
pub const CHECKPOINTS_FOLDER: &str = "checkpoints";
/// Manifest of a dataset or a checkpoint, in its folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Under this name the coordinator gives the manifest of a run's dataset, which lies elsewhere, to those who ask for
/// an object of the run.
pub const DATASET_MANIFEST: &str = "dataset/manifest.json";
/// Images refused, one JSON object a line, in the dataset's folder.
pub const QUARANTINE_FILE: &str = "quarantine.jsonl";

/// The grid of a step, relative to the run's folder.
#[must_use]
pub fn sample_file(step: Step) -> String {
    format!("{SAMPLES_FOLDER}/step-{step:06}.png")
}

/// Folder of a step's checkpoint, relative to the run's folder.
#[must_use]
pub fn checkpoint_folder(step: Step) -> String {
    format!("{CHECKPOINTS_FOLDER}/step-{step:06}")
}

/// An object of a step's checkpoint, relative to the run's folder.
#[must_use]
pub fn checkpoint_object(step: Step, file: &str) -> String {
    format!("{}/{file}", checkpoint_folder(step))
}

/// Name of a checkpoint's part inside its folder. Each generation writes its own, so that one that is over and does not
/// know it yet cannot touch what a newer one has written.
#[must_use]
pub fn part_file(generation: Generation, part: &str) -> String {
    format!("g{generation}/{part}")
}

/// What [`part_file`] was made of; `None` for other names.
#[must_use]
pub fn part_of_file(file: &str) -> Option<(Generation, &str)> {
    let (generation, part) = file.strip_prefix('g')?.split_once('/')?;
    Some((Generation(generation.parse().ok()?), part))
}

/// The step in a name that [`sample_file`] or [`checkpoint_folder`] made (last path part, any extension).
#[must_use]
pub fn step_of_name(name: &str) -> Option<Step> {
    name.strip_prefix("step-")?.split('.').next()?.parse().ok()
}

/// Object name of a dataset's shard.
#[must_use]
pub fn shard_file(shard: u32) -> String {
    format!("shard-{shard:05}.safetensors")
}
