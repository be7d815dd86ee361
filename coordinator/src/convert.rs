//! Between the wire's messages and the core's events and views. No decisions.

use takuma_core::checkpoint::CheckpointPart;
use takuma_core::event::{
    CellShape, Claim, Directive, Event, FailureKind, Fence, Formed, GridKind, Hello, MemberEnd,
    MemberFailure, Outcome, Peer, Position, Prepare, Progress, RunEvent, SessionId, StateSource, StepReport,
    StepTimes, Tile, Upload, When,
};
use takuma_core::ids::Generation;
use takuma_core::layout;
use takuma_core::record::RunStatus;
use takuma_core::slots::SlotRange;
use takuma_core::view::{Plan, RunView, WorkerView};
use takuma_proto::v1;
use takuma_proto::v1::worker_directive::Directive as Wire;
use takuma_proto::v1::worker_message::Message;

fn fence(run: String, generation: u64) -> Fence {
    Fence { run, generation: Generation(generation) }
}

/// What a worker says of itself.
#[must_use]
pub fn hello(hello: v1::Hello) -> Hello {
    Hello {
        process_id: hello.process_id,
        requested_name: hello.requested_name,
        ring_address: hello.ring_address,
        host: hello.host,
        pid: hello.pid,
        device: hello.device,
        threads: hello.threads,
        membership: hello.membership.map(claim),
    }
}

fn claim(membership: v1::Membership) -> Claim {
    let peer = |member: v1::Member| Peer {
        worker: member.worker,
        process_id: member.process_id,
        ring_address: member.ring_address,
        slots: SlotRange { first: member.first_slot, count: member.slot_count },
    };
    Claim {
        fence: fence(membership.run, membership.generation),
        run_id: membership.run_id,
        rank: membership.rank,
        members: membership.members.into_iter().map(peer).collect(),
        position: position(membership.position),
        parked: membership.parked,
        changes_to: (membership.changes_to > 0).then_some(Generation(membership.changes_to)),
    }
}

fn position(position: Option<v1::Position>) -> Position {
    position.map_or_else(Position::default, |at| Position { step: at.step, phase: at.phase })
}

/// The event that a worker's message is, or why it is none. Log lines and the first hello are not events.
///
/// # Errors
/// In words, for a message that cannot be.
pub fn event(session: SessionId, message: Message) -> Result<Option<Event>, String> {
    Ok(Some(match message {
        Message::Hello(_) => return Err("a second hello came".to_owned()),
        Message::LogLine(_) => return Ok(None),
        Message::Heartbeat(beat) => Event::HeartbeatReceived { session, progress: progress(beat) },
        Message::Prepared(prepared) => {
            Event::MemberPrepared { session, fence: fence(prepared.run, prepared.generation) }
        }
        Message::StepReport(report) => Event::StepReported { session, report: step_report(report) },
        Message::SampleTile(sent) => Event::TileReceived { session, tile: tile(sent)? },
        Message::CheckpointUploaded(sent) => Event::CheckpointUploaded { session, upload: upload(sent) },
        Message::RunEnded(ended) => Event::MemberEnded { session, end: member_end(ended)? },
        Message::RunFailed(failed) => Event::MemberFailed { session, failure: member_failure(failed) },
        Message::Goodbye(goodbye) => {
            Event::WorkerLeaves { session, reason: goodbye.reason, at_once: goodbye.at_once }
        }
        Message::Formed(sent) => Event::GroupFormed { session, formed: formed(sent) },
    }))
}

fn formed(formed: v1::Formed) -> Formed {
    Formed {
        fence: fence(formed.run, formed.generation),
        position: position(formed.position),
        stalled_s: formed.stalled_s,
        restored: formed.restored,
    }
}

fn progress(beat: v1::Heartbeat) -> Progress {
    let times = StepTimes {
        compute_s: f64::from(beat.compute_s),
        data_s: f64::from(beat.data_s),
        exchange_s: f64::from(beat.exchange_s),
        receive_s: f64::from(beat.receive_s),
    };
    Progress { fence: fence(beat.run, beat.generation), step: beat.step, phase: beat.phase, times }
}

fn step_report(report: v1::StepReport) -> StepReport {
    StepReport {
        fence: fence(report.run, report.generation),
        step: report.step,
        epoch: report.epoch,
        d_loss: report.d_loss,
        g_loss: report.g_loss,
        d_acc: report.d_acc,
        step_s: report.step_s,
        times: StepTimes {
            compute_s: report.compute_s,
            data_s: report.data_s,
            exchange_s: report.exchange_s,
            receive_s: 0.0,
        },
        fed: report.fed,
        left_out: report.left_out,
    }
}

