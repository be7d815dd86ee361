//! Replays the transcripts of `scenarios/`: every line that begins with a time is an event, the indented
//! lines below it are the actions that it must lead to. `TAKUMA_BLESS=1` writes them anew; read the diff.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use std::fmt::Write;
use std::path::Path;

use support::*;
use takuma_core::event::*;
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
    let mut replayed = String::new();
    for line in recorded.lines().filter(|line| !line.starts_with("  ")) {
        writeln!(replayed, "{line}").unwrap();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split(' ').collect();
        let now = Timestamp(words[0].parse().expect("a line begins with milliseconds"));
        for action in cluster.apply(now, event(&words[1..])) {
            if !matches!(action, Action::PublishRun { .. }) {
                writeln!(replayed, "  {}", tell(&action)).unwrap();
            }
        }
    }
    replayed
}

/// `s1` -> 1, `g2` -> 2, `4` -> 4.
fn number(word: &str) -> u64 {
    word.trim_start_matches(['s', 'g']).parse().unwrap_or_else(|_| panic!("'{word}' is no number"))
}

fn event(words: &[&str]) -> Event {
    let session = |at: usize| SessionId(number(words[at]));
    let fenced = |at: usize| fence(words[at], number(words[at + 1]));
    let request = RequestId(1);
    let outcome = |at: usize| words.get(at).map_or(Ok(()), |_| Err(words[at..].join(" ")));
    match words[0] {
        "join" => WorkerIn { session: session(1), name: words[2] }.event(),
        "beat" => {
            let progress = Progress {
                fence: fence("", 0),
                step: number(words[2]),
                phase: "d".into(),
                times: StepTimes::default(),
            };
            Event::HeartbeatReceived { session: session(1), progress }
        }
        "submit" => {
            let workers = words.get(3).map(|word| number(word) as u32);
            Event::RunSubmitted { request, submission: submission(words[1], number(words[2]), workers) }
        }
        "saved" => Event::RunSaved { fence: fenced(1), outcome: outcome(3) },
        "prepared" => Event::MemberPrepared { session: session(1), fence: fenced(2) },
        "step" => {
            Event::StepReported { session: session(1), report: step_report(fenced(2), number(words[4])) }
        }
        "tile" => {
            let (first, cells) = (number(words[5]) as u32, number(words[6]) as u32);
            Event::TileReceived { session: session(1), tile: tile(fenced(2), number(words[4]), first, cells) }
        }
        "grid" => Event::GridSettled {
            fence: fenced(1),
            kind: GridKind::Generated,
            step: number(words[3]),
            outcome: outcome(4),
        },
        "upload" => {
            Event::CheckpointUploaded { session: session(1), upload: upload(fenced(2), number(words[4])) }
        }
        "committed" => {
            Event::CheckpointSettled { fence: fenced(1), mark: mark(number(words[3])), outcome: outcome(4) }
        }
        "completed" => {
            let end = member_end(fenced(2), Outcome::Completed, number(words[4]));
            Event::MemberEnded { session: session(1), end }
        }
        "halted" => {
            let end = member_end(fenced(2), Outcome::Stopped, number(words[4]));
            Event::MemberEnded { session: session(1), end }
        }
        "flushed" => Event::RunFlushed { fence: fenced(1), outcome: outcome(3) },
        "fails" => Event::MemberFailed { session: session(1), failure: failure(fenced(2), false, None) },
        "loses-peer" => {
            let suspect = Some(number(words[4]) as u32);
            Event::MemberFailed { session: session(1), failure: failure(fenced(2), true, suspect) }
        }
        "bye" => Event::WorkerLeft { session: session(1), reason: words[2..].join(" ") },
        "gone" => Event::SessionEnded { session: session(1), reason: "its connection closed".into() },
        "stop" => Event::StopRequested { request, run: words[1].into() },
        "resume" => Event::ResumeRequested { request, run: words[1].into(), dataset: dataset() },
        "shutdown" => Event::ShutDown,
        "tick" => Event::Ticked,
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
