//! The shapes of `-o json`. Names are a contract with scripts: described in docs/json.md, never renamed.

use serde::Serialize;
use takuma_core::layout::step_of_name;
use takuma_proto::v1::{CheckpointView, LogLine, RunView, SampleView, WorkerView};

use crate::client::status_name;

fn known(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// One run: `run show`, and each element of `run ls`.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // described in docs/json.md, key by key
pub struct RunJson<'a> {
    pub name: &'a str,
    pub id: Option<&'a str>,
    pub recipe: &'a str,
    pub status: &'static str,
    pub step: u64,
    pub steps: u64,
    pub epoch: u64,
    pub workers: u32,
    pub generation: u64,
    pub seed: u64,
    pub exact: bool,
    pub global_batch: u32,
    pub images_per_s: Option<f64>,
    pub eta_s: Option<f64>,
    pub elapsed_s: f64,
    pub d_loss: Option<f64>,
    pub g_loss: Option<f64>,
    pub d_acc: Option<f64>,
    pub weights_sha256: Option<&'a str>,
    pub data: &'a str,
    pub store: &'a str,
    pub error: Option<&'a str>,
    pub waiting_for: Option<&'a str>,
    pub origin: Option<&'a str>,
}

impl<'a> From<&'a RunView> for RunJson<'a> {
    fn from(run: &'a RunView) -> Self {
        Self {
            name: &run.name,
            id: known(&run.id),
            recipe: &run.recipe,
            status: status_name(run.status()),
            step: run.step,
            steps: run.steps,
            epoch: run.epoch,
            workers: run.workers,
            generation: run.generation,
            seed: run.seed,
            exact: run.exact,
            global_batch: run.global_batch,
            images_per_s: run.images_per_s,
            eta_s: run.eta_s,
            elapsed_s: run.elapsed_s,
            d_loss: run.d_loss,
            g_loss: run.g_loss,
            d_acc: run.d_acc,
            weights_sha256: known(&run.weights_sha256),
            data: &run.data,
            store: &run.store,
            error: known(&run.error),
            waiting_for: known(&run.waiting_for),
            origin: known(&run.origin),
        }
    }
}

/// One element of `worker ls`.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // described in docs/json.md, key by key
pub struct WorkerJson<'a> {
    pub name: &'a str,
    pub host: &'a str,
    pub pid: u32,
    pub device: &'a str,
    pub threads: u32,
    pub status: &'a str,
    pub run: Option<&'a str>,
    pub rank: Option<i32>,
    pub first_slot: Option<u32>,
    pub slot_count: Option<u32>,
    pub step: Option<u64>,
    pub compute_s: Option<f32>,
    pub data_s: Option<f32>,
    pub exchange_s: Option<f32>,
    pub connected_s: f64,
    pub heartbeat_age_s: f64,
}

impl<'a> From<&'a WorkerView> for WorkerJson<'a> {
    fn from(worker: &'a WorkerView) -> Self {
        let in_run = !worker.run.is_empty();
        let timed = in_run && worker.compute_s > 0.0;
        Self {
            name: &worker.name,
            host: &worker.host,
            pid: worker.pid,
            device: &worker.device,
            threads: worker.threads,
            status: &worker.status,
            run: known(&worker.run),
            rank: (worker.rank >= 0).then_some(worker.rank),
            // A lost worker still names its run, but has no place in it.
            first_slot: (worker.rank >= 0).then_some(worker.first_slot),
            slot_count: (worker.rank >= 0).then_some(worker.slot_count),
            step: in_run.then_some(worker.step),
            compute_s: timed.then_some(worker.compute_s),
            data_s: timed.then_some(worker.data_s),
            exchange_s: timed.then_some(worker.exchange_s),
            connected_s: worker.connected_s,
            heartbeat_age_s: worker.heartbeat_age_s,
        }
    }
}

/// One element of `sample ls`.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // described in docs/json.md, key by key
pub struct SampleJson<'a> {
    pub name: &'a str,
    pub step: Option<u64>,
    pub size_bytes: u64,
    pub url: &'a str,
}

impl<'a> From<&'a SampleView> for SampleJson<'a> {
    fn from(sample: &'a SampleView) -> Self {
        let step = step_of_name(&sample.name);
        Self { name: &sample.name, step, size_bytes: sample.size_bytes, url: &sample.url }
    }
}

/// One element of `checkpoint ls`.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // described in docs/json.md, key by key
pub struct CheckpointJson<'a> {
    pub step: u64,
    pub size_bytes: u64,
    pub created_unix_s: f64,
    pub url: &'a str,
    pub weights_sha256: Option<&'a str>,
}

impl<'a> From<&'a CheckpointView> for CheckpointJson<'a> {
    fn from(checkpoint: &'a CheckpointView) -> Self {
        Self {
            step: checkpoint.step,
            size_bytes: checkpoint.size_bytes,
            created_unix_s: checkpoint.created_unix_s,
            url: &checkpoint.url,
            weights_sha256: known(&checkpoint.weights_sha256),
        }
    }
}

/// One line of `run logs -o json`.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // described in docs/json.md, key by key
pub struct LogJson<'a> {
    pub at_unix_s: f64,
    pub level: &'a str,
    pub worker: Option<&'a str>,
    pub run: Option<&'a str>,
    pub rank: Option<i32>,
    pub generation: u64,
    pub step: u64,
    pub message: &'a str,
}

impl<'a> From<&'a LogLine> for LogJson<'a> {
    fn from(line: &'a LogLine) -> Self {
        Self {
            at_unix_s: line.at_unix_s,
            level: &line.level,
            worker: known(&line.worker),
            run: known(&line.run),
            rank: (line.rank >= 0).then_some(line.rank),
            generation: line.generation,
            step: line.step,
            message: &line.message,
        }
    }
}
