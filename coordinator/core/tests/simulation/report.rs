//! What many worlds came to, as a table.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::faults::Fault;

#[derive(Debug, Default, Clone)]
pub struct Stats {
    pub seeds: u64,
    /// Applied by the core.
    pub events: u64,
    pub checks: u64,
    pub faults: BTreeMap<Fault, u64>,
    pub store_failures: u64,
    /// Messages of older groups that were turned away.
    pub refusals: u64,
    /// Lines of the runs' events.
    pub kinds: BTreeMap<&'static str, u64>,
    /// From a fault until the next group of the survivors stands, where nothing but the fault was in the way.
    /// By its kind, if it was the only one in that time.
    pub recoveries_ms: BTreeMap<Option<Fault>, Vec<u64>>,
    pub redone_max: u64,
    pub simulated_ms: u64,
    /// Real time in the core.
    pub core_s: f64,
}

impl Stats {
    pub fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.checks += other.checks;
        self.store_failures += other.store_failures;
        self.refusals += other.refusals;
        self.simulated_ms += other.simulated_ms;
        self.core_s += other.core_s;
        self.redone_max = self.redone_max.max(other.redone_max);
        for (&kind, times) in &other.recoveries_ms {
            self.recoveries_ms.entry(kind).or_default().extend(times);
        }
        for (&fault, count) in &other.faults {
            *self.faults.entry(fault).or_default() += count;
        }
        for (&kind, count) in &other.kinds {
            *self.kinds.entry(kind).or_default() += count;
        }
    }

    pub fn kind(&self, kind: &str) -> u64 {
        self.kinds.get(kind).copied().unwrap_or(0)
    }

    pub fn table(&self) -> String {
        let mut table = String::new();
        let mut row = |name: &str, value: String| writeln!(table, "  {name:<72}{value:>24}").unwrap();
        row("seeds", self.seeds.to_string());
        row("simulated hours", format!("{:.1}", self.simulated_ms as f64 / 3.6e6));
        row("events applied by the core", self.events.to_string());
        row("invariants checked", self.checks.to_string());
        for (fault, count) in &self.faults {
            row(fault.name(), count.to_string());
        }
        row("store calls that failed for good", self.store_failures.to_string());
        row("stale messages refused", self.refusals.to_string());
        row("groups formed anew", self.kind("regrouping").to_string());
        row("changes between two steps", self.kind("regrouped").to_string());
        row("returns to a checkpoint or the beginning", self.kind("waiting").to_string());
        for (kind, times) in &self.recoveries_ms {
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let [p50, p99, max] = [50, 99, 100]
                .map(|hundredths| sorted[(sorted.len() * hundredths / 100).min(sorted.len() - 1)]);
            let what = kind.map_or("several faults", Fault::name);
            let what = format!("{} recoveries from {what}, ms: p50 / p99 / max", sorted.len());
            row(&what, format!("{p50} / {p99} / {max}"));
        }
        row("phases redone by survivors, at most", self.redone_max.to_string());
        table
    }
}
