//! Store calls that are tried until they succeed, the fault is one that waiting does not mend, or time is up.

use std::future::Future;
use std::time::Duration;

use takuma_store::StoreError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Before the second try.
pub const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A full disk or a missing permission gets this many tries: it may be mended while somebody looks at it.
const TRIES_IF_REFUSED: u32 = 3;

/// How long to go on.
#[derive(Debug, Clone)]
pub struct Patience {
    /// A store that does not answer is tried for so long.
    pub outage: Duration,
    /// Before the second try; doubled before each later one.
    pub first_pause: Duration,
    /// The coordinator is shutting down: one last try.
    pub hurry: CancellationToken,
}

/// Runs a store call until it succeeds.
///
/// # Errors
/// The store's last error, in words.
pub async fn persist<T, F>(patience: &Patience, mut call: impl FnMut() -> F) -> Result<T, String>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let deadline = Instant::now() + patience.outage;
    let mut pause = patience.first_pause;
    for tries in 1u32.. {
        let error = match call().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let hopeless = is_refusal(&error) && tries >= TRIES_IF_REFUSED;
        if hopeless || patience.hurry.is_cancelled() || Instant::now() + pause > deadline {
            return Err(error.to_string());
        }
        tracing::warn!(%error, pause_ms = pause.as_millis() as u64, tries, "the store did not do it; trying again");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = patience.hurry.cancelled() => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    unreachable!("the loop ends at its deadline")
}

/// Whether the store answered that it will not, rather than not at all.
fn is_refusal(error: &StoreError) -> bool {
    match error {
        StoreError::Failed { reason, .. } => {
            let reason = reason.to_lowercase();
            ["no space left", "quota", "read-only", "not a directory"]
                .iter()
                .any(|cause| reason.contains(cause))
        }
        StoreError::NoAnswer { .. } | StoreError::Busy { .. } => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn patience() -> Patience {
        let first_pause = Duration::from_millis(1);
        Patience { outage: Duration::from_secs(60), first_pause, hurry: CancellationToken::new() }
    }

    fn refused() -> StoreError {
        StoreError::Denied { action: "write", url: "file:///x".into() }
    }

    #[tokio::test]
    async fn a_refusal_is_told_after_three_tries() {
        let calls = Cell::new(0);
        let call = || {
            calls.set(calls.get() + 1);
            async { Err::<(), _>(refused()) }
        };
        let message = persist(&patience(), call).await.unwrap_err();
        assert!(message.contains("permission denied"), "{message}");
        assert_eq!(calls.get(), 3);
    }

    #[tokio::test]
    async fn success_after_a_failure_is_success() {
        let calls = Cell::new(0);
        let call = || {
            calls.set(calls.get() + 1);
            let result = if calls.get() < 3 { Err(refused()) } else { Ok(7) };
            async { result }
        };
        assert_eq!(persist(&patience(), call).await, Ok(7));
    }
}
