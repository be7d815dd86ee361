//! `takuma sample`: the pictures of a run, listed and fetched through the coordinator.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use takuma_core::layout::{PLOT_FILE, SAMPLES_FOLDER, step_of_name};
use takuma_proto::v1::{ListSamplesReply, ListSamplesRequest, SampleView};

use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::json::SampleJson;
use crate::object::{Reading, plain_name};
use crate::output::{self, Format, OutputArgs, Table, Tone};

/// No picture of ours comes near; a server that sends more is not one of ours.
const PICTURE_BYTES_MAX: u64 = 64 << 20;
/// Enough to hide the network's round trips, few enough for any server.
const DOWNLOADS_AT_ONCE: usize = 4;

/// `takuma sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    #[command(subcommand)]
    verb: SampleVerb,
}

#[derive(Debug, Subcommand)]
enum SampleVerb {
    /// List a run's grids, by step
    #[command(visible_alias = "list")]
    Ls {
        /// The run's name, or the beginning of it
        run: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Fetch a run's grids, the grid of real images and the loss plot
    #[command(after_help = "\
Files that are there already with the same size are left alone.

Examples:
  takuma sample download calm-otter-3                  everything into ./calm-otter-3
  takuma sample download calm-otter-3 pics --latest    the newest grid only")]
    Download(DownloadArgs),
}

#[derive(Debug, Args)]
struct DownloadArgs {
    /// The run's name, or the beginning of it
    run: String,
    /// Where to put the files [default: a folder of the run's name]
    dir: Option<PathBuf>,
    /// Only the grid of this step
    #[arg(long, value_name = "N", conflicts_with = "latest")]
    step: Option<u64>,
    /// Only the newest grid
    #[arg(long)]
    latest: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// A file to fetch.
struct Wanted {
    /// In the run's folder.
    object: String,
    /// In DIR; checked by [`plain_name`].
    file: PathBuf,
    /// Where the coordinator told it.
    size_bytes: Option<u64>,
}

/// What a download did, as `-o json` prints it.
#[derive(Debug, Default, Serialize)]
struct Downloaded {
    dir: PathBuf,
    written: Vec<PathBuf>,
    skipped: Vec<PathBuf>,
}

/// Runs `takuma sample ...`.
///
/// # Errors
/// There is no such run or sample, a file cannot be written, or the coordinator cannot be reached.
pub async fn run(args: SampleArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    let (client, _) = Client::connect(at.address()?).await?;
    match args.verb {
        SampleVerb::Ls { run, output } => ls(&client, run, output.format).await,
        SampleVerb::Download(download_args) => download(&client, download_args).await,
    }
}

/// Everything that a run has to show.
///
/// # Errors
/// There is no such run, or the coordinator cannot be reached.
pub async fn list(client: &Client, run: &str) -> Result<ListSamplesReply, CliError> {
    client.call(client.control().list_samples(ListSamplesRequest { run: run.to_owned() })).await
}

async fn ls(client: &Client, run: String, format: Format) -> Result<Exit, CliError> {
    let samples = list(client, &run).await?.samples;
    if format == Format::Json {
        output::print_json(&samples.iter().map(SampleJson::from).collect::<Vec<_>>())?;
        return Ok(Exit::Success);
    }
    if samples.is_empty() {
        output::message(&format!("run {run} has no samples yet; the first grid comes with step 0"));
        return Ok(Exit::Success);
    }
    let mut table = Table::new(&["NAME", "STEP", "SIZE", "URL"]);
    for sample in &samples {
        let step = step_of_name(&sample.name).map_or_else(String::new, |step| step.to_string());
        table.row(vec![
            (sample.name.clone(), Tone::Name),
            (step, Tone::Plain),
            (output::bytes(sample.size_bytes), Tone::Plain),
            (sample.url.clone(), Tone::Plain),
        ]);
    }
    output::print_table(&table)?;
    Ok(Exit::Success)
}

async fn download(client: &Client, args: DownloadArgs) -> Result<Exit, CliError> {
    let run = client.run(&args.run).await?.name;
    let listing = list(client, &run).await?;
    let dir = match args.dir.clone() {
        Some(dir) => dir,
        None => PathBuf::from(plain_name(&run)?),
    };
    let wanted = wanted(&run, &listing, &dir, &args)?;
    std::fs::create_dir_all(&dir)
        .map_err(|error| CliError::io(format_args!("make {}", dir.display()), error))?;
    let one = wanted.len() == 1;
    let fetched: Vec<(PathBuf, bool)> = futures::stream::iter(wanted)
        .map(|wanted| fetch(client, &run, &dir, wanted))
        .buffered(DOWNLOADS_AT_ONCE)
        .try_collect()
        .await?;
    let mut done = Downloaded { dir: dir.clone(), ..Downloaded::default() };
    for (file, written) in fetched {
        if written { done.written.push(file) } else { done.skipped.push(file) }
    }
    let files = output::count(done.written.len() as u64, "file");
    output::message(&format!("{files} written, {} there already", done.skipped.len()));
    match (args.output.format, one) {
        (Format::Json, _) => output::print_json(&done)?,
        (_, true) if args.latest || args.step.is_some() => {
            let file = done.written.first().or(done.skipped.first()).unwrap_or(&dir);
            output::print_line(&file.display().to_string())?;
        }
        _ => output::print_line(&dir.display().to_string())?,
    }
    Ok(Exit::Success)
}

/// Which files the arguments mean, each with a name that stays inside `dir`.
fn wanted(
    run: &str,
    listing: &ListSamplesReply,
    dir: &Path,
    args: &DownloadArgs,
) -> Result<Vec<Wanted>, CliError> {
    let to_fetch = |sample: &SampleView| {
        let name = plain_name(&sample.name)?;
        let object = format!("{SAMPLES_FOLDER}/{name}");
        Ok(Wanted { object, file: dir.join(name), size_bytes: Some(sample.size_bytes) })
    };
    let grids = || listing.samples.iter().filter(|sample| step_of_name(&sample.name).is_some());
    if let Some(step) = args.step {
        let grid = grids().find(|sample| step_of_name(&sample.name) == Some(step)).ok_or_else(|| {
            CliError::failed(format!(
                "run {run} has no grid of step {step}; 'takuma sample ls {run}' lists them"
            ))
        })?;
        return Ok(vec![to_fetch(grid)?]);
    }
    if args.latest {
        let newest = grids().max_by_key(|sample| step_of_name(&sample.name)).ok_or_else(|| {
            CliError::failed(format!(
                "run {run} has no grid yet; 'takuma run show {run}' tells how far it is"
            ))
        })?;
        return Ok(vec![to_fetch(newest)?]);
    }
    let mut files = listing.samples.iter().map(to_fetch).collect::<Result<Vec<_>, CliError>>()?;
    if listing.has_plot {
        files.push(Wanted { object: PLOT_FILE.to_owned(), file: dir.join(PLOT_FILE), size_bytes: None });
    }
    Ok(files)
}

/// Fetches one file; false when it was there already.
async fn fetch(client: &Client, run: &str, dir: &Path, wanted: Wanted) -> Result<(PathBuf, bool), CliError> {
    let Wanted { object, file, size_bytes } = wanted;
    let failed = |error| CliError::io(format_args!("write {}", file.display()), error);
    if let (Some(size), Ok(there)) = (size_bytes, file.symlink_metadata())
        && there.is_file()
        && there.len() == size
    {
        return Ok((file, false));
    }
    let limit = size_bytes.unwrap_or(PICTURE_BYTES_MAX).min(PICTURE_BYTES_MAX);
    let reading = Reading::open(client, run, &object, limit).await?;
    let (part, fingerprint) = reading.into_folder(dir).await?;
    let received = fingerprint.size_bytes;
    if size_bytes.is_some_and(|size| size != received) {
        return Err(CliError::failed(format!(
            "{object} of run {run} came with {received} bytes, not as told; try again"
        )));
    }
    part.persist(&file).map_err(|error| failed(error.error))?;
    Ok((file, true))
}
