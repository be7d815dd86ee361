//! What happens when ranks die, fall silent, disagree, or strangers call.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use takuma_core::ids::{Generation, Rank};

use super::{
    Kind, Ring, RingConfig, RingListener,
    greeting::{Greeting, run_hash},
    group::{Group, Side},
    listener::GREETING_MAX,
};
use crate::collective::{
    Collective, CollectiveError, PendingReduce,
    contract::{connect, form, together},
};

/// Far below the limits of the rings here, and generous to a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(2);

fn listener() -> RingListener {
    RingListener::bind("127.0.0.1:0").unwrap()
}

/// Takes `rank` out of `rings`.
fn without(mut rings: Vec<Ring>, rank: usize) -> (Ring, Vec<Ring>) {
    let taken = rings.remove(rank);
    (taken, rings)
}

type Start = fn(&Ring) -> Result<PendingReduce, CollectiveError>;

/// Both ways to sum a bucket, and how their errors begin when rank 1 is lost.
const SUMS: [(Start, &str); 2] = [
    (|ring| ring.start_all_reduce(vec![1.0; 200_000]), "rank 1 was lost during all_reduce"),
    (|ring| ring.start_chain_reduce(vec![vec![1.0; 200_000]]), "rank 1 was lost during chain_reduce"),
];

/// What the ranks get from a bucket that cannot be summed, in less than [`AT_ONCE`].
fn failures(rings: &[Ring]) -> Vec<CollectiveError> {
    failures_of(rings, SUMS[0].0)
}

fn failures_of(rings: &[Ring], start: Start) -> Vec<CollectiveError> {
    let begin = Instant::now();
    let failures = together(rings.iter().collect(), |ring: &Ring| {
        start(ring).and_then(PendingReduce::wait).unwrap_err()
    });
    assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
    failures
}

fn group(ring: &Ring) -> &Group {
    &ring.links.as_ref().unwrap().group
}

/// Returns once all of `rings` wait for data at the same time.
fn until_all_wait(rings: &[Ring]) {
    let begin = Instant::now();
    while !rings.iter().all(|ring| group(ring).is_waiting()) {
        assert!(begin.elapsed() < Duration::from_secs(20), "some rank does not wait");
        std::thread::yield_now();
    }
}

#[test]
fn killed_rank_is_named_by_all_survivors_at_once() {
    for (world, (start, words)) in [2, 3, 5].into_iter().flat_map(|world| SUMS.map(|sum| (world, sum))) {
        let (killed, survivors) = without(form(world, |_| {}), 1);
        let failures = std::thread::scope(|scope| {
            scope.spawn(move || killed.vanish());
            failures_of(&survivors, start)
        });
        for failure in &failures {
            assert!(matches!(failure, CollectiveError::PeerLost { .. }), "{failure}");
            assert_eq!(failure.suspect_rank(), Some(Rank(1)), "{failure}");
            assert!(failure.to_string().starts_with(words), "{failure}");
        }
    }
}

#[test]
fn rank_killed_in_the_middle_of_a_chain_is_named_by_all() {
    for victim in 0..3 {
        // Rank 3 does not join in, so the others are all under way and cannot get to the end.
        let (idle, mut joined) = without(form(4, |_| {}), 3);
        let start = |ring: &Ring| ring.start_chain_reduce(vec![vec![1.0; 2_000_000]]).unwrap();
        let mut pending: Vec<_> = joined.iter().map(start).collect();
        until_all_wait(&joined);
        let begin = Instant::now();
        joined.remove(victim).vanish();
        drop(pending.remove(victim));
        for failure in pending.into_iter().map(|pending| pending.wait().unwrap_err()) {
            assert!(matches!(failure, CollectiveError::PeerLost { .. }), "{failure}");
            assert_eq!(failure.suspect_rank(), Some(Rank(victim as u32)), "{failure}");
            let words = format!("rank {victim} was lost during chain_reduce");
            assert!(failure.to_string().starts_with(&words), "{failure}");
        }
        assert_eq!(idle.barrier().unwrap_err().suspect_rank(), Some(Rank(victim as u32)));
        assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
    }
}

