//! The lease on a store: of all coordinators that are pointed at it, one works.
//!
//! `coordinator.json` in the store says who holds it. The holder replaces it by a conditional write every third
//! of its term; whoever sees it unchanged for a whole term, by its own clock, may take it in the same way. So no
//! clocks are compared, and of several takers one wins. The holder counts its term from before the write, a
//! taker from after the read: the holder's is always over first, and then its writes wait ([`Lease::guard`])
//! until the lease is renewed, or lost, which ends the process.

mod guard;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use takuma_store::{Created, Store, StoreError, Version};
use tokio::time::{Instant, sleep, sleep_until};

use guard::{Guarded, Moment, Validity};

/// Object that names the holder.
pub const LEASE_FILE: &str = "coordinator.json";
/// Renewals in a term.
const RENEWALS_PER_TERM: u32 = 3;
/// Writes that are tried in a row where the version was another one of ours.
const ATTEMPTS: u32 = 3;

/// What the lease says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Machine.
    pub host: String,
    /// Where it listens.
    pub address: String,
    /// Tells two lives of a coordinator apart.
    pub id: String,
    /// Rises with every attempt to renew, so that each is another object.
    pub renewals: u64,
    /// It ended in peace: the store is free.
    pub released: bool,
    /// The run of the machine's system that it lives in; empty = not known.
    #[serde(default)]
    pub boot_id: String,
    /// The network in which the address is meant: containers that are called alike have one each. Empty = not known.
    #[serde(default)]
    pub network: String,
}

impl Holder {
    /// A new coordinator that listens at `address` of this machine.
    ///
    /// # Errors
    /// The system gives no random bits.
    pub fn here(address: String) -> Result<Self, getrandom::Error> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
        Ok(Self {
            host: gethostname::gethostname().to_string_lossy().into_owned(),
            address,
            id: format!("{:016x}", getrandom::u64()?),
            renewals: 0,
            released: false,
            boot_id: boot_id.trim().to_owned(),
            network: network.to_string_lossy().into_owned(),
        })
    }

    /// Whether two can only listen at their address one after the other.
    fn is_at_the_place_of(&self, other: &Self) -> bool {
        let place = |holder: &Self| {
            (holder.host.clone(), holder.address.clone(), holder.boot_id.clone(), holder.network.clone())
        };
        place(self) == place(other)
    }
}

/// Why the lease cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Somebody else has it and is alive.
    #[error(
        "another coordinator, at {address} on {host}, works on {url}; stop it, give this one another --store, \
         or start it with --standby to take over when that one ends"
    )]
    Held {
        /// The holder's machine.
        host: String,
        /// The holder's address.
        address: String,
        /// The store.
        url: String,
    },
    /// The store does not do its part.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The right to work on a store.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    holder: Holder,
    version: Version,
    term: Duration,
    valid: Validity,
    /// Writes that were tried.
    attempts: u64,
}

impl Lease {
    /// Takes the lease of `store`: at once where nobody holds it; without `standby` also where the last holder
    /// listened at this very address of this machine, which the caller has bound, so it must be dead; otherwise
    /// when it was not renewed for `term`. With `standby` it is waited for as long as it takes. A lease that cannot be
    /// read may have a living holder, so it is outwaited too.
    ///
    /// # Errors
    /// A living holder, or the store.
    pub async fn acquire(
        store: &Store,
        holder: Holder,
        term: Duration,
        standby: bool,
    ) -> Result<Self, LeaseError> {
        let mut seen: Option<(Version, Instant)> = None;
        let mut told = false;
        loop {
            let asked = Moment::now();
            let Some((content, version)) = store.get_versioned(LEASE_FILE).await? else {
                if store.create(LEASE_FILE, json(&holder)).await? == Created::New {
                    return Self::confirmed(store, holder, term, asked).await;
                }
                continue;
            };
            let present = serde_json::from_slice::<Holder>(&content).ok();
            let ours = |present: &Holder| !standby && present.is_at_the_place_of(&holder);
            let free = present.as_ref().is_some_and(|present| present.released || ours(present));
            let unchanged = seen.as_ref().filter(|(last, _)| *last == version).map(|&(_, since)| since);
            if free || unchanged.is_some_and(|since| since.elapsed() > term) {
                if store.replace(LEASE_FILE, json(&holder), &version).await? {
                    return Self::confirmed(store, holder, term, asked).await;
                }
                continue;
            }
            // It changed while we looked: its holder lives.
            if let (Some(present), true, false) = (&present, seen.is_some() && unchanged.is_none(), standby) {
                let (host, address) = (present.host.clone(), present.address.clone());
                return Err(LeaseError::Held { host, address, url: store.url().to_owned() });
            }
            if !told {
                let known = present
                    .map(|Holder { host, address, .. }| format!("the coordinator at {address} on {host}"));
                let who = known.unwrap_or_else(|| format!("somebody, but {LEASE_FILE} is damaged"));
                tracing::info!("the store is held by {who}; watching whether it lives");
                told = true;
            }
            if unchanged.is_none() {
                seen = Some((version, Instant::now()));
            }
            sleep(term / (2 * RENEWALS_PER_TERM)).await;
        }
    }