fn tile(tile: v1::SampleTile) -> Result<Tile, String> {
    let kind = match tile.kind() {
        v1::sample_tile::Kind::Generated => GridKind::Generated,
        v1::sample_tile::Kind::Reals => GridKind::Reals,
        v1::sample_tile::Kind::Unspecified => return Err("a tile of no kind came".to_owned()),
    };
    Ok(Tile {
        fence: fence(tile.run, tile.generation),
        kind,
        step: tile.step,
        first_cell: tile.first_cell,
        cells_total: tile.cells_total,
        cell: CellShape { height: tile.height, width: tile.width, channels: tile.channels },
        pixels: tile.pixels,
    })
}

fn upload(upload: v1::CheckpointUploaded) -> Upload {
    let part = |part: v1::ObjectPart| CheckpointPart {
        file: part.name,
        size_bytes: part.size_bytes,
        sha256: part.sha256,
    };
    Upload {
        fence: fence(upload.run, upload.generation),
        step: upload.step,
        parts: upload.parts.into_iter().map(part).collect(),
        weights_sha256: upload.weights_sha256,
    }
}

fn member_end(ended: v1::RunEnded) -> Result<MemberEnd, String> {
    let outcome = match ended.outcome() {
        v1::run_ended::Outcome::Completed => Outcome::Completed,
        v1::run_ended::Outcome::Stopped => Outcome::Stopped,
        v1::run_ended::Outcome::Unspecified => return Err("an end of no outcome came".to_owned()),
    };
    let weights_sha256 = ended.weights_sha256;
    Ok(MemberEnd { fence: fence(ended.run, ended.generation), outcome, step: ended.step, weights_sha256 })
}

fn member_failure(failed: v1::RunFailed) -> MemberFailure {
    let kind = match failed.kind() {
        v1::run_failed::Kind::PeerLost => {
            FailureKind::PeerLost { suspect: u32::try_from(failed.suspect_rank).ok() }
        }
        v1::run_failed::Kind::Run => FailureKind::Run,
        v1::run_failed::Kind::NotFinite => FailureKind::NotFinite,
        v1::run_failed::Kind::Local | v1::run_failed::Kind::Unspecified => FailureKind::Local,
    };
    MemberFailure {
        fence: fence(failed.run, failed.generation),
        step: failed.step,
        phase: failed.phase,
        kind,
        message: failed.message,
    }
}

/// A directive as it goes over the wire.
#[must_use]
pub fn directive(directive: Directive) -> v1::WorkerDirective {
    let wire = match directive {
        Directive::Prepare(prepare) => Wire::Prepare(prepare_message(*prepare)),
        Directive::Start(fence) => Wire::Start(v1::Start { run: fence.run, generation: fence.generation.0 }),
        Directive::Stop(fence) => {
            Wire::StopRun(v1::StopRun { run: fence.run, generation: fence.generation.0 })
        }
        Directive::Abort { fence, message } => {
            Wire::Abort(v1::Abort { run: fence.run, generation: fence.generation.0, message })
        }
        Directive::CheckpointCommitted { run, step } => {
            Wire::CheckpointCommitted(v1::CheckpointCommitted { run, step })
        }
        Directive::Kept { run, step, grids, reals, resend } => {
            Wire::Kept(v1::Kept { run, step, grids, reals, resend })
        }
        Directive::Release(fence) => {
            Wire::Release(v1::Release { run: fence.run, generation: fence.generation.0 })
        }
        Directive::Farewell => Wire::Farewell(v1::Farewell {}),
    };
    v1::WorkerDirective { directive: Some(wire) }
}

fn prepare_message(prepare: Prepare) -> v1::Prepare {
    let member = |(rank, peer): (usize, Peer)| v1::Member {
        rank: rank as u32,
        worker: peer.worker,
        ring_address: peer.ring_address,
        first_slot: peer.slots.first,
        slot_count: peer.slots.count,
        process_id: peer.process_id,
    };
    let (state, start_step) = match prepare.state {
        StateSource::Fresh => (v1::prepare::State::Fresh, 0),
        StateSource::Checkpoint(step) => (v1::prepare::State::Checkpoint, step),
        StateSource::Peers => (v1::prepare::State::Peers, 0),
    };
    let when = match prepare.when {
        When::Now => v1::prepare::When::Now,
        When::NextStep => v1::prepare::When::NextStep,
    };
    v1::Prepare {
        run: prepare.fence.run,
        generation: prepare.fence.generation.0,
        config_json: prepare.config.to_json(),
        rank: prepare.rank,
        members: prepare.members.into_iter().enumerate().map(member).collect(),
        run_url: prepare.run_url,
        checkpoint_url: prepare.checkpoint_url,
        start_step,
        state: state.into(),
        target_steps: prepare.target_steps,
        passed_over: prepare.passed_over,
        run_id: prepare.run_id,
        when: when.into(),
    }
}

