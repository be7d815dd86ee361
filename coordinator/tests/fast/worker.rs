//! A worker as fast as a GPU: it computes nothing, keeps its results in the real worker's spool, and sends them as the
//! real session does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use takuma_core::checkpoint::CHECKPOINT_PARTS;
use takuma_core::config::RunConfig;
use takuma_core::ids::Generation;
use takuma_core::layout;
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::{PROTOCOL_VERSION, v1};
use takuma_store::Store;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::checkpoint::Finished;
use crate::spool::{Spool, Stamp};

/// As in the real session.
const OUTBOX_MESSAGES: usize = 256;
/// The trainer is so many steps ahead of what was sent at most: it shows how fast the coordinator takes them.
const MOST_AHEAD: u64 = 256;
/// Images of a grid, and the side of each.
const CELLS: u32 = 64;
const SIDE: u32 = 64;

/// When it did what.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub started: Instant,
    pub last_step: Instant,
}

/// Joins, and trains the run that it is given to its end. `pace` is the time of a step; zero means as fast as can be.
pub async fn train(address: SocketAddr, store: Store, pace: Duration) -> Times {
    let mut client = ClusterClient::connect(format!("http://{address}")).await.unwrap();
    let (outbox, outgoing) = mpsc::channel(OUTBOX_MESSAGES);
    outbox.send(wrap(Message::Hello(hello()))).await.unwrap();
    let mut directives = client.session(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let mut beats = tokio::time::interval(Duration::from_millis(500));
    let (sent_step, sent) = watch::channel(0);
    let mut spool: Option<Spool> = None;
    let mut prepared = None;
    let mut trainer: Option<JoinHandle<Times>> = None;
    loop {
        let unsent = spool.clone();
        let changed = async move {
            match unsent {
                Some(spool) => spool.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            directive = directives.message() => {
                match directive.unwrap().expect("the session goes on").directive.unwrap() {
                    Directive::Prepare(prepare) => {
                        let (run, generation) = (prepare.run.clone(), prepare.generation);
                        let new = Spool::new(Stamp { run: run.clone(), generation, rank: prepare.rank });
                        new.news(Message::Prepared(v1::Prepared { run, generation }));
                        spool = Some(new);
                        prepared = Some(prepare);
                    }
                    Directive::Start(_) => {
                        let (spool, prepare) = (spool.clone().unwrap(), prepared.clone().unwrap());
                        let job = Job { spool, prepare, store: store.clone(), pace, sent: sent.clone() };
                        trainer = Some(tokio::spawn(job.train()));
                    }
                    Directive::Kept(kept) => spool.as_ref().unwrap().kept(kept),
                    Directive::CheckpointCommitted(done) => spool.as_ref().unwrap().committed(done.step),
                    Directive::Release(_) => return trainer.unwrap().await.unwrap(),
                    Directive::Abort(abort) => panic!("{}", abort.message),
                    _ => {}
                }
            }
            _ = beats.tick() => {
                let (step, phase) = (*sent.borrow(), "d".to_owned());
                let (run, generation) = prepared.as_ref().map_or_else(Default::default, |told| (told.run.clone(), told.generation));
                let beat = v1::Heartbeat { run, generation, step, phase, ..v1::Heartbeat::default() };
                outbox.try_send(wrap(Message::Heartbeat(beat))).ok();
            }
            () = changed => {
                let spool = spool.as_ref().unwrap();
                for message in spool.take_unsent() {
                    if let Message::StepReport(report) = &message {
                        sent_step.send_replace(report.step);
                    }
                    outbox.send(wrap(message)).await.unwrap();
                }
                if spool.has_unsent() {
                    spool.wake();
                }
            }
        }
    }
}

/// The trainer's thread.
struct Job {
    spool: Spool,
    prepare: v1::Prepare,
    store: Store,
    pace: Duration,
    sent: watch::Receiver<u64>,
}

impl Job {
    async fn train(mut self) -> Times {
        let config = RunConfig::from_json(&self.prepare.config_json).unwrap();
        let (run, generation) = (self.prepare.run.clone(), self.prepare.generation);
        let target = self.prepare.target_steps;
        let started = Instant::now();
        let pixels: Arc<[u8]> = pixels().into();
        let tile = |kind: v1::sample_tile::Kind, step: u64| {
            let mut own = pixels.to_vec();
            own.rotate_left((step as usize * 3) % pixels.len());
            v1::SampleTile {
                kind: kind.into(),
                step,
                cells_total: CELLS,
                height: SIDE,
                width: SIDE,
                channels: 3,
                pixels: own,
                ..v1::SampleTile::default()
            }
        };
        self.spool.news(Message::Formed(v1::Formed {
            run,
            generation,
            position: Some(v1::Position::default()),
            stalled_s: 0.0,
            restored: 0,
        }));
        self.spool.tile(tile(v1::sample_tile::Kind::Reals, 0));
        self.spool.tile(tile(v1::sample_tile::Kind::Generated, 0));
        for step in 1..=target {
            self.sent.wait_for(|&sent| sent + MOST_AHEAD > step).await.unwrap();
            if !self.pace.is_zero() {
                tokio::time::sleep_until((started + self.pace * step as u32).into()).await;
            }
            self.spool.report(report(step));
            if step.is_multiple_of(config.sample_every) || step == target {
                self.spool.tile(tile(v1::sample_tile::Kind::Generated, step));
            }
            if step.is_multiple_of(config.checkpoint_every) || step == target {
                self.upload(step).await;
            }
        }
        let last_step = Instant::now();
        let (run, weights_sha256) = (self.prepare.run.clone(), format!("{target:064}"));
        let outcome = v1::run_ended::Outcome::Completed.into();
        self.spool.news(Message::RunEnded(v1::RunEnded {
            run,
            generation,
            outcome,
            step: target,
            weights_sha256,
        }));
        Times { started, last_step }
    }

    async fn upload(&self, step: u64) {
        let folder =
            self.store.at(&layout::run_folder(&self.prepare.run)).at(&layout::checkpoint_folder(step));
        let content = format!("weights {step}");
        let mut parts = Vec::new();
        for part in CHECKPOINT_PARTS {
            let name = layout::part_file(Generation(self.prepare.generation), part);
            folder.put(&name, content.clone()).await.unwrap();
            let size_bytes = content.len() as u64;
            parts.push(v1::ObjectPart { name, size_bytes, sha256: format!("{step:064}") });
        }
        self.spool.upload(Finished { step, parts, weights_sha256: format!("{step:064}") });
    }
}

/// Smooth shapes with a little noise, about as hard to compress as a young generator's images.
fn pixels() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut pixels = Vec::with_capacity((CELLS * SIDE * SIDE * 3) as usize);
    for cell in 0..CELLS {
        for y in 0..SIDE {
            for x in 0..SIDE {
                for channel in 0..3 {
                    let wave = ((x * (cell + 3) + y * 5) as f32 / 60.0 + channel as f32).sin();
                    pixels.push((128.0 + 90.0 * wave + random.f32() * 16.0) as u8);
                }
            }
        }
    }
    pixels
}

fn report(step: u64) -> v1::StepReport {
    let noise = (step * 7919 % 101) as f64 / 101.0;
    v1::StepReport {
        step,
        epoch: step / 98,
        d_loss: 0.7 + 0.3 * noise,
        g_loss: 2.1 - 0.7 * noise,
        d_acc: 0.5 + noise / 3.0,
        step_s: 0.001 + noise / 10_000.0,
        compute_s: 0.0009,
        data_s: 0.000_04,
        exchange_s: 0.000_06,
        fed: step.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        ..v1::StepReport::default()
    }
}

fn hello() -> v1::Hello {
    v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        process_id: "process-fast".into(),
        requested_name: "fast".into(),
        ring_address: "127.0.0.1:1".into(),
        host: "testhost".into(),
        device: "cuda:0".into(),
        threads: 1,
        ..v1::Hello::default()
    }
}

fn wrap(message: Message) -> v1::WorkerMessage {
    v1::WorkerMessage { message: Some(message) }
}
