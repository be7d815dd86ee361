//! A test that runs itself again in processes of its own, one a rank: two workers on one GPU need that, since libtorch has
//! one backward thread a device in each process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use takuma_core::config::RunConfig;
use takuma_core::ids::{Generation, Rank};
use takuma_core::slots::SlotRange;
use takuma_worker::collective::{Ring, RingConfig, RingListener};

/// Tells a process its rank, the number of them, and their folder.
const VARIABLE: &str = "TAKUMA_TEST_MEMBER";
/// CUDA takes some seconds to load, in each of them.
const DEADLINE: Duration = Duration::from_secs(80);

/// One of the processes, seen from inside.
pub struct Member {
    rank: u32,
    world: u32,
    folder: PathBuf,
}

/// Which of the processes this is; none in the one that runs the tests.
pub fn member() -> Option<Member> {
    let told = std::env::var(VARIABLE).ok()?;
    let [rank, world, folder] = told.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
    Some(Member { rank: rank.parse().unwrap(), world: world.parse().unwrap(), folder: folder.into() })
}

/// Runs the test of this name in `world` processes; what each of them handed in, by rank.
pub fn in_processes(test: &str, world: u32) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let start = |rank: u32| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(VARIABLE, format!("{rank} {world} {}", folder.path().display()))
            .stdout(Stdio::null())
            .spawn()
            .map(Process)
            .unwrap()
    };
    let mut processes: Vec<Process> = (0..world).map(start).collect();
    for (rank, process) in processes.iter_mut().enumerate() {
        let status = until(&format!("the end of rank {rank}"), || process.0.try_wait().unwrap());
        assert!(status.success(), "rank {rank} ended with {status}");
    }
    (0..world).map(|rank| std::fs::read(folder.path().join(format!("{rank}.made"))).unwrap()).collect()
}

impl Member {
    /// Its slots and its ring, in a run of lanes.
    pub fn join(&self, config: &RunConfig) -> (SlotRange, Ring) {
        let listener = RingListener::bind("127.0.0.1:0").unwrap();
        put(&self.file(self.rank, "address"), listener.local_addr().to_string().as_bytes());
        let address = |rank: u32| {
            let file = self.file(rank, "address");
            until("the address of a peer", || std::fs::read_to_string(&file).ok())
        };
        let members = (0..self.world).map(address).collect();
        let mut ring = RingConfig::new("test", Rank(self.rank), Generation(1), members);
        let shares = config.shares(self.world);
        ring.lanes_by_rank = shares.iter().map(|share| config.lanes_of(share.count)).collect();
        (shares[self.rank as usize], Ring::connect(&listener, ring).unwrap())
    }

    /// Hands in what it made.
    pub fn hand_in(&self, made: &[u8]) {
        put(&self.file(self.rank, "made"), made);
    }

    fn file(&self, rank: u32, kind: &str) -> PathBuf {
        self.folder.join(format!("{rank}.{kind}"))
    }
}

/// Writes a file in one piece, since others wait for it.
fn put(file: &Path, bytes: &[u8]) {
    let new = file.with_extension("new");
    std::fs::write(&new, bytes).unwrap();
    std::fs::rename(&new, file).unwrap();
}

fn until<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(begin.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        // Of another process: there is no event to wait on.
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// A process that dies with its handle.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
