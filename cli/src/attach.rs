//! Following a run until it ends: reconnects while the coordinator restarts, detaches on Ctrl-C.

use std::time::{Duration, Instant};

use takuma_proto::v1::{RunEvent, RunStatus, RunUpdate, RunView, WatchRunRequest};
use tonic::{Code, Status, Streaming};

use crate::client::{Client, connection_broke, has_ended, status_name};
use crate::error::{CliError, Exit};
use crate::output::{self, Tone};
use crate::progress::Screen;

/// A coordinator restarts within two seconds or so; an operator who restarts it by hand gets this long.
pub const RECONNECT_FOR: Duration = Duration::from_secs(30);
/// Of the events before we came, this many tell how things stand.
const PAST_EVENTS_MAX: usize = 3;
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// The updates of one run, over as many connections as it takes.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    run: String,
    patience: Duration,
    stream: Option<Streaming<RunUpdate>>,
    silent_since: Option<Instant>,
    attempts: u32,
    last_event_unix_s: f64,
}

impl Watch {
    /// Watches the run of this name or prefix; a broken stream is taken up again for `patience`.
    #[must_use]
    pub fn new(client: &Client, run: &str, patience: Duration) -> Self {
        Self {
            client: client.clone(),
            run: run.to_owned(),
            patience,
            stream: None,
            silent_since: None,
            attempts: 0,
            last_event_unix_s: f64::NEG_INFINITY,
        }
    }

    /// The next state. May be dropped and called again without losing the place.
    ///
    /// # Errors
    /// The coordinator's refusal, or [`CliError::Unreachable`] when it stayed away for too long.
    pub async fn next(&mut self, screen: &Screen) -> Result<RunUpdate, CliError> {
        loop {
            let broken = match self.stream.as_mut() {
                None => match self.open().await {
                    Ok(stream) => {
                        self.stream = Some(stream);
                        continue;
                    }
                    Err(status) => status,
                },
                Some(stream) => match stream.message().await {
                    Ok(Some(update)) if update.run.is_some() => return Ok(self.accept(update, screen)),
                    Ok(Some(_)) => continue,
                    Ok(None) => {
                        Status::unavailable("the coordinator ended the stream before the run had ended")
                    }
                    Err(status) => status,
                },
            };
            self.stream = None;
            if !passes(&broken) {
                return Err(self.client.refused(broken));
            }
            self.back_off(broken, screen).await?;
        }
    }

    async fn open(&self) -> Result<Streaming<RunUpdate>, Status> {
        let request = WatchRunRequest { run: self.run.clone() };
        let mut control = self.client.control();
        match tokio::time::timeout(crate::client::CALL_TIMEOUT, control.watch_run(request)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::unavailable("the coordinator accepts connections but does not answer")),
        }
    }

    fn accept(&mut self, mut update: RunUpdate, screen: &Screen) -> RunUpdate {
        let back = self.silent_since.take().is_some();
        if back {
            self.attempts = 0;
            screen.say("the coordinator is back");
        }
        let told = self.last_event_unix_s;
        self.last_event_unix_s = update.events.iter().map(|event| event.at_unix_s).fold(told, f64::max);
        // The first update of a connection brings the run's past, which may be told already, and long.
        if back {
            update.events.retain(|event| event.at_unix_s > told);
        } else if told == f64::NEG_INFINITY {
            let past = update.events.len().saturating_sub(PAST_EVENTS_MAX);
            update.events.drain(..past);
        }
        update
    }

    async fn back_off(&mut self, broken: Status, screen: &Screen) -> Result<(), CliError> {
        let now = Instant::now();
        let since = match self.silent_since {
            Some(since) => since,
            None => {
                let patience = self.patience.as_secs();
                screen.say(&format!("the coordinator does not answer; trying again for {patience} s"));
                *self.silent_since.insert(now)
            }
        };
        let left = self.patience.saturating_sub(now - since);
        if left.is_zero() {
            let address = self.client.address();
            let message = format!(
                "the coordinator at {} went away while run {} was watched, and did not come back within {} s; the \
                 workers may go on without it: start it again, then 'takuma run watch {}'",
                address.url,
                self.run,
                self.patience.as_secs(),
                self.run
            );
            return Err(CliError::Unreachable { message, source: Some(Box::new(broken)) });
        }
        let longest = (FIRST_DELAY * 2_u32.saturating_pow(self.attempts.min(10))).min(LONGEST_DELAY);
        self.attempts += 1;
        // Full jitter: many terminals must not come back in one wave.
        tokio::time::sleep(longest.mul_f64(fastrand::f64()).min(left)).await;
        Ok(())
    }
}

/// Whether trying again may help.
fn passes(status: &Status) -> bool {
    connection_broke(status) || matches!(status.code(), Code::Unavailable | Code::Cancelled)
}

/// How following a run ended.
#[derive(Debug)]
pub enum Ended {
    /// The run is over; this is its last state.
    Run(Box<RunView>),
    /// Ctrl-C: the run goes on without us.
    Detached,
}