#[test]
fn rank_that_left_in_peace_is_named_when_it_is_needed() {
    let (left, survivors) = without(form(5, |_| {}), 3);
    drop(left);
    for failure in failures(&survivors) {
        assert!(matches!(failure, CollectiveError::PeerLost { .. }), "{failure}");
        assert_eq!(failure.suspect_rank(), Some(Rank(3)), "{failure}");
        assert!(failure.to_string().contains("it has left the group"), "{failure}");
    }
}

#[test]
fn rank_that_leaves_after_the_last_operation_disturbs_nobody() {
    for _ in 0..20 {
        together(form(4, |_| {}), |ring| {
            let pending = ring.start_all_reduce(vec![1.0; 70_000]).unwrap();
            assert!(pending.wait().unwrap().iter().all(|&value| value == 4.0));
            ring.barrier().unwrap();
        });
    }
}

#[test]
fn rank_that_joins_no_operation_is_timed_out_by_name() {
    for (start, _) in SUMS {
        let rings = form(4, |config| config.timeout = Duration::from_millis(300));
        let (idle, waiting) = without(rings, 1);
        for failure in failures_of(&waiting, start) {
            assert!(matches!(failure, CollectiveError::Timeout { .. }), "{failure}");
            assert_eq!(failure.suspect_rank(), Some(Rank(1)), "{failure}");
        }
        // It is told, too, so that it does not wait for a group that is gone.
        assert_eq!(idle.barrier().unwrap_err().suspect_rank(), Some(Rank(1)));
    }
}

#[test]
fn shorter_timeout_ends_a_wait_under_way_and_blames_who_does_not_wait() {
    let (_idle, waiting) = without(form(4, |_| {}), 1);
    let pending: Vec<_> = waiting.iter().map(|ring| SUMS[0].0(ring).unwrap()).collect();
    until_all_wait(&waiting);
    let begin = Instant::now();
    for ring in &waiting {
        ring.set_timeout(Duration::from_millis(300));
    }
    for failure in pending.into_iter().map(|pending| pending.wait().unwrap_err()) {
        assert!(matches!(failure, CollectiveError::Timeout { .. }), "{failure}");
        assert_eq!(failure.suspect_rank(), Some(Rank(1)), "{failure}");
    }
    assert!(begin.elapsed() < AT_ONCE, "took {:?}", begin.elapsed());
}

#[test]
fn longer_timeout_lets_the_others_come_late() {
    let old = Duration::from_millis(300);
    let (late, waiting) = without(form(3, |config| config.timeout = old), 1);
    for ring in waiting.iter().chain([&late]) {
        ring.set_timeout(Duration::from_secs(20));
    }
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        for ring in &waiting {
            let tell = tell.clone();
            scope.spawn(move || tell.send(SUMS[0].0(ring).and_then(PendingReduce::wait)).unwrap());
        }
        let early = told.recv_timeout(old * 2);
        assert!(early.is_err(), "{early:?}");
        assert_eq!(SUMS[0].0(&late).unwrap().wait().unwrap()[0], 3.0);
        for _ in &waiting {
            assert_eq!(told.recv().unwrap().unwrap()[0], 3.0);
        }
    });
}

#[test]
fn timeout_reaches_the_kernel_too() {
    let rings = form(2, |config| config.use_local_sockets = false);
    rings[0].set_timeout(Duration::from_secs(77));
    let set = rustix::net::sockopt::tcp_user_timeout(group(&rings[0]).control(Side::Next)).unwrap();
    assert_eq!(set, 77_000);
    // Never below the longest silence, which is 10 s here: the warden decides about silence.
    rings[0].set_timeout(Duration::from_millis(50));
    let set = rustix::net::sockopt::tcp_user_timeout(group(&rings[0]).control(Side::Next)).unwrap();
    assert_eq!(set, 10_000);
}

