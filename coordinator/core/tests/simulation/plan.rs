//! [`Plan`]: what a seed makes of a world. Each seed has its own mixture of faults: a world in which everything goes
//! wrong at once never gets far enough for the rare things.

use crate::faults::Fault;
use crate::rng::Rng;

/// One run that somebody wants.
#[derive(Debug, Clone)]
pub struct WantedRun {
    pub name: String,
    pub steps: u64,
    pub from_ms: u64,
    pub workers: Option<u32>,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub workers: u64,
    pub runs: Vec<WantedRun>,
    pub global_batch: u32,
    pub sample_every: u64,
    pub checkpoint_every: u64,
    /// Usual time of a phase's computation.
    pub phase_ms: u64,
    pub latency_ms: u64,
    /// By so much the clock of a coordinator may differ from that of the one before.
    pub skew_ms: u64,
    pub faults: Vec<Fault>,
    /// Mean time between two faults.
    pub fault_every_ms: u64,
    pub storm_from_ms: u64,
    pub storm_until_ms: u64,
    /// All runs have ended so long after the storm.
    pub calm_ms: u64,
    /// Views of everything are checked after every so many events.
    pub views_every: u64,
}

const NAMES: [&str; 3] = ["ada", "bob", "cyd"];

impl Plan {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let storm_until_ms = rng.within(8_000, 40_000);
        let runs = (0..rng.within(1, 4)).map(|number| WantedRun {
            name: NAMES[number as usize].to_owned(),
            steps: if rng.one_in(4) { rng.within(1, 20) } else { rng.within(20, 200) },
            from_ms: number * rng.within(0, 6_000),
            workers: rng.one_in(4).then_some(2),
        });
        let runs = runs.collect();
        let chosen = rng.within(1, 6);
        let mut faults: Vec<Fault> = (0..chosen).filter_map(|_| rng.pick(&Fault::ALL)).collect();
        // Without newcomers a storm of kills is over soon.
        faults.push(Fault::Join);
        Self {
            seed,
            workers: rng.within(1, 7),
            runs,
            global_batch: 8,
            sample_every: rng.within(2, 8),
            checkpoint_every: rng.within(2, 20),
            phase_ms: rng.within(2, 120),
            latency_ms: rng.within(0, 20),
            skew_ms: if rng.one_in(2) { 3_600_000 } else { 0 },
            faults,
            fault_every_ms: if rng.one_in(3) { rng.within(20, 400) } else { rng.within(100, 3_000) },
            storm_from_ms: rng.within(0, 1_500),
            storm_until_ms,
            calm_ms: 240_000,
            views_every: 1,
        }
    }
}
