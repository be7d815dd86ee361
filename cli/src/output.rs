//! What goes to the screen: tables, JSON, colours, durations. Data to stdout, messages to stderr.

use std::io::{self, Write};

use console::{Style, measure_text_width};
use serde::Serialize;

use crate::error::CliError;

/// How data is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// The same with more columns.
    Wide,
    /// For programs; every name is described in docs/json.md.
    Json,
}

/// `-o`, the same on every command that prints data.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct OutputArgs {
    /// How to print the result
    #[arg(short = 'o', long = "output", value_name = "FORMAT", value_enum, default_value_t)]
    pub format: Format,
}

/// `-o` of a noun alone, which lists. With a verb it belongs behind that.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct ListArgs {
    /// How to print the list
    #[arg(short = 'o', long = "output", value_name = "FORMAT", value_enum)]
    format: Option<Format>,
}

impl ListArgs {
    /// The arguments of the list, for a noun without a verb.
    ///
    /// # Errors
    /// There is a verb, and `-o` stands before it.
    pub fn settle(self, has_verb: bool) -> Result<OutputArgs, CliError> {
        if has_verb && self.format.is_some() {
            return Err(CliError::Usage(
                "-o belongs behind the verb, as in 'takuma run ls -o json'".to_owned(),
            ));
        }
        Ok(OutputArgs { format: self.format.unwrap_or_default() })
    }
}

/// What a cell means, and so its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// No colour.
    Plain,
    /// Names of things.
    Name,
    /// All is well.
    Good,
    /// Wants attention.
    Warning,
    /// Went wrong.
    Bad,
    /// Of little weight.
    Faint,
}

impl Tone {
    fn style(self) -> Style {
        match self {
            Self::Plain => Style::new(),
            Self::Name => Style::new().bold(),
            Self::Good => Style::new().green(),
            Self::Warning => Style::new().yellow(),
            Self::Bad => Style::new().red().bold(),
            Self::Faint => Style::new().dim(),
        }
    }

    /// `text` in this tone for stdout, uncoloured where colours are off.
    #[must_use]
    pub fn stdout(self, text: &str) -> String {
        self.style().apply_to(text).to_string()
    }

    /// `text` in this tone for stderr.
    #[must_use]
    pub fn stderr(self, text: &str) -> String {
        self.style().for_stderr().apply_to(text).to_string()
    }
}

/// Turns colours off where `NO_COLOR` is set or the stream is no terminal.
pub fn settle_colours() {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    console::set_colors_enabled(!refused && console::Term::stdout().is_term());
    console::set_colors_enabled_stderr(!refused && console::Term::stderr().is_term());
}

/// Left-aligned columns, two spaces apart, no lines: easy on the eye and on `awk`.
#[derive(Debug)]
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<(String, Tone)>>,
}

impl Table {
    /// A table without rows.
    #[must_use]
    pub fn new(headers: &[&'static str]) -> Self {
        Self { headers: headers.to_vec(), rows: Vec::new() }
    }

    /// Adds a row: one cell a column.
    pub fn row(&mut self, cells: Vec<(String, Tone)>) {
        debug_assert_eq!(cells.len(), self.headers.len(), "one cell a column");
        self.rows.push(cells);
    }

    /// The lines, coloured for stdout.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let widths: Vec<usize> = (0..self.headers.len())
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                let widest = cells.map(|(text, _)| measure_text_width(&visible(text))).max().unwrap_or(0);
                widest.max(self.headers[column].len())
            })
            .collect();
        let headers = self.headers.iter().map(|header| ((*header).to_owned(), Tone::Faint)).collect();
        std::iter::once(&headers).chain(&self.rows).map(|row| line(row, &widths)).collect()
    }
}

fn line(cells: &[(String, Tone)], widths: &[usize]) -> String {
    let mut line = String::new();
    for (column, ((text, tone), width)) in cells.iter().zip(widths).enumerate() {
        let text = visible(text);
        let text = if text.is_empty() { "-".to_owned() } else { text };
        line.push_str(&tone.stdout(&text));
        if column + 1 < cells.len() {
            let padding = (width + 2).saturating_sub(measure_text_width(&text));
            line.push_str(&" ".repeat(padding));
        }
    }
    line
}

