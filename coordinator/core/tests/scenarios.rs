//! Replays the transcripts of `scenarios/`: every line that begins with a time is an event, the indented
//! lines below it are the actions that it must lead to. `TAKUMA_BLESS=1` writes them anew; read the diff.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use support::*;
use takuma_core::config::OnNan;
use takuma_core::event::*;
use takuma_core::ids::Generation;
use takuma_core::record::RunRecord;
use takuma_core::time::Timestamp;

#[test]
fn transcripts_replay_as_recorded() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 6, "transcripts are missing");
    let mut different = Vec::new();
    for path in paths {
        let recorded = std::fs::read_to_string(&path).unwrap();
        let replayed = replay(&recorded);
        if std::env::var_os("TAKUMA_BLESS").is_some() {
            std::fs::write(&path, &replayed).unwrap();
        } else if replayed != recorded {
            different.push(format!("{}:\n{replayed}", path.display()));
        }
    }
    assert!(different.is_empty(), "replayed otherwise than recorded:\n{}", different.join("\n"));
}

fn replay(recorded: &str) -> String {
    let mut cluster = cluster();
    // By worker, what it was told: what it claims when it comes back.
    let mut told: BTreeMap<String, Vec<Prepare>> = BTreeMap::new();
    let mut saved: BTreeMap<String, RunRecord> = BTreeMap::new();
    let mut replayed = String::new();
    for line in recorded.lines().filter(|line| !line.starts_with("  ")) {
        writeln!(replayed, "{line}").unwrap();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split(' ').collect();
        let now = Timestamp(words[0].parse().expect("a line begins with milliseconds"));
        let actions = if words[1] == "restart" {
            cluster = support::cluster();
            recovered(&words[1..], &saved).flat_map(|event| cluster.apply(now, event)).collect()
        } else {
            cluster.apply(now, event(&words[1..], &told, &saved))
        };
        for action in actions {
            match &action {
                Action::Direct { directive: Directive::Prepare(prepare), .. } => {
                    let worker = prepare.members[prepare.rank as usize].worker.clone();
                    told.entry(worker).or_default().push((**prepare).clone());
                }
                Action::SaveRun { record, .. } => {
                    saved.insert(record.name.clone(), (**record).clone());
                }
                _ => {}
            }
            if !matches!(action, Action::PublishRun { .. }) {
                writeln!(replayed, "  {}", tell(&action)).unwrap();
            }
        }
    }
    replayed
}

/// `restart 3 2`: the coordinator comes back and finds the metrics of 3 steps and the checkpoint of step 2.
fn recovered(words: &[&str], saved: &BTreeMap<String, RunRecord>) -> impl Iterator<Item = Event> {
    let stored = Stored { step: number(words[1]), ..Stored::default() };
    let checkpoint = words.get(2).map(|word| mark(number(word)));
    saved.values().map(move |record| {
        let (record, stored) = (Box::new(record.clone()), stored.clone());
        Event::RunRecovered { record, checkpoint: checkpoint.clone(), stored }
    })
}

/// `return s3 a [parked] [g4] [to g5]`: the newest group that it was told of, or that of a generation.
fn returning(words: &[&str], told: &BTreeMap<String, Vec<Prepare>>) -> Event {
    let prepares = &told[words[2]];
    let word_after = |word: &str| words.iter().position(|given| *given == word).map(|at| words[at + 1]);
    let changes_to = word_after("to").map(|word| Generation(number(word)));
    let generation = words[3..].iter().find(|word| word.starts_with('g')).map(|word| number(word));
    let generation = generation.filter(|&generation| changes_to != Some(Generation(generation)));
    let of = |generation: u64| prepares.iter().find(|prepare| prepare.fence.generation.0 == generation);
    let prepare = generation.map_or(prepares.last(), of).expect("it was told of that group");
    let claim = Claim { changes_to, ..claim(prepare, words.contains(&"parked")) };
    let process_id = prepare.members[prepare.rank as usize].process_id.clone();
    let hello = Hello { process_id, membership: Some(claim), ..hello(words[2]) };
    Event::WorkerConnected { session: SessionId(number(words[1])), hello }
}

/// `s1` -> 1, `g2` -> 2, `4` -> 4.
fn number(word: &str) -> u64 {
    word.trim_start_matches(['s', 'g']).parse().unwrap_or_else(|_| panic!("'{word}' is no number"))
}