/// Follows a run on the screen until it has ended or Ctrl-C.
///
/// # Errors
/// As [`Watch::next`].
pub async fn follow(client: &Client, run: &str, screen: &mut Screen) -> Result<Ended, CliError> {
    let mut watch = Watch::new(client, run, RECONNECT_FOR);
    let mut news = News::default();
    let followed = loop {
        let update = tokio::select! {
            update = watch.next(screen) => update,
            pressed = tokio::signal::ctrl_c() => {
                break pressed.map(|()| Ended::Detached).map_err(|error| CliError::io("watch for Ctrl-C", error));
            }
        };
        match update {
            Err(error) => break Err(error),
            Ok(RunUpdate { run: Some(run), events }) => {
                events
                    .iter()
                    .filter(|event| news.tells(event))
                    .for_each(|event| screen.say(&event_line(event)));
                screen.update(&run);
                if has_ended(&run) {
                    break Ok(Ended::Run(Box::new(run)));
                }
            }
            Ok(RunUpdate { run: None, .. }) => {}
        }
    };
    screen.close();
    followed
}

/// Which events are worth a line: what the bar and the last sentence do not tell anyway, and what does not come
/// every minute for a day. A change of the workers is one line: who left, or who joined.
#[derive(Debug, Default)]
struct News {
    /// A group broke, and how long it stood still is not told yet.
    broken: bool,
}

impl News {
    fn tells(&mut self, event: &RunEvent) -> bool {
        match event.kind.as_str() {
            "submitted" | "preparing" | "sample" | "failed" | "stopped" | "succeeded" => false,
            // The steps of a change, of which the last tells all.
            "changing" | "regrouping" | "link_lost" | "leaving" => false,
            "worker_lost" => {
                self.broken = true;
                true
            }
            // Also comes after a change between two steps, which stops nobody.
            "formed" => std::mem::take(&mut self.broken),
            _ => true,
        }
    }
}

/// `12:03:04Z worker-2: the link to worker-1 broke`.
fn event_line(event: &RunEvent) -> String {
    let time = output::timestamp(event.at_unix_s);
    let clock = time.split_once('T').map_or("-", |(_, clock)| clock);
    let named = event.worker.is_empty() || event.message.contains(&event.worker);
    let worker = if named { String::new() } else { format!("{}: ", event.worker) };
    Tone::Faint.stderr(&output::visible(&format!("{clock} {worker}{}", event.message)))
}

/// Says in one sentence how a run ended and what to do next, and returns the exit code that stands for it.
///
/// # Errors
/// A failed or stopped run is an error here, so that scripts see it.
pub fn conclude(run: &RunView) -> Result<Exit, CliError> {
    let name = &run.name;
    let took = output::duration(run.elapsed_s);
    match run.status() {
        RunStatus::Succeeded => {
            let pace = if run.elapsed_s > 0.0 {
                format!(" ({} it/s)", crate::progress::per_second(run.step as f64 / run.elapsed_s))
            } else {
                String::new()
            };
            let losses = crate::progress::losses(run);
            let done = Tone::Good.stderr("succeeded");
            output::message(&format!("run {name} {done}: {} steps in {took}{pace}  {losses}", run.step));
            next_commands(name, &["sample download {}", "checkpoint ls {}", "run show {}"]);
            Ok(Exit::Success)
        }
        RunStatus::Stopped => {
            next_commands(name, &["run resume {}", "sample download {}", "run show {}"]);
            Err(CliError::failed(format!(
                "run {name} was stopped at step {} of {}; 'takuma run resume {name}' goes on from there",
                run.step, run.steps
            )))
        }
        RunStatus::Failed => {
            next_commands(name, &["run resume {}", "run logs {}", "run show {}"]);
            let why = if run.error.is_empty() {
                "the coordinator gave no reason".into()
            } else {
                output::visible(&run.error)
            };
            Err(CliError::failed(format!("run {name} failed at step {} of {}: {why}", run.step, run.steps)))
        }
        status => Err(CliError::failed(format!("run {name} is {}, not ended", status_name(status)))),
    }
}

/// Prints the useful next commands, each with the run's name filled in.
pub fn next_commands(run: &str, commands: &[&str]) {
    for command in commands {
        output::message(&Tone::Faint.stderr(&format!("  takuma {}", command.replace("{}", run))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_names_its_worker_once() {
        console::set_colors_enabled_stderr(false);
        let mut event =
            RunEvent { worker: "worker-2".into(), message: "the link broke".into(), ..RunEvent::default() };
        assert_eq!(event_line(&event), "00:00:00Z worker-2: the link broke");
        event.message = "worker-2 left".into();
        assert_eq!(event_line(&event), "00:00:00Z worker-2 left");
    }

    #[test]
    fn routine_is_no_news() {
        let mut news = News::default();
        let mut told = |kinds: &[&'static str]| -> Vec<&'static str> {
            let event = |kind: &str| RunEvent { kind: kind.into(), ..RunEvent::default() };
            kinds.iter().copied().filter(|kind| news.tells(&event(kind))).collect()
        };
        assert_eq!(told(&["sample", "checkpoint", "preparing"]), ["checkpoint"]);
        assert_eq!(told(&["changing", "regrouped", "formed"]), ["regrouped"], "a join is one line");
        let loss = ["link_lost", "worker_lost", "regrouping", "formed", "formed"];
        assert_eq!(told(&loss), ["worker_lost", "formed"], "who, and for how long nothing went on");
        assert_eq!(told(&["leaving", "changing", "worker_left"]), ["worker_left"]);
    }
}