#[test]
fn silent_process_is_noticed_though_its_sockets_stand() {
    for (start, _) in SUMS {
        let rings = form(4, |config| config.silence = Duration::from_millis(500));
        rings[2].freeze();
        let (_frozen, waiting) = without(rings, 2);
        for failure in failures_of(&waiting, start) {
            assert!(matches!(failure, CollectiveError::Timeout { .. }), "{failure}");
            assert_eq!(failure.suspect_rank(), Some(Rank(2)), "{failure}");
        }
    }
}

#[test]
fn neighbour_that_still_waits_for_its_own_is_not_taken_for_silent() {
    let listeners = [listener(), listener(), listener(), listener()];
    let members: Vec<String> = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
    let silence = Duration::from_millis(300);
    let join = |rank: usize| {
        let mut config = RingConfig::new("contract", Rank(rank as u32), Generation(1), members.clone());
        config.silence = silence;
        Ring::connect(&listeners[rank], config).and_then(|ring| ring.barrier())
    };
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        // Rank 1 meets both neighbours, which then wait for rank 3 and give no signs of life yet.
        for rank in 0..3 {
            let (tell, join) = (tell.clone(), &join);
            scope.spawn(move || tell.send(join(rank)).unwrap());
        }
        let early = told.recv_timeout(silence * 3);
        assert!(early.is_err(), "{early:?}");
        join(3).unwrap();
        for _ in 0..3 {
            told.recv().unwrap().unwrap();
        }
    });
}

#[test]
fn ranks_with_other_lengths_find_out() {
    let rings = form(2, |_| {});
    let short = together(rings.iter().collect(), |ring: &Ring| {
        ring.all_reduce(&mut vec![1.0; 4 + ring.rank().0 as usize]).unwrap_err()
    });
    let rings = form(3, |_| {});
    let buckets = together(rings.iter().collect(), |ring: &Ring| {
        let bucket = vec![1.0; if ring.rank() == Rank(1) { 0 } else { 90_000 }];
        ring.start_all_reduce(bucket).and_then(|pending| pending.wait()).unwrap_err()
    });
    let rings = form(3, |_| {});
    let chains = together(rings.iter().collect(), |ring: &Ring| {
        let lane = vec![1.0; if ring.rank() == Rank(1) { 0 } else { 90_000 }];
        ring.start_chain_reduce(vec![lane]).and_then(|pending| pending.wait()).unwrap_err()
    });
    for failure in short.iter().chain(&buckets).chain(&chains) {
        assert!(matches!(failure, CollectiveError::Protocol { .. }), "{failure}");
        assert!(failure.to_string().contains("values"), "{failure}");
    }
}

#[test]
fn ranks_in_other_operations_find_out() {
    let rings = form(2, |_| {});
    let failures = together(rings.iter().collect(), |ring: &Ring| match ring.rank() {
        Rank(0) => ring.barrier().unwrap_err(),
        _ => ring.all_gather(b"x").unwrap_err(),
    });
    for failure in failures {
        assert!(matches!(failure, CollectiveError::Protocol { .. }), "{failure}");
        assert!(failure.to_string().contains("barrier 2"), "{failure}");
    }
    let rings = form(2, |_| {});
    let failures = together(rings.iter().collect(), |ring: &Ring| {
        let (start, _) = SUMS[ring.rank().0 as usize];
        start(ring).and_then(PendingReduce::wait).unwrap_err()
    });
    for failure in failures {
        assert!(matches!(failure, CollectiveError::Protocol { .. }), "{failure}");
        assert!(failure.to_string().contains("chain_reduce 1 of a bucket"), "{failure}");
    }
}

#[test]
fn ranks_with_other_roots_find_out() {
    let rings = form(2, |_| {});
    let failures = together(rings.iter().collect(), |ring: &Ring| {
        ring.broadcast(ring.rank(), &mut b"mine".to_vec()).unwrap_err()
    });
    assert!(failures.iter().all(|failure| matches!(failure, CollectiveError::Protocol { .. })));
}

