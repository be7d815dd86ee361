//! A worker that cannot go on and cannot stop in order ends at once, and its parent starts it again.
//!
//! A GPU can hang in a way that no call into its driver returns. What helps is the end of the process, so on a
//! CUDA device the worker is the child of a process that does nothing but wait for it ([`run`]). Whatever the child
//! does is the parent's answer too, signals included, except for one exit status: that of [`last_resort`].

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal as Arrivals, SignalKind, signal};

/// How a worker exits that has to be started again. No error of its own has this status.
pub const LAST_RESORT_STATUS: u8 = 86;

/// In a child's environment: its parent's process id. Says nothing where the parent is another one, in a shell
/// that was started from a worker say.
const PARENT: &str = "TAKUMA_SUPERVISED_BY";

/// Longest time for the last words, which may hang like everything else.
const LAST_WORDS_MAX: Duration = Duration::from_millis(500);

/// Ends the process at once, whatever its threads are doing, and has the parent start it again.
pub fn last_resort(reason: &str) -> ! {
    let words = reason.to_owned();
    let begin = Instant::now();
    let saying =
        std::thread::Builder::new().spawn(move || tracing::error!("{words}; this process ends itself"));
    while let Ok(saying) = &saying
        && !saying.is_finished()
        && begin.elapsed() < LAST_WORDS_MAX
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: runs no handlers and no destructors, and has no conditions.
    unsafe { libc::_exit(LAST_RESORT_STATUS.into()) }
}

/// Makes this process the parent of a worker with the same arguments, if `is_wanted` and it is not a child itself.
/// Returns what to exit with when the child has ended; `None` in the child, which is to go on as the worker.
///
/// Call it first, right after the arguments are read and logging is set up: the parent must have no other threads
/// and not have touched CUDA.
#[must_use]
pub fn run(is_wanted: bool) -> Option<ExitCode> {
    run_with(is_wanted, Restarts::USUAL)
}

/// [`run`] with other limits.
#[must_use]
pub fn run_with(is_wanted: bool, restarts: Restarts) -> Option<ExitCode> {
    if !is_wanted || is_supervised() {
        return None;
    }
    match supervise(restarts) {
        Ok(status) => Some(exit_code(status)),
        Err(error) => {
            tracing::error!("the worker's process cannot be started or waited for: {error}");
            Some(ExitCode::FAILURE)
        }
    }
}

/// When a worker is started again.
#[derive(Debug, Clone, Copy)]
pub struct Restarts {
    /// Before the first start again. Doubles with each.
    pub first_pause: Duration,
    /// It grows no further.
    pub longest_pause: Duration,
    /// So many starts in a row, then the parent gives up.
    pub most_in_a_row: u32,
    /// A worker that lived this long begins a new row.
    pub forgiven_after: Duration,
}

impl Restarts {
    /// Five times, after 1 to 16 s. A GPU that hangs again within ten minutes each time needs a person.
    pub const USUAL: Self = Self {
        first_pause: Duration::from_secs(1),
        longest_pause: Duration::from_secs(30),
        most_in_a_row: 5,
        forgiven_after: Duration::from_secs(600),
    };

    /// How long to wait before start again number `number` of this row; none if that is one too many.
    fn pause(&self, number: u32) -> Option<Duration> {
        let factor = 2u32.saturating_pow(number.saturating_sub(1));
        (number <= self.most_in_a_row)
            .then(|| self.first_pause.saturating_mul(factor).min(self.longest_pause))
    }
}

fn is_supervised() -> bool {
    let parent = std::env::var(PARENT).ok().and_then(|id| id.parse().ok()).and_then(Pid::from_raw);
    parent.is_some() && parent == getppid()
}

/// The signals that are passed on.
struct Signals {
    terminate: Arrivals,
    interrupt: Arrivals,
}

fn supervise(restarts: Restarts) -> io::Result<ExitStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Before the first child, so that none is missed.
        let mut signals = Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        };
        let mut in_a_row = 0;
        loop {
            let begin = Instant::now();
            let status = wait(&mut start()?, &mut signals).await?;
            if status.code() != Some(LAST_RESORT_STATUS.into()) {
                return Ok(status);
            }
            in_a_row = if begin.elapsed() >= restarts.forgiven_after { 1 } else { in_a_row + 1 };
            let Some(pause) = restarts.pause(in_a_row) else {
                tracing::error!(
                    "the worker had to end itself {in_a_row} times in a row; it is not started again"
                );
                return Ok(status);
            };
            tracing::warn!(
                "the worker had to end itself; it is started again in {:.1} s",
                pause.as_secs_f64()
            );
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // Nothing runs that would have to stop.
                _ = signals.terminate.recv() => return Ok(ExitStatus::from_raw(0)),
                _ = signals.interrupt.recv() => return Ok(ExitStatus::from_raw(0)),
            }
        }
    })
}

/// Starts this program again, with the same arguments.
fn start() -> io::Result<Child> {
    let own = getpid();
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).env(PARENT, own.as_raw_nonzero().to_string());
    // SAFETY: two system calls, which is all that may be done between fork and exec.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // It may have died before.
            if getppid() == Some(own) { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
        });
    }
    command.spawn()
}

