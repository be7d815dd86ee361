//! What members send while they train: heartbeats, steps, tiles, checkpoints; and what became of storing them.

use std::collections::BTreeSet;

use crate::checkpoint::{CHECKPOINT_FORMAT, CHECKPOINT_PARTS, CheckpointManifest, Retention};
use crate::cluster::Cluster;
use crate::event::{
    Action, Directive, Fence, Grid, GridKind, MetricsLine, Progress, SessionId, StepReport, Tile, Upload,
};
use crate::ids::{Generation, Step};
use crate::layout::part_of_file;
use crate::record::CheckpointMark;
use crate::run::Gap;

impl Cluster {
    pub(crate) fn on_heartbeat(&mut self, session: SessionId, progress: Progress) {
        self.members.heard(self.now, session, progress);
        if let Some((progress, rank)) = self.training_member(session) {
            self.note_speed(&progress, rank);
            self.watch_pace(session, &progress, rank);
        }
    }

    /// Takes the next step's metrics; those that came before are repeats.
    pub(crate) fn on_step(&mut self, session: SessionId, report: StepReport) {
        let now = self.now;
        let Some((run, rank)) = self.fenced("StepReport", session, &report.fence) else { return };
        let fence = report.fence.clone();
        let (name, last) = (fence.run.clone(), run.record.step);
        if rank != 0 || report.step <= last {
            return self.out.push(Action::RefuseStale { session, what: "StepReport", fence });
        }
        if report.step > run.record.target_steps {
            let target = run.record.target_steps;
            let cause = format!("step {} was reported after step {last} of {target}", report.step);
            return self.fail(&name, &cause);
        }
        let gap = (report.step > last + 1).then(|| run.results.note_gap(last, report.step));
        if gap == Some(Gap::New) {
            // It was on its way when the group was taken up again; those before it were refused then.
            self.tell_kept(session, &name, true);
        }
        if let Some(Gap::New | Gap::Asked) = gap {
            return self.out.push(Action::RefuseStale { session, what: "StepReport", fence });
        }
        if gap == Some(Gap::Lost) {
            let message = format!("metrics of steps {} to {} were lost", last + 1, report.step - 1);
            self.record(&name, "metrics_lost", "", message);
        }
        let Some(run) = self.runs.get_mut(&name) else { return };
        let line = metrics_line(&report, run.record.config.global_batch, run.record.workers);
        if let Some(group) = &mut run.group {
            let interval_s = now.since_ms(group.reported) as f64 / 1000.0;
            group.reported = now;
            run.means.add(&line, interval_s);
        }
        if !report.left_out.is_empty() {
            let message = format!("step {}: {}", report.step, report.left_out);
            self.record(&name, "left_out", "", message);
        }
        let Some(run) = self.runs.get_mut(&name) else { return };
        run.record.step = report.step;
        run.record.pace_s = run.means.pace_s;
        run.last = Some(line.clone());
        let early = run.results.early.remove(&report.step);
        self.out.push(Action::RecordMetrics { run: name.clone(), line });
        self.changed.insert(name);
        if let Some((session, upload)) = early {
            self.on_upload(session, upload);
        }
        self.try_flush(&fence.run);
    }

    /// Metrics lie in the store: members need not keep them. A slow store may tell of lines that are to be
    /// forgotten.
    pub(crate) fn on_metrics_stored(&mut self, name: &str, step: Step, lineage: Generation) {
        let run = self.runs.get_mut(name).filter(|run| run.record.lineage == lineage);
        let Some(run) = run else { return };
        run.results.stored.step = step.min(run.record.step);
        self.tell_all_kept(name);
    }

    fn tell_all_kept(&mut self, name: &str) {
        let Some(run) = self.runs.get(name) else { return };
        let members = run.group.iter().flat_map(|group| &group.members);
        let sessions: Vec<SessionId> = members.map(|member| member.session).collect();
        for session in sessions {
            if self.members.get(session).is_some() {
                self.tell_kept(session, name, false);
            }
        }
    }

