//! [`RunConfig`]: everything that decides a run's result, in one document.
//!
//! The same JSON travels from the CLI to the coordinator and the workers, lies in `run.json` and in
//! every checkpoint. Unknown keys are errors, so a misspelt key never passes for a default.

use serde::{Deserialize, Serialize};

use crate::dataset::DatasetManifest;
use crate::slots::SlotMap;

/// What is trained: a model, its losses, its optimizer and its defaults under one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// DCGAN on 64x64 colour images, channels 64 to 512.
    DcganCeleba,
    /// The same with an eighth of the channels: for tests and demonstrations.
    DcganTiny,
}

impl Recipe {
    /// Every recipe, in the order in which help and errors list them.
    pub const ALL: [Self; 2] = [Self::DcganCeleba, Self::DcganTiny];

    /// The name that people type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DcganCeleba => "dcgan-celeba",
            Self::DcganTiny => "dcgan-tiny",
        }
    }

    /// Looks a recipe up by name.
    ///
    /// # Errors
    /// [`ConfigError::UnknownRecipe`] names the recipes that exist.
    pub fn from_name(name: &str) -> Result<Self, ConfigError> {
        Self::ALL
            .into_iter()
            .find(|recipe| recipe.name() == name)
            .ok_or_else(|| ConfigError::UnknownRecipe { name: name.to_owned() })
    }

    /// Side of the square images that the recipe trains on, in pixels.
    #[must_use]
    pub fn image_size(self) -> u32 {
        64
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Over which images batch normalisation takes its statistics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNorm {
    /// The global batch, forward and backward: any number of workers trains the same model.
    #[default]
    Sync,
    /// Each worker's own images: no exchange inside the passes, another result per worker count.
    Local,
}

/// What happens when a loss or gradient is not finite. The update that it is in is never applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnNan {
    /// The run fails, and says where.
    #[default]
    Stop,
    /// Training goes on with the next update. Ten steps in a row without one fail the run.
    Skip,
    /// The run goes back to its newest checkpoint and makes no update in that step when it comes to it again.
    Rollback,
}

/// In which numbers convolutions are computed. Weights, statistics, losses, gradients' sums and the optimizer are f32
/// in all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Full single precision, on every device.
    #[default]
    F32,
    /// GPUs multiply in TF32: the range of f32 with 10 bits of fraction, on tensor cores. CPUs compute as for `f32`.
    Tf32,
    /// Inputs and weights of a convolution are rounded to bfloat16; weights themselves stay f32.
    Bf16,
}

/// A run, to the number. Construct by deserialising: defaults fill what is left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What is trained.
    pub recipe: Recipe,
    /// URL of the prepared dataset's folder (`file://`, `s3://`, ...).
    pub data: String,
    /// Steps to train; wins over `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the data, when `steps` is not given.
    #[serde(default = "defaults::epochs")]
    pub epochs: u64,
    /// Images per step over all workers. Workers only split it.
    #[serde(default = "defaults::global_batch")]
    pub global_batch: u32,
    /// Workers to wait for; none = all that are idle when the run's turn comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<u32>,
    /// Shares of the batch follow the workers' speeds, instead of being even.
    #[serde(default)]
    pub balance: bool,
    /// Decides weights, noise and data order.
    #[serde(default)]
    pub seed: u64,
    /// Steps between two sample grids; step 0 and the last step always have one.
    #[serde(default = "defaults::sample_every")]
    pub sample_every: u64,
    /// Steps between two checkpoints; stop and end always have one.
    #[serde(default = "defaults::checkpoint_every")]
    pub checkpoint_every: u64,
    /// Checkpoints that stay: the newest so many; none = all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_checkpoints: Option<u32>,
    /// What happens when a loss or gradient is not finite.
    #[serde(default)]
    pub on_nan: OnNan,
    /// Whose statistics normalise a batch.
    #[serde(default)]
    pub batch_norm: BatchNorm,
    /// In which numbers convolutions are computed.
    #[serde(default)]
    pub precision: Precision,
    /// The same bits whatever workers there are and whatever fails: see docs/exact.md.
    #[serde(default)]
    pub exact: bool,
    /// Parts of the batch that exact mode computes one by one; they bound the number of its workers.
    #[serde(default = "defaults::lanes")]
    pub lanes: u32,
    /// Adam's step size.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: f64,
    /// Adam's decay of the first moment.
    #[serde(default = "defaults::beta1")]
    pub beta1: f64,
    /// Adam's decay of the second moment.
    #[serde(default = "defaults::beta2")]
    pub beta2: f64,
    /// Gradients leave for the exchange in pieces of about this many bytes.
    #[serde(default = "defaults::bucket_bytes")]
    pub bucket_bytes: u64,
    /// Sockets between two neighbours of the ring for gradient buckets.
    #[serde(default = "defaults::ring_channels")]
    pub ring_channels: u32,
    /// How long a worker waits for its neighbours before it calls them lost, in milliseconds.
    #[serde(default = "defaults::exchange_timeout_ms")]
    pub exchange_timeout_ms: u64,
}

