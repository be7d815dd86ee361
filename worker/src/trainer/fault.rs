//! [`Fault`]: a failure on order, so that tests can hit every phase of a step with a real process.

use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::recipe::Phase;

/// Names the fault: `kill@+3.g1` kills this process when the third step after joining a group enters its
/// phase g1; `stop` stops it instead (SIGSTOP), `nan` makes its images infinite.
pub const FAULT_VARIABLE: &str = "TAKUMA_FAULT";

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kill,
    Stop,
    Nan,
}

/// A failure that waits for its step and phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    kind: Kind,
    /// Steps after the first one that this process trains.
    after: u64,
    phase: Phase,
    /// The step that it waits for, known once the process trains.
    due: Option<u64>,
}

impl Fault {
    /// The fault that the environment orders; none where the variable is not set.
    ///
    /// # Panics
    /// On a variable that is no fault: a test that injects nothing would prove nothing.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        let text = std::env::var(FAULT_VARIABLE).ok()?;
        Some(
            Self::parse(&text).unwrap_or_else(|| panic!("{FAULT_VARIABLE}={text} is no fault; see fault.rs")),
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let (kind, place) = text.split_once("@+")?;
        let (after, phase) = place.split_once('.')?;
        let kind = match kind {
            "kill" => Kind::Kill,
            "stop" => Kind::Stop,
            "nan" => Kind::Nan,
            _ => return None,
        };
        let phase = Phase::ALL.into_iter().find(|known| known.name() == phase)?;
        Some(Self { kind, after: after.parse().ok()?, phase, due: None })
    }

    /// Strikes if this is the place. Returns whether the images are to be spoilt.
    pub fn strike(&mut self, step: u64, phase: Phase) -> bool {
        let due = *self.due.get_or_insert(step + self.after);
        if (step, phase) != (due, self.phase) {
            return false;
        }
        match self.kind {
            Kind::Kill => signal(Signal::KILL),
            Kind::Stop => signal(Signal::STOP),
            Kind::Nan => return true,
        }
        false
    }
}

fn signal(signal: Signal) {
    let me: Pid = getpid();
    if let Err(error) = kill_process(me, signal) {
        tracing::error!(%error, "the ordered fault did not happen");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_and_strike_once_at_their_place() {
        let mut fault = Fault::parse("nan@+2.g1").unwrap();
        let struck: Vec<(u64, Phase)> = (7..12)
            .flat_map(|step| Phase::ALL.map(|phase| (step, phase)))
            .filter(|&(step, phase)| fault.strike(step, phase))
            .collect();
        assert_eq!(struck, [(9, Phase::G1)]);
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for text in ["", "kill", "kill@3.d", "kill@+x.d", "kill@+3.h", "melt@+3.d"] {
            assert_eq!(Fault::parse(text), None, "{text}");
        }
    }
}
