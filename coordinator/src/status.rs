//! The only table from refusals to [`tonic::Status`].

use takuma_core::event::Refusal;
use takuma_store::StoreError;
use tonic::{Code, Status};

/// The status that tells a client of a refusal.
#[must_use]
pub fn from_refusal(refusal: &Refusal) -> Status {
    let code = match refusal {
        Refusal::Invalid(_) => Code::InvalidArgument,
        Refusal::NotFound(_) => Code::NotFound,
        Refusal::Unavailable(_) => Code::Unavailable,
        Refusal::Exhausted(_) => Code::ResourceExhausted,
        // Protocol: FAILED_PRECONDITION, so that no client takes it for a passing fault and tries again.
        _ => Code::FailedPrecondition,
    };
    Status::new(code, refusal.to_string())
}

/// The refusal that a store's error means for whoever asked.
#[must_use]
pub fn refusal_of_store(error: &StoreError) -> Refusal {
    match error {
        StoreError::Url { .. } => Refusal::Invalid(error.to_string()),
        StoreError::NotFound { .. } => Refusal::NotFound(error.to_string()),
        _ => Refusal::Unavailable(error.to_string()),
    }
}
