//! A worker that does by itself what real ones do: it trains at its pace, keeps what the store does not have yet,
//! and comes back to whatever coordinator there is. It computes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use takuma_core::checkpoint::CHECKPOINT_PARTS;
use takuma_core::config::RunConfig;
use takuma_core::ids::Generation;
use takuma_core::layout;
use takuma_proto::v1;
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_store::Store;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep_until};
use tokio_stream::wrappers::ReceiverStream;

use super::door::Door;
use super::worker::membership;

/// Between two tries to reach a coordinator.
const RETRY: Duration = Duration::from_secs(1);
/// As in worker/src/trainer/spool.rs: more is lost; from the second and third on each step ends with the pause.
const MAX_KEPT: [usize; 2] = [100_000, 224];
const MANY_REPORTS: usize = 75_000;
const MANY_TILES: usize = 160;
const PAUSE: Duration = Duration::from_secs(1);
/// Cells of a grid, and the side of each: small, since thousands of grids are made.
const CELLS: u32 = 64;
const SIDE: u32 = 4;
/// Of one grid.
pub const GRID_BYTES: u64 = (CELLS * SIDE * SIDE) as u64;

/// What one session has sent already.
#[derive(Default)]
struct Sent {
    report: u64,
    tiles: BTreeSet<(u64, i32)>,
    uploads: BTreeSet<u64>,
    news: usize,
}

/// Its part in a run.
struct Member {
    prepare: v1::Prepare,
    config: RunConfig,
    training: bool,
    step: u64,
    next_step: Instant,
    reports: BTreeMap<u64, v1::StepReport>,
    tiles: BTreeMap<(u64, i32), v1::SampleTile>,
    uploads: BTreeMap<u64, v1::CheckpointUploaded>,
    committed: u64,
    news: Vec<Message>,
    ended: bool,
    sent: Sent,
}

/// The only worker of its cluster.
pub struct Trainer {
    door: Door,
    store: Store,
    pace: Duration,
    member: Option<Member>,
    most: Arc<[AtomicUsize; 2]>,
}

impl Trainer {
    /// A worker that uploads to `store` and needs `pace` for a step.
    pub fn new(door: Door, store: Store, pace: Duration) -> Self {
        Self { door, store, pace, member: None, most: Arc::default() }
    }

    /// The most reports and the most tiles that it ever kept.
    pub fn most_kept(&self) -> Arc<[AtomicUsize; 2]> {
        Arc::clone(&self.most)
    }

    /// Works until it is dropped.
    pub async fn work(mut self) {
        loop {
            if self.session().await.is_none() {
                self.train_for(RETRY).await;
            }
        }
    }

    /// Without a coordinator.
    async fn train_for(&mut self, period: Duration) {
        let until = Instant::now() + period;
        while let Some(at) = self.next_step().filter(|&at| at < until) {
            sleep_until(at).await;
            self.step().await;
        }
        sleep_until(until).await;
    }

    fn next_step(&self) -> Option<Instant> {
        let member = self.member.as_ref()?;
        let [reports, tiles] = member.kept_now();
        let pause = if reports >= MANY_REPORTS || tiles >= MANY_TILES { PAUSE } else { Duration::ZERO };
        (member.training && member.step < member.prepare.target_steps).then_some(member.next_step + pause)
    }

    /// One session, to its end; `None` if none came about.
    async fn session(&mut self) -> Option<()> {
        let channel = self.door.connect().await.ok()?;
        let (outgoing, messages) = mpsc::channel(256);
        let hello = self.hello();
        outgoing.send(wrap(Message::Hello(hello))).await.ok()?;
        let mut client = ClusterClient::new(channel);
        let mut directives = client.session(ReceiverStream::new(messages)).await.ok()?.into_inner();
        let Some(Directive::Welcome(welcome)) = directives.message().await.ok()??.directive else {
            panic!("no welcome came")
        };
        if let Some(member) = &mut self.member {
            member.sent = Sent::default();
        }
        let mut beats = interval(Duration::from_millis(welcome.heartbeat_interval_ms.into()));
        loop {
            let next = self.next_step();
            tokio::select! {
                directive = directives.message() => match directive {
                    Ok(Some(directive)) => self.follow(directive.directive.expect("a directive")),
                    _ => return Some(()),
                },
                _ = beats.tick() => outgoing.send(wrap(Message::Heartbeat(self.heartbeat()))).await.ok()?,
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => self.step().await,
            }
            for message in self.member.as_mut().map(Member::unsent).unwrap_or_default() {
                outgoing.send(wrap(message)).await.ok()?;
            }
        }
    }

