//! `takuma dataset`: from images to shards.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use takuma_data::{DataError, Inspection, PrepareOptions, PrepareReport, Progress, Stage, SynthOptions};
use takuma_store::{Store, StoreError};

use crate::error::{CliError, Exit};
use crate::output::{self, Format, OutputArgs, Tone};

/// Without a terminal: often enough to see life.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// `takuma dataset`.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct DatasetArgs {
    #[command(subcommand)]
    verb: DatasetVerb,
}

/// `--endpoint`, on commands that touch a store themselves.
#[derive(Debug, Clone, Default, Args)]
pub struct EndpointArgs {
    /// The S3 server, where it is not Amazon's [env: AWS_ENDPOINT]
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
}

#[derive(Debug, Subcommand)]
enum DatasetVerb {
    /// Decode, crop and resize every image once, and write shards
    #[command(after_help = "\
Images that cannot be used are listed with the reason in DST/quarantine.jsonl and do not stop the job.

Examples:
  takuma dataset prepare img_align_celeba.zip ./celeba
  takuma dataset prepare ./photos s3://bucket/photos --crop 0 --endpoint http://127.0.0.1:9000")]
    Prepare(PrepareArgs),
    /// Draw faces by program: a dataset, or with DST ending in .zip an archive of JPEGs
    #[command(
        after_help = "Examples:\n  takuma dataset synth ./faces --count 5000\n  takuma dataset synth faces.zip --count 5000"
    )]
    Synth(SynthArgs),
    /// Show what a dataset holds
    Inspect(UrlArgs),
    /// Read every shard and check its digest: exit 0 if all are whole, 1 if not
    Verify(UrlArgs),
}

#[derive(Debug, Args)]
struct PrepareArgs {
    /// A zip, tar, gzipped tar or folder of JPEG and PNG images
    #[arg(value_name = "SRC")]
    source: String,
    /// Where the shards go: a folder or a URL (file://, s3://)
    #[arg(value_name = "DST")]
    destination: String,
    #[command(flatten)]
    shape: ShapeArgs,
}

#[derive(Debug, Args)]
struct ShapeArgs {
    /// Side of the central square to cut out, in pixels; 0 = the largest that fits
    #[arg(long, default_value_t = 108)]
    crop: u32,
    /// Side of the prepared images, in pixels
    #[arg(long, default_value_t = 64)]
    size: u32,
    /// Files to spread the images over
    #[arg(long, default_value_t = 64)]
    shards: u32,
    /// Seed of the shuffle, and of the faces where they are drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    endpoint: EndpointArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct SynthArgs {
    /// Where the shards go: a folder or a URL (file://, s3://), or a file ending in .zip
    #[arg(value_name = "DST")]
    destination: String,
    /// How many faces
    #[arg(long, value_name = "N")]
    count: u64,
    #[command(flatten)]
    shape: ShapeArgs,
}

#[derive(Debug, Args)]
struct UrlArgs {
    /// The dataset's folder or URL
    url: String,
    #[command(flatten)]
    endpoint: EndpointArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl DatasetArgs {
    /// The S3 server that was given.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        let endpoint = match &self.verb {
            DatasetVerb::Prepare(args) => &args.shape.endpoint,
            DatasetVerb::Synth(args) => &args.shape.endpoint,
            DatasetVerb::Inspect(args) | DatasetVerb::Verify(args) => &args.endpoint,
        };
        endpoint.endpoint.as_deref()
    }
}

/// Runs `takuma dataset ...`.
///
/// # Errors
/// As takuma-data's: one sentence with place and remedy; or Ctrl-C.
pub async fn run(args: DatasetArgs) -> Result<Exit, CliError> {
    let work = async {
        match args.verb {
            DatasetVerb::Prepare(args) => prepare(args).await,
            DatasetVerb::Synth(args) if args.destination.ends_with(".zip") => synth_archive(args).await,
            DatasetVerb::Synth(args) => synth(args).await,
            DatasetVerb::Inspect(args) => inspect(args).await,
            DatasetVerb::Verify(args) => verify(args).await,
        }
    };
    tokio::select! {
        done = work => done,
        pressed = tokio::signal::ctrl_c() => {
            pressed.map_err(|error| CliError::io("watch for Ctrl-C", error))?;
            Err(CliError::Interrupted("interrupted; a dataset that was not finished does not count as one".to_owned()))
        }
    }
}

impl From<DataError> for CliError {
    fn from(error: DataError) -> Self {
        let wrong_usage = match &error {
            DataError::Option { .. } => true,
            DataError::Store(store) => {
                let store: &StoreError = store;
                matches!(store, StoreError::Url { .. })
            }
            _ => false,
        };
        if wrong_usage { Self::Usage(error.to_string()) } else { Self::from_source(error) }
    }
}

