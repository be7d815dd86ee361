//! `run logs`.

use takuma_proto::v1::{LogLine, ReadLogsRequest};

use super::RunName;
use crate::client::Client;
use crate::error::{CliError, Exit};
use crate::json::LogJson;
use crate::output::{self, Format, OutputArgs, Tone};

#[derive(Debug, clap::Args)]
pub(super) struct LogsArgs {
    #[command(flatten)]
    name: RunName,
    /// Go on with new lines until the run has ended
    #[arg(short, long)]
    follow: bool,
    /// Only the last N lines
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    tail: u32,
    /// Only this rank's lines
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(i32).range(0..))]
    rank: Option<i32>,
    /// The least level to print
    #[arg(long, value_enum, default_value_t)]
    level: Level,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

pub(super) async fn logs(client: &Client, args: LogsArgs) -> Result<Exit, CliError> {
    let request = ReadLogsRequest {
        run: args.name.run,
        follow: args.follow,
        tail: args.tail,
        rank: args.rank,
        level: args.level.name().to_owned(),
    };
    let mut lines = client.call(client.control().read_logs(request)).await?;
    loop {
        // Following has no deadline of its own: the connection's keep-alive finds a coordinator that is gone.
        let next = if args.follow { lines.message().await } else { client.within(lines.message()).await? };
        let Some(line) = next.map_err(|status| client.refused(status))? else { return Ok(Exit::Success) };
        match args.output.format {
            Format::Json => output::print_json_line(&LogJson::from(&line))?,
            Format::Table | Format::Wide => output::print_line(&text(&line))?,
        }
    }
}

fn text(line: &LogLine) -> String {
    let tone = match line.level.as_str() {
        "ERROR" => Tone::Bad,
        "WARN" => Tone::Warning,
        _ => Tone::Plain,
    };
    let place =
        if line.rank >= 0 { format!(" rank {} step {}", line.rank, line.step) } else { String::new() };
    format!(
        "{} {} {}{place}  {}",
        Tone::Faint.stdout(&output::timestamp(line.at_unix_s)),
        tone.stdout(&format!("{:<5}", output::visible(&line.level))),
        output::visible(&line.worker),
        output::visible(&line.message)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_names_time_level_worker_rank_and_step() {
        console::set_colors_enabled(false);
        let line = LogLine {
            at_unix_s: 0.0,
            level: "WARN".into(),
            worker: "worker-1".into(),
            rank: 1,
            step: 7,
            message: "slow".into(),
            ..LogLine::default()
        };
        assert_eq!(text(&line), "1970-01-01T00:00:00Z WARN  worker-1 rank 1 step 7  slow");
    }
}