fn event(
    words: &[&str],
    told: &BTreeMap<String, Vec<Prepare>>,
    saved: &BTreeMap<String, RunRecord>,
) -> Event {
    let session = |at: usize| SessionId(number(words[at]));
    let fenced = |at: usize| fence(words[at], number(words[at + 1]));
    let outcome = |at: usize| words.get(at).map_or(Ok(()), |_| Err(words[at..].join(" ")));
    match words[0] {
        "join" => WorkerIn { session: session(1), name: words[2] }.event(),
        "return" => returning(words, told),
        "saved" => {
            let (fence, outcome) = (fenced(1), outcome(3));
            let reserved = saved[words[1]].generations_reserved;
            Event::RunSaved { fence, reserved, outcome }
        }
        "stored" => {
            let lineage = Generation(number(words[2]));
            Event::MetricsStored { run: words[1].into(), step: number(words[3]), lineage }
        }
        "grid" => Event::GridSettled {
            fence: fenced(1),
            kind: GridKind::Generated,
            step: number(words[3]),
            outcome: outcome(4),
        },
        "committed" => {
            Event::CheckpointSettled { fence: fenced(1), mark: mark(number(words[3])), outcome: outcome(4) }
        }
        "flushed" => Event::RunFlushed { fence: fenced(1), outcome: outcome(3) },
        "leaves" => Event::WorkerLeaves { session: session(1), reason: "SIGTERM".into(), at_once: false },
        "bye" => Event::WorkerLeaves { session: session(1), reason: words[2..].join(" "), at_once: true },
        "gone" => Event::SessionEnded { session: session(1), reason: "its connection closed".into() },
        "shutdown" => Event::ShutDown,
        "tick" => Event::Ticked,
        "submit" | "fork" | "stop" | "resume" | "drain" => request(words),
        _ => member_event(words),
    }
}

/// What a client asks for.
fn request(words: &[&str]) -> Event {
    let request = RequestId(1);
    match words[0] {
        "submit" => {
            let workers = words.get(3).filter(|word| **word != "-").map(|word| number(word) as u32);
            let mut submission = submission(words[1], number(words[2]), workers);
            submission.config.balance = words.get(4) == Some(&"balance");
            if words.get(4) == Some(&"rollback") {
                submission.config.on_nan = OnNan::Rollback;
            }
            Event::RunSubmitted { request, submission }
        }
        "fork" => {
            let mut submission = submission(words[1], number(words[2]), None);
            submission.origin = Some(origin(words[3], number(words[4])));
            if words.get(5) == Some(&"rollback") {
                submission.config.on_nan = OnNan::Rollback;
            }
            Event::RunSubmitted { request, submission }
        }
        "stop" => Event::StopRequested { request, run: words[1].into() },
        "resume" => Event::ResumeRequested { request, run: words[1].into(), dataset: dataset() },
        _ => Event::DrainRequested { request, worker: words[1].into() },
    }
}

/// What a worker sends: `step s1 calm g1 4`.
fn member_event(words: &[&str]) -> Event {
    let session = SessionId(number(words[1]));
    let fenced = || fence(words[2], number(words[3]));
    let step = || number(words[4]);
    let failed = |kind| Event::MemberFailed { session, failure: failure(fenced(), kind) };
    match words[0] {
        "beat" => {
            let (fence, step, times) = (fence("", 0), number(words[2]), StepTimes::default());
            let progress = Progress { fence, step, phase: "d".into(), times };
            Event::HeartbeatReceived { session, progress }
        }
        // `works s1 calm g1 STEP COMPUTE_MS DATA_MS [RECEIVE_MS]`
        "works" => {
            let seconds = |at: usize| words.get(at).map_or(0.0, |word| number(word) as f64 / 1000.0);
            let (compute_s, data_s, receive_s) = (seconds(5), seconds(6), seconds(7));
            let times = StepTimes { compute_s, data_s, exchange_s: receive_s, receive_s };
            let progress = Progress { fence: fenced(), step: step(), phase: "d".into(), times };
            Event::HeartbeatReceived { session, progress }
        }
        "prepared" => Event::MemberPrepared { session, fence: fenced() },
        "formed" => Event::GroupFormed { session, formed: formed(fenced(), step()) },
        "step" => Event::StepReported { session, report: step_report(fenced(), step()) },
        "tile" => {
            let (first, cells) = (number(words[5]) as u32, number(words[6]) as u32);
            Event::TileReceived { session, tile: tile(fenced(), step(), first, cells) }
        }
        "upload" => Event::CheckpointUploaded { session, upload: upload(fenced(), step()) },
        "completed" => Event::MemberEnded { session, end: member_end(fenced(), Outcome::Completed, step()) },
        "halted" => Event::MemberEnded { session, end: member_end(fenced(), Outcome::Stopped, step()) },
        "fails" => failed(FailureKind::Local),
        "breaks" => failed(FailureKind::Run),
        "explodes" => {
            let failure = failure(fenced(), FailureKind::NotFinite);
            Event::MemberFailed { session, failure: MemberFailure { step: step(), ..failure } }
        }
        "loses-peer" => failed(FailureKind::PeerLost { suspect: Some(step() as u32) }),
        other => panic!("'{other}' is no event"),
    }
}

struct WorkerIn<'a> {
    session: SessionId,
    name: &'a str,
}

impl WorkerIn<'_> {
    fn event(&self) -> Event {
        let name = if self.name == "-" { "" } else { self.name };
        let mut hello = hello(name);
        hello.process_id = format!("process of {} {}", self.name, self.session.0);
        Event::WorkerConnected { session: self.session, hello }
    }
}
