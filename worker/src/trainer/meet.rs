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
    use std::time::Duration;

    use takuma_core::ids::{Generation, Rank};

    use super::*;
    use crate::collective::{RingConfig, RingListener};

    #[test]
    fn nccl_needs_a_card_of_its_own_at_every_rank() {
        let cards = |cards: &[&str]| cards.iter().map(|card| card.as_bytes().to_vec()).collect::<Vec<_>>();
        assert_eq!(on_host_because(&cards(&["a", "b", "c"])), None);
        assert!(on_host_because(&cards(&["a", "", "c"])).unwrap().contains("rank 1"));
        assert!(on_host_because(&cards(&["a", "b", "a"])).unwrap().contains("share"));
    }

    /// What each of two members gets when it joins with its ring of `generation`.
    fn joined<T: Send>(
        listeners: &[RingListener; 2],
        generation: u64,
        meetings: &mut [Meeting; 2],
        join: impl Fn(&mut Meeting, Ring) -> T + Sync,
    ) -> Vec<T> {
        let members: Vec<String> =
            listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
        std::thread::scope(|scope| {
            let (join, members) = (&join, &members);
            let threads: Vec<_> = (0..)
                .zip(listeners.iter().zip(meetings))
                .map(|(rank, (listener, meeting))| {
                    scope.spawn(move || {
                        let mut config =
                            RingConfig::new("test", Rank(rank), Generation(generation), members.clone());
                        // Who is to blame where all wait is asked for a part of it.
                        config.timeout = Duration::from_secs(2);
                        join(meeting, Ring::connect(listener, config).unwrap())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn group_that_nccl_cannot_form_twice_goes_over_the_host_once() {
        use crate::collective::nccl::fake::{self, HANG_INIT, next_comm};
        let listeners = [0, 1].map(|_| RingListener::bind("127.0.0.1:0").unwrap());
        let config = NcclConfig { init_timeout: Duration::from_millis(300), ..fake::config() };
        let mut meetings =
            [b"a", b"b"].map(|card| Meeting { nccl: Some((card.to_vec(), config.clone())), failures: 0 });
        for generation in 1..=u64::from(MAX_FAILURES) {
            let errors = joined(&listeners, generation, &mut meetings, |meeting, ring| {
                next_comm(HANG_INIT);
                meeting.join(ring).unwrap_err()
            });
            for error in errors {
                assert!(matches!(error, CollectiveError::Timeout { .. }), "{error}");
            }
        }
        // One of both has seen another failure and goes over the host; so do all.
        meetings[0].failures = 1;
        let mut sums_on_devices = |generation| {
            joined(&listeners, generation, &mut meetings, |meeting, ring| {
                let collective = meeting.join(ring).unwrap();
                let mut sum = [1.0];
                collective.all_reduce_f64(&mut sum).unwrap();
                assert_eq!(sum, [2.0]);
                collective.on_device().is_some()
            })
        };
        assert_eq!(sums_on_devices(8), [false, false]);
        assert_eq!(sums_on_devices(9), [true, true], "the next group tries NCCL again");
    }

    #[test]
    fn group_of_processors_stays_a_ring() {
        let listeners = [0, 1].map(|_| RingListener::bind("127.0.0.1:0").unwrap());
        let mut meetings = [0, 1].map(|_| Meeting::new(Device::Cpu, false));
        let sums = joined(&listeners, 1, &mut meetings, |meeting, ring| {
            let collective = meeting.join(ring).unwrap();
            assert!(collective.on_device().is_none());
            let mut sum = [f64::from(collective.rank().0) + 1.0];
            collective.all_reduce_f64(&mut sum).unwrap();
            sum
        });
        assert_eq!(sums, [[3.0], [3.0]]);
    }
}