/// The text without control characters: what comes from a server must not drive the terminal.
#[must_use]
pub fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Prints one line of data.
///
/// # Errors
/// [`CliError::OutputClosed`] when the reader has gone, or the output cannot be written.
pub fn print_line(line: &str) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::OutputClosed,
        _ => CliError::io("write the output", error),
    })
}

/// Prints a table.
///
/// # Errors
/// As [`print_line`].
pub fn print_table(table: &Table) -> Result<(), CliError> {
    table.lines().iter().try_for_each(|line| print_line(line))
}

/// Prints a value as indented JSON.
///
/// # Errors
/// As [`print_line`].
pub fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    print_line(&serde_json::to_string_pretty(value).map_err(CliError::from_source)?)
}

/// Prints a value as one line of JSON.
///
/// # Errors
/// As [`print_line`].
pub fn print_json_line(value: &impl Serialize) -> Result<(), CliError> {
    print_line(&serde_json::to_string(value).map_err(CliError::from_source)?)
}

/// Prints one line for the person.
pub fn message(text: &str) {
    // A closed stderr leaves nobody to tell, and is no reason to give up the work.
    writeln!(io::stderr().lock(), "{text}").ok();
}

/// A duration in at most two units: `8s`, `2m10s`, `3h05m`, `4d02h`.
#[must_use]
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    // Saturates far beyond any run's length.
    let total = seconds.round() as u64;
    let (days, hours, minutes, secs) = (total / 86_400, total / 3_600 % 24, total / 60 % 60, total % 60);
    if days > 0 {
        format!("{days}d{hours:02}h")
    } else if hours > 0 {
        format!("{hours}h{minutes:02}m")
    } else if minutes > 0 {
        format!("{minutes}m{secs:02}s")
    } else {
        format!("{secs}s")
    }
}

/// An amount of bytes with three digits or so: `812 B`, `37.5 MB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

/// A count with its noun: `1 worker`, `2 workers`.
#[must_use]
pub fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Seconds since 1970, of this machine's clock.
#[must_use]
pub fn now_unix_s() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |age| age.as_secs_f64())
}

/// A moment as RFC 3339 in UTC, to the second; "-" where it is none.
#[must_use]
pub fn timestamp(unix_s: f64) -> String {
    // The upper bound is the year 9999, the last that the format can say.
    if !(0.0..253_402_300_799.0).contains(&unix_s) {
        return "-".to_owned();
    }
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs_f64(unix_s);
    humantime::format_rfc3339_seconds(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_show_two_units_at_most() {
        let shown: Vec<_> = [0.4, 8.0, 59.6, 130.0, 11_100.0, 352_800.0].map(duration).into();
        assert_eq!(shown, ["0s", "8s", "1m00s", "2m10s", "3h05m", "4d02h"]);
        assert_eq!(duration(f64::NAN), "-");
        assert_eq!(duration(-1.0), "-");
    }

    #[test]
    fn bytes_keep_three_digits_or_so() {
        assert_eq!(
            [0, 999, 1000, 37_512_345, 999_999_999].map(bytes),
            ["0 B", "999 B", "1.0 kB", "37.5 MB", "1.0 GB"]
        );
    }

    #[test]
    fn moments_outside_the_calendar_are_dashes() {
        assert_eq!(timestamp(0.0), "1970-01-01T00:00:00Z");
        assert_eq!([f64::NAN, -1.0, 1e300].map(timestamp), ["-", "-", "-"]);
    }

    #[test]
    fn columns_line_up_and_empty_cells_are_dashes() {
        let mut table = Table::new(&["NAME", "STATUS"]);
        table.row(vec![("calm-otter-3".into(), Tone::Plain), ("running".into(), Tone::Plain)]);
        table.row(vec![("x".into(), Tone::Plain), (String::new(), Tone::Plain)]);
        console::set_colors_enabled(false);
        assert_eq!(table.lines(), ["NAME          STATUS", "calm-otter-3  running", "x             -"]);
    }

    #[test]
    fn control_characters_of_a_server_do_not_reach_the_terminal() {
        assert_eq!(visible("a\x1b[2Jb\nc"), "a [2Jb c");
    }
}
