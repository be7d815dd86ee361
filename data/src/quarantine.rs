//! Why an image was refused: one line in `quarantine.jsonl` each, in the order of the names.

use serde::{Deserialize, Serialize};

/// Kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// The file ends too early.
    Truncated,
    /// The bytes are neither JPEG nor PNG, whatever the name says.
    NotAnImage,
    /// A side is shorter than the crop.
    TooSmall,
    /// Sides, pixels or memory beyond every sensible photograph.
    AbsurdDimensions,
    /// The file itself is larger than any sensible photograph, or an entry inflates to more than it says.
    TooLarge,
    /// The archive's entry or the file cannot be read.
    Unreadable,
    /// The image is damaged or of a kind that is not supported.
    DecodeError,
}

impl Reason {
    /// As in `quarantine.jsonl`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::NotAnImage => "not_an_image",
            Self::TooSmall => "too_small",
            Self::AbsurdDimensions => "absurd_dimensions",
            Self::TooLarge => "too_large",
            Self::Unreadable => "unreadable",
            Self::DecodeError => "decode_error",
        }
    }
}

/// One line of `quarantine.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Name inside the source.
    pub file: String,
    /// Kind of refusal.
    pub reason: Reason,
    /// In words.
    pub detail: String,
}

/// A refusal before it has its file's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) detail: String,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    pub(crate) fn of(self, file: String) -> Quarantined {
        Quarantined { file, reason: self.reason, detail: self.detail }
    }
}
