//! [`Meeting`]: from a ring to the collective of a group: with NCCL beside it where every member has a GPU of its own.

use std::collections::BTreeSet;

use tch::Device;

use crate::collective::{Collective, CollectiveError, Nccl, NcclConfig, Ring};
use crate::torch::cuda;

/// Set to `ring`, gradients of GPUs go over the host: for two workers on one GPU it is so anyway, and to compare.
const COLLECTIVE_VARIABLE: &str = "TAKUMA_COLLECTIVE";

/// What this worker brings to every group.
pub(super) struct Meeting {
    /// Its GPU's identity, and NCCL; none on a processor, where NCCL cannot be had, and in exact mode.
    nccl: Option<(Vec<u8>, NcclConfig)>,
    /// Groups in a row that could not be formed with NCCL.
    failures: u32,
}

/// After so many, a group goes over the host: slow, and better than none. The next one tries NCCL again.
const MAX_FAILURES: u32 = 2;

impl Meeting {
    /// For a worker that computes on `device`. In exact mode groups stay rings: gradients are summed lane after lane,
    /// which NCCL does not do.
    pub(super) fn new(device: Device, is_exact: bool) -> Self {
        Self { nccl: (!is_exact).then(|| nccl_of(device)).flatten(), failures: 0 }
    }

    /// The collective of the group whose ring this is. All members call it first of all.
    ///
    /// # Errors
    /// What ended the group.
    pub(super) fn join(&mut self, ring: Ring) -> Result<Box<dyn Collective>, CollectiveError> {
        if ring.world() == 1 {
            return Ok(Box::new(ring));
        }
        if self.failures >= MAX_FAILURES {
            tracing::warn!("NCCL could not form a group {MAX_FAILURES} times in a row");
        }
        let offered = self.nccl.as_ref().filter(|_| self.failures < MAX_FAILURES);
        let own = offered.map(|(card, _)| card.as_slice());
        let cards = ring.all_gather(own.unwrap_or_default())?;
        match (&self.nccl, on_host_because(&cards)) {
            (Some((_, config)), None) => {
                self.failures += 1;
                let group = Nccl::form(ring, config)?;
                self.failures = 0;
                Ok(Box::new(group))
            }
            (Some(_), Some(reason)) => {
                tracing::info!("gradients go over the host: {reason}");
                self.failures = 0;
                Ok(Box::new(ring))
            }
            (None, _) => Ok(Box::new(ring)),
        }
    }
}

fn nccl_of(device: Device) -> Option<(Vec<u8>, NcclConfig)> {
    let Device::Cuda(index) = device else { return None };
    if std::env::var(COLLECTIVE_VARIABLE).is_ok_and(|value| value == "ring") {
        return None;
    }
    let card = cuda::devices().ok()?.into_iter().nth(index)?.uuid;
    match NcclConfig::load() {
        Ok(config) => Some((card.to_vec(), config)),
        Err(error) => {
            tracing::warn!("gradients go over the host: {error}");
            None
        }
    }
}

/// Why a group with these cards, by rank, cannot use NCCL.
fn on_host_because(cards: &[Vec<u8>]) -> Option<String> {
    if let Some(rank) = cards.iter().position(Vec::is_empty) {
        return Some(format!("rank {rank} has no GPU with NCCL"));
    }
    // NCCL refuses a card that is there twice.
    let distinct: BTreeSet<_> = cards.iter().collect();
    (distinct.len() < cards.len()).then(|| "two workers share a GPU".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_needs_a_card_of_its_own_at_every_rank() {
        let cards = |cards: &[&str]| cards.iter().map(|card| card.as_bytes().to_vec()).collect::<Vec<_>>();
        assert_eq!(on_host_because(&cards(&["a", "b", "c"])), None);
        assert!(on_host_because(&cards(&["a", "", "c"])).unwrap().contains("rank 1"));
        assert!(on_host_because(&cards(&["a", "b", "a"])).unwrap().contains("share"));
    }

    #[test]
    fn group_of_processors_stays_a_ring() {
        use crate::collective::{RingConfig, RingListener};
        use takuma_core::ids::{Generation, Rank};

        let listeners = [0, 1].map(|_| RingListener::bind("127.0.0.1:0").unwrap());
        let members: Vec<String> =
            listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
        let join = |rank: u32| {
            let config = RingConfig::new("test", Rank(rank), Generation(1), members.clone());
            let ring = Ring::connect(&listeners[rank as usize], config).unwrap();
            let collective = Meeting::new(Device::Cpu, false).join(ring).unwrap();
            assert!(collective.on_device().is_none());
            let mut sum = [f64::from(rank) + 1.0];
            collective.all_reduce_f64(&mut sum).unwrap();
            sum
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| join(1));
            assert_eq!(join(0), [3.0]);
            assert_eq!(other.join().unwrap(), [3.0]);
        });
    }
}
