//! What happens when ranks of an NCCL group die, fall silent, hang or disagree.

use std::{
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use takuma_core::ids::{Generation, Rank};

use super::{
    FORMING, Nccl, NcclConfig, agree_on_id,
    fake::{
        self, HANG_ABORT, HANG_FINALIZE, HANG_INIT, HANG_SUMS, Stream, child, form, form_with, next_comm,
    },
};
use crate::{
    collective::{
        Collective, CollectiveError, DeviceCollective, DeviceKind, Ring, RingConfig, RingListener,
        contract::{connect, form as form_rings, together},
    },
    supervise::{
        LAST_RESORT_STATUS, Restarts,
        tests::{counting, start_counted, starts},
    },
};

/// Far below the limits of the groups here, and generous to a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(3);
const SHORT: Duration = Duration::from_millis(300);

/// A sum of this rank that is waited for.
fn sum(member: &Nccl) -> Result<(), CollectiveError> {
    sum_on(member, &Stream::new())
}

fn sum_on(member: &Nccl, stream: &Stream) -> Result<(), CollectiveError> {
    let mut values = vec![1.0f32; 1000];
    let enqueued = stream.sum(member, &mut values, DeviceKind::F32);
    let settled = member.settle();
    // Nothing touches the values any more, so the end of a group let go of them.
    values.fill(0.0);
    enqueued.and(settled)
}

/// What the ranks get from a sum that cannot be, in less than [`AT_ONCE`].
fn failures(members: &[&Nccl]) -> Vec<CollectiveError> {
    let begin = Instant::now();
    let failures = together(members.to_vec(), |member| sum(member).unwrap_err());
    assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
    for (member, failure) in members.iter().zip(&failures) {
        // Later ones fail for the same reason.
        assert_eq!(sum(member).unwrap_err().suspect_rank(), failure.suspect_rank());
        assert_eq!(member.barrier().unwrap_err().suspect_rank(), failure.suspect_rank());
    }
    failures
}

fn assert_timeout(failure: &CollectiveError, suspect: u32) {
    assert!(matches!(failure, CollectiveError::Timeout { .. }), "{failure}");
    assert_eq!(failure.suspect_rank(), Some(Rank(suspect)), "{failure}");
}

fn assert_lost(failure: &CollectiveError, suspect: u32) {
    assert!(matches!(failure, CollectiveError::PeerLost { .. }), "{failure}");
    assert_eq!(failure.suspect_rank(), Some(Rank(suspect)), "{failure}");
}

fn with_short_timeout(config: &mut RingConfig) {
    config.timeout = SHORT;
}

#[test]
fn killed_rank_is_named_by_all_survivors_at_once() {
    for world in [2, 3, 5] {
        let mut members = form(world, |_| {});
        let killed = members.remove(1);
        let failures = std::thread::scope(|scope| {
            scope.spawn(|| killed.shared().ring.vanish());
            failures(&members.iter().collect::<Vec<_>>())
        });
        failures.iter().for_each(|failure| assert_lost(failure, 1));
    }
}

#[test]
fn rank_that_joins_no_sum_is_timed_out_by_name() {
    let members = form(4, with_short_timeout);
    let failures = failures(&[&members[0], &members[2], &members[3]]);
    failures.iter().for_each(|failure| assert_timeout(failure, 1));
    assert_eq!(sum(&members[1]).unwrap_err().suspect_rank(), Some(Rank(1)));
}

#[test]
fn silent_process_is_noticed_though_its_gpu_sums() {
    let members = form(3, |config| config.silence = Duration::from_millis(500));
    members[2].shared().ring.freeze();
    let failures = failures(&[&members[0], &members[1]]);
    failures.iter().for_each(|failure| assert_timeout(failure, 2));
}

#[test]
fn rank_whose_gpu_does_not_come_to_the_sum_is_timed_out_by_name() {
    let members = form(3, with_short_timeout);
    let stuck = Stream::new();
    let mut values = [1.0f32; 10];
    stuck.block(true);
    stuck.sum(&members[1], &mut values, DeviceKind::F32).unwrap();
    let failures = failures(&[&members[0], &members[2]]);
    failures.iter().for_each(|failure| assert_timeout(failure, 1));
    assert_timeout(&members[1].settle().unwrap_err(), 1);
}

#[test]
fn gpu_that_nobody_else_blames_is_blamed_by_its_own_rank() {
    let members = form(2, |config| config.timeout = SHORT / 3);
    let stuck = Stream::new();
    stuck.block(true);
    let failure = sum_on(&members[1], &stuck).unwrap_err();
    assert!(matches!(failure, CollectiveError::Local { .. }), "{failure}");
    assert!(failure.to_string().contains("this worker's GPU has not come to it"), "{failure}");
    let told = sum(&members[0]).unwrap_err();
    assert!(matches!(told, CollectiveError::Aborted { .. }), "{told}");
}

#[test]
fn sum_that_hangs_on_the_devices_ends_everywhere() {
    let members = form(3, with_short_timeout);
    members[1].set_faults(HANG_SUMS);
    for failure in failures(&members.iter().collect::<Vec<_>>()) {
        // All wait, so which one hangs cannot be told.
        assert!(matches!(failure, CollectiveError::Timeout { .. }), "{failure}");
        assert!(failure.to_string().contains("its GPU did not come to the sum"), "{failure}");
    }
}

#[test]
fn faults_that_nccl_finds_end_the_group_in_words() {
    // `ncclSystemError` is this machine's, `ncclRemoteError` somebody's.
    for (error, words, is_own) in [(2, "NCCL 2", true), (6, "does not say which", false)] {
        let members = form(3, |_| {});
        members[2].set_faults(HANG_SUMS);
        members[2].set_error(error);
        for failure in failures(&members.iter().collect::<Vec<_>>()) {
            assert!(failure.to_string().contains(words), "{failure}");
            assert!(failure.to_string().contains("said by the fake"), "{failure}");
            assert_eq!(failure.suspect_rank(), None);
        }
        let own = sum(&members[2]).unwrap_err();
        assert_eq!(matches!(own, CollectiveError::Local { .. }), is_own, "{own}");
    }
}

#[test]
fn lost_rank_wins_over_what_nccl_says_of_it() {
    let mut members = form(3, |_| {});
    let killed = members.remove(1);
    members.iter().for_each(|member| member.set_error(6));
    killed.shared().ring.vanish();
    failures(&members.iter().collect::<Vec<_>>()).iter().for_each(|failure| assert_lost(failure, 1));
}

#[test]
fn abort_ends_waits_now_and_later() {
    let members = form(3, |_| {});
    let stream = Stream::new();
    let mut values = vec![1.0f32; 1000];
    stream.sum(&members[0], &mut values, DeviceKind::F32).unwrap();
    let failure = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| members[0].settle().unwrap_err());
        let begin = Instant::now();
        members[0].abort_handle().abort("the operator said so");
        let failure = waiter.join().unwrap();
        assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
        failure
    });
    let others = members.iter().map(|member| sum(member).unwrap_err());
    for failure in others.chain([failure]) {
        assert!(matches!(failure, CollectiveError::Aborted { .. }), "{failure}");
        assert!(failure.to_string().contains("the operator said so"), "{failure}");
    }
}

