//! A cluster driven by words, and actions told in words: for transcripts and random schedules.

#![allow(dead_code)] // Each test program uses its part.

use takuma_core::checkpoint::{CHECKPOINT_PARTS, CheckpointPart};
use takuma_core::cluster::{Cluster, Options};
use takuma_core::config::{Recipe, RunConfig};
use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest, ShardEntry};
use takuma_core::event::*;
use takuma_core::ids::Generation;
use takuma_core::record::{CheckpointMark, Origin};

pub fn cluster() -> Cluster {
    Cluster::new(Options::new("file:///s", "0"))
}

pub fn dataset() -> DatasetManifest {
    let shard = |file| ShardEntry { file, images: 8, size_bytes: 1, sha256: String::new() };
    DatasetManifest {
        format: DATASET_FORMAT,
        name: "d".into(),
        images: 64,
        height: 64,
        width: 64,
        channels: 3,
        quarantined: 0,
        crop: 0,
        seed: 0,
        source: "test".into(),
        digest: "d".into(),
        shards: (0..8).map(takuma_core::layout::shard_file).map(shard).collect(),
    }
}

/// Eight shards that go with a global batch.
pub fn dataset_of(global_batch: u32) -> DatasetManifest {
    let mut dataset = dataset();
    dataset.shards.iter_mut().for_each(|shard| shard.images = u64::from(global_batch));
    dataset.images = 8 * u64::from(global_batch);
    dataset
}

pub fn hello(name: &str) -> Hello {
    Hello {
        process_id: format!("process of {name}"),
        requested_name: name.into(),
        ring_address: format!("{name}:1"),
        host: "host".into(),
        pid: 1,
        device: "cpu".into(),
        threads: 1,
        membership: None,
    }
}

/// What a member says that comes back from `prepare`'s group.
pub fn claim(prepare: &Prepare, parked: bool) -> Claim {
    Claim {
        fence: prepare.fence.clone(),
        run_id: prepare.run_id.clone(),
        rank: prepare.rank,
        members: prepare.members.clone(),
        position: Position::default(),
        parked,
        changes_to: None,
    }
}

pub fn formed(fence: Fence, step: u64) -> Formed {
    Formed { fence, position: Position { step, phase: 1 }, stalled_s: 0.12, restored: 0 }
}

pub fn submission(name: &str, steps: u64, workers: Option<u32>) -> Submission {
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
    config.global_batch = 8;
    config.steps = Some(steps);
    config.workers = workers;
    Submission { name: Some(name.into()), config, dataset: dataset(), origin: None, random: [1, 2] }
}

/// The checkpoint of a run like those of [`submission`].
pub fn origin(run: &str, step: u64) -> Box<OriginCheckpoint> {
    let config = submission(run, step, None).config;
    let mark = Origin { run: run.into(), step };
    Box::new(OriginCheckpoint { mark, config, dataset_digest: dataset().digest })
}

pub fn step_report(fence: Fence, step: u64) -> StepReport {
    let times = StepTimes { compute_s: 0.5, exchange_s: 0.5, ..StepTimes::default() };
    StepReport {
        fence,
        step,
        epoch: 0,
        d_loss: 1.0,
        g_loss: 2.0,
        d_acc: 0.5,
        step_s: 1.0,
        times,
        fed: 0,
        left_out: String::new(),
    }
}

/// A tile of 8 one-pixel cells split like the slots.
pub fn tile(fence: Fence, step: u64, first_cell: u32, cells: u32) -> Tile {
    let cell = CellShape { height: 1, width: 1, channels: 1 };
    let pixels = vec![0; cells as usize];
    Tile { fence, kind: GridKind::Generated, step, first_cell, cells_total: 8, cell, pixels }
}

pub fn upload(fence: Fence, step: u64) -> Upload {
    let file = |part: &str| takuma_core::layout::part_file(fence.generation, part);
    let part = |part: &str| CheckpointPart { file: file(part), size_bytes: 1, sha256: String::new() };
    let parts = CHECKPOINT_PARTS.map(part).to_vec();
    Upload { fence, step, parts, weights_sha256: format!("sha-{step}") }
}

pub fn mark(step: u64) -> CheckpointMark {
    CheckpointMark { step, weights_sha256: format!("sha-{step}") }
}

pub fn member_end(fence: Fence, outcome: Outcome, step: u64) -> MemberEnd {
    MemberEnd { fence, outcome, step, weights_sha256: format!("sha-{step}") }
}

