//! `run submit`: settings, plan, question, run.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;
use takuma_core::config::RunConfig;
use takuma_proto::PROTOCOL_VERSION;
use takuma_proto::v1::{Plan, RunView, SubmitRunRequest};

use super::plan;
use crate::attach::{self, Ended};
use crate::client::Client;
use crate::context::CoordinatorArgs;
use crate::error::{CliError, Exit};
use crate::json::RunJson;
use crate::output::{self, Format, OutputArgs};
use crate::progress::Screen;
use crate::settings::{self, Layer, SettingsError};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  takuma run submit dcgan-celeba --data ./celeba                     two epochs, asks before it starts
  takuma run submit dcgan-celeba --data s3://b/celeba --steps 300 --wait -y
  takuma run submit dcgan-tiny --data ./faces --set learning_rate=0.0001 --dry-run
  takuma run submit dcgan-tiny --data ./faces --exact --set lanes=4 -y
  takuma run submit --config run.toml -d -y

Settings: --config FILE < TAKUMA_RUN_* variables < flags < --set; see docs/configuration.md.
Exit: 0 succeeded or detached, 1 failed or stopped, 2 wrong usage, 3 coordinator unreachable.")]
pub(super) struct SubmitArgs {
    /// What to train: dcgan-celeba or dcgan-tiny
    recipe: Option<String>,
    /// The prepared dataset: a folder or a URL (file://, s3://)
    #[arg(long, value_name = "URL")]
    data: Option<String>,
    /// Steps to train
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Passes over the data, instead of --steps [default: 2]
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Images per step over all workers [default: 64]
    #[arg(long, value_name = "N")]
    global_batch: Option<u64>,
    /// Workers to wait for [default: all that are idle when the run starts]
    #[arg(long, value_name = "N")]
    workers: Option<u64>,
    /// Give fast workers larger shares of the batch, measured as the run goes; for machines that are not alike
    #[arg(long)]
    balance: bool,
    /// Decides weights, noise and data order [default: 0]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Steps between two sample grids [default: 50]
    #[arg(long, value_name = "N")]
    sample_every: Option<u64>,
    /// Steps between two checkpoints [default: 500]
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Checkpoints to keep: the newest so many [default: all]
    #[arg(long, value_name = "N")]
    keep: Option<u64>,
    /// When a loss or gradient is not finite: fail the run (stop), leave the update out (skip), or go back to the newest
    /// checkpoint and pass over the step (rollback) [default: stop]
    #[arg(long, value_name = "POLICY", value_enum)]
    on_nan: Option<OnNanFlag>,
    /// Whose statistics normalise a batch: all workers' (sync) or each its own (local) [default: sync]
    #[arg(long, value_name = "MODE", value_enum)]
    batch_norm: Option<BatchNormFlag>,
    /// In which numbers convolutions are computed: f32, tf32 (on GPUs; on CPUs the same as f32) or bf16 [default: f32]
    #[arg(long, value_name = "NUMBERS", value_enum)]
    precision: Option<PrecisionFlag>,
    /// The same bits whatever workers train and whatever fails; --set lanes=N parts the batch [default: 8]
    #[arg(long)]
    exact: bool,
    /// Any setting by its key; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Settings from a TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    launch: LaunchArgs,
}

