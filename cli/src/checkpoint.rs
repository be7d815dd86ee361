//! `takuma checkpoint`: what a run can be resumed from.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use takuma_core::checkpoint::{CHECKPOINT_PARTS, CheckpointManifest, CheckpointPart};
use takuma_core::layout::{MANIFEST_FILE, checkpoint_object};
use takuma_proto::v1::{CheckpointView, ListCheckpointsRequest};

use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::json::CheckpointJson;
use crate::object::{Fingerprint, Reading, plain_name};
use crate::output::{self, Format, OutputArgs, Table, Tone};

/// No part of ours comes near; a server that sends more is not one of ours.
const PART_BYTES_MAX: u64 = 64 << 30;
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// `takuma checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    #[command(subcommand)]
    verb: CheckpointVerb,
}

#[derive(Debug, Subcommand)]
enum CheckpointVerb {
    /// List a run's checkpoints, by step
    #[command(visible_alias = "list")]
    Ls {
        /// The run's name, or the beginning of it
        run: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Read every byte of a checkpoint and hold it against its manifest: exit 1 if anything is damaged
    #[command(after_help = "\
Examples:
  takuma checkpoint verify calm-otter-3            the newest one
  takuma checkpoint verify calm-otter-3 --all")]
    Verify(VerifyArgs),
    /// Fetch a checkpoint's files, each verified
    #[command(
        allow_missing_positional = true,
        after_help = "\
Examples:
  takuma checkpoint download calm-otter-3 ./weights          the newest one
  takuma checkpoint download calm-otter-3 500 ./weights"
    )]
    Download(DownloadArgs),
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// The run's name, or the beginning of it
    run: String,
    /// The checkpoint's step [default: the newest]
    step: Option<u64>,
    /// Every checkpoint of the run
    #[arg(long, conflicts_with = "step")]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct DownloadArgs {
    /// The run's name, or the beginning of it
    run: String,
    /// The checkpoint's step [default: the newest]
    step: Option<u64>,
    /// Where to put the files
    #[arg(required = true)]
    dir: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// What a verification found, as `-o json` prints it.
#[derive(Debug, Serialize)]
struct Verified {
    step: u64,
    ok: bool,
    size_bytes: u64,
    parts: Vec<VerifiedPart>,
}

#[derive(Debug, Serialize)]
struct VerifiedPart {
    file: String,
    size_bytes: u64,
    /// What is wrong with it, in words.
    problem: Option<String>,
}

/// What a download did, as `-o json` prints it.
#[derive(Debug, Serialize)]
struct Downloaded {
    dir: PathBuf,
    step: u64,
    written: Vec<PathBuf>,
}

/// Runs `takuma checkpoint ...`.
///
/// # Errors
/// There is no such run or checkpoint, one is damaged, or the coordinator cannot be reached.
pub async fn run(args: CheckpointArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    let (client, _) = Client::connect(at.address()?).await?;
    match args.verb {
        CheckpointVerb::Ls { run, output } => ls(&client, &run, output.format).await,
        CheckpointVerb::Verify(args) => verify(&client, args).await,
        CheckpointVerb::Download(args) => download(&client, args).await,
    }
}

async fn list(client: &Client, run: &str) -> Result<Vec<CheckpointView>, CliError> {
    let request = ListCheckpointsRequest { run: run.to_owned() };
    Ok(client.call(client.control().list_checkpoints(request)).await?.checkpoints)
}

async fn ls(client: &Client, run: &str, format: Format) -> Result<Exit, CliError> {
    let checkpoints = list(client, run).await?;
    if format == Format::Json {
        output::print_json(&checkpoints.iter().map(CheckpointJson::from).collect::<Vec<_>>())?;
        return Ok(Exit::Success);
    }
    if checkpoints.is_empty() {
        output::message(&format!("run {run} has no checkpoint yet"));
        return Ok(Exit::Success);
    }
    let wide = format == Format::Wide;
    let headers = ["STEP", "SIZE", "AGE", "URL", "WEIGHTS_SHA256"];
    let mut table = Table::new(&headers[..if wide { 5 } else { 4 }]);
    for checkpoint in &checkpoints {
        let age_s = (output::now_unix_s() - checkpoint.created_unix_s).max(0.0);
        let mut row = vec![
            (checkpoint.step.to_string(), Tone::Name),
            (output::bytes(checkpoint.size_bytes), Tone::Plain),
            (output::duration(age_s), Tone::Plain),
            (checkpoint.url.clone(), Tone::Plain),
        ];
        if wide {
            row.push((checkpoint.weights_sha256.clone(), Tone::Plain));
        }
        table.row(row);
    }
    output::print_table(&table)?;
    Ok(Exit::Success)
}

/// The steps of the checkpoints that are meant, ascending.
async fn steps(client: &Client, run: &str, step: Option<u64>, all: bool) -> Result<Vec<u64>, CliError> {
    let there: Vec<u64> = list(client, run).await?.iter().map(|checkpoint| checkpoint.step).collect();
    match step {
        Some(step) if there.contains(&step) => Ok(vec![step]),
        Some(step) => Err(CliError::failed(format!(
            "run {run} has no checkpoint of step {step}; 'takuma checkpoint ls {run}' lists those that it has"
        ))),
        None if there.is_empty() => Err(CliError::failed(format!(
            "run {run} has no checkpoint yet; 'takuma run show {run}' tells how far it is"
        ))),
        None if all => Ok(there),
        None => Ok(there.into_iter().max().into_iter().collect()),
    }
}