#[test]
fn absurd_length_from_a_member_is_refused_before_memory_is_taken() {
    let rings = form(2, |_| {});
    let failures = together(rings.iter().collect(), |ring: &Ring| match ring.rank() {
        Rank(0) => ring.all_gather(b"x").unwrap_err(),
        _ => {
            let links = ring.links.as_ref().unwrap();
            let absurd = u64::MAX.to_le_bytes();
            let announce = |block: &mut Vec<u8>| block.extend_from_slice(&absurd);
            links.short(|short| short.gather_equal(Kind::Lengths, 0, 8, announce)).unwrap();
            ring.barrier().unwrap_err()
        }
    });
    for failure in failures {
        assert!(matches!(failure, CollectiveError::Protocol { rank: Rank(1), .. }), "{failure}");
    }
}

#[test]
fn garbage_between_members_ends_the_group_and_names_the_sender() {
    let rings = form(3, |_| {});
    group(&rings[0]).control(Side::Next).write_all(&[0xa5; 512]).unwrap();
    let failure = failures(&rings[1..2]).remove(0);
    assert!(matches!(failure, CollectiveError::Protocol { rank: Rank(0), .. }), "{failure}");
}

#[test]
fn dropped_bucket_still_counts_for_the_others() {
    together(form(2, |_| {}), |ring| {
        let first = ring.start_all_reduce(vec![1.0; 10]).unwrap();
        match ring.rank() {
            Rank(0) => drop(first),
            _ => assert_eq!(first.wait().unwrap(), [2.0; 10]),
        }
        assert_eq!(ring.start_all_reduce(vec![2.0]).unwrap().wait().unwrap(), [4.0]);
        ring.barrier().unwrap();
    });
}

#[test]
fn ring_dropped_with_buckets_under_way_ends_the_group() {
    let (dropped, others) = without(form(2, |_| {}), 0);
    let pending = dropped.start_all_reduce(vec![1.0; 10]).unwrap();
    drop(dropped);
    assert!(matches!(pending.wait(), Err(CollectiveError::Aborted { .. })));
    assert!(matches!(failures(&others)[0], CollectiveError::Aborted { .. }));
}

#[test]
fn survivors_form_the_next_generation_on_the_same_listeners() {
    let listeners = [listener(), listener(), listener()];
    let [first, second, third] = &listeners;
    let rings = connect(&[first, second, third], Generation(1), |_| {});
    let (killed, survivors) = without(rings, 1);
    killed.vanish();
    assert!(failures(&survivors).iter().all(|failure| failure.suspect_rank() == Some(Rank(1))));
    drop(survivors);
    together(connect(&[first, third], Generation(2), |_| {}), |ring| {
        let mut values = [1.0];
        ring.all_reduce(&mut values).unwrap();
        assert_eq!(values, [2.0]);
    });
}

/// A configuration for rank 0 of two.
fn pair(first: &RingListener, second: &RingListener, generation: Generation) -> RingConfig {
    let members = vec![first.local_addr().to_string(), second.local_addr().to_string()];
    RingConfig::new("contract", Rank(0), generation, members)
}

#[test]
fn stale_generation_is_refused_and_told_the_present_one() {
    let (own, peer) = (listener(), listener());
    peer.fence("contract", Generation(5));
    let refused = Ring::connect(&own, pair(&own, &peer, Generation(4))).unwrap_err();
    let CollectiveError::StaleGeneration { own: Generation(4), current: Generation(5), .. } = refused else {
        panic!("{refused}")
    };
    own.fence("contract", Generation(6));
    let refused = Ring::connect(&own, pair(&own, &peer, Generation(5))).unwrap_err();
    assert!(matches!(refused, CollectiveError::StaleGeneration { current: Generation(6), .. }), "{refused}");
}