async fn prepare(args: PrepareArgs) -> Result<Exit, CliError> {
    let ShapeArgs { crop, size, shards, seed, .. } = args.shape;
    let store = Store::open(&args.destination)?;
    let options = PrepareOptions { source: args.source, crop, size, shards, seed };
    let meter = Meter::stderr();
    let report = takuma_data::prepare(options, &store, meter.teller()).await;
    meter.close();
    print_report(&store, &report?, args.shape.output.format)
}

async fn synth(args: SynthArgs) -> Result<Exit, CliError> {
    let ShapeArgs { crop, size, shards, seed, .. } = args.shape;
    let store = Store::open(&args.destination)?;
    let report = draw(SynthOptions { count: args.count, size, shards, seed, crop }, &store).await?;
    print_report(&store, &report, args.shape.output.format)
}

/// Draws a dataset of faces, with its progress on stderr.
///
/// # Errors
/// As [`takuma_data::synth`].
pub async fn draw(options: SynthOptions, store: &Store) -> Result<PrepareReport, CliError> {
    let meter = Meter::stderr();
    let report = takuma_data::synth(options, store, meter.teller()).await;
    meter.close();
    Ok(report?)
}

async fn synth_archive(args: SynthArgs) -> Result<Exit, CliError> {
    let SynthArgs { destination, count, shape } = args;
    let path = match destination.strip_prefix("file://") {
        Some(path) => PathBuf::from(path),
        None if destination.contains("://") => {
            return Err(CliError::Usage(format!(
                "cannot write an archive to {destination}; give a local path"
            )));
        }
        None => PathBuf::from(&destination),
    };
    let meter = Meter::stderr();
    let teller = meter.teller();
    let started = Instant::now();
    let (seed, file) = (shape.seed, path.clone());
    let drawn =
        tokio::task::spawn_blocking(move || takuma_data::synth_archive(count, seed, &file, teller)).await;
    meter.close();
    drawn.map_err(CliError::from_source)??;
    let elapsed_s = started.elapsed().as_secs_f64();
    match shape.output.format {
        Format::Json => {
            output::print_json(&json!({ "file": path, "images": count, "elapsed_s": elapsed_s }))?
        }
        _ => output::print_line(&format!(
            "{} ({count} images, {})",
            path.display(),
            output::duration(elapsed_s)
        ))?,
    }
    Ok(Exit::Success)
}

fn print_report(store: &Store, report: &PrepareReport, format: Format) -> Result<Exit, CliError> {
    let manifest = &report.manifest;
    let elapsed_s = report.elapsed.as_secs_f64();
    if format == Format::Json {
        output::print_json(&json!({
            "url": store.url(),
            "images": manifest.images,
            "shards": manifest.shards.len(),
            "quarantined": manifest.quarantined,
            "ignored": report.ignored,
            "images_per_s": report.images_per_s,
            "elapsed_s": elapsed_s,
            "digest": manifest.digest,
        }))?;
    } else {
        print_pairs(&[
            ("images", manifest.images.to_string()),
            ("shards", manifest.shards.len().to_string()),
            ("quarantined", manifest.quarantined.to_string()),
            ("images/s", format!("{:.0}", report.images_per_s)),
            ("took", format!("{elapsed_s:.1}s")),
            ("digest", manifest.digest.clone()),
            ("dataset", store.url().to_owned()),
        ])?;
    }
    if manifest.quarantined > 0 {
        let refused = output::count(manifest.quarantined, "image");
        output::message(&format!(
            "{refused} could not be used; the reasons are in {}/quarantine.jsonl",
            store.url()
        ));
    }
    Ok(Exit::Success)
}

async fn inspect(args: UrlArgs) -> Result<Exit, CliError> {
    let store = Store::open(&args.url)?;
    let Inspection { manifest, quarantine, steps_per_epoch, size_bytes } =
        takuma_data::inspect(&store).await?;
    if args.output.format == Format::Json {
        output::print_json(&json!({
            "url": store.url(),
            "images": manifest.images,
            "shards": manifest.shards.len(),
            "height": manifest.height,
            "width": manifest.width,
            "channels": manifest.channels,
            "crop": manifest.crop,
            "seed": manifest.seed,
            "source": manifest.source,
            "quarantined": manifest.quarantined,
            "quarantine_reasons": quarantine,
            "steps_per_epoch": steps_per_epoch,
            "size_bytes": size_bytes,
            "digest": manifest.digest,
        }))?;
        return Ok(Exit::Success);
    }
    let reasons: Vec<_> = quarantine.iter().map(|(reason, images)| format!("{reason} {images}")).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    print_pairs(&[
        ("dataset", store.url().to_owned()),
        (
            "images",
            format!("{} of {}x{}x{}", manifest.images, manifest.height, manifest.width, manifest.channels),
        ),
        ("shards", format!("{} ({})", manifest.shards.len(), output::bytes(size_bytes))),
        (
            "steps/epoch",
            steps_per_epoch
                .map_or_else(|| "-".to_owned(), |steps| format!("{steps} with a global batch of 64")),
        ),
        ("quarantined", format!("{}{reasons}", manifest.quarantined)),
        ("source", format!("{}, crop {}, seed {}", manifest.source, manifest.crop, manifest.seed)),
        ("digest", manifest.digest),
    ])?;
    Ok(Exit::Success)
}

