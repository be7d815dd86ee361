//! What travels on the control connection between neighbours: signs of life, farewells and blame.
//!
//! All notices have one size, so a reader needs one small buffer and never believes a length.

use std::time::Duration;

use takuma_core::ids::{Generation, Rank};

use super::frame::{u16_at, u32_at, u64_at};
use crate::collective::CollectiveError;

/// Bytes of a notice on the wire.
pub(super) const NOTICE_BYTES: usize = 256;

const MAGIC: u32 = u32::from_le_bytes(*b"TKN1");
const TEXT_AT: usize = 40;

/// What neighbours tell each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// The process runs. `waiting`: its trainer waits for a neighbour itself.
    Alive { waiting: bool },
    /// The sender leaves in peace; it owes nothing.
    Farewell,
    /// The group is over.
    Over(Verdict),
}

/// Why the group is over, in a form that all ranks come to share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    cause: Cause,
    /// Whom the cause names.
    suspect: Rank,
    /// Who found out.
    reporter: Rank,
    waited: Duration,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Cause {
    PeerLost = 1,
    Timeout = 2,
    Aborted = 3,
    Protocol = 4,
}

const KIND_ALIVE: u8 = 1;
const KIND_FAREWELL: u8 = 2;
const KIND_OVER: u8 = 3;

impl Verdict {
    /// What rank `reporter` tells the others about its `error`.
    pub(super) fn of(error: &CollectiveError, reporter: Rank) -> Self {
        let (cause, suspect, waited, text) = match error {
            CollectiveError::PeerLost { rank, detail, .. } => {
                (Cause::PeerLost, *rank, Duration::ZERO, detail.clone())
            }
            CollectiveError::Timeout { rank, detail, waited, .. } => {
                (Cause::Timeout, *rank, *waited, detail.clone())
            }
            CollectiveError::Protocol { rank, detail, .. } => {
                (Cause::Protocol, *rank, Duration::ZERO, detail.clone())
            }
            CollectiveError::Aborted { reason, .. } => {
                (Cause::Aborted, reporter, Duration::ZERO, reason.clone())
            }
            CollectiveError::StaleGeneration { .. } | CollectiveError::Local { .. } => {
                (Cause::Aborted, reporter, Duration::ZERO, error.to_string())
            }
        };
        Self { cause, suspect, reporter, waited, text }
    }

    /// The error that this verdict is for rank `own`.
    pub(super) fn to_error(&self, own: Rank) -> CollectiveError {
        let operation = "the exchange".to_owned();
        let detail = if self.reporter == own {
            self.text.clone()
        } else {
            format!("{} (reported by rank {})", self.text, self.reporter)
        };
        match self.cause {
            Cause::PeerLost => {
                CollectiveError::PeerLost { rank: self.suspect, operation, detail, source: None }
            }
            Cause::Timeout => {
                CollectiveError::Timeout { rank: self.suspect, waited: self.waited, operation, detail }
            }
            Cause::Aborted => CollectiveError::Aborted { operation, reason: detail },
            Cause::Protocol => CollectiveError::Protocol { rank: self.suspect, operation, detail },
        }
    }
}

impl Notice {
    pub(super) fn encode(&self, generation: Generation) -> [u8; NOTICE_BYTES] {
        let mut bytes = [0; NOTICE_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&generation.0.to_le_bytes());
        match self {
            Self::Alive { waiting } => {
                bytes[4] = KIND_ALIVE;
                bytes[5] = u8::from(*waiting);
            }
            Self::Farewell => bytes[4] = KIND_FAREWELL,
            Self::Over(verdict) => {
                bytes[4] = KIND_OVER;
                bytes[5] = verdict.cause as u8;
                bytes[16..20].copy_from_slice(&verdict.suspect.0.to_le_bytes());
                bytes[20..24].copy_from_slice(&verdict.reporter.0.to_le_bytes());
                let waited_ms = u64::try_from(verdict.waited.as_millis()).unwrap_or(u64::MAX);
                bytes[24..32].copy_from_slice(&waited_ms.to_le_bytes());
                let text = verdict.text.as_bytes();
                let length = text.len().min(NOTICE_BYTES - TEXT_AT);
                bytes[32..34].copy_from_slice(&(length as u16).to_le_bytes());
                bytes[TEXT_AT..TEXT_AT + length].copy_from_slice(&text[..length]);
            }
        }
        bytes
    }

    /// The notice in `bytes`, or nothing if they are none of `generation`.
    pub(super) fn decode(bytes: &[u8; NOTICE_BYTES], generation: Generation) -> Option<Self> {
        if u32_at(bytes, 0) != MAGIC || u64_at(bytes, 8) != generation.0 {
            return None;
        }
        match bytes[4] {
            KIND_ALIVE => Some(Self::Alive { waiting: bytes[5] != 0 }),
            KIND_FAREWELL => Some(Self::Farewell),
            KIND_OVER => {
                let cause = match bytes[5] {
                    1 => Cause::PeerLost,
                    2 => Cause::Timeout,
                    3 => Cause::Aborted,
                    4 => Cause::Protocol,
                    _ => return None,
                };
                let text = bytes.get(TEXT_AT..TEXT_AT + usize::from(u16_at(bytes, 32)))?;
                Some(Self::Over(Verdict {
                    cause,
                    suspect: Rank(u32_at(bytes, 16)),
                    reporter: Rank(u32_at(bytes, 20)),
                    waited: Duration::from_millis(u64_at(bytes, 24)),
                    text: String::from_utf8_lossy(text).into_owned(),
                }))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(text: String) -> Verdict {
        Verdict {
            cause: Cause::Timeout,
            suspect: Rank(3),
            reporter: Rank(1),
            waited: Duration::from_millis(1250),
            text,
        }
    }

    #[test]
    fn notices_survive_the_wire() {
        let generation = Generation(12);
        for notice in [
            Notice::Alive { waiting: true },
            Notice::Alive { waiting: false },
            Notice::Farewell,
            Notice::Over(verdict("no byte came".into())),
        ] {
            assert_eq!(Notice::decode(&notice.encode(generation), generation), Some(notice));
        }
    }

    #[test]
    fn notice_of_another_generation_is_none() {
        let bytes = Notice::Farewell.encode(Generation(2));
        assert_eq!(Notice::decode(&bytes, Generation(3)), None);
    }

    #[test]
    fn overlong_words_are_cut_and_overlong_lengths_refused() {
        let generation = Generation(0);
        let mut bytes = Notice::Over(verdict("x".repeat(5000))).encode(generation);
        let Some(Notice::Over(cut)) = Notice::decode(&bytes, generation) else { panic!("no verdict") };
        assert_eq!(cut.text.len(), NOTICE_BYTES - TEXT_AT);
        bytes[32..34].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(Notice::decode(&bytes, generation), None);
    }
}