#[test]
fn fence_ends_a_formation_under_way() {
    let (own, absent) = (listener(), listener());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let forming = scope.spawn(|| Ring::connect(&own, pair(&own, &absent, Generation(1))));
        // The dialler's first greeting shows that the formation is under way.
        while absent.parked() == 0 {
            std::thread::yield_now();
        }
        own.fence("contract", Generation(2));
        let failure = forming.join().unwrap().unwrap_err();
        assert!(matches!(failure, CollectiveError::StaleGeneration { .. }), "{failure}");
    });
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn missing_member_is_named_by_all_who_came() {
    let listeners = [listener(), listener(), listener(), listener()];
    let members: Vec<String> = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
    let came = vec![(Rank(0), &listeners[0]), (Rank(1), &listeners[1]), (Rank(3), &listeners[3])];
    let failures = together(came, |(rank, listener)| {
        let mut config = RingConfig::new("contract", rank, Generation(1), members.clone());
        config.connect_timeout = Duration::from_millis(300);
        Ring::connect(listener, config).unwrap_err()
    });
    for failure in failures {
        assert_eq!(failure.suspect_rank(), Some(Rank(2)), "{failure}");
    }
}

#[test]
fn members_with_other_settings_find_out() {
    type Adjust = fn(&mut RingConfig);
    let adjusts: [(Adjust, &str); 2] = [
        (|config| config.channels = 1 + config.rank.0 as usize, "channels"),
        (|config| config.lanes_by_rank = vec![1, 2 + config.rank.0], "lanes"),
    ];
    for (adjust, word) in adjusts {
        let listeners = [listener(), listener()];
        let members: Vec<String> =
            listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
        let failures = together(vec![0, 1], |rank| {
            let mut config = RingConfig::new("contract", Rank(rank), Generation(1), members.clone());
            adjust(&mut config);
            Ring::connect(&listeners[rank as usize], config).unwrap_err()
        });
        let is_named = |failure: &CollectiveError| {
            matches!(failure, CollectiveError::Protocol { .. }) && failure.to_string().contains(word)
        };
        assert!(failures.iter().any(is_named), "{failures:?}");
    }
}

#[test]
fn strangers_do_not_keep_a_ring_from_forming() {
    let listeners = [listener(), listener()];
    let mut mute: Vec<TcpStream> = Vec::new();
    let mut noise: u32 = 1;
    for listener in &listeners {
        for _ in 0..GREETING_MAX + 20 {
            mute.push(TcpStream::connect(listener.local_addr()).unwrap());
        }
        let mut stranger = TcpStream::connect(listener.local_addr()).unwrap();
        let garbage: Vec<u8> = (0..1 << 20)
            .map(|_| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8
            })
            .collect();
        // It may be cut off in the middle, which is as good.
        let is_cut = stranger.write_all(&garbage).is_err();
        assert!(is_cut || matches!(stranger.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
    let rings = connect(&[&listeners[0], &listeners[1]], Generation(1), |_| {});
    together(rings, |ring| ring.barrier().unwrap());
    assert_eq!(listeners[0].parked(), 0);
}

#[test]
fn strangers_with_good_manners_fill_no_more_than_their_places() {
    let listeners = [listener(), listener()];
    let mut strangers = Vec::new();
    for number in 0..400 {
        let mut stranger = TcpStream::connect(listeners[0].local_addr()).unwrap();
        let greeting = Greeting {
            run: run_hash("another run"),
            generation: Generation(1),
            from: Rank(number),
            to: Rank(0),
            world: 1000,
            channel: 0,
            channels: 3,
            lanes: 0,
        };
        stranger.write_all(&greeting.encode()).unwrap();
        strangers.push(stranger);
    }
    let rings = connect(&[&listeners[0], &listeners[1]], Generation(1), |_| {});
    together(rings, |ring| ring.barrier().unwrap());
    assert!(listeners[0].parked() <= super::listener::PARKED_MAX);
}