pub fn failure(fence: Fence, kind: FailureKind) -> MemberFailure {
    let message = match kind {
        FailureKind::PeerLost { .. } => "the peer closed the connection",
        FailureKind::Local => "out of memory",
        FailureKind::Run => "another dataset",
        FailureKind::NotFinite => "the loss is not finite",
    };
    MemberFailure { fence, step: 0, phase: "d".into(), kind, message: message.into() }
}

pub fn fence(run: &str, generation: u64) -> Fence {
    Fence { run: run.into(), generation: Generation(generation) }
}

/// One line that says what an action does.
pub fn tell(action: &Action) -> String {
    let result = |result: &Result<String, Refusal>| match result {
        Ok(run) => format!("ok {run}"),
        Err(refusal) => format!("refused: {refusal}"),
    };
    match action {
        Action::WelcomeWorker { session, name } => format!("welcome s{} as {name}", session.0),
        Action::RefuseWorker { session, refusal } => format!("turn s{} away: {refusal}", session.0),
        Action::CloseSession { session, reason } => format!("close s{}: {reason}", session.0),
        Action::Direct { session, directive } => format!("s{} <- {}", session.0, tell_directive(directive)),
        Action::Answer { request, result: answer } => format!("answer {}: {}", request.0, result(answer)),
        Action::SaveRun { record, first, acknowledge } => format!(
            "save {} {:?} g{} step {}{}{}",
            record.name,
            record.status,
            record.generation,
            record.step,
            if *first { ", first" } else { "" },
            if *acknowledge { ", acknowledge" } else { "" },
        ),
        Action::RecordEvent { run, event } => format!("event {run} {}: {}", event.kind, event.message),
        Action::RecordMetrics { run, line } => {
            format!("metrics {run} step {} g{}", line.step, line.generation)
        }
        Action::RewindMetrics { run, step, .. } => format!("rewind {run} to {step}"),
        Action::StoreGrid { grid } => format!("store grid {} step {}", grid.fence.run, grid.step),
        Action::CommitCheckpoint { manifest, .. } => format!(
            "commit {} step {} g{} by {}",
            manifest.run, manifest.step, manifest.generation, manifest.writer
        ),
        Action::SweepCheckpoints { fence, step, retention } => format!(
            "sweep {} up to step {step} g{}, keep {:?}, pinned {:?}",
            fence.run, fence.generation, retention.keep, retention.pinned
        ),
        Action::FlushRun { fence } => format!("flush {} g{}", fence.run, fence.generation),
        Action::RefuseStale { session, what, fence } => {
            format!("refuse {what} of s{} for {} g{}", session.0, fence.run, fence.generation)
        }
        Action::PublishRun { run } => format!("publish {run}"),
        Action::CloseRun { run } => format!("close {run}"),
    }
}

fn tell_directive(directive: &Directive) -> String {
    match directive {
        Directive::Prepare(prepare) => {
            let share = |peer: &Peer| format!("{}:{}+{}", peer.worker, peer.slots.first, peer.slots.count);
            let members: Vec<String> = prepare.members.iter().map(share).collect();
            let state = match prepare.state {
                StateSource::Fresh => "fresh".to_owned(),
                StateSource::Checkpoint(step) if prepare.checkpoint_url == prepare.run_url => {
                    format!("from checkpoint {step}")
                }
                StateSource::Checkpoint(step) => {
                    format!("from checkpoint {step} in {}", prepare.checkpoint_url)
                }
                StateSource::Peers => "from peers".to_owned(),
            };
            let when = if prepare.when == When::Now { "now" } else { "at the next step" };
            let passes: Vec<String> = prepare.passed_over.iter().map(u64::to_string).collect();
            let passes = if passes.is_empty() {
                String::new()
            } else {
                format!(", passing over {}", passes.join(" "))
            };
            format!(
                "prepare {} g{} rank {} of [{}] {state} {when} to {}{passes}",
                prepare.fence.run,
                prepare.fence.generation,
                prepare.rank,
                members.join(" "),
                prepare.target_steps
            )
        }
        Directive::Start(fence) => format!("start {} g{}", fence.run, fence.generation),
        Directive::Stop(fence) => format!("stop {} g{}", fence.run, fence.generation),
        Directive::Abort { fence, message } => {
            format!("abort {} g{}: {message}", fence.run, fence.generation)
        }
        Directive::CheckpointCommitted { run, step } => format!("committed {run} step {step}"),
        Directive::Kept { run, step, grids, reals, resend } => {
            let reals = if *reals { ", reals" } else { "" };
            let resend = if *resend { ", resend" } else { "" };
            format!("kept {run} to step {step}, grids {grids:?}{reals}{resend}")
        }
        Directive::Release(fence) => format!("release {} g{}", fence.run, fence.generation),
        Directive::Farewell => "farewell".to_owned(),
    }
}
