//! The first bytes of a connection between ranks, and the answer to them.

use takuma_core::ids::{Generation, Rank};

use super::frame::{u16_at, u32_at, u64_at};

/// Bytes of a greeting on the wire.
pub(super) const GREETING_BYTES: usize = 40;

/// Bytes of an answer on the wire.
pub(super) const ANSWER_BYTES: usize = 24;

const GREETING_MAGIC: u32 = u32::from_le_bytes(*b"TKG1");
const ANSWER_MAGIC: u32 = u32::from_le_bytes(*b"TKA1");

/// Of greetings, frames and notices together.
const VERSION: u16 = 2;

/// Who dials, and what for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Greeting {
    /// [`run_hash`] of the run.
    pub run: u64,
    pub generation: Generation,
    pub from: Rank,
    pub to: Rank,
    pub world: u32,
    /// 0 is control, 1 is for short operations, the rest is for buckets.
    pub channel: u16,
    /// Number of channels between neighbours.
    pub channels: u16,
    /// [`super::RingConfig::lanes_digest`].
    pub lanes: u16,
}

/// A greeting that cannot be taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadGreeting {
    /// Not from a ring at all.
    Foreign,
    /// From a ring of another version.
    Version,
}

impl Greeting {
    pub(super) fn encode(&self) -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[0..4].copy_from_slice(&GREETING_MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.channel.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.from.0.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.to.0.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.world.to_le_bytes());
        bytes[36..38].copy_from_slice(&self.channels.to_le_bytes());
        bytes[38..40].copy_from_slice(&self.lanes.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; GREETING_BYTES]) -> Result<Self, BadGreeting> {
        if u32_at(bytes, 0) != GREETING_MAGIC {
            return Err(BadGreeting::Foreign);
        }
        if u16_at(bytes, 4) != VERSION {
            return Err(BadGreeting::Version);
        }
        Ok(Self {
            channel: u16_at(bytes, 6),
            run: u64_at(bytes, 8),
            generation: Generation(u64_at(bytes, 16)),
            from: Rank(u32_at(bytes, 24)),
            to: Rank(u32_at(bytes, 28)),
            world: u32_at(bytes, 32),
            channels: u16_at(bytes, 36),
            lanes: u16_at(bytes, 38),
        })
    }
}

/// True if `bytes`, the beginning of what came, cannot become a greeting.
pub(super) fn is_foreign(bytes: &[u8]) -> bool {
    !GREETING_MAGIC.to_le_bytes().starts_with(&bytes[..bytes.len().min(4)])
}

/// What the dialled rank says to a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The connection is part of the ring.
    Welcome,
    /// The run has gone on to this generation.
    Stale(Generation),
    /// The dialled rank sees another group: other size, other place, other number of channels or other
    /// lanes.
    Mismatch,
    /// The dialled rank speaks another version.
    Version,
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER_BYTES] {
        let (status, generation) = match self {
            Self::Welcome => (0u16, Generation(0)),
            Self::Stale(current) => (1, current),
            Self::Mismatch => (2, Generation(0)),
            Self::Version => (3, Generation(0)),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0..4].copy_from_slice(&ANSWER_MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..16].copy_from_slice(&generation.0.to_le_bytes());
        bytes
    }

    /// The answer in `bytes`, or nothing if they are none. The version is not looked at: answers keep
    /// their form for good, so that a refusal is always understood.
    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Option<Self> {
        if u32_at(bytes, 0) != ANSWER_MAGIC {
            return None;
        }
        match u16_at(bytes, 6) {
            0 => Some(Self::Welcome),
            1 => Some(Self::Stale(Generation(u64_at(bytes, 8)))),
            2 => Some(Self::Mismatch),
            3 => Some(Self::Version),
            _ => None,
        }
    }
}

/// A run's name as 64 bits. Guards against mixed-up addresses, not against malice.
pub(super) fn run_hash(run: &str) -> u64 {
    fnv1a(run.bytes())
}

/// FNV-1a of `bytes`.
pub(super) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_and_answers_survive_the_wire() {
        let greeting = Greeting {
            run: run_hash("brave-otter"),
            generation: Generation(5),
            from: Rank(1),
            to: Rank(2),
            world: 4,
            channel: 3,
            channels: 4,
            lanes: 0x1234,
        };
        assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
        for answer in [Answer::Welcome, Answer::Stale(Generation(9)), Answer::Mismatch, Answer::Version] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
    }

    #[test]
    fn foreign_bytes_are_known_from_the_first_one() {
        assert!(is_foreign(b"GET"));
        assert!(is_foreign(b"TKGX"));
        assert!(!is_foreign(b"TK"));
        assert!(!is_foreign(b""));
    }

    #[test]
    fn other_version_is_told_from_noise() {
        let mut bytes = [0; GREETING_BYTES];
        assert_eq!(Greeting::decode(&bytes), Err(BadGreeting::Foreign));
        bytes[0..4].copy_from_slice(b"TKG1");
        bytes[4] = 77;
        assert_eq!(Greeting::decode(&bytes), Err(BadGreeting::Version));
    }
}