/// How a run is begun, whatever it begins from.
#[derive(Debug, clap::Args)]
pub(super) struct LaunchArgs {
    /// The run's name [default: a memorable one]
    #[arg(long)]
    name: Option<String>,
    /// Return at once and print the run's name
    #[arg(short, long, conflicts_with = "wait")]
    detach: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Print settings and plan; change nothing
    #[arg(long)]
    dry_run: bool,
    /// The exit code must tell the run's result: Ctrl-C then exits 130
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BatchNormFlag {
    Sync,
    Local,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnNanFlag {
    Stop,
    Skip,
    Rollback,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PrecisionFlag {
    F32,
    Tf32,
    Bf16,
}

impl SubmitArgs {
    fn config(&self) -> Result<RunConfig, SettingsError> {
        let mut layers = Vec::new();
        if let Some(file) = &self.config {
            layers.push(Layer::from_file(file)?);
        }
        // A variable that is not text cannot be one of ours.
        let variables =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        layers.push(Layer::from_environment(variables)?);
        layers.push(self.flags()?);
        layers.push(Layer::from_pairs(&self.set)?);
        settings::resolve(&layers)
    }

    fn flags(&self) -> Result<Layer, SettingsError> {
        let mut layer = Layer::new("on the command line");
        let batch_norm = self.batch_norm.map(|mode| match mode {
            BatchNormFlag::Sync => "sync".to_owned(),
            BatchNormFlag::Local => "local".to_owned(),
        });
        let on_nan = self.on_nan.map(|policy| match policy {
            OnNanFlag::Stop => "stop".to_owned(),
            OnNanFlag::Skip => "skip".to_owned(),
            OnNanFlag::Rollback => "rollback".to_owned(),
        });
        let precision = self.precision.map(|precision| match precision {
            PrecisionFlag::F32 => "f32".to_owned(),
            PrecisionFlag::Tf32 => "tf32".to_owned(),
            PrecisionFlag::Bf16 => "bf16".to_owned(),
        });
        let texts = [
            ("recipe", &self.recipe),
            ("data", &self.data),
            ("on_nan", &on_nan),
            ("batch_norm", &batch_norm),
            ("precision", &precision),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                layer.insert_text(key, text)?;
            }
        }
        let numbers = [
            ("steps", self.steps),
            ("epochs", self.epochs),
            ("global_batch", self.global_batch),
            ("workers", self.workers),
            ("seed", self.seed),
            ("sample_every", self.sample_every),
            ("checkpoint_every", self.checkpoint_every),
            ("keep_checkpoints", self.keep),
        ];
        for (key, number) in numbers {
            if let Some(number) = number {
                layer.insert(key, number.into(), &number.to_string())?;
            }
        }
        for (key, flag) in [("exact", self.exact), ("balance", self.balance)] {
            if flag {
                layer.insert(key, true.into(), "true")?;
            }
        }
        Ok(layer)
    }
}

pub(super) async fn submit(args: SubmitArgs, at: &CoordinatorArgs) -> Result<Exit, CliError> {
    let config = args.config()?;
    args.launch.check_terminal()?;
    let (client, _) = Client::connect(at.address()?).await?;
    args.launch.launch(&client, &config, Origin::default()).await
}

/// The checkpoint that a run starts from; by default none.
#[derive(Debug, Clone, Default)]
pub(super) struct Origin {
    pub run: String,
    pub step: u64,
}

impl LaunchArgs {
    /// Whether the question can be asked, before anything is done.
    pub(super) fn check_terminal(&self) -> Result<(), CliError> {
        if self.yes || self.dry_run || can_ask() {
            return Ok(());
        }
        Err(CliError::Usage(
            "there is no terminal to ask on; add -y to start the run, or --dry-run to only see the plan"
                .to_owned(),
        ))
    }

    /// Shows the plan, asks, submits and follows, as the arguments say.
    pub(super) async fn launch(
        &self,
        client: &Client,
        config: &RunConfig,
        origin: Origin,
    ) -> Result<Exit, CliError> {
        let request = |dry_run: bool| SubmitRunRequest {
            origin_run: origin.run.clone(),
            origin_step: origin.step,
            ..request(config, self.name.as_deref().unwrap_or_default(), dry_run)
        };
        let (_, plan) = send(client, request(true)).await?;
        if self.dry_run {
            return print_dry_run(config, &plan, self.output.format);
        }
        for line in plan::describe(config, &plan) {
            output::message(&output::visible(&line));
        }
        if !origin.run.is_empty() {
            output::message(&output::visible(&format!(
                "  {:<12}the checkpoint {}@{}",
                "from", origin.run, origin.step
            )));
        }
        if !self.yes && !ask("start this run?").await? {
            return Err(CliError::failed("nothing was started"));
        }
        let (run, _) = send(client, request(false)).await?;
        if self.detach {
            return detached(&run, self.output.format);
        }
        output::message(&format!("run {} is submitted; Ctrl-C detaches, the run goes on", run.name));
        follow_to_end(client, &run.name, self.output.format, self.wait).await
    }
}

fn request(config: &RunConfig, name: &str, dry_run: bool) -> SubmitRunRequest {
    SubmitRunRequest {
        protocol_version: PROTOCOL_VERSION,
        config_json: config.to_json(),
        name: name.to_owned(),
        dry_run,
        ..SubmitRunRequest::default()
    }
}

/// Sends a configuration to the coordinator; with `dry_run` only to be checked and planned.
///
/// # Errors
/// The coordinator's refusal, or it cannot be reached.
pub async fn submit_config(
    client: &Client,
    config: &RunConfig,
    name: &str,
    dry_run: bool,
) -> Result<(RunView, Plan), CliError> {
    send(client, request(config, name, dry_run)).await
}

async fn send(client: &Client, request: SubmitRunRequest) -> Result<(RunView, Plan), CliError> {
    let reply = client.call(client.control().submit_run(request)).await?;
    match (reply.run, reply.plan) {
        (Some(run), Some(plan)) => Ok((run, plan)),
        _ => Err(CliError::failed(
            "the coordinator's answer lacks the run or its plan; update the coordinator",
        )),
    }
}

fn print_dry_run(config: &RunConfig, plan: &Plan, format: Format) -> Result<Exit, CliError> {
    if format == Format::Json {
        let plan = json!({
            "workers": plan.workers,
            "slots_per_worker": plan.slots_per_worker,
            "global_batch": plan.global_batch,
            "steps": plan.steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "images": plan.images,
            "eta_s": plan.eta_s,
            "workers_idle": plan.workers_idle,
            "runs_ahead": plan.runs_ahead,
        });
        output::print_json(&json!({ "config": config, "plan": plan }))?;
        return Ok(Exit::Success);
    }
    output::print_line(settings::to_toml(config)?.trim_end())?;
    for line in plan::describe(config, plan) {
        // As TOML comments: the whole can be kept as a file for --config.
        output::print_line(&format!("# {}", output::visible(line.trim_start())))?;
    }
    Ok(Exit::Success)
}

pub(super) fn detached(run: &RunView, format: Format) -> Result<Exit, CliError> {
    match format {
        Format::Json => output::print_json(&RunJson::from(run))?,
        Format::Table | Format::Wide => output::print_line(&run.name)?,
    }
    attach::next_commands(&run.name, &["run watch {}", "run stop {}"]);
    Ok(Exit::Success)
}

/// Follows a run on the screen; what it returns is the command's end.
pub(super) async fn follow_to_end(
    client: &Client,
    run: &str,
    format: Format,
    must_know: bool,
) -> Result<Exit, CliError> {
    let mut screen = Screen::stderr();
    match attach::follow(client, run, &mut screen).await? {
        Ended::Run(run) => {
            if format == Format::Json {
                output::print_json(&RunJson::from(&*run))?;
            }
            attach::conclude(&run)
        }
        Ended::Detached => {
            let text = format!("detached; the run goes on: come back with 'takuma run watch {run}'");
            if must_know {
                return Err(CliError::Interrupted(text));
            }
            output::message(&text);
            Ok(Exit::Success)
        }
    }
}

fn can_ask() -> bool {
    use std::io::IsTerminal;
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

async fn ask(question: &str) -> Result<bool, CliError> {
    write!(std::io::stderr(), "{question} [y/N] ").map_err(|error| CliError::io("ask", error))?;
    let read = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).map(|_| answer)
    });
    let answer =
        read.await.map_err(CliError::from_source)?.map_err(|error| CliError::io("read the answer", error))?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