fn status(status: RunStatus) -> v1::RunStatus {
    match status {
        RunStatus::Queued => v1::RunStatus::Queued,
        RunStatus::Preparing => v1::RunStatus::Preparing,
        RunStatus::Running => v1::RunStatus::Running,
        RunStatus::Stopping => v1::RunStatus::Stopping,
        RunStatus::Stopped => v1::RunStatus::Stopped,
        RunStatus::Succeeded => v1::RunStatus::Succeeded,
        RunStatus::Failed => v1::RunStatus::Failed,
        RunStatus::Waiting => v1::RunStatus::Waiting,
    }
}

/// A run as clients see it.
#[must_use]
pub fn run_view(view: &RunView, store_url: &str) -> v1::RunView {
    let record = &view.record;
    let training = matches!(record.status, RunStatus::Running | RunStatus::Stopping);
    let batch = f64::from(record.config.global_batch);
    v1::RunView {
        name: record.name.clone(),
        id: record.id.clone(),
        recipe: record.config.recipe.name().to_owned(),
        status: status(record.status).into(),
        step: record.step,
        steps: record.target_steps,
        epoch: view.epoch,
        workers: record.workers,
        generation: record.generation.0,
        seed: record.config.seed,
        exact: record.config.exact,
        global_batch: record.config.global_batch,
        images_per_s: view
            .means
            .step_s
            .filter(|&step_s| training && step_s > 0.0)
            .map(|step_s| batch / step_s),
        eta_s: view.eta_s,
        elapsed_s: view.elapsed_s,
        d_loss: view.last.as_ref().map(|line| line.d_loss),
        g_loss: view.last.as_ref().map(|line| line.g_loss),
        d_acc: view.last.as_ref().map(|line| line.d_acc),
        weights_sha256: record.weights_sha256.clone(),
        data: record.config.data.clone(),
        store: format!("{store_url}/{}", layout::run_folder(&record.name)),
        error: record.error.clone(),
        created_unix_s: record.created.unix_s(),
        mean_step_s: view.means.step_s,
        compute_s: view.means.compute_s,
        data_s: view.means.data_s,
        exchange_s: view.means.exchange_s,
        checkpoint_step: record.checkpoint.as_ref().map_or(0, |mark| mark.step),
        has_checkpoint: record.checkpoint.is_some(),
        config_json: record.config.to_json(),
        queue_position: view.queue_position,
        waiting_for: view.waiting_for.clone(),
        origin: record.origin.as_ref().map_or_else(String::new, ToString::to_string),
    }
}

/// A worker as clients see it.
#[must_use]
pub fn worker_view(view: WorkerView) -> v1::WorkerView {
    v1::WorkerView {
        name: view.name,
        host: view.host,
        pid: view.pid,
        device: view.device,
        threads: view.threads,
        status: view.status.to_owned(),
        run: view.run,
        rank: view.rank.map_or(-1, |rank| rank as i32),
        first_slot: view.slots.map_or(0, |slots| slots.first),
        slot_count: view.slots.map_or(0, |slots| slots.count),
        step: view.step,
        compute_s: view.times.compute_s as f32,
        data_s: view.times.data_s as f32,
        exchange_s: view.times.exchange_s as f32,
        connected_s: view.connected_s,
        heartbeat_age_s: view.heartbeat_age_s,
    }
}

/// A plan as clients see it.
#[must_use]
pub fn plan(plan: Plan, view: &RunView) -> v1::Plan {
    v1::Plan {
        workers: plan.workers,
        slots_per_worker: plan.slots_per_worker,
        global_batch: view.record.config.global_batch,
        steps: view.record.target_steps,
        steps_per_epoch: view.record.dataset.steps_per_epoch,
        images: view.record.dataset.images,
        eta_s: plan.eta_s,
        workers_idle: plan.workers_idle,
        runs_ahead: plan.runs_ahead,
    }
}

/// A run's event as clients see it.
#[must_use]
pub fn run_event(event: &RunEvent) -> v1::RunEvent {
    v1::RunEvent {
        at_unix_s: event.at.unix_s(),
        kind: event.kind.to_owned(),
        worker: event.worker.clone(),
        generation: event.generation.0,
        step: event.step,
        message: event.message.clone(),
    }
}

/// A run's event as a line of its log.
#[must_use]
pub fn event_line(run: &str, event: &RunEvent) -> v1::LogLine {
    v1::LogLine {
        at_unix_s: event.at.unix_s(),
        level: if event.kind == "failed" { "ERROR" } else { "INFO" }.to_owned(),
        run: run.to_owned(),
        rank: -1,
        generation: event.generation.0,
        step: event.step,
        message: format!("{}: {}", event.kind, event.message),
        worker: "coordinator".to_owned(),
    }
}
