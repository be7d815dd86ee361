//! [`Means`]: how long a run's steps take of late.

use crate::event::MetricsLine;

/// Weight of the newest step in the running means: about the last 20 steps count.
const MEAN_WEIGHT: f64 = 0.1;
/// The pace is taken over stretches of at least so long: a fast run's reports come in bursts, many in a millisecond.
const SHORTEST_STRETCH_S: f64 = 0.25;

/// Exponential means of step times, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Means {
    /// From one report to the next, pauses for grids and checkpoints included: what an ETA needs.
    pub pace_s: Option<f64>,
    /// The steps' own time.
    pub step_s: Option<f64>,
    /// Of that, computing.
    pub compute_s: Option<f64>,
    /// Of that, waiting for images.
    pub data_s: Option<f64>,
    /// Of that, waiting for the exchange.
    pub exchange_s: Option<f64>,
    /// Whole stretches of which the pace tells, older ones counting less.
    told: Stretch,
    /// Steps of which it does not tell yet.
    open: Stretch,
}

/// Steps and how long they took together.
#[derive(Debug, Clone, Copy, Default)]
struct Stretch {
    steps: f64,
    seconds: f64,
}

impl Stretch {
    fn pace_s(self) -> Option<f64> {
        // The first reports may come within one millisecond.
        (self.seconds > 0.0).then(|| self.seconds / self.steps)
    }
}

impl Means {
    /// Takes in a step that was reported `interval_s` after the one before.
    pub fn add(&mut self, line: &MetricsLine, interval_s: f64) {
        self.add_pace(interval_s);
        let mix = |mean: &mut Option<f64>, value: f64| {
            *mean = Some(mean.map_or(value, |mean| mean + MEAN_WEIGHT * (value - mean)));
        };
        mix(&mut self.step_s, line.step_s);
        mix(&mut self.compute_s, line.compute_s);
        mix(&mut self.data_s, line.data_s);
        mix(&mut self.exchange_s, line.exchange_s);
    }

    /// A slow run's steps are stretches by themselves: about the last 20 count. Steps are weighed, not their paces, so
    /// one slow step at the start is soon outweighed.
    fn add_pace(&mut self, interval_s: f64) {
        self.open.steps += 1.0;
        self.open.seconds += interval_s;
        if self.open.seconds < SHORTEST_STRETCH_S {
            // Until the first stretch is whole, it is all that is known.
            self.pace_s = self.told.pace_s().or(self.open.pace_s());
            return;
        }
        let Stretch { steps, seconds } = std::mem::take(&mut self.open);
        let keep = 1.0 - MEAN_WEIGHT;
        self.told.steps = self.told.steps * keep + steps;
        self.told.seconds = self.told.seconds * keep + seconds;
        self.pace_s = self.told.pace_s();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Generation;

    fn line() -> MetricsLine {
        MetricsLine {
            step: 1,
            epoch: 0,
            d_loss: 1.0,
            g_loss: 1.0,
            d_acc: 0.5,
            step_s: 0.001,
            compute_s: 0.001,
            data_s: 0.0,
            exchange_s: 0.0,
            images_per_s: 64_000.0,
            workers: 1,
            generation: Generation(1),
            fed: 0,
        }
    }

    #[test]
    fn the_pace_of_reports_that_come_in_bursts_is_the_average() {
        let mut means = Means::default();
        // It began slowly.
        means.add(&line(), 0.5);
        for burst in 0..120 {
            for step in 0..64 {
                means.add(&line(), if step == 0 { 0.064 } else { 0.0 });
                let pace_s = means.pace_s.unwrap();
                assert!(burst < 80 || (0.001..0.0012).contains(&pace_s), "{pace_s} in burst {burst}");
            }
        }
    }

    #[test]
    fn the_pace_of_slow_steps_follows_the_last_twenty() {
        let mut means = Means::default();
        means.add(&line(), 1.0);
        assert_eq!(means.pace_s, Some(1.0));
        (0..60).for_each(|_| means.add(&line(), 2.0));
        assert!((means.pace_s.unwrap() - 2.0).abs() < 0.01);
    }

    #[test]
    fn before_any_time_has_passed_no_pace_is_known() {
        let mut means = Means::default();
        means.add(&line(), 0.0);
        assert_eq!(means.pace_s, None);
    }
}