async fn verify(args: UrlArgs) -> Result<Exit, CliError> {
    let store = Store::open(&args.url)?;
    let meter = Meter::stderr();
    let report = takuma_data::verify(&store, meter.teller()).await;
    meter.close();
    let report = report?;
    if args.output.format == Format::Json {
        output::print_json(&json!({
            "url": store.url(),
            "images": report.images,
            "shards": report.shards,
            "size_bytes": report.size_bytes,
            "digest": report.digest,
        }))?;
    } else {
        print_pairs(&[
            ("dataset", store.url().to_owned()),
            (
                "verified",
                format!(
                    "{}, {}",
                    output::count(report.shards, "shard"),
                    output::count(report.images, "image")
                ),
            ),
            ("digest", report.digest),
        ])?;
    }
    Ok(Exit::Success)
}

fn print_pairs(pairs: &[(&str, String)]) -> Result<(), CliError> {
    pairs
        .iter()
        .try_for_each(|(key, value)| output::print_line(&format!("{key:<13}{}", output::visible(value))))
}

/// The job's progress on stderr. Cheap to clone: what the job holds and what we close are one.
#[derive(Debug, Clone)]
struct Meter {
    bar: Option<ProgressBar>,
}

#[derive(Debug)]
struct Told {
    stage: Option<Stage>,
    began: Instant,
    last_line: Instant,
}

impl Meter {
    fn stderr() -> Self {
        let terminal = console::Term::stderr().is_term();
        Self { bar: terminal.then(|| ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr())) }
    }

    /// What the job calls with its progress.
    fn teller(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let bar = self.bar.clone();
        let start = Instant::now();
        let told = Mutex::new(Told { stage: None, began: start, last_line: start });
        move |progress| {
            let now = Instant::now();
            let mut told = told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let fresh = told.stage != Some(progress.stage);
            if fresh {
                *told = Told { stage: Some(progress.stage), began: now, ..*told };
            }
            let text = progress_text(progress, now - told.began);
            match &bar {
                Some(bar) => show(bar, progress, fresh, text),
                None if now - told.last_line >= LINE_EVERY => {
                    told.last_line = now;
                    output::message(&format!("{} {text}", stage_name(progress.stage)));
                }
                None => {}
            }
        }
    }

    fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn show(bar: &ProgressBar, progress: Progress, fresh: bool, text: String) {
    if fresh {
        let template =
            if progress.total.is_some() { "{prefix} {bar:30}  {msg}" } else { "{prefix} {spinner}  {msg}" };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏░"));
        bar.set_prefix(Tone::Name.stderr(stage_name(progress.stage)));
    }
    bar.set_length(progress.total.unwrap_or(0));
    bar.set_position(progress.done);
    bar.set_message(text);
}

fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Scanning => "scanning",
        Stage::Decoding => "decoding",
        Stage::Drawing => "drawing",
        Stage::Writing => "writing",
        Stage::Verifying => "verifying",
    }
}

/// `1200/6000 images  5210 images/s  3 quarantined`.
fn progress_text(progress: Progress, elapsed: Duration) -> String {
    let noun = match progress.stage {
        Stage::Scanning | Stage::Decoding | Stage::Drawing => "images",
        Stage::Writing | Stage::Verifying => "shards",
    };
    let of = progress.total.map_or_else(String::new, |total| format!("/{total}"));
    let mut text = format!("{}{of} {noun}", progress.done);
    let seconds = elapsed.as_secs_f64();
    if noun == "images" && seconds > 0.2 {
        text.push_str(&format!("  {:.0} images/s", progress.done as f64 / seconds));
    }
    if progress.quarantined > 0 {
        text.push_str(&format!("  {} quarantined", progress.quarantined));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_tells_count_speed_and_quarantine() {
        let progress = Progress { stage: Stage::Decoding, done: 1200, total: Some(6000), quarantined: 3 };
        let text = progress_text(progress, Duration::from_millis(500));
        assert_eq!(text, "1200/6000 images  2400 images/s  3 quarantined");
        let progress = Progress { stage: Stage::Writing, done: 2, total: None, quarantined: 0 };
        assert_eq!(progress_text(progress, Duration::from_secs(1)), "2 shards");
    }
}
