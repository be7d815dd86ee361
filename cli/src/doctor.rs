//! `takuma doctor`: looks over this machine and the cluster, one line a check, each with its remedy.
//!
//! Changes nothing, but for one small object that it writes into a store and takes away again.

mod cluster;
mod machine;

use serde::Serialize;

use crate::context::CoordinatorArgs;
use crate::dataset::EndpointArgs;
use crate::error::{CliError, Exit};
use crate::output::{self, Format, OutputArgs, Tone, visible};

/// `takuma doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  takuma doctor
  takuma doctor --json
  takuma doctor --store s3://bucket/takuma --data s3://bucket/celeba --endpoint http://127.0.0.1:9000

Exit codes: 0 nothing is wrong (there may be warnings), 1 there is an error.")]
pub struct DoctorArgs {
    /// A store to look over [default: the folder that 'takuma up' uses, if it is there]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// A dataset to look over [env: TAKUMA_RUN_DATA]
    #[arg(long, value_name = "URL")]
    data: Option<String>,
    #[command(flatten)]
    endpoint: EndpointArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// The same as -o json
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

impl DoctorArgs {
    /// The S3 server that was given.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint.endpoint.as_deref()
    }
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Error,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    check: String,
    status: Status,
    /// What was found.
    message: String,
    /// What to do; none where nothing is to be done.
    remedy: Option<String>,
}

impl Check {
    fn ok(check: &str, message: impl Into<String>) -> Self {
        Self { check: check.to_owned(), status: Status::Ok, message: message.into(), remedy: None }
    }

    fn warning(check: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Warning, remedy: Some(remedy.into()), ..Self::ok(check, message) }
    }

    fn error(check: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Error, remedy: Some(remedy.into()), ..Self::ok(check, message) }
    }

    /// An error whose sentence names the remedy itself: "what; do that".
    fn failed(check: &str, sentence: &str) -> Self {
        match sentence.split_once("; ") {
            Some((message, remedy)) => Self::error(check, message, remedy),
            None => Self { status: Status::Error, ..Self::ok(check, sentence) },
        }
    }

    fn line(&self) -> String {
        let (word, tone) = match self.status {
            Status::Ok => ("ok", Tone::Good),
            Status::Warning => ("warning", Tone::Warning),
            Status::Error => ("error", Tone::Bad),
        };
        let remedy = self.remedy.as_ref().map_or_else(String::new, |remedy| format!("; {remedy}"));
        let found = visible(&format!("{:<13}{}{remedy}", self.check, self.message));
        format!("{}{found}", tone.stdout(&format!("{word:<9}")))
    }
}

/// Runs `takuma doctor`.
///
/// # Errors
/// Only what keeps the report from being made or printed; what is wrong stands in the report.
pub async fn run(args: DoctorArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    let mut checks = machine::programs().await;
    checks.extend(machine::resources());
    checks.extend(cluster::coordinator(at).await);
    checks.extend(cluster::store(args.store.as_deref()).await);
    checks.extend(cluster::data(args.data.as_deref()).await);
    let found = |status| checks.iter().filter(|check| check.status == status).count() as u64;
    let (errors, warnings) = (found(Status::Error), found(Status::Warning));
    if args.json || args.output.format == Format::Json {
        output::print_json(&checks)?;
    } else {
        checks.iter().try_for_each(|check| output::print_line(&check.line()))?;
        let summary = match (errors, warnings) {
            (0, 0) => "all is well".to_owned(),
            (0, _) => output::count(warnings, "warning"),
            (_, 0) => output::count(errors, "error"),
            _ => format!("{}, {}", output::count(errors, "error"), output::count(warnings, "warning")),
        };
        output::message(&summary);
    }
    Ok(if errors == 0 { Exit::Success } else { Exit::Failure })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_tells_status_check_finding_and_remedy() {
        console::set_colors_enabled(false);
        let check =
            Check::failed("cuda:0", "NVIDIA H100: its memory is full; end what uses it; then try again");
        assert_eq!(
            check.line(),
            "error    cuda:0       NVIDIA H100: its memory is full; end what uses it; then try again"
        );
        assert_eq!(check.remedy.as_deref(), Some("end what uses it; then try again"));
        assert_eq!(Check::ok("memory", "8.0 GB\n").line(), "ok       memory       8.0 GB ");
    }

    #[test]
    fn sentence_without_remedy_stays_whole() {
        let check = Check::failed("store", "no room");
        assert_eq!((check.message.as_str(), check.remedy), ("no room", None));
    }
}