    fn hello(&self) -> v1::Hello {
        let claim = self.member.as_ref().filter(|member| member.training);
        v1::Hello {
            protocol_version: takuma_proto::PROTOCOL_VERSION,
            process_id: "process-a".into(),
            requested_name: "a".into(),
            ring_address: "127.0.0.1:1".into(),
            host: "testhost".into(),
            device: "cpu".into(),
            threads: 1,
            membership: claim.map(|member| v1::Membership {
                position: Some(v1::Position { step: member.step, phase: 0 }),
                ..membership(&member.prepare)
            }),
            ..v1::Hello::default()
        }
    }

    fn heartbeat(&self) -> v1::Heartbeat {
        let Some(member) = &self.member else {
            return v1::Heartbeat { phase: "idle".into(), ..v1::Heartbeat::default() };
        };
        let (run, generation) = (member.prepare.run.clone(), member.prepare.generation);
        v1::Heartbeat { run, generation, step: member.step, phase: "d".into(), ..v1::Heartbeat::default() }
    }

    fn follow(&mut self, directive: Directive) {
        match directive {
            Directive::Prepare(prepare) => self.prepare(prepare),
            Directive::Start(start) => {
                if let Some(member) = self.is(&start.run, start.generation) {
                    member.training = true;
                    member.next_step = Instant::now();
                    member.formed();
                    member.grids_due(member.step);
                    member.end_if_through();
                }
            }
            Directive::CheckpointCommitted(done) => {
                if let Some(member) = self.member.as_mut().filter(|member| member.prepare.run == done.run) {
                    member.uploads.remove(&done.step);
                    member.committed = member.committed.max(done.step);
                    member.end_if_through();
                }
            }
            Directive::Kept(kept) => {
                if let Some(member) = self.member.as_mut().filter(|member| member.prepare.run == kept.run) {
                    member.kept(&kept);
                }
            }
            Directive::Abort(v1::Abort { run, generation, .. })
            | Directive::Release(v1::Release { run, generation }) => {
                if self.is(&run, generation).is_some() {
                    self.member = None;
                }
            }
            Directive::Farewell(_) => {}
            other => panic!("{other:?} came"),
        }
    }

    fn is(&mut self, run: &str, generation: u64) -> Option<&mut Member> {
        let is = |member: &&mut Member| member.prepare.run == run && member.prepare.generation == generation;
        self.member.as_mut().filter(is)
    }

    fn prepare(&mut self, prepare: v1::Prepare) {
        let generation = prepare.generation;
        match &mut self.member {
            Some(member) if prepare.state() == v1::prepare::State::Peers && member.training => {
                member.prepare = prepare;
                member.news.clear();
                member.sent = Sent::default();
                member.formed();
                member.end_if_through();
            }
            _ => {
                let run = prepare.run.clone();
                let mut member = Member::begin(prepare);
                member.news.push(Message::Prepared(v1::Prepared { run, generation }));
                self.member = Some(member);
            }
        }
    }

    /// Finishes a step and uploads its checkpoint.
    async fn step(&mut self) {
        let (store, pace) = (self.store.clone(), self.pace);
        let Some(member) = &mut self.member else { return };
        member.step += 1;
        // After a pause the steps that did not take place are not made up for.
        member.next_step = (member.next_step + pace).max(Instant::now());
        let step = member.step;
        member.reports.insert(step, report(step));
        member.grids_due(step);
        for ((kept, most), bound) in member.kept_now().into_iter().zip(&*self.most).zip(MAX_KEPT) {
            most.fetch_max(kept, Ordering::Relaxed);
            assert!(kept <= bound, "a worker loses what it can keep no longer");
        }
        let last = step == member.prepare.target_steps;
        if last || step.is_multiple_of(member.config.checkpoint_every) {
            let folder =
                store.at(&layout::run_folder(&member.prepare.run)).at(&layout::checkpoint_folder(step));
            let content = format!("weights {step}");
            let mut parts = Vec::new();
            for part in CHECKPOINT_PARTS {
                let name = layout::part_file(Generation(member.prepare.generation), part);
                folder.put(&name, content.clone()).await.expect("the worker's own way to the store is clear");
                let size_bytes = content.len() as u64;
                parts.push(v1::ObjectPart { name, size_bytes, sha256: format!("{step:064}") });
            }
            let weights_sha256 = format!("{step:064}");
            let upload = v1::CheckpointUploaded { step, parts, weights_sha256, ..Default::default() };
            member.uploads.insert(step, upload);
        }
    }
}

