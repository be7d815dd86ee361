//! A store that is away for ten minutes while a worker trains a thousand steps a second. Time is paused.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use takuma_core::config::RunConfig;
use tokio::time::sleep;

use crate::support::cluster::{Cluster, in_paused_time};
use crate::support::trainer::GRID_BYTES;
use crate::support::{Place, most_that_waited};

/// A thousand steps a second, as on a GPU.
const PACE: Duration = Duration::from_millis(1);
const OUTAGE: Duration = Duration::from_secs(600);

#[test]
fn ten_minutes_without_a_store_at_a_thousand_steps_a_second_lose_nothing_and_memory_stays_bounded() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_ansi(false);
    let subscriber = subscriber.with_env_filter("takuma_coordinator::files=debug");
    let subscriber = subscriber.with_writer(move || writer.clone()).finish();
    let most_kept = tracing::subscriber::with_default(subscriber, || {
        in_paused_time(async {
            let (place, cluster) = (Place::new().await, Cluster::default());
            let config = RunConfig { sample_every: 50, checkpoint_every: 5_000, ..place.config(20_000) };
            let most_kept = cluster.start(PACE);
            let outage = async {
                while cluster.view().await.is_none_or(|run| run.step < 1_000) {
                    sleep(Duration::from_millis(100)).await;
                }
                cluster.faults.outage(OUTAGE);
                sleep(OUTAGE - Duration::from_secs(5)).await;
                let run = cluster.view().await.unwrap();
                // The grids that a worker keeps, and then a step a second.
                assert!((9_000..12_000).contains(&run.step), "step {}", run.step);
                assert_eq!(run.error, "");
            };
            let (run, ()) = tokio::join!(cluster.train(&config), outage);
            assert_eq!(run.error, "");
            cluster.check(&config).await.unwrap();
            most_kept
        })
    });
    let [reports, tiles] = [0, 1].map(|at| most_kept[at].load(Ordering::Relaxed));
    let (jobs, bytes) = most_that_waited(&log.lines()).expect("the writer tells at its end");
    println!(
        "kept by the worker: {reports} reports, {tiles} tiles; waiting: {jobs} jobs, {bytes} bytes of grids"
    );
    assert!(tiles < 200, "{tiles} tiles");
    // What waits at the coordinator is a copy of that, and a little more.
    assert!(jobs < reports as u64 + 1_000, "{jobs} jobs");
    assert!(bytes <= tiles as u64 * GRID_BYTES, "{bytes} bytes");
}

/// What was logged.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
