//! `takuma demo`: from nothing to pictures in one command.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Instant;

use takuma_core::config::{Recipe, RunConfig};
use takuma_core::layout::{PLOT_FILE, SAMPLES_FOLDER, step_of_name};
use takuma_data::{DataError, SynthOptions};
use takuma_proto::v1::RunView;
use takuma_store::Store;

use crate::attach::{self, Ended};
use crate::chaos;
use crate::dataset;
use crate::devices::{Device, WorkerCount, assign_here, on_devices};
use crate::error::{CliError, Exit};
use crate::local::{LocalCluster, LocalOptions, default_threads};
use crate::output::{self, Tone, duration};
use crate::progress::Screen;
use crate::run::{describe_plan, submit_config};
use crate::up::{Signals, wind_down};

/// Faces can be told from noise by then; a few minutes on two cores.
const STEPS: u64 = 150;
/// Drawn in a second or two.
const IMAGES: u64 = 5000;
/// Without GPUs; and with --chaos, where one of them is killed.
const WORKERS: u32 = 2;
const FOLDER: &str = "takuma-demo";

/// `takuma demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Needs nothing: draws faces, starts a coordinator and workers here, trains, and tells where the pictures are.
Everything lies in the folder; delete it to be rid of all. The faces are kept for the next time.

Examples:
  takuma demo
  takuma demo --steps 600 --dir /tmp/demo
  takuma demo --chaos                       a small run twice, once with a worker and the coordinator killed:
                                            the same result to the bit")]
pub struct DemoArgs {
    /// Steps to train [default: 150; with --chaos 300]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Workers to start [default: one on each usable GPU; without GPUs, and with --chaos, 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: Option<u32>,
    /// What they compute on: auto (GPUs where there are any; with --chaos the processor), cpu, cuda, or cuda:N for one
    /// certain GPU
    #[arg(long, value_name = "DEVICE", env = "TAKUMA_DEVICE", default_value_t)]
    device: Device,
    /// Where everything goes
    #[arg(long, value_name = "DIR", default_value = FOLDER)]
    dir: PathBuf,
    /// What to train: dcgan-celeba or dcgan-tiny [default: dcgan-celeba; with --chaos dcgan-tiny]
    #[arg(long)]
    recipe: Option<String>,
    /// Train in exact mode twice, the second time killing a worker and the coordinator, and compare
    #[arg(long)]
    chaos: bool,
    /// Faces to draw
    #[arg(long, value_name = "N", default_value_t = IMAGES)]
    images: u64,
}

impl DemoArgs {
    /// --chaos compares to the bit, which takes workers of one kind: a processor is the same for all of them.
    fn device(&self) -> Device {
        match self.device {
            Device::Auto if self.chaos => Device::Cpu,
            device => device,
        }
    }

    fn worker_count(&self) -> WorkerCount {
        match self.workers {
            None if self.chaos => WorkerCount::Given(WORKERS),
            None => WorkerCount::Auto,
            Some(workers) => WorkerCount::Given(workers),
        }
    }
}

/// Runs `takuma demo`.
///
/// # Errors
/// Dataset, cluster or run failed; or Ctrl-C.
pub async fn run(args: DemoArgs) -> Result<Exit, CliError> {
    let started = Instant::now();
    let (recipe, steps) =
        if args.chaos { (Recipe::DcganTiny, chaos::STEPS) } else { (Recipe::DcganCeleba, STEPS) };
    let recipe = match &args.recipe {
        Some(name) => Recipe::from_name(name).map_err(|error| CliError::Usage(error.to_string()))?,
        None => recipe,
    };
    let mut signals = Signals::new()?;
    let dir = std::path::absolute(&args.dir).map_err(|error| CliError::io("find the folder", error))?;
    let devices = tokio::select! {
        devices = assign_here(args.device(), args.worker_count(), WORKERS) => devices?,
        () = signals.next() => return Err(interrupted()),
    };
    let workers = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    let data = tokio::select! {
        data = faces(&dir, args.images, recipe.image_size()) => data?,
        () = signals.next() => return Err(interrupted()),
    };
    let mut config = RunConfig::new(recipe, data);
    config.steps = Some(args.steps.unwrap_or(steps));
    config.workers = Some(workers);
    config.exact = args.chaos;
    config.validate().map_err(|error| CliError::Usage(error.to_string()))?;

    let options = LocalOptions {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        store: Store::open(&dir.join("store").display().to_string())?.url().to_owned(),
        devices,
        threads: default_threads(workers),
        logs: dir.join("logs"),
        log_format: "text",
    };
    let cluster_started = Instant::now();
    let mut cluster = tokio::select! {
        cluster = LocalCluster::start(&options) => cluster?,
        () = signals.next() => return Err(interrupted()),
    };
    let threads = output::count(options.threads.into(), "thread");
    output::message(&format!(
        "cluster     coordinator at {}, {} of {threads}{} ({:.1}s)",
        cluster.client().address().url,
        output::count(workers.into(), "worker"),
        on_devices(&options.devices),
        cluster_started.elapsed().as_secs_f64()
    ));
    if args.chaos {
        let compared = tokio::select! {
            compared = chaos::run(&mut cluster, &config) => Some(compared),
            () = signals.next() => None,
        };
        wind_down(cluster, &mut signals).await?;
        return compared.unwrap_or_else(|| Err(interrupted()));
    }
    let ended = train(&mut cluster, &config, &mut signals).await;
    let pictures = match &ended {
        Ok(Some(run)) => Some(pictures(&cluster, run).await?),
        _ => None,
    };
    wind_down(cluster, &mut signals).await?;
    let Some(run) = ended? else { return Err(interrupted()) };
    let exit = conclude(&run, &dir)?;
    if let Some(pictures) = pictures {
        pictures.print(&dir, started)?;
    }
    Ok(exit)
}