    /// Reads back what was written: the version to renew.
    async fn confirmed(
        store: &Store,
        holder: Holder,
        term: Duration,
        asked: Moment,
    ) -> Result<Self, LeaseError> {
        let valid = Validity::new(asked, term);
        match store.get_versioned(LEASE_FILE).await? {
            Some((content, version)) if content == json(&holder) => {
                Ok(Self { store: store.clone(), holder, version, term, valid, attempts: 0 })
            }
            _ => Err(LeaseError::Held {
                host: "another machine".to_owned(),
                address: "another address".to_owned(),
                url: store.url().to_owned(),
            }),
        }
    }

    /// The store, whose writes wait while the lease is not valid.
    #[must_use]
    pub fn guard(&self) -> Store {
        let valid = self.valid.clone();
        self.store.with_objects(|inner| Arc::new(Guarded { inner, valid }))
    }

    /// Renews until the lease is lost; then it returns, and the process must end.
    pub async fn keep(&mut self) {
        loop {
            let asked = Moment::now();
            match self.write(self.holder.clone()).await {
                Ok(true) => self.valid.extend(asked, self.term),
                Ok(false) => return,
                // The guard holds writes back meanwhile; nobody else can take the lease from this store either.
                Err(error) => tracing::warn!(%error, "the lease on the store was not renewed; trying again"),
            }
            sleep_until(asked.instant + self.term / RENEWALS_PER_TERM).await;
        }
    }

    /// Gives the lease back, so that the next coordinator need not wait.
    pub async fn release(mut self) {
        let next = Holder { released: true, ..self.holder.clone() };
        if let Err(error) = self.write(next).await {
            tracing::warn!(%error, "the lease on the store could not be given back; the next coordinator waits for its end");
        }
    }

    /// Whether the lease is still ours after writing `next`. Each attempt writes other bytes, so what is read back
    /// tells whether it was this one that landed: an older write that is still there renews nothing.
    async fn write(&mut self, next: Holder) -> Result<bool, StoreError> {
        for _ in 0..ATTEMPTS {
            self.attempts += 1;
            let next = Holder { renewals: self.attempts, ..next.clone() };
            let replaced = self.store.replace(LEASE_FILE, json(&next), &self.version).await;
            let Some((content, version)) = self.store.get_versioned(LEASE_FILE).await? else {
                return Ok(false);
            };
            let present = serde_json::from_slice::<Holder>(&content).ok();
            if present.as_ref().is_none_or(|present| present.id != self.holder.id) {
                return Ok(false);
            }
            self.version = version;
            if present.as_ref() == Some(&next) {
                self.holder = next;
                return Ok(true);
            }
            replaced?;
        }
        Err(StoreError::NoAnswer {
            action: "write",
            url: format!("{}/{LEASE_FILE}", self.store.url()),
            waited: self.term / RENEWALS_PER_TERM,
        })
    }
}

