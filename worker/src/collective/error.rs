//! Why an exchange ended.

use std::{io, sync::Arc, time::Duration};

use takuma_core::ids::{Generation, Rank};

/// Why an operation of a group failed. `operation` tells what this rank was doing.
///
/// By what the caller can do: re-form without the suspect ([`CollectiveError::PeerLost`],
/// [`CollectiveError::Timeout`]), stand down ([`CollectiveError::Aborted`]), take the newer member list
/// ([`CollectiveError::StaleGeneration`]), report a bug or a mixed-up cluster
/// ([`CollectiveError::Protocol`]), or mend this machine ([`CollectiveError::Local`]).
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// The process or its link is gone.
    #[error("rank {rank} was lost during {operation}: {detail}")]
    PeerLost {
        /// Whose process or link is gone.
        rank: Rank,
        /// What this rank was doing.
        operation: String,
        /// How it was noticed, and by whom if not by this rank.
        detail: String,
        /// The socket's own error, if this rank saw it.
        #[source]
        source: Option<Arc<io::Error>>,
    },
    /// The link stands but nothing came.
    #[error("rank {rank} gave no sign for {:.1} s during {operation}: {detail}", waited.as_secs_f64())]
    Timeout {
        /// Who did not answer.
        rank: Rank,
        /// How long it was waited for.
        waited: Duration,
        /// What this rank was doing.
        operation: String,
        /// What was missing.
        detail: String,
    },
    /// Somebody ended the group on purpose.
    #[error("{operation} was stopped: {reason}")]
    Aborted {
        /// What this rank was doing.
        operation: String,
        /// The words given to [`super::AbortHandle::abort`].
        reason: String,
    },
    /// The group has been replaced.
    #[error("generation {own} is over: {detail}; generation {current} has taken its place, join that one")]
    StaleGeneration {
        /// The generation of this group.
        own: Generation,
        /// The newer one that was seen.
        current: Generation,
        /// Who said so.
        detail: String,
    },
    /// A rank did something else than the others, or speaks another protocol.
    #[error("rank {rank} does not fit the group during {operation}: {detail}")]
    Protocol {
        /// Who sent what did not fit.
        rank: Rank,
        /// What this rank was doing.
        operation: String,
        /// What came and what was expected.
        detail: String,
    },
    /// This machine or the arguments are at fault.
    #[error("{operation} is not possible here: {detail}")]
    Local {
        /// What was tried.
        operation: String,
        /// Why not, and what helps.
        detail: String,
        /// The system's error, if there is one.
        #[source]
        source: Option<Arc<io::Error>>,
    },
}

impl CollectiveError {
    /// The rank to leave out of the next group, if one is to blame.
    #[must_use]
    pub fn suspect_rank(&self) -> Option<Rank> {
        match self {
            Self::PeerLost { rank, .. } | Self::Timeout { rank, .. } | Self::Protocol { rank, .. } => {
                Some(*rank)
            }
            Self::Aborted { .. } | Self::StaleGeneration { .. } | Self::Local { .. } => None,
        }
    }

    /// The same cause, told from another operation.
    #[must_use]
    pub(crate) fn during(mut self, now: &str) -> Self {
        match &mut self {
            Self::PeerLost { operation, .. }
            | Self::Timeout { operation, .. }
            | Self::Aborted { operation, .. }
            | Self::Protocol { operation, .. }
            | Self::Local { operation, .. } => now.clone_into(operation),
            Self::StaleGeneration { .. } => {}
        }
        self
    }

    /// A system error on this machine.
    pub(crate) fn local(operation: &str, detail: &str, source: io::Error) -> Self {
        Self::Local { operation: operation.into(), detail: detail.into(), source: Some(Arc::new(source)) }
    }
}
