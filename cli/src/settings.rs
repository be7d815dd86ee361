//! A run's settings from every source into one [`RunConfig`]: file < environment < flags < `--set`.
//!
//! Keys and their types are read off [`RunConfig`] itself, so that a key added there is known here.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use takuma_core::config::{ConfigError, Recipe, RunConfig};

/// Environment variables of this prefix are settings: `TAKUMA_RUN_STEPS=300`.
pub const VARIABLE_PREFIX: &str = "TAKUMA_RUN_";

/// Two keys at least this alike (Jaro-Winkler, 0 to 1) are taken for a slip of the finger.
const ALIKE: f64 = 0.75;

/// Why the settings make no run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// No such key.
    #[error("unknown key '{key}' {origin}; {}", suggestion(key))]
    UnknownKey {
        /// As given.
        key: String,
        /// Where, in words: "in run.toml".
        origin: String,
    },
    /// A value of another type.
    #[error("{key} is {value} {origin}, but must be {must_be}")]
    WrongType {
        /// The configuration key.
        key: String,
        /// As given.
        value: String,
        /// Where, in words.
        origin: String,
        /// The type, in words.
        must_be: &'static str,
    },
    /// `--set` without `=`.
    #[error("--set '{given}' has no '='; write --set KEY=VALUE, for example --set learning_rate=0.0001")]
    NoEquals {
        /// As given.
        given: String,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    Unreadable {
        /// Its path.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line} is not valid TOML: {message}", file.display())]
    NotToml {
        /// Its path.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// The parser's words.
        message: String,
    },
    /// A key without which there is no run.
    #[error("{0}")]
    Missing(&'static str),
    /// No recipe has that name.
    #[error("there is no recipe '{name}' {origin}; {}", recipe_suggestion(name))]
    UnknownRecipe {
        /// As given.
        name: String,
        /// Where, in words.
        origin: String,
    },
    /// A local path that cannot be made absolute.
    #[error("'{path}' is not a usable path: {reason}")]
    Path {
        /// As given.
        path: String,
        /// Why.
        reason: String,
    },
    /// A value out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The settings of one source.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    origin: String,
    values: Map<String, Value>,
    /// What a relative `data` path is relative to; none = the current folder.
    folder: Option<PathBuf>,
}

/// Every key that a run has, with a value of its type.
fn template() -> Map<String, Value> {
    let mut config = RunConfig::new(Recipe::DcganCeleba, "");
    // Keys left out where they are none are keys all the same.
    config.steps = Some(1);
    config.workers = Some(1);
    config.keep_checkpoints = Some(1);
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        other => unreachable!("a RunConfig is a JSON object, not {other:?}"),
    }
}

/// Every key that a run has.
#[must_use]
pub fn known_keys() -> Vec<String> {
    template().into_iter().map(|(key, _)| key).collect()
}

fn suggestion(key: &str) -> String {
    let keys = known_keys();
    match nearest(key, keys.iter().map(String::as_str)) {
        Some(near) => format!("did you mean '{near}'?"),
        None => format!("the keys are {}", keys.join(", ")),
    }
}

fn recipe_suggestion(name: &str) -> String {
    let names = Recipe::ALL.map(Recipe::name);
    match nearest(name, names.into_iter()) {
        Some(near) => format!("did you mean '{near}'? (recipes are {})", names.join(", ")),
        None => format!("recipes are {}", names.join(", ")),
    }
}

fn nearest<'a>(word: &str, among: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    among
        .map(|known| (strsim::jaro_winkler(&word, &known.replace('-', "_")), known))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

impl Layer {
    /// A source without settings yet; `origin` in words, as it stands in errors: "in run.toml".
    #[must_use]
    pub fn new(origin: impl Into<String>) -> Self {
        Self { origin: origin.into(), ..Self::default() }
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, or has a key or type that a run has not.
    pub fn from_file(file: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| SettingsError::Unreadable { file: file.to_owned(), source })?;
        let document: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
            SettingsError::NotToml { file: file.to_owned(), line, message: one_line(error.message()) }
        })?;
        let mut layer = Self::new(format!("in {}", file.display()));
        for (key, value) in document {
            let shown = value.to_string();
            let value = serde_json::to_value(value).unwrap_or(Value::Null);
            layer.insert(&key, value, &shown)?;
        }
        layer.folder = std::path::absolute(file).ok().and_then(|file| file.parent().map(Path::to_owned));
        Ok(layer)
    }

    /// Takes the variables that begin with [`VARIABLE_PREFIX`].
    ///
    /// # Errors
    /// A variable of that prefix that is no key, or of another type.
    pub fn from_environment(
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<Self, SettingsError> {
        let mut layer = Self::default();
        for (name, value) in variables {
            if let Some(key) = name.strip_prefix(VARIABLE_PREFIX) {
                layer.origin = format!("in the environment ({name})");
                layer.insert_text(&key.to_lowercase(), &value)?;
            }
        }
        layer.origin = "in the environment".to_owned();
        Ok(layer)
    }

    /// Takes the `KEY=VALUE` pairs of `--set`.
    ///
    /// # Errors
    /// A pair without `=`, an unknown key, or a value of another type.
    pub fn from_pairs(pairs: &[String]) -> Result<Self, SettingsError> {
        let mut layer = Self::new("in --set");
        for pair in pairs {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| SettingsError::NoEquals { given: pair.clone() })?;
            layer.insert_text(key.trim(), value.trim())?;
        }
        Ok(layer)
    }

    /// Takes every setting of a configuration.
    #[must_use]
    pub fn from_config(config: &RunConfig, origin: impl Into<String>) -> Self {
        let values = serde_json::to_value(config).ok().and_then(|value| value.as_object().cloned());
        Self { values: values.unwrap_or_default(), ..Self::new(origin) }
    }

    /// Sets a key from text: a number, or true or false, where the key's type is one.
    ///
    /// # Errors
    /// An unknown key, or text that is none of its type.
    pub fn insert_text(&mut self, key: &str, text: &str) -> Result<(), SettingsError> {
        let plain = matches!(template().get(key), Some(Value::Number(_) | Value::Bool(_)));
        let parsed = if plain { serde_json::from_str(text).ok() } else { None };
        self.insert(key, parsed.unwrap_or_else(|| Value::String(text.to_owned())), &format!("'{text}'"))
    }

    /// Sets a key.
    ///
    /// # Errors
    /// An unknown key, or a value of another type; `shown` is the value as the error shows it.
    pub fn insert(&mut self, key: &str, value: Value, shown: &str) -> Result<(), SettingsError> {
        let Some(model) = template().remove(key) else {
            return Err(SettingsError::UnknownKey { key: key.to_owned(), origin: self.origin.clone() });
        };
        let (fits, must_be) = match &model {
            Value::Number(number) if number.is_u64() => (value.is_u64(), "a whole number, 0 or more"),
            Value::Number(_) => (value.is_number(), "a number"),
            Value::Bool(_) => (value.is_boolean(), "true or false"),
            _ => (value.is_string(), "text"),
        };
        if !fits {
            return Err(SettingsError::WrongType {
                key: key.to_owned(),
                value: shown.to_owned(),
                origin: self.origin.clone(),
                must_be,
            });
        }
        self.values.insert(key.to_owned(), value);
        Ok(())
    }
}