fn json(holder: &Holder) -> Bytes {
    Bytes::from(serde_json::to_vec(holder).expect("a Holder has only string keys"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Duration = Duration::from_secs(9);

    fn holder(id: &str) -> Holder {
        let (host, address) = (format!("host-{id}"), "0.0.0.0:7070".to_owned());
        let (boot_id, network) = ("boot".to_owned(), "net:[1]".to_owned());
        Holder { host, address, id: id.to_owned(), renewals: 0, released: false, boot_id, network }
    }

    async fn take(store: &Store, id: &str, standby: bool) -> Result<Lease, LeaseError> {
        Lease::acquire(store, holder(id), TERM, standby).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_living_holder_is_told_and_a_released_store_is_taken_at_once() {
        let store = Store::memory();
        let mut first = take(&store, "a", false).await.unwrap();
        tokio::select! {
            () = first.keep() => panic!("the lease was lost"),
            refused = take(&store, "b", false) => {
                let message = refused.unwrap_err().to_string();
                assert!(message.contains("host-a") && message.contains("--standby"), "{message}");
            }
        }
        first.release().await;
        let asked = Instant::now();
        take(&store, "b", false).await.unwrap();
        assert!(asked.elapsed() < TERM / 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_holder_is_outwaited_and_its_writes_wait_by_then() {
        let store = Store::memory();
        let mut first = take(&store, "a", false).await.unwrap();
        let guarded = first.guard();
        guarded.put("x", "1").await.unwrap();
        // The first is stopped, as by SIGSTOP: it renews nothing.
        let second = take(&store, "b", true).await.unwrap();
        assert!(first.valid.is_over(), "the old term is over before the new one begins");
        second.guard().put("x", "2").await.unwrap();
        let late = tokio::time::timeout(TERM * 3, guarded.put("x", "stale"));
        assert!(late.await.is_err(), "a stale write waits");
        tokio::time::timeout(TERM, first.keep()).await.expect("the old holder learns that it lost");
        assert_eq!(store.get("x").await.unwrap(), "2");
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_on_the_same_address_waits_for_nothing() {
        let store = Store::memory();
        let first = take(&store, "a", false).await.unwrap();
        drop(first);
        let asked = Instant::now();
        let again = Holder { id: "a, again".into(), ..holder("a") };
        Lease::acquire(&store, again, TERM, false).await.unwrap();
        assert!(asked.elapsed() < TERM / 10);
    }

    #[tokio::test(start_paused = true)]
    async fn containers_that_are_called_alike_do_not_take_from_each_other() {
        let store = Store::memory();
        let mut first = take(&store, "a", false).await.unwrap();
        for other in [
            Holder { id: "b".into(), network: "net:[2]".into(), ..holder("a") },
            Holder { id: "b".into(), boot_id: "another".into(), ..holder("a") },
            Holder { id: "b".into(), network: String::new(), ..holder("a") },
        ] {
            tokio::select! {
                () = first.keep() => panic!("the lease was lost"),
                refused = Lease::acquire(&store, other, TERM, false) => {
                    assert!(matches!(refused, Err(LeaseError::Held { .. })), "{refused:?}");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whatever_bit_of_the_lease_flips_its_living_holder_keeps_it_or_ends() {
        let store = Store::memory();
        let first = take(&store, "a", false).await.unwrap();
        let whole = store.get(LEASE_FILE).await.unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.to_vec();
                flipped[at] ^= 1 << bit;
                store.put(LEASE_FILE, flipped).await.unwrap();
                let asked = Instant::now();
                drop(take(&store, "b", false).await.unwrap());
                assert!(asked.elapsed() > TERM, "bit {bit} of byte {at}: taken while its holder may write");
            }
            store.put(LEASE_FILE, whole.slice(..at)).await.unwrap();
            let asked = Instant::now();
            drop(take(&store, "b", false).await.unwrap());
            assert!(asked.elapsed() > TERM, "cut to {at} bytes");
        }
        drop(first);
    }

    #[test]
    fn a_lease_of_an_older_takuma_is_read() {
        let old = r#"{"host":"h","address":"a","id":"i","renewals":3,"released":false}"#;
        let read: Holder = serde_json::from_str(old).unwrap();
        assert_eq!((read.renewals, read.boot_id.as_str()), (3, ""));
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_takers_one_wins() {
        let store = Store::memory();
        drop(take(&store, "a", false).await.unwrap());
        let takers = (0..8).map(|taker| {
            let store = store.clone();
            tokio::spawn(async move { take(&store, &format!("taker {taker}"), false).await.is_ok() })
        });
        let won: usize =
            futures::future::join_all(takers).await.into_iter().map(|won| usize::from(won.unwrap())).sum();
        assert_eq!(won, 1);
    }
}