    /// Takes a part of a grid; the last part sends the grid to the store.
    pub(crate) fn on_tile(&mut self, session: SessionId, tile: Tile) {
        let who = self.members.get(session).map_or(String::new(), |worker| worker.introduction());
        let Some(run) = self.same_past("SampleTile", session, &tile.fence) else { return };
        if let Some(lost) = run.results.make_room(&tile) {
            self.record(
                &tile.fence.run,
                "sample_lost",
                "",
                format!("the grid of step {lost} never became whole"),
            );
        }
        let Some(run) = self.runs.get_mut(&tile.fence.run) else { return };
        match run.results.add_tile(&tile) {
            Ok(None) => {}
            Ok(Some(pixels)) => {
                let fence = run.fence();
                let Tile { kind, step, cells_total: cells, cell, .. } = tile;
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
        run.results.storing.remove(&(step, kind));
        if run.record.lineage > fence.generation || run.group.is_none() {
            return;
        }
        let what = match kind {
            GridKind::Generated => format!("the sample grid of step {step}"),
            GridKind::Reals => "the grid of real images".to_owned(),
        };
        if let Err(error) = outcome {
            return self.fail(&fence.run, &format!("{what} could not be stored: {error}"));
        }
        run.results.note_stored(step, kind);
        self.tell_all_kept(&fence.run);
        self.record(&fence.run, "sample", "", format!("{what} is stored"));
        self.save(&fence.run, false);
        self.try_flush(&fence.run);
    }

    /// Lets the shell commit a checkpoint that a rank 0 has uploaded.
    pub(crate) fn on_upload(&mut self, session: SessionId, upload: Upload) {
        let now = self.now;
        let version = self.options.version.clone();
        let (writer, who) = self
            .members
            .get(session)
            .map_or_else(Default::default, |worker| (worker.name.clone(), worker.introduction()));
        let Some(run) = self.same_past("CheckpointUploaded", session, &upload.fence) else { return };
        // The group may have changed since the parts were written.
        let named: BTreeSet<&str> = upload
            .parts
            .iter()
            .filter_map(|given| part_of_file(&given.file))
            .filter(|&(writer, _)| writer <= upload.fence.generation)
            .map(|(_, part)| part)
            .collect();
        let complete =
            upload.parts.len() == CHECKPOINT_PARTS.len() && named == BTreeSet::from(CHECKPOINT_PARTS);
        if !complete || upload.step > run.record.target_steps {
            let cause = format!("{who} uploaded an impossible checkpoint of step {}", upload.step);
            return self.fail(&upload.fence.run, &cause);
        }
        // Metrics first: whoever goes on from a checkpoint finds every line up to it.
        if upload.step > run.record.step {
            run.results.early.insert(upload.step, (session, upload));
            return;
        }
        if !run.results.committing.insert(upload.step) {
            return;
        }
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

    /// What stays of a run's checkpoints: forks that have none of their own yet start from one.
    fn retention_of(&self, name: &str) -> Retention {
        let keep = self.runs.get(name).and_then(|run| run.record.config.keep_checkpoints);
        let forks = self.runs.values().filter(|run| run.record.checkpoint.is_none());
        let origins = forks.filter_map(|run| run.record.origin.as_ref());
        let pinned = origins.filter(|origin| origin.run == name).map(|origin| origin.step).collect();
        Retention { keep, pinned }
    }

    /// A manifest was written, or not. One that was counts even if its group is gone: the checkpoint exists.
    pub(crate) fn on_checkpoint_settled(
        &mut self,
        fence: &Fence,
        mark: CheckpointMark,
        outcome: Result<(), String>,
    ) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        let step = mark.step;
        run.results.committing.remove(&step);
        if outcome.is_ok() && run.record.checkpoint.as_ref().is_none_or(|newest| newest.step <= step) {
            run.record.checkpoint = Some(mark);
        }
        let newest = run.record.checkpoint.as_ref().map(|newest| newest.step);
        if outcome.is_ok() && newest == Some(step) {
            let retention = self.retention_of(&fence.run);
            self.out.push(Action::SweepCheckpoints { fence: fence.clone(), step, retention });
        }
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        let present = run.record.lineage <= fence.generation;
        let Some(group) = run.group.as_ref().filter(|_| present) else {
            if outcome.is_ok() {
                let ended = run.record.status.is_ended();
                self.save(&fence.run, false);
                if ended {
                    self.out.push(Action::CloseRun { run: fence.run.clone() });
                }
            }
            return;
        };
        let sessions: Vec<SessionId> = group.members.iter().map(|member| member.session).collect();
        let (kind, message, committed) = match outcome {
            Ok(()) => ("checkpoint", format!("the checkpoint of step {step} is stored"), step),
            Err(error) => {
                let message = format!("the checkpoint of step {step} could not be stored: {error}");
                // It came late: its parts may have been swept away as those of one that nobody needs.
                match newest.filter(|&newest| newest >= step) {
                    Some(newest) => ("checkpoint_lost", message, newest),
                    None => return self.fail(&fence.run, &message),
                }
            }
        };
        for session in sessions {
            if self.members.get(session).is_some() {
                let directive = Directive::CheckpointCommitted { run: fence.run.clone(), step: committed };
                self.direct(session, directive);
            }
        }
        self.record(&fence.run, kind, "", message);
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
        fed: report.fed,
    }
}