#[test]
fn group_that_is_dropped_in_the_middle_of_a_sum_tells_the_others() {
    let mut members = form(2, |_| {});
    let stream = Stream::new();
    let mut values = [1.0f32; 10];
    stream.sum(&members[0], &mut values, DeviceKind::F32).unwrap();
    let begin = Instant::now();
    drop(members.remove(0));
    assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
    let failure = sum(&members[0]).unwrap_err();
    assert!(failure.to_string().contains("dropped with sums under way"), "{failure}");
}

/// What each rank gets when the group does not form, in less than [`AT_ONCE`].
fn refusals(config: &NcclConfig, rings: Vec<Ring>, before: impl Fn(&Ring) + Sync) -> Vec<CollectiveError> {
    let begin = Instant::now();
    let refusals = together(rings, |ring| {
        before(&ring);
        Nccl::form(ring, config).unwrap_err()
    });
    assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
    refusals
}

#[test]
fn group_that_does_not_form_ends_everywhere_within_its_limit() {
    let config = NcclConfig { init_timeout: SHORT, ..fake::config() };
    let refusals = refusals(&config, form_rings(3, with_short_timeout), |ring| {
        next_comm(if ring.rank() == Rank(1) { HANG_INIT } else { 0 });
    });
    for refusal in &refusals {
        assert!(matches!(refusal, CollectiveError::Timeout { .. }), "{refusal}");
        assert!(refusal.to_string().contains(FORMING), "{refusal}");
    }
}

#[test]
fn rank_that_never_forms_is_named() {
    let mut rings = form_rings(3, with_short_timeout);
    let absent = rings.remove(1);
    for refusal in refusals(&fake::config(), rings, |_| {}) {
        assert_timeout(&refusal, 1);
    }
    assert_eq!(absent.barrier().unwrap_err().suspect_rank(), Some(Rank(1)));
}

#[test]
fn rank_that_dies_while_the_group_forms_is_named() {
    let config = fake::config();
    let refusals = together(form_rings(3, |_| {}), |ring| {
        if ring.rank() == Rank(1) {
            agree_on_id(&ring, &config).unwrap();
            ring.vanish();
            return None;
        }
        Some(Nccl::form(ring, &config).unwrap_err())
    });
    refusals.iter().flatten().for_each(|refusal| assert_lost(refusal, 1));
}

