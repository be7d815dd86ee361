//! What members send while they train: heartbeats, steps, tiles, checkpoints; and what became of storing them.

use crate::checkpoint::{CHECKPOINT_FORMAT, CHECKPOINT_PARTS, CheckpointManifest};
use crate::cluster::Cluster;
use crate::event::{
    Action, Directive, Fence, Grid, GridKind, MetricsLine, Progress, SessionId, StepReport, Tile, Upload,
};
use crate::ids::Step;
use crate::record::CheckpointMark;

impl Cluster {
    pub(crate) fn on_heartbeat(&mut self, session: SessionId, progress: Progress) {
        self.members.heard(self.now, session, progress);
    }

    /// Takes the next step's metrics; what came before is refused, a gap ends the run.
    pub(crate) fn on_step(&mut self, session: SessionId, report: StepReport) {
        let now = self.now;
        let Some((run, rank)) = self.fenced("StepReport", session, &report.fence) else { return };
        let (name, last) = (report.fence.run.clone(), run.record.step);
        if !Self::is_training(run) || rank != 0 || report.step <= last {
            let fence = report.fence;
            return self.out.push(Action::RefuseStale { session, what: "StepReport", fence });
        }
        if report.step != last + 1 || report.step > run.record.target_steps {
            let target = run.record.target_steps;
            let cause = format!("step {} was reported after step {last} of {target}", report.step);
            return self.fail(&name, &cause);
        }
        let line = metrics_line(&report, run.record.config.global_batch, run.record.workers);
        if let Some(attempt) = &mut run.attempt {
            let interval_s = now.since_ms(attempt.reported) as f64 / 1000.0;
            attempt.reported = now;
            run.means.add(&line, interval_s);
        }
        run.record.step = report.step;
        run.record.pace_s = run.means.pace_s;
        run.last = Some(line.clone());
        self.out.push(Action::RecordMetrics { run: name.clone(), line });
        self.changed.insert(name);
    }

    /// Takes a part of a grid; the last part sends the grid to the store.
    pub(crate) fn on_tile(&mut self, session: SessionId, tile: Tile) {
        let Some((run, rank)) = self.fenced("SampleTile", session, &tile.fence) else { return };
        if !Self::is_training(run) {
            let fence = tile.fence;
            return self.out.push(Action::RefuseStale { session, what: "SampleTile", fence });
        }
        let Some(attempt) = &mut run.attempt else { return };
        let who = attempt.members[rank].introduction.clone();
        match attempt.add_tile(&tile) {
            Ok(None) => {}
            Ok(Some(pixels)) => {
                let Tile { fence, kind, step, cells_total: cells, cell, .. } = tile;
                self.out.push(Action::StoreGrid { grid: Grid { fence, kind, step, cells, cell, pixels } });
            }
            Err(reason) => {
                let cause = format!("{who} sent an impossible tile for step {}: {reason}", tile.step);
                self.fail(&tile.fence.run, &cause);
            }
        }
    }

    pub(crate) fn on_grid_settled(
        &mut self,
        fence: &Fence,
        kind: GridKind,
        step: Step,
        outcome: Result<(), String>,
    ) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        if run.record.generation != fence.generation {
            return;
        }
        let Some(attempt) = &mut run.attempt else { return };
        attempt.storing.remove(&(step, kind));
        let what = match kind {
            GridKind::Generated => format!("the sample grid of step {step}"),
            GridKind::Reals => "the grid of real images".to_owned(),
        };
        if let Err(error) = outcome {
            return self.fail(&fence.run, &format!("{what} could not be stored: {error}"));
        }
        self.record(&fence.run, "sample", "", format!("{what} is stored"));
        self.save(&fence.run, false);
        self.try_flush(&fence.run);
    }

    /// Lets the shell commit a checkpoint that rank 0 has uploaded.
    pub(crate) fn on_upload(&mut self, session: SessionId, upload: Upload) {
        let now = self.now;
        let version = self.options.version.clone();
        let Some((run, rank)) = self.fenced("CheckpointUploaded", session, &upload.fence) else { return };
        if !Self::is_training(run) || rank != 0 {
            let fence = upload.fence;
            return self.out.push(Action::RefuseStale { session, what: "CheckpointUploaded", fence });
        }
        let Some(attempt) = &mut run.attempt else { return };
        let writer = attempt.members[rank].name.clone();
        let complete =
            CHECKPOINT_PARTS.iter().all(|&part| upload.parts.iter().any(|given| given.file == part))
                && upload.parts.len() == CHECKPOINT_PARTS.len();
        if !complete || upload.step > run.record.step {
            let introduction = attempt.members[rank].introduction.clone();
            let (step, last) = (upload.step, run.record.step);
            let cause =
                format!("{introduction} uploaded an impossible checkpoint of step {step} after step {last}");
            return self.fail(&upload.fence.run, &cause);
        }
        attempt.committing.insert(upload.step);
        let manifest = CheckpointManifest {
            format: CHECKPOINT_FORMAT,
            run: upload.fence.run,
            step: upload.step,
            config: run.record.config.clone(),
            dataset_digest: run.record.dataset.digest.clone(),
            generation: upload.fence.generation,
            writer,
            version,
            created_unix_s: now.unix_s(),
            weights_sha256: upload.weights_sha256,
            parts: upload.parts,
        };
        self.out.push(Action::CommitCheckpoint { manifest: Box::new(manifest) });
    }

    /// A manifest was written, or not. One that was counts even if its group is gone: the checkpoint exists.
    pub(crate) fn on_checkpoint_settled(
        &mut self,
        fence: &Fence,
        mark: CheckpointMark,
        outcome: Result<(), String>,
    ) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        let present = run.record.generation == fence.generation;
        let step = mark.step;
        if outcome.is_ok() && run.record.checkpoint.as_ref().is_none_or(|newest| newest.step <= step) {
            run.record.checkpoint = Some(mark);
        }
        let Some(attempt) = run.attempt.as_mut().filter(|_| present) else {
            if outcome.is_ok() {
                let ended = run.record.status.is_ended();
                self.save(&fence.run, false);
                if ended {
                    self.out.push(Action::CloseRun { run: fence.run.clone() });
                }
            }
            return;
        };
        attempt.committing.remove(&step);
        let sessions: Vec<SessionId> = attempt.members.iter().map(|member| member.session).collect();
        if let Err(error) = outcome {
            return self
                .fail(&fence.run, &format!("the checkpoint of step {step} could not be stored: {error}"));
        }
        for session in sessions {
            if self.members.get(session).is_some() {
                let directive = Directive::CheckpointCommitted { run: fence.run.clone(), step };
                self.out.push(Action::Direct { session, directive });
            }
        }
        self.record(&fence.run, "checkpoint", "", format!("the checkpoint of step {step} is stored"));
        self.save(&fence.run, false);
        self.try_flush(&fence.run);
    }
}

fn metrics_line(report: &StepReport, global_batch: u32, workers: u32) -> MetricsLine {
    let images_per_s = if report.step_s > 0.0 { f64::from(global_batch) / report.step_s } else { 0.0 };
    MetricsLine {
        step: report.step,
        epoch: report.epoch,
        d_loss: report.d_loss,
        g_loss: report.g_loss,
        d_acc: report.d_acc,
        step_s: report.step_s,
        compute_s: report.times.compute_s,
        data_s: report.times.data_s,
        exchange_s: report.times.exchange_s,
        images_per_s,
        workers,
        generation: report.fence.generation,
    }
}