async fn manifest(client: &Client, run: &str, step: u64) -> Result<(Vec<u8>, CheckpointManifest), CliError> {
    let object = checkpoint_object(step, MANIFEST_FILE);
    let json = Reading::open(client, run, &object, MANIFEST_BYTES_MAX).await?.whole().await?;
    let manifest = serde_json::from_slice(&json).map_err(|error| {
        CliError::failed(format!("{object} of run {run} cannot be read: {error}; choose another checkpoint"))
    })?;
    Ok((json, manifest))
}

async fn verify(client: &Client, args: VerifyArgs) -> Result<Exit, CliError> {
    let run = client.run(&args.run).await?.name;
    let mut verified = Vec::new();
    for step in steps(client, &run, args.step, args.all).await? {
        let found = verify_one(client, &run, step).await?;
        if args.output.format != Format::Json {
            for line in lines(&found) {
                output::print_line(&output::visible(&line))?;
            }
        }
        verified.push(found);
    }
    if args.output.format == Format::Json {
        output::print_json(&verified)?;
    }
    let damaged: Vec<String> =
        verified.iter().filter(|found| !found.ok).map(|found| found.step.to_string()).collect();
    if damaged.is_empty() {
        return Ok(Exit::Success);
    }
    let remedy = match verified.iter().rfind(|found| found.ok) {
        Some(good) => {
            format!("step {} is whole: 'takuma run fork {run}@{}' goes on from it", good.step, good.step)
        }
        None => format!("'takuma checkpoint verify {run} --all' looks at the others"),
    };
    Err(CliError::failed(format!(
        "run {run}: the checkpoint of step {} is damaged; {remedy}",
        damaged.join(", ")
    )))
}

async fn verify_one(client: &Client, run: &str, step: u64) -> Result<Verified, CliError> {
    let (_, manifest) = manifest(client, run, step).await?;
    let mut parts = Vec::new();
    for file in CHECKPOINT_PARTS {
        let Some(due) = manifest.part(file) else {
            let problem = Some("is not in the manifest".to_owned());
            parts.push(VerifiedPart { file: file.to_owned(), size_bytes: 0, problem });
            continue;
        };
        let read = async {
            Reading::open(client, run, &checkpoint_object(step, &due.file), PART_BYTES_MAX)
                .await?
                .fingerprint()
                .await
        };
        let problem = match read.await {
            Ok(found) => difference(due, &found),
            Err(error) if error.is_not_found() => Some("is not there".to_owned()),
            // A store that does not answer says nothing about the checkpoint.
            Err(error) => return Err(error),
        };
        parts.push(VerifiedPart { file: file.to_owned(), size_bytes: due.size_bytes, problem });
    }
    let ok = parts.iter().all(|part| part.problem.is_none());
    Ok(Verified { step, ok, size_bytes: parts.iter().map(|part| part.size_bytes).sum(), parts })
}

fn difference(due: &CheckpointPart, found: &Fingerprint) -> Option<String> {
    if found.size_bytes != due.size_bytes {
        return Some(format!("has {} bytes, but {} are due", found.size_bytes, due.size_bytes));
    }
    (found.sha256 != due.sha256).then(|| "has another SHA-256 than its manifest says".to_owned())
}

fn lines(found: &Verified) -> Vec<String> {
    if found.ok {
        let parts = output::count(found.parts.len() as u64, "part");
        return vec![format!("step {}: {parts}, {}: ok", found.step, output::bytes(found.size_bytes))];
    }
    let problem =
        |part: &VerifiedPart| Some(format!("step {}: {} {}", found.step, part.file, part.problem.as_ref()?));
    found.parts.iter().filter_map(problem).collect()
}

async fn download(client: &Client, args: DownloadArgs) -> Result<Exit, CliError> {
    let run = client.run(&args.run).await?.name;
    let Some(&step) = steps(client, &run, args.step, false).await?.first() else {
        return Err(CliError::failed(format!("run {run} has no checkpoint yet")));
    };
    let (json, manifest) = manifest(client, &run, step).await?;
    let dir = &args.dir;
    std::fs::create_dir_all(dir)
        .map_err(|error| CliError::io(format_args!("make {}", dir.display()), error))?;
    let mut written = Vec::new();
    for due in &manifest.parts {
        written.push(fetch(client, &run, step, due, dir).await?);
    }
    // Last, as in the store: a folder with a manifest is whole.
    let file = dir.join(MANIFEST_FILE);
    std::fs::write(&file, json)
        .map_err(|error| CliError::io(format_args!("write {}", file.display()), error))?;
    written.push(file);
    output::message(&format!(
        "the checkpoint of step {step}: {} written and verified",
        output::count(written.len() as u64, "file")
    ));
    match args.output.format {
        Format::Json => output::print_json(&Downloaded { dir: dir.clone(), step, written })?,
        Format::Table | Format::Wide => output::print_line(&dir.display().to_string())?,
    }
    Ok(Exit::Success)
}

async fn fetch(
    client: &Client,
    run: &str,
    step: u64,
    due: &CheckpointPart,
    dir: &Path,
) -> Result<PathBuf, CliError> {
    // Without the folder of the generation that wrote it: here it stands alone.
    let file = dir.join(plain_name(due.name())?);
    let object = checkpoint_object(step, &due.file);
    let reading = Reading::open(client, run, &object, due.size_bytes).await?;
    let (part, found) = reading.into_folder(dir).await?;
    if let Some(problem) = difference(due, &found) {
        return Err(CliError::failed(format!(
            "{object} of run {run} {problem}; 'takuma checkpoint verify {run} --all' finds one that is whole"
        )));
    }
    part.persist(&file)
        .map_err(|error| CliError::io(format_args!("write {}", file.display()), error.error))?;
    Ok(file)
}
