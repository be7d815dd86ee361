//! A worker that speaks the wire's protocol and trains nothing.

use std::net::SocketAddr;
use std::time::Duration;

use takuma_core::checkpoint::CHECKPOINT_PARTS;
use takuma_core::ids::Generation;
use takuma_core::layout::{checkpoint_folder, part_file};
use takuma_proto::v1;
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_store::Store;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::soon;

/// A worker that does as it is told by the test.
pub struct Worker {
    pub name: String,
    pub outgoing: Option<mpsc::Sender<v1::WorkerMessage>>,
    pub directives: Streaming<v1::WorkerDirective>,
    heart: JoinHandle<()>,
}

impl Worker {
    pub async fn join(address: SocketAddr, name: &str, protocol_version: u32) -> Result<Self, Status> {
        Self::connect(address, name, protocol_version, None).await
    }

    pub async fn connect(
        address: SocketAddr,
        name: &str,
        protocol_version: u32,
        membership: Option<v1::Membership>,
    ) -> Result<Self, Status> {
        let mut client =
            soon("the connection", ClusterClient::connect(format!("http://{address}"))).await.unwrap();
        let (outgoing, messages) = mpsc::channel(64);
        let hello = v1::Hello {
            protocol_version,
            software_version: "0.1.0".into(),
            process_id: format!("process-{name}"),
            requested_name: name.into(),
            ring_address: format!("127.0.0.1:1{}", name.len()),
            host: "testhost".into(),
            pid: 4242,
            device: "cpu".into(),
            threads: 1,
            libtorch_version: "2.11.0".into(),
            membership,
        };
        outgoing.send(v1::WorkerMessage { message: Some(Message::Hello(hello)) }).await.unwrap();
        let session = client.session(ReceiverStream::new(messages));
        let mut directives = soon("the welcome", session).await?.into_inner();
        let Some(Directive::Welcome(welcome)) = next(&mut directives).await else {
            panic!("no welcome came")
        };
        let mut beats = tokio::time::interval(Duration::from_millis(welcome.heartbeat_interval_ms.into()));
        let sender = outgoing.clone();
        let heart = tokio::spawn(async move {
            loop {
                beats.tick().await;
                let beat =
                    Message::Heartbeat(v1::Heartbeat { phase: "d".into(), ..v1::Heartbeat::default() });
                if sender.send(v1::WorkerMessage { message: Some(beat) }).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { name: welcome.name, outgoing: Some(outgoing), directives, heart })
    }

    pub async fn send(&self, message: Message) {
        let outgoing = self.outgoing.as_ref().expect("the worker is connected");
        let message = v1::WorkerMessage { message: Some(message) };
        soon("room for a message", outgoing.send(message)).await.unwrap();
    }

    /// The next directive that asks for something. What is kept already changes nothing here.
    pub async fn next(&mut self) -> Directive {
        loop {
            match self.next_of_all().await {
                Directive::Kept(_) => {}
                directive => return directive,
            }
        }
    }

    pub async fn next_of_all(&mut self) -> Directive {
        next(&mut self.directives).await.expect("the session ended")
    }

    /// Waits until the coordinator says what it has, and that the rest is to be sent again.
    pub async fn asked_to_resend(&mut self) -> v1::Kept {
        loop {
            match self.next_of_all().await {
                Directive::Kept(kept) if kept.resend => return kept,
                Directive::Kept(_) => {}
                other => panic!("{other:?} came instead of a Kept"),
            }
        }
    }

    /// Stops the heartbeats and stays connected: what SIGSTOP does.
    pub fn fall_silent(&self) {
        self.heart.abort();
    }

    /// Breaks the connection: what SIGKILL does.
    pub fn die(self) {
        self.heart.abort();
    }

    /// Takes a Prepare that asks for the state of peers.
    pub async fn regrouped(&mut self, when: v1::prepare::When) -> v1::Prepare {
        let prepare = self.told_to_prepare().await;
        assert_eq!((prepare.state(), prepare.when()), (v1::prepare::State::Peers, when));
        prepare
    }

    pub async fn told_to_prepare(&mut self) -> v1::Prepare {
        match self.next().await {
            Directive::Prepare(prepare) => prepare,
            other => panic!("{other:?} came instead of a Prepare"),
        }
    }

    /// Takes a Prepare and answers it.
    pub async fn prepare(&mut self) -> v1::Prepare {
        let prepare = self.told_to_prepare().await;
        self.prepared(&prepare).await;
        prepare
    }

    pub async fn prepared(&self, prepare: &v1::Prepare) {
        let prepared = v1::Prepared { run: prepare.run.clone(), generation: prepare.generation };
        self.send(Message::Prepared(prepared)).await;
    }

    /// Takes the Start; it needs all to be prepared.
    pub async fn start(&mut self) -> v1::Start {
        match self.next().await {
            Directive::Start(start) => start,
            other => panic!("{other:?} came instead of a Start"),
        }
    }

    /// Says as rank 0 that its group stands.
    pub async fn formed(&self, prepare: &v1::Prepare, step: u64) {
        self.send(Message::Formed(v1::Formed {
            run: prepare.run.clone(),
            generation: prepare.generation,
            position: Some(v1::Position { step, phase: 0 }),
            stalled_s: 0.05,
            restored: 0,
        }))
        .await;
    }

    /// Says that the link to a peer broke, or that it cannot go on.
    pub async fn failed(&self, prepare: &v1::Prepare, kind: v1::run_failed::Kind, message: &str) {
        let peer = (prepare.rank + 1) % prepare.members.len() as u32;
        self.send(Message::RunFailed(v1::RunFailed {
            run: prepare.run.clone(),
            generation: prepare.generation,
            step: 2,
            phase: "g1".into(),
            kind: kind.into(),
            message: message.into(),
            suspect_rank: peer as i32,
        }))
        .await;
    }

    pub async fn goodbye(&self, at_once: bool) {
        self.send(Message::Goodbye(v1::Goodbye { reason: "SIGTERM".into(), at_once })).await;
    }

    pub async fn report(&self, prepare: &v1::Prepare, step: u64) {
        self.send(Message::StepReport(v1::StepReport {
            run: prepare.run.clone(),
            generation: prepare.generation,
            step,
            epoch: 0,
            d_loss: 1.0 / step as f64,
            g_loss: step as f64,
            d_acc: 0.5,
            step_s: 0.5,
            compute_s: 0.4,
            data_s: 0.04,
            exchange_s: 0.06,
            fed: step * 1_000,
            left_out: String::new(),
        }))
        .await;
    }

    pub async fn tile(&self, prepare: &v1::Prepare, kind: v1::sample_tile::Kind, step: u64) {
        let share = &prepare.members[prepare.rank as usize];
        let (height, width, channels) = (64, 64, 3);
        let cell = |cell: u32| vec![(cell * 3) as u8; (height * width * channels) as usize];
        self.send(Message::SampleTile(v1::SampleTile {
            run: prepare.run.clone(),
            generation: prepare.generation,
            kind: kind.into(),
            step,
            first_cell: share.first_slot,
            cells_total: 64,
            height,
            width,
            channels,
            pixels: (share.first_slot..share.first_slot + share.slot_count).flat_map(cell).collect(),
        }))
        .await;
    }

    /// Uploads a checkpoint as rank 0 does, and waits for its commit.
    pub async fn checkpoint(&mut self, prepare: &v1::Prepare, step: u64) {
        self.upload(prepare, step).await;
        self.committed(step).await;
    }

    pub async fn upload(&self, prepare: &v1::Prepare, step: u64) {
        let store = Store::open(&prepare.run_url).unwrap().at(&checkpoint_folder(step));
        let mut parts = Vec::new();
        for part in CHECKPOINT_PARTS {
            let name = part_file(Generation(prepare.generation), part);
            store.put(&name, format!("weights {step}")).await.unwrap();
            let size_bytes = format!("weights {step}").len() as u64;
            parts.push(v1::ObjectPart { name, size_bytes, sha256: format!("{step:064}") });
        }
        let (run, generation) = (prepare.run.clone(), prepare.generation);
        let weights_sha256 = format!("{step:064}");
        let uploaded = v1::CheckpointUploaded { run, generation, step, parts, weights_sha256 };
        self.send(Message::CheckpointUploaded(uploaded)).await;
    }

    pub async fn committed(&mut self, step: u64) {
        let directive = self.next().await;
        assert!(matches!(&directive, Directive::CheckpointCommitted(c) if c.step == step), "{directive:?}");
    }

    pub async fn end(&self, prepare: &v1::Prepare, outcome: v1::run_ended::Outcome, step: u64) {
        let (run, generation) = (prepare.run.clone(), prepare.generation);
        let weights_sha256 = format!("{step:064}");
        let ended = v1::RunEnded { run, generation, outcome: outcome.into(), step, weights_sha256 };
        self.send(Message::RunEnded(ended)).await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.heart.abort();
    }
}

/// What a member of `prepare`'s group says that comes back.
pub fn membership(prepare: &v1::Prepare) -> v1::Membership {
    v1::Membership {
        run: prepare.run.clone(),
        run_id: prepare.run_id.clone(),
        generation: prepare.generation,
        rank: prepare.rank,
        members: prepare.members.clone(),
        position: Some(v1::Position { step: 2, phase: 0 }),
        parked: false,
        changes_to: 0,
    }
}

async fn next(directives: &mut Streaming<v1::WorkerDirective>) -> Option<Directive> {
    soon("a directive", directives.message()).await.unwrap().and_then(|message| message.directive)
}