mod defaults {
    pub fn epochs() -> u64 {
        2
    }
    pub fn global_batch() -> u32 {
        64
    }
    pub fn sample_every() -> u64 {
        50
    }
    pub fn checkpoint_every() -> u64 {
        500
    }
    // Eight workers at most, and parts that a processor still computes well.
    pub fn lanes() -> u32 {
        8
    }
    pub fn learning_rate() -> f64 {
        2e-4
    }
    pub fn beta1() -> f64 {
        0.5
    }
    pub fn beta2() -> f64 {
        0.999
    }
    // DDP's 25 MiB would be one bucket here; 4 MiB lets the last convolution's gradient leave
    // while the earlier layers are still in backward.
    pub fn bucket_bytes() -> u64 {
        4 << 20
    }
    pub fn ring_channels() -> u32 {
        2
    }
    // A step takes seconds on a slow CPU and a neighbour may be a whole phase behind.
    pub fn exchange_timeout_ms() -> u64 {
        60_000
    }
}

/// Why a run cannot be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No recipe has that name.
    #[error("there is no recipe '{name}'; recipes are {}", recipe_names())]
    UnknownRecipe {
        /// As typed.
        name: String,
    },
    /// A number lies outside its range.
    #[error("{key} is {value}, but must be {must_be}")]
    OutOfRange {
        /// The configuration key.
        key: &'static str,
        /// As given.
        value: String,
        /// The rule.
        must_be: &'static str,
    },
    /// Neither of global batch and shard count divides the other.
    #[error(
        "a global batch of {global_batch} does not go with {shards} shards: one must divide the other; \
         choose --global-batch accordingly or prepare the dataset with another --shards"
    )]
    BatchAndShards {
        /// Images per step.
        global_batch: u32,
        /// Shards of the dataset.
        shards: u32,
    },
    /// The dataset cannot fill one batch.
    #[error("the dataset has {images} images, too few for one global batch of {global_batch}")]
    TooFewImages {
        /// Usable images.
        images: u64,
        /// Images per step.
        global_batch: u32,
    },
    /// Images have another size or channel count than the recipe trains on.
    #[error(
        "recipe {recipe} trains on {expected}x{expected} colour images, but the dataset holds {found}; \
         prepare it again with --size {expected}"
    )]
    ImageShape {
        /// The recipe.
        recipe: Recipe,
        /// Side in pixels.
        expected: u32,
        /// What the dataset's manifest says, e.g. "32x32x3".
        found: String,
    },
    /// The document is not a run configuration.
    #[error("the run configuration cannot be read: {message}")]
    Malformed {
        /// The parser's words.
        message: String,
    },
}

fn recipe_names() -> String {
    Recipe::ALL.map(Recipe::name).join(", ")
}

fn rule(holds: bool, key: &'static str, value: String, must_be: &'static str) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::OutOfRange { key, value, must_be }) }
}