fn interrupted() -> CliError {
    CliError::Interrupted("interrupted; 'takuma demo' starts again and keeps the faces".to_owned())
}

/// URL of the dataset: drawn now, or the one from the last time.
async fn faces(dir: &Path, images: u64, size: u32) -> Result<String, CliError> {
    // The count is in the name, so that another count is another dataset.
    let store = Store::open(&dir.join(format!("faces-{images}")).display().to_string())?;
    match takuma_data::inspect(&store).await {
        Ok(found) => {
            output::message(&format!(
                "faces       {} from the last time: {}",
                found.manifest.images,
                store.url()
            ));
        }
        Err(DataError::NoDataset { .. }) => {
            let options = SynthOptions { count: images, size, shards: 64, seed: 0, crop: 108 };
            let report = dataset::draw(options, &store).await?;
            let took = report.elapsed.as_secs_f64();
            output::message(&format!("faces       {images} drawn in {took:.1}s: {}", store.url()));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(store.url().to_owned())
}

/// The run's last state; none on Ctrl-C.
async fn train(
    cluster: &mut LocalCluster,
    config: &RunConfig,
    signals: &mut Signals,
) -> Result<Option<RunView>, CliError> {
    let client = cluster.client().clone();
    // Asked before the run takes the workers, so that the plan sees them idle.
    let (_, plan) = submit_config(&client, config, "", true).await?;
    let (run, _) = submit_config(&client, config, "", false).await?;
    output::message(&format!("run         {}", run.name));
    describe_plan(config, &plan).iter().for_each(|line| output::message(&output::visible(line)));
    let mut screen = Screen::stderr();
    let follow = attach::follow(&client, &run.name, &mut screen);
    tokio::pin!(follow);
    let ended = loop {
        tokio::select! {
            // One Ctrl-C reaches both the run's follower and us. Taken here first, it is not left over to
            // pass for the second one, which means "do not wait".
            biased;
            () = signals.next() => break Ended::Detached,
            ended = &mut follow => break ended?,
            death = cluster.next_death() => {
                let death = death?;
                if death.was_coordinator {
                    return Err(CliError::failed(death.message));
                }
                // The coordinator notices by itself and ends the run in words.
                output::message(&death.message);
            }
        }
    };
    Ok(match ended {
        Ended::Run(run) => Some(*run),
        Ended::Detached => None,
    })
}

fn conclude(run: &RunView, dir: &Path) -> Result<Exit, CliError> {
    use takuma_proto::v1::RunStatus;
    if run.status() == RunStatus::Succeeded {
        return Ok(Exit::Success);
    }
    let logs = dir.join("logs").display().to_string();
    let why = if run.error.is_empty() { "it was stopped".to_owned() } else { output::visible(&run.error) };
    Err(CliError::failed(format!(
        "run {} ended at step {} of {}: {why}; the logs are in {logs}",
        run.name, run.step, run.steps
    )))
}

/// What there is to look at.
struct Pictures {
    run: RunView,
    folder: String,
    newest: Option<String>,
    grids: usize,
    plot: Option<String>,
}

async fn pictures(cluster: &LocalCluster, run: &RunView) -> Result<Pictures, CliError> {
    let listing = crate::sample::list(cluster.client(), &run.name).await?;
    // A local store's URL is shown as the path that people can open.
    let store = Store::open(&run.store)?;
    let root = store.local_path().map_or_else(|| store.url().to_owned(), |path| path.display().to_string());
    let grids: Vec<_> =
        listing.samples.iter().filter(|sample| step_of_name(&sample.name).is_some()).collect();
    let newest = grids.iter().max_by_key(|sample| step_of_name(&sample.name));
    Ok(Pictures {
        run: run.clone(),
        folder: format!("{root}/{SAMPLES_FOLDER}"),
        newest: newest.map(|sample| format!("{root}/{SAMPLES_FOLDER}/{}", sample.name)),
        grids: grids.len(),
        plot: listing.has_plot.then(|| format!("{root}/{PLOT_FILE}")),
    })
}

impl Pictures {
    fn print(&self, dir: &Path, started: Instant) -> Result<(), CliError> {
        let none = || "none".to_owned();
        let losses = crate::progress::losses(&self.run);
        let trained = duration(self.run.elapsed_s);
        let together = duration(started.elapsed().as_secs_f64());
        for (key, value) in [
            (
                "trained",
                format!("{} steps in {trained} ({together} with everything)  {losses}", self.run.step),
            ),
            ("grids", format!("{} ({})", self.folder, self.grids)),
            ("newest", self.newest.clone().unwrap_or_else(none)),
            ("loss plot", self.plot.clone().unwrap_or_else(none)),
        ] {
            output::print_line(&format!(
                "{}{}",
                Tone::Name.stdout(&format!("{key:<12}")),
                output::visible(&value)
            ))?;
        }
        output::message("next:");
        output::message(
            &Tone::Faint.stderr(&format!("  takuma up --workers 2 --store {}/store", dir.display())),
        );
        let submit = format!("  takuma run submit {} --data {} --steps 600", self.run.recipe, self.run.data);
        output::message(&Tone::Faint.stderr(&submit));
        Ok(())
    }
}
