//! [`CliError`]: one sentence for the person, and the exit code for the script.

use std::error::Error;

/// How the process ends. The numbers are part of the command's contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done as asked; of a run: it succeeded.
    Success = 0,
    /// It did not work; of a run: it failed, or was stopped before its last step.
    Failure = 1,
    /// The command was used wrongly; nothing was done.
    Usage = 2,
    /// The coordinator cannot be reached.
    Unreachable = 3,
    /// Ctrl-C before there was an answer, as shells tell it.
    Interrupted = 130,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what was asked: split by exit code.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// Wrong usage or settings: mend the command line, the environment or the file.
    #[error("{0}")]
    Usage(String),
    /// The coordinator does not answer.
    #[error("{message}")]
    Unreachable {
        /// With the address, where it came from, and the remedy.
        message: String,
        /// The transport's own error.
        #[source]
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// Everything else.
    #[error("{message}")]
    Failed {
        /// With place and remedy.
        message: String,
        /// What lay beneath, shown with `RUST_BACKTRACE=1`.
        #[source]
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// Ctrl-C.
    #[error("{0}")]
    Interrupted(String),
    /// Whoever read our output has gone (`| head`): no reason to complain.
    #[error("the reader of the output has gone")]
    OutputClosed,
}

impl CliError {
    /// A failure with nothing beneath it.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), source: None }
    }

    /// A failure whose message is that of `source`.
    pub fn from_source(source: impl Error + Send + Sync + 'static) -> Self {
        Self::Failed { message: source.to_string(), source: Some(Box::new(source)) }
    }

    /// A file or process operation that failed: "cannot ACTION: CAUSE".
    pub fn io(action: impl std::fmt::Display, source: std::io::Error) -> Self {
        Self::Failed {
            message: format!("cannot {action}: {}", plain(&source)),
            source: Some(Box::new(source)),
        }
    }

    /// Whether the coordinator answered that it has no such thing.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        let Self::Failed { source: Some(source), .. } = self else { return false };
        source.downcast_ref::<tonic::Status>().is_some_and(|status| status.code() == tonic::Code::NotFound)
    }

    /// How the process should end.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Unreachable { .. } => Exit::Unreachable,
            Self::Failed { .. } => Exit::Failure,
            Self::Interrupted(_) => Exit::Interrupted,
            Self::OutputClosed => Exit::Success,
        }
    }
}

impl From<takuma_store::StoreError> for CliError {
    fn from(error: takuma_store::StoreError) -> Self {
        match error {
            takuma_store::StoreError::Url { .. } => Self::Usage(error.to_string()),
            error => Self::from_source(error),
        }
    }
}

impl From<crate::settings::SettingsError> for CliError {
    fn from(error: crate::settings::SettingsError) -> Self {
        Self::Usage(error.to_string())
    }
}

/// The operating system's words without their number: "Permission denied (os error 13)" says it twice.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_errors_read_as_one_sentence_without_numbers() {
        let error = CliError::io("read /x", std::io::Error::from_raw_os_error(2));
        assert_eq!(error.to_string(), "cannot read /x: no such file or directory");
        assert_eq!(error.exit(), Exit::Failure);
    }

    #[test]
    fn unusable_store_url_is_wrong_usage() {
        let error = CliError::from(takuma_store::Store::open("ftp://x/y").unwrap_err());
        assert_eq!(error.exit(), Exit::Usage);
    }
}
