//! A process that gets only a part of the time, as on a slower machine.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// It runs for one of these, then stands still for three.
const SLICE: Duration = Duration::from_millis(25);

/// Slows a process down to about a quarter until it is dropped.
pub struct Throttle {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Begins to stop and continue the process with this id.
    #[must_use]
    pub fn start(pid: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::SeqCst) {
                signal("STOP", pid);
                std::thread::sleep(3 * SLICE);
                signal("CONT", pid);
                std::thread::sleep(SLICE);
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // A thread that panicked has been reported.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// The process may have ended.
fn signal(name: &str, pid: u32) {
    drop(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status());
}
