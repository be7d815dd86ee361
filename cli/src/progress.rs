//! How a run's progress looks: pure text, and the bar or the lines that show it.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use takuma_proto::v1::{RunStatus, RunView};

use crate::client::{has_ended, status_name};
use crate::output;

/// Where there is no terminal: often enough to see life, seldom enough for a day-long log.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// `120/300 40%`.
#[must_use]
pub fn position(run: &RunView) -> String {
    if run.steps == 0 {
        return run.step.to_string();
    }
    // Rounded down: 100% is for runs that are done.
    let percent = u128::from(run.step) * 100 / u128::from(run.steps);
    format!("{}/{} {percent}%", run.step, run.steps)
}

/// Steps a second as text: `1.85`, `0.062`; none before the first step.
#[must_use]
pub fn speed(run: &RunView) -> Option<String> {
    run.mean_step_s.filter(|seconds| *seconds > 0.0).map(|seconds| per_second(1.0 / seconds))
}

/// A number a second, with two digits at least and not many more than three: `943`, `1.85`, `0.062`.
#[must_use]
pub fn per_second(number: f64) -> String {
    match number {
        100.0.. => format!("{number:.0}"),
        0.1.. => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// `1.85 it/s  ETA 1m37s`, as far as known.
#[must_use]
pub fn pace(run: &RunView) -> String {
    let speed = speed(run).map(|speed| format!("{speed} it/s"));
    let eta = run.eta_s.filter(|_| !has_ended(run)).map(|eta| format!("ETA {}", output::duration(eta)));
    [speed, eta].into_iter().flatten().collect::<Vec<_>>().join("  ")
}

/// `d_loss 0.912  g_loss 1.423  d_acc 0.78`; empty before the first step.
#[must_use]
pub fn losses(run: &RunView) -> String {
    let part =
        |name, value: Option<f64>, digits: usize| value.map(|value| format!("{name} {value:.digits$}"));
    [part("d_loss", run.d_loss, 3), part("g_loss", run.g_loss, 3), part("d_acc", run.d_acc, 2)]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("  ")
}

/// `compute 82%  data 1%  exchange 17%`: where a step's time goes; empty before the first step.
#[must_use]
pub fn time_split(run: &RunView) -> String {
    let Some(step_s) = run.mean_step_s.filter(|seconds| *seconds > 0.0) else { return String::new() };
    let part = |name, seconds: Option<f64>| {
        seconds.map(|seconds| format!("{name} {:.0}%", 100.0 * seconds / step_s))
    };
    [part("compute", run.compute_s), part("data", run.data_s), part("exchange", run.exchange_s)]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("  ")
}

/// The whole state in one line.
#[must_use]
pub fn line(run: &RunView) -> String {
    if let Some(waiting) = waiting(run) {
        return format!("{}  {waiting}", run.name);
    }
    let parts = [format!("step {}", position(run)), losses(run), pace(run), time_split(run)];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    format!("{}  {}", run.name, parts.join("  "))
}

/// What a run that trains nothing yet is waiting for.
#[must_use]
pub fn waiting(run: &RunView) -> Option<String> {
    match run.status() {
        RunStatus::Waiting => {
            let what = if run.waiting_for.is_empty() { "workers" } else { &run.waiting_for };
            let from = if run.has_checkpoint {
                format!("from the checkpoint of step {}", run.checkpoint_step)
            } else {
                "from where it began".to_owned()
            };
            Some(format!("waiting for {}; then goes on {from}", output::visible(what)))
        }
        RunStatus::Queued => {
            let place = match run.queue_position {
                0 | 1 => String::new(),
                place => format!(", number {place} in the queue"),
            };
            let what = if run.waiting_for.is_empty() { "its turn" } else { &run.waiting_for };
            Some(format!("queued{place}: waits for {}", output::visible(what)))
        }
        RunStatus::Preparing => {
            Some(format!("preparing: {} load their shards", output::count(run.workers.into(), "worker")))
        }
        _ => None,
    }
}

/// Where progress is shown: a bar on a terminal, else a line every few seconds.
#[derive(Debug)]
pub struct Screen {
    bar: Option<ProgressBar>,
    shown: Option<(Instant, RunStatus)>,
}

impl Screen {
    /// For this process's stderr.
    #[must_use]
    pub fn stderr() -> Self {
        let terminal = console::Term::stderr();
        if !terminal.is_term() {
            return Self { bar: None, shown: None };
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        Self { bar: Some(bar), shown: None }
    }

    /// Shows the run's present state.
    pub fn update(&mut self, run: &RunView) {
        match &self.bar {
            Some(bar) => {
                if self.shown.is_none_or(|(_, status)| status != run.status()) {
                    bar.set_style(style(run));
                    // Moves the spinner while there is nothing else to see; a bar moves by its steps.
                    if waiting(run).is_some() {
                        bar.enable_steady_tick(Duration::from_millis(125));
                    } else {
                        bar.disable_steady_tick();
                    }
                }
                bar.set_length(run.steps);
                bar.set_position(run.step);
                bar.set_prefix(run.name.clone());
                bar.set_message(match waiting(run) {
                    Some(waiting) => waiting,
                    None => {
                        let below = [losses(run), time_split(run)].join("   ");
                        format!("{}  {}\n{}", position(run), pace(run), below.trim_end())
                    }
                });
                self.shown = Some((Instant::now(), run.status()));
            }
            None => {
                let now = Instant::now();
                if self.is_due(run, now) {
                    output::message(&line(run));
                    self.shown = Some((now, run.status()));
                }
            }
        }
    }

    fn is_due(&self, run: &RunView, now: Instant) -> bool {
        self.shown.is_none_or(|(at, status)| status != run.status() || now - at >= LINE_EVERY)
    }

    /// Prints a line without disturbing the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::message(text)),
            None => output::message(text),
        }
    }

    /// Takes the bar off the screen.
    pub fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(run: &RunView) -> ProgressStyle {
    let template = if waiting(run).is_some() {
        "{spinner} {prefix}  {wide_msg}".to_owned()
    } else {
        format!("{{prefix}} {}  {{bar:24}}  {{msg}}", status_name(run.status()))
    };
    // The templates are fixed text; a bar in the default style is still a bar.
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("█▉▊▋▌▍▎▏░")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> RunView {
        RunView {
            name: "calm-otter-3".into(),
            status: RunStatus::Running.into(),
            step: 120,
            steps: 300,
            d_loss: Some(0.9124),
            g_loss: Some(1.4231),
            d_acc: Some(0.781),
            mean_step_s: Some(0.54),
            compute_s: Some(0.443),
            data_s: Some(0.005),
            exchange_s: Some(0.092),
            eta_s: Some(97.2),
            ..RunView::default()
        }
    }

    #[test]
    fn line_tells_how_far_how_well_how_long_and_what_is_slow() {
        assert_eq!(
            line(&running()),
            "calm-otter-3  step 120/300 40%  d_loss 0.912  g_loss 1.423  d_acc 0.78  1.85 it/s  ETA 1m37s  \
             compute 82%  data 1%  exchange 17%"
        );
    }

    #[test]
    fn before_the_first_step_only_the_position_is_known() {
        let run =
            RunView { name: "x".into(), status: RunStatus::Running.into(), steps: 300, ..RunView::default() };
        assert_eq!(line(&run), "x  step 0/300 0%");
    }

    #[test]
    fn queued_run_says_what_it_waits_for_and_its_place() {
        let mut run = RunView { name: "x".into(), status: RunStatus::Queued.into(), ..RunView::default() };
        run.waiting_for = "2 workers (1 is connected)".into();
        run.queue_position = 1;
        assert_eq!(line(&run), "x  queued: waits for 2 workers (1 is connected)");
        run.queue_position = 3;
        run.waiting_for = String::new();
        assert_eq!(line(&run), "x  queued, number 3 in the queue: waits for its turn");
    }

    #[test]
    fn waiting_run_says_for_whom_and_from_where_it_goes_on() {
        let status = RunStatus::Waiting.into();
        let mut run = RunView { name: "x".into(), status, step: 70, steps: 300, ..RunView::default() };
        run.waiting_for = "1 worker (none is connected)".into();
        assert_eq!(
            line(&run),
            "x  waiting for 1 worker (none is connected); then goes on from where it began"
        );
        (run.has_checkpoint, run.checkpoint_step) = (true, 50);
        assert!(line(&run).ends_with("; then goes on from the checkpoint of step 50"), "{}", line(&run));
    }

    #[test]
    fn hundred_percent_is_for_the_last_step_only() {
        let run = RunView { step: 2999, steps: 3000, ..RunView::default() };
        assert_eq!(position(&run), "2999/3000 99%");
    }

    #[test]
    fn steps_of_a_gpu_are_told_without_fractions() {
        let run =
            RunView { step: 3165, steps: 6330, mean_step_s: Some(0.001_06), eta_s: Some(3.4), ..running() };
        assert_eq!(pace(&run), "943 it/s  ETA 3s");
    }

    #[test]
    fn slow_steps_keep_two_significant_digits() {
        let run = RunView { mean_step_s: Some(16.0), ..RunView::default() };
        assert_eq!(speed(&run).unwrap(), "0.062");
    }

    #[test]
    fn without_terminal_a_line_comes_every_few_seconds_and_at_each_new_status() {
        let start = Instant::now();
        let screen = Screen { bar: None, shown: Some((start, RunStatus::Running)) };
        assert!(!screen.is_due(&running(), start + Duration::from_secs(4)));
        assert!(screen.is_due(&running(), start + Duration::from_secs(5)));
        let stopping = RunView { status: RunStatus::Stopping.into(), ..running() };
        assert!(screen.is_due(&stopping, start));
    }
}
