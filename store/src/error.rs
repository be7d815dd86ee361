//! [`StoreError`]: split by what the caller can do about it.

use std::time::Duration;

/// Why a store did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The URL is not one of a store, or its settings are incomplete: mend the URL or the environment.
    #[error("'{url}' is not a usable store: {reason}")]
    Url {
        /// As given.
        url: String,
        /// In words, with the remedy.
        reason: String,
    },
    /// There is no such object.
    #[error("there is no {url}")]
    NotFound {
        /// The object's URL.
        url: String,
    },
    /// The store answered that we may not: mend permissions or credentials.
    #[error("cannot {action} {url}: permission denied; check the folder's permissions or the credentials")]
    Denied {
        /// "read", "write", "list" or "delete".
        action: &'static str,
        /// The object's URL.
        url: String,
    },
    /// The store took a request and stayed silent until the caller's patience ended; asking again may help.
    #[error("cannot {action} {url}: no answer within {waited:?}; check the store and the way to it")]
    NoAnswer {
        /// "read", "write", "list" or "delete".
        action: &'static str,
        /// The object's URL.
        url: String,
        /// The caller's limit.
        waited: Duration,
    },
    /// Another write of the same object is under way: ask again in a moment.
    #[error("cannot {action} {url}: another write of it is under way; trying again in a moment helps")]
    Busy {
        /// "write" or "lock".
        action: &'static str,
        /// The object's URL.
        url: String,
    },
    /// Anything else; trying again later may help.
    #[error("cannot {action} {url}: {reason}")]
    Failed {
        /// "read", "write", "list" or "delete".
        action: &'static str,
        /// The object's URL.
        url: String,
        /// The innermost cause, in words.
        reason: String,
        /// The store's own error; boxed, since most results carry none.
        #[source]
        source: Box<object_store::Error>,
    },
}

impl StoreError {
    pub(crate) fn scheme(url: &str) -> Self {
        let reason =
            "give file:///folder, s3://bucket/folder, gs://bucket/folder or az://container/folder".into();
        Self::Url { url: url.to_owned(), reason }
    }

    pub(crate) fn settings(url: &str, source: object_store::Error) -> Self {
        Self::Url { url: url.to_owned(), reason: innermost(&source) }
    }

    pub(crate) fn from_object_store(action: &'static str, url: String, source: object_store::Error) -> Self {
        match source {
            object_store::Error::NotFound { .. } => Self::NotFound { url },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Self::Denied { action, url }
            }
            source => Self::Failed { action, url, reason: innermost(&source), source: source.into() },
        }
    }
}

/// The last link of the chain of causes: "No space left on device" rather than what wraps it.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