#[test]
fn rank_with_another_nccl_is_named() {
    let config = fake::config();
    let refusals = together(form_rings(3, |_| {}), |ring| {
        if ring.rank() == Rank(1) {
            if let Err(error) = ring.all_gather(&22_903_i32.to_le_bytes()) {
                // The others were faster.
                assert_eq!(error.suspect_rank(), Some(Rank(1)));
            }
            return None;
        }
        Some(Nccl::form(ring, &config).unwrap_err())
    });
    for refusal in refusals.iter().flatten() {
        assert!(matches!(refusal, CollectiveError::Protocol { .. }), "{refusal}");
        assert_eq!(refusal.suspect_rank(), Some(Rank(1)));
        assert!(refusal.to_string().contains("it has NCCL 2.29.3, this worker 2.28.9"), "{refusal}");
    }
}

#[test]
fn next_generation_forms_without_the_lost_and_the_former_one_is_refused() {
    let listeners: Vec<_> = (0..3).map(|_| RingListener::bind("127.0.0.1:0").unwrap()).collect();
    let listeners: Vec<_> = listeners.iter().collect();
    let config = fake::config();
    let join = |listeners: &[&RingListener], generation| {
        together(connect(listeners, generation, |_| {}), |ring| Nccl::form(ring, &config).unwrap())
    };
    let former = join(&listeners, Generation(4));
    former[1].shared().ring.vanish();
    let survivors = [listeners[0], listeners[2]];
    let next = join(&survivors, Generation(5));
    together(next.iter().collect(), |member| sum(member).unwrap());
    for member in [&former[0], &former[2]] {
        assert_lost(&sum(member).unwrap_err(), 1);
    }
    let members = survivors.map(|listener| listener.local_addr().to_string()).to_vec();
    let stale = Ring::connect(survivors[0], RingConfig::new("contract", Rank(0), Generation(4), members));
    assert!(matches!(stale, Err(CollectiveError::StaleGeneration { .. })), "{stale:?}");
}

#[test]
fn communicator_that_does_not_end_in_peace_is_aborted() {
    let members = form(2, |_| {});
    members[0].set_faults(HANG_FINALIZE);
    let begin = Instant::now();
    together(members, drop);
    assert!(begin.elapsed() < Duration::from_secs(5), "took {:?}", begin.elapsed());
}

#[test]
fn graphs_can_be_destroyed_before_the_communicator() {
    for is_peace in [true, false] {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let before_abort: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            assert!(!is_peace, "not even a panic keeps the communicator from its end");
        });
        let config = NcclConfig { before_abort: Some(before_abort), ..fake::config() };
        let members = form_with(&config, 2, |_| {});
        if !is_peace {
            members[0].abort_handle().abort("the operator said so");
        }
        drop(members);
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn end_that_hangs_takes_the_last_resort() {
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&reasons);
    let config = NcclConfig {
        abort_timeout: SHORT,
        last_resort: Arc::new(move |reason| noted.lock().unwrap().push(reason.to_owned())),
        ..fake::config()
    };
    let members = form_with(&config, 2, |_| {});
    members[0].set_faults(HANG_ABORT);
    members[0].abort_handle().abort("the operator said so");
    // Were the last resort one that returns, nobody would wait for ever.
    members.iter().for_each(|member| assert!(member.settle().is_err()));
    let reasons = reasons.lock().unwrap();
    assert_eq!(*reasons, ["ending the NCCL communicator failed: it did not end within 0.3 s"]);
}

/// Ends this process.
fn hang_in_the_end() -> ! {
    let config = NcclConfig { abort_timeout: SHORT, ..fake::config() };
    let members = form_with(&config, 2, |_| {});
    members[1].set_faults(HANG_ABORT);
    members[0].abort_handle().abort("the operator said so");
    // Until the word is there.
    while members[1].settle().is_ok() {
        std::thread::yield_now();
    }
    panic!("this process lives");
}

#[test]
#[ignore = "run by process_whose_communicator_does_not_end_ends_itself"]
fn hangs_in_the_end() {
    hang_in_the_end();
}

#[test]
fn process_whose_communicator_does_not_end_ends_itself() {
    let begin = Instant::now();
    let status = child("collective::nccl::faults::hangs_in_the_end").status().unwrap();
    assert_eq!(status.code(), Some(i32::from(LAST_RESORT_STATUS)));
    assert!(begin.elapsed() < AT_ONCE * 2, "took {:?}", begin.elapsed());
}

#[test]
#[ignore = "run by supervised_process_whose_communicator_does_not_end_starts_again"]
fn hangs_in_the_end_once() {
    let restarts = Restarts { first_pause: Duration::from_millis(10), ..Restarts::USUAL };
    match start_counted(restarts) {
        Ok(1) => hang_in_the_end(),
        Ok(_) => {
            let members = form(2, |_| {});
            together(members.iter().collect(), |member| sum(member).unwrap());
        }
        Err(code) => assert_eq!(code, ExitCode::SUCCESS),
    }
}

#[test]
fn supervised_process_whose_communicator_does_not_end_starts_again() {
    let (mut parent, folder) = counting(child("collective::nccl::faults::hangs_in_the_end_once"));
    assert!(parent.status().unwrap().success());
    assert_eq!(starts(&folder).len(), 2);
}