/// Joins the layers, later ones winning, and checks the whole.
///
/// A layer that says `epochs` without `steps` also drops the `steps` of those before it: the last
/// word on the run's length counts.
///
/// # Errors
/// Recipe or data missing, an unknown recipe, or a rule of [`RunConfig::validate`] broken.
pub fn resolve(layers: &[Layer]) -> Result<RunConfig, SettingsError> {
    let mut all = Map::new();
    let mut recipe_origin = String::new();
    for layer in layers {
        if layer.values.contains_key("epochs") && !layer.values.contains_key("steps") {
            all.remove("steps");
        }
        for (key, value) in &layer.values {
            let value = match (key.as_str(), value.as_str()) {
                ("data", Some(data)) => Value::String(data_url(data, layer.folder.as_deref())?),
                ("recipe", _) => {
                    recipe_origin.clone_from(&layer.origin);
                    value.clone()
                }
                _ => value.clone(),
            };
            all.insert(key.clone(), value);
        }
    }
    let Some(recipe) = all.get("recipe").and_then(Value::as_str) else {
        return Err(SettingsError::Missing(
            "no recipe: name one, as in 'takuma run submit dcgan-celeba --data URL' (recipes are dcgan-celeba, dcgan-tiny)",
        ));
    };
    if Recipe::from_name(recipe).is_err() {
        return Err(SettingsError::UnknownRecipe { name: recipe.to_owned(), origin: recipe_origin });
    }
    if !all.contains_key("data") {
        return Err(SettingsError::Missing(
            "no data: give --data URL of a prepared dataset ('takuma dataset synth DST --count 5000' makes one)",
        ));
    }
    let json = Value::Object(all).to_string();
    Ok(RunConfig::from_json(&json)?)
}

/// The dataset's URL: a path without a scheme becomes an absolute `file://` URL, since coordinator and
/// workers have other current folders than the person who types.
fn data_url(given: &str, folder: Option<&Path>) -> Result<String, SettingsError> {
    if given.is_empty() || given.contains("://") {
        return Ok(given.trim_end_matches('/').to_owned());
    }
    let refused = |reason: String| SettingsError::Path { path: given.to_owned(), reason };
    let joined = folder.map_or_else(|| PathBuf::from(given), |folder| folder.join(given));
    let absolute = std::path::absolute(joined).map_err(|error| refused(error.to_string()))?;
    let url = url::Url::from_file_path(&absolute).map_err(|()| refused("it is not absolute".to_owned()))?;
    // Parsed once more, because only that takes `..` out, and store URLs cannot hold it.
    let url = url::Url::parse(url.as_str()).map_err(|error| refused(error.to_string()))?;
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// A configuration as the TOML that `--config` would read.
///
/// # Errors
/// None in practice: a configuration has only plain values.
pub fn to_toml(config: &RunConfig) -> Result<String, crate::error::CliError> {
    toml::to_string(config).map_err(crate::error::CliError::from_source)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