/// Waits for the child's end, and passes signals on until then.
async fn wait(child: &mut Child, signals: &mut Signals) -> io::Result<ExitStatus> {
    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    loop {
        let arrived = tokio::select! {
            status = child.wait() => return status,
            _ = signals.terminate.recv() => Signal::TERM,
            _ = signals.interrupt.recv() => Signal::INT,
        };
        // The child was not waited for yet, so the id is its own.
        if let Some(id) = id
            && let Err(error) = kill_process(id, arrived)
        {
            tracing::warn!("a signal could not be passed on to the worker: {error}");
        }
    }
}

/// What a shell would say of `status`.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Stdio;

    use super::*;

    /// Where a process that was started says so: a line with its id.
    const STARTS: &str = "TAKUMA_TEST_STARTS";
    const QUICK: Restarts = Restarts { first_pause: Duration::from_millis(10), ..Restarts::USUAL };

    /// One test of this program, which is ignored otherwise, in a process of its own.
    pub(crate) fn program(test: &str) -> std::process::Command {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
        command.env_remove(PARENT).stdout(Stdio::null());
        command
    }

    /// Goes on in the child only, whose starts are counted: which one this is. In the parent: how the last one exited.
    pub(crate) fn start_counted(restarts: Restarts) -> Result<usize, ExitCode> {
        if let Some(code) = run_with(true, restarts) {
            return Err(code);
        }
        let path = PathBuf::from(std::env::var_os(STARTS).unwrap());
        let starts = fs::read_to_string(&path).unwrap() + &format!("{}\n", std::process::id());
        // In one piece, since others wait for it.
        fs::write(path.with_extension("new"), &starts).unwrap();
        fs::rename(path.with_extension("new"), &path).unwrap();
        Ok(starts.lines().count())
    }

    /// A program that calls [`start_counted`], and where its starts are told.
    pub(crate) fn counting(mut program: std::process::Command) -> (std::process::Command, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("starts");
        fs::write(&path, "").unwrap();
        program.env(STARTS, path);
        (program, folder)
    }

    /// The ids of the processes that were started.
    pub(crate) fn starts(folder: &tempfile::TempDir) -> Vec<i32> {
        let starts = fs::read_to_string(folder.path().join("starts")).unwrap();
        starts.lines().map(|id| id.parse().unwrap()).collect()
    }

    fn until(what: &str, is_so: impl Fn() -> bool) {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(20), "not so: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn is_running(id: i32) -> bool {
        let stat = fs::read_to_string(Path::new("/proc").join(id.to_string()).join("stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn pauses_double_and_end() {
        let restarts = Restarts { longest_pause: Duration::from_secs(5), ..Restarts::USUAL };
        let pauses: Vec<_> =
            (1..=6).map(|number| restarts.pause(number).map(|pause| pause.as_secs())).collect();
        assert_eq!(pauses, [Some(1), Some(2), Some(4), Some(5), Some(5), None]);
    }

    #[test]
    fn process_that_is_no_child_goes_on_where_no_parent_is_wanted() {
        assert!(run(false).is_none());
    }

    #[test]
    #[ignore = "run by worker_that_always_ends_itself_is_given_up"]
    fn ends_itself() {
        let restarts = Restarts { most_in_a_row: 2, ..QUICK };
        match start_counted(restarts) {
            Ok(_) => last_resort("a test wants it"),
            Err(code) => assert_eq!(code, ExitCode::from(LAST_RESORT_STATUS)),
        }
    }

    #[test]
    fn worker_that_always_ends_itself_is_given_up() {
        let (mut parent, folder) = counting(program("supervise::tests::ends_itself"));
        assert!(parent.status().unwrap().success());
        assert_eq!(starts(&folder).len(), 3);
    }

    #[test]
    #[ignore = "run by other_ends_of_the_worker_are_the_parents_too"]
    fn exits_with_seven() {
        match start_counted(QUICK) {
            Ok(_) => std::process::exit(7),
            Err(code) => assert_eq!(code, ExitCode::from(7)),
        }
    }

    #[test]
    fn other_ends_of_the_worker_are_the_parents_too() {
        let (mut parent, folder) = counting(program("supervise::tests::exits_with_seven"));
        assert!(parent.status().unwrap().success());
        assert_eq!(starts(&folder).len(), 1);
    }

    #[test]
    #[ignore = "run by the tests of signals"]
    fn waits_for_a_signal() {
        match start_counted(QUICK) {
            Ok(_) => std::thread::sleep(Duration::from_secs(60)),
            Err(code) => assert_eq!(code, ExitCode::from(128 + 15)),
        }
    }

    #[test]
    fn signals_reach_the_worker() {
        let (mut parent, folder) = counting(program("supervise::tests::waits_for_a_signal"));
        let mut parent = parent.spawn().unwrap();
        until("the worker runs", || !starts(&folder).is_empty());
        kill_process(Pid::from_child(&parent), Signal::TERM).unwrap();
        assert!(parent.wait().unwrap().success());
    }

    #[test]
    fn worker_dies_with_its_parent() {
        let (mut parent, folder) = counting(program("supervise::tests::waits_for_a_signal"));
        let mut parent = parent.spawn().unwrap();
        until("the worker runs", || !starts(&folder).is_empty());
        let worker = starts(&folder)[0];
        assert!(is_running(worker));
        parent.kill().unwrap();
        parent.wait().unwrap();
        until("the worker is gone", || !is_running(worker));
    }
}
