//! [`Faults`]: failures on order, so that tests can hit every phase of a step with a real process.

use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::recipe::Phase;

/// Names the faults, separated by commas: `kill@+3.g1` kills this process when the third step after joining a
/// group enters its phase g1; `stop` stops it instead (SIGSTOP), `nan` makes its images infinite.
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
struct Order {
    kind: Kind,
    /// Steps after the first one that this process trains.
    after: u64,
    phase: Phase,
}

/// The failures that wait for their place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    orders: Vec<Order>,
    /// The first step that this process trains, once it does.
    first: Option<u64>,
}

impl Faults {
    /// The faults that the environment orders; none where the variable is not set.
    ///
    /// # Panics
    /// On a variable that is no fault: a test that injects nothing would prove nothing.
    #[must_use]
    pub fn from_environment() -> Self {
        let Ok(text) = std::env::var(FAULT_VARIABLE) else { return Self::default() };
        Self::parse(&text).unwrap_or_else(|| panic!("{FAULT_VARIABLE}={text} is no fault; see fault.rs"))
    }

    fn parse(text: &str) -> Option<Self> {
        let orders = text.split(',').map(Order::parse).collect::<Option<_>>()?;
        Some(Self { orders, first: None })
    }

    /// Whether a fault is still to come that strikes inside of a step.
    pub fn are_inside_steps(&self) -> bool {
        self.orders.iter().any(|order| order.phase != Phase::D)
    }

    /// Strikes if this is the place of a fault, which is then over: a phase that is run again is spared.
    /// Returns whether the images are to be spoilt.
    pub fn strike(&mut self, step: u64, phase: Phase) -> bool {
        if self.orders.is_empty() {
            return false;
        }
        let first = *self.first.get_or_insert(step);
        let due = |order: &Order| (first + order.after, order.phase) == (step, phase);
        let Some(at) = self.orders.iter().position(due) else { return false };
        match self.orders.swap_remove(at).kind {
            Kind::Kill => signal(Signal::KILL),
            Kind::Stop => signal(Signal::STOP),
            Kind::Nan => return true,
        }
        false
    }
}

impl Order {
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
        Some(Self { kind, after: after.parse().ok()?, phase })
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
        let mut faults = Faults::parse("nan@+2.g1,nan@+3.d").unwrap();
        let struck: Vec<(u64, Phase)> = (7..12)
            .flat_map(|step| Phase::ALL.map(|phase| (step, phase)))
            .flat_map(|place| [place, place])
            .filter(|&(step, phase)| faults.strike(step, phase))
            .collect();
        assert_eq!(struck, [(9, Phase::G1), (10, Phase::D)]);
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for text in ["", "kill", "kill@3.d", "kill@+x.d", "kill@+3.h", "melt@+3.d", "nan@+2.d,"] {
            assert_eq!(Faults::parse(text), None, "{text}");
        }
    }
}