impl Member {
    fn begin(prepare: v1::Prepare) -> Self {
        Self {
            config: RunConfig::from_json(&prepare.config_json).unwrap(),
            step: prepare.start_step,
            committed: prepare.start_step,
            prepare,
            training: false,
            next_step: Instant::now(),
            reports: BTreeMap::new(),
            tiles: BTreeMap::new(),
            uploads: BTreeMap::new(),
            news: Vec::new(),
            ended: false,
            sent: Sent::default(),
        }
    }

    fn formed(&mut self) {
        self.ended = false;
        self.news.push(Message::Formed(v1::Formed {
            run: self.prepare.run.clone(),
            generation: self.prepare.generation,
            position: Some(v1::Position { step: self.step, phase: 0 }),
            stalled_s: 0.05,
            restored: 0,
        }));
    }

    fn grids_due(&mut self, step: u64) {
        let kinds: &[v1::sample_tile::Kind] = match step {
            0 => &[v1::sample_tile::Kind::Reals, v1::sample_tile::Kind::Generated],
            _ => &[v1::sample_tile::Kind::Generated],
        };
        if !step.is_multiple_of(self.config.sample_every) && step != self.prepare.target_steps {
            return;
        }
        for &kind in kinds {
            let tile = v1::SampleTile {
                kind: kind.into(),
                step,
                cells_total: CELLS,
                height: SIDE,
                width: SIDE,
                channels: 1,
                pixels: vec![step as u8; (CELLS * SIDE * SIDE) as usize],
                ..v1::SampleTile::default()
            };
            self.tiles.insert((step, kind.into()), tile);
        }
    }

    fn kept_now(&self) -> [usize; 2] {
        [self.reports.len(), self.tiles.len()]
    }

    fn kept(&mut self, kept: &v1::Kept) {
        if kept.resend {
            self.sent = Sent::default();
        }
        self.reports = self.reports.split_off(&(kept.step + 1));
        let generated = i32::from(v1::sample_tile::Kind::Generated);
        self.tiles.retain(|&(step, kind), _| match kind == generated {
            true => !kept.grids.contains(&step),
            false => !kept.reals,
        });
    }

    /// As real workers do, after the last upload was committed.
    fn end_if_through(&mut self) {
        let target = self.prepare.target_steps;
        if self.step < target || self.committed < target || self.ended {
            return;
        }
        self.ended = true;
        self.news.push(Message::RunEnded(v1::RunEnded {
            run: self.prepare.run.clone(),
            generation: self.prepare.generation,
            outcome: v1::run_ended::Outcome::Completed.into(),
            step: target,
            weights_sha256: format!("{target:064}"),
        }));
    }

    /// What this session has not sent yet.
    fn unsent(&mut self) -> Vec<Message> {
        let (run, generation) = (self.prepare.run.clone(), self.prepare.generation);
        let mut messages = self.news[self.sent.news..].to_vec();
        self.sent.news = self.news.len();
        if !self.training {
            return messages;
        }
        for (&step, report) in self.reports.range(self.sent.report + 1..) {
            self.sent.report = step;
            messages.push(Message::StepReport(v1::StepReport {
                run: run.clone(),
                generation,
                ..report.clone()
            }));
        }
        for (&key, tile) in &self.tiles {
            if self.sent.tiles.insert(key) {
                let tile = v1::SampleTile { run: run.clone(), generation, ..tile.clone() };
                messages.push(Message::SampleTile(tile));
            }
        }
        for (&step, upload) in &self.uploads {
            if self.sent.uploads.insert(step) {
                let upload = v1::CheckpointUploaded { run: run.clone(), generation, ..upload.clone() };
                messages.push(Message::CheckpointUploaded(upload));
            }
        }
        messages
    }
}

fn report(step: u64) -> v1::StepReport {
    let (d_loss, g_loss) = (1.0 / step as f64, step as f64);
    v1::StepReport { step, d_loss, g_loss, d_acc: 0.5, step_s: 0.5, fed: step, ..Default::default() }
}

fn wrap(message: Message) -> v1::WorkerMessage {
    v1::WorkerMessage { message: Some(message) }
}