impl RunConfig {
    /// The configuration of `recipe` on `data` with every default.
    #[must_use]
    pub fn new(recipe: Recipe, data: impl Into<String>) -> Self {
        Self {
            recipe,
            data: data.into(),
            steps: None,
            epochs: defaults::epochs(),
            global_batch: defaults::global_batch(),
            workers: None,
            balance: false,
            seed: 0,
            sample_every: defaults::sample_every(),
            checkpoint_every: defaults::checkpoint_every(),
            keep_checkpoints: None,
            on_nan: OnNan::default(),
            batch_norm: BatchNorm::default(),
            precision: Precision::default(),
            exact: false,
            lanes: defaults::lanes(),
            learning_rate: defaults::learning_rate(),
            beta1: defaults::beta1(),
            beta2: defaults::beta2(),
            bucket_bytes: defaults::bucket_bytes(),
            ring_channels: defaults::ring_channels(),
            exchange_timeout_ms: defaults::exchange_timeout_ms(),
        }
    }

    /// Reads the JSON form and validates it.
    ///
    /// # Errors
    /// [`ConfigError::Malformed`] or a broken rule of [`RunConfig::validate`].
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(json)
            .map_err(|error| ConfigError::Malformed { message: error.to_string() })?;
        config.validate()?;
        Ok(config)
    }

    /// The JSON form, every default filled in.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a RunConfig has only string keys and finite numbers")
    }

    /// Checks the rules that need no dataset.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fraction = |x: f64| (0.0..1.0).contains(&x);
        rule(!self.data.is_empty(), "data", "empty".to_owned(), "the URL of a prepared dataset")?;
        rule(self.steps != Some(0), "steps", "0".to_owned(), "at least 1")?;
        rule(self.epochs > 0, "epochs", self.epochs.to_string(), "at least 1")?;
        rule(
            (1..=65_536).contains(&self.global_batch),
            "global_batch",
            self.global_batch.to_string(),
            "between 1 and 65536",
        )?;
        if let Some(workers) = self.workers {
            rule(
                workers > 0 && workers <= self.global_batch,
                "workers",
                workers.to_string(),
                "between 1 and the global batch",
            )?;
        }
        self.validate_exact()?;
        rule(
            !self.balance || self.batch_norm == BatchNorm::Sync,
            "batch_norm",
            "local".to_owned(),
            "sync with balance, where a worker may have few images to take statistics over",
        )?;
        rule(self.sample_every > 0, "sample_every", self.sample_every.to_string(), "at least 1")?;
        rule(self.checkpoint_every > 0, "checkpoint_every", self.checkpoint_every.to_string(), "at least 1")?;
        rule(self.keep_checkpoints != Some(0), "keep_checkpoints", "0".to_owned(), "at least 1")?;
        rule(
            self.learning_rate > 0.0 && self.learning_rate.is_finite(),
            "learning_rate",
            self.learning_rate.to_string(),
            "a positive number",
        )?;
        rule(fraction(self.beta1), "beta1", self.beta1.to_string(), "at least 0 and less than 1")?;
        rule(fraction(self.beta2), "beta2", self.beta2.to_string(), "at least 0 and less than 1")?;
        rule(
            (4_096..=1 << 30).contains(&self.bucket_bytes),
            "bucket_bytes",
            self.bucket_bytes.to_string(),
            "between 4096 and 1073741824",
        )?;
        rule(
            (1..=16).contains(&self.ring_channels),
            "ring_channels",
            self.ring_channels.to_string(),
            "between 1 and 16",
        )?;
        rule(
            (100..=3_600_000).contains(&self.exchange_timeout_ms),
            "exchange_timeout_ms",
            self.exchange_timeout_ms.to_string(),
            "between 100 and 3600000",
        )
    }

    /// The rules of exact mode.
    fn validate_exact(&self) -> Result<(), ConfigError> {
        if !self.exact {
            return Ok(());
        }
        rule(
            self.workers.is_none_or(|workers| workers <= self.lanes),
            "workers",
            self.workers.unwrap_or(0).to_string(),
            "at most as many as lanes in exact mode, where a worker has whole lanes",
        )?;
        rule(
            self.lanes > 0 && self.global_batch.is_multiple_of(self.lanes),
            "lanes",
            self.lanes.to_string(),
            "a divisor of the global batch",
        )?;
        rule(
            self.batch_norm == BatchNorm::Sync,
            "batch_norm",
            "local".to_owned(),
            "sync in exact mode, where the result must not depend on the workers",
        )
    }

    /// Checks the run against the dataset that it names and returns how slots are fed.
    ///
    /// # Errors
    /// Batch and shards that do not divide, too few images, images of another shape.
    pub fn slot_map(&self, dataset: &DatasetManifest) -> Result<SlotMap, ConfigError> {
        let size = self.recipe.image_size();
        if (dataset.height, dataset.width, dataset.channels) != (size, size, 3) {
            let found = format!("{}x{}x{}", dataset.height, dataset.width, dataset.channels);
            return Err(ConfigError::ImageShape { recipe: self.recipe, expected: size, found });
        }
        let shard_images: Vec<u64> = dataset.shards.iter().map(|shard| shard.images).collect();
        SlotMap::new(self.global_batch, self.seed, &shard_images)
    }

    /// Steps of the whole run, given the steps of one epoch.
    #[must_use]
    pub fn target_steps(&self, steps_per_epoch: u64) -> u64 {
        self.steps.unwrap_or(self.epochs * steps_per_epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trip_keeps_every_field() {
        let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
        config.steps = Some(7);
        config.workers = Some(3);
        assert_eq!(RunConfig::from_json(&config.to_json()), Ok(config));
    }

    #[test]
    fn precision_is_f32_unless_said_and_reads_as_people_write_it() {
        let with = |text: &str| {
            RunConfig::from_json(&format!(r#"{{"recipe":"dcgan-tiny","data":"file:///d"{text}}}"#))
        };
        assert_eq!(with("").unwrap().precision, Precision::F32);
        for (name, precision) in
            [("f32", Precision::F32), ("tf32", Precision::Tf32), ("bf16", Precision::Bf16)]
        {
            let config = with(&format!(r#","precision":"{name}""#)).unwrap();
            assert_eq!(config.precision, precision);
            assert!(config.to_json().contains(&format!(r#""precision":"{name}""#)), "{}", config.to_json());
        }
        let message = with(r#","precision":"fp16""#).unwrap_err().to_string();
        assert!(message.contains("fp16") && message.contains("bf16"), "{message}");
    }

    #[test]
    fn exact_mode_cannot_wait_for_more_workers_than_lanes() {
        let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
        (config.exact, config.workers) = (true, Some(9));
        let message = config.validate().unwrap_err().to_string();
        assert!(message.starts_with("workers is 9, but must be at most as many as lanes"), "{message}");
        config.workers = Some(8);
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn unknown_key_is_refused_by_name() {
        let error = RunConfig::from_json(r#"{"recipe":"dcgan-tiny","data":"file:///d","sede":1}"#);
        assert!(matches!(error, Err(ConfigError::Malformed { message }) if message.contains("sede")));
    }

    #[test]
    fn unknown_recipe_lists_the_known_ones() {
        let message = Recipe::from_name("dcgan").unwrap_err().to_string();
        assert!(message.contains("dcgan-celeba") && message.contains("dcgan-tiny"), "{message}");
    }

    #[test]
    fn each_broken_rule_names_its_key() {
        type Breakage = (&'static str, fn(&mut RunConfig));
        let broken: [Breakage; 6] = [
            ("steps", |c| c.steps = Some(0)),
            ("global_batch", |c| c.global_batch = 0),
            ("workers", |c| c.workers = Some(65)),
            ("learning_rate", |c| c.learning_rate = f64::NAN),
            ("beta1", |c| c.beta1 = 1.0),
            ("sample_every", |c| c.sample_every = 0),
        ];
        for (key, break_it) in broken {
            let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
            break_it(&mut config);
            match config.validate() {
                Err(ConfigError::OutOfRange { key: named, .. }) => assert_eq!(named, key),
                other => panic!("{key}: {other:?}"),
            }
        }
    }
}
