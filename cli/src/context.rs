//! Which coordinator to talk to: `--coordinator`, else `TAKUMA_COORDINATOR`, else that of the last `takuma up`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::CliError;

/// Where `takuma up` listens unless told otherwise, and where commands look when nothing was saved.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7070";

/// The environment variable beside `--coordinator`.
pub const COORDINATOR_VARIABLE: &str = "TAKUMA_COORDINATOR";

/// `--coordinator`, the same on every command that talks to one.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CoordinatorArgs {
    /// The coordinator's address [env: TAKUMA_COORDINATOR] [default: that of the last `takuma up`]
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub coordinator: Option<String>,
}

/// What `takuma up` leaves for the commands after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// `http://HOST:PORT`.
    pub coordinator: String,
}

/// An address, and who named it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// `http://HOST:PORT`.
    pub url: String,
    /// In words, for errors: "from --coordinator".
    pub origin: String,
}

impl Context {
    /// Where the context lies: `~/.config/takuma/context.toml` on Linux.
    #[must_use]
    pub fn file() -> Option<PathBuf> {
        let folders = directories::ProjectDirs::from("", "", "takuma")?;
        Some(folders.config_dir().join("context.toml"))
    }

    /// Reads the saved context; `None` where there is none.
    ///
    /// # Errors
    /// The file is there but cannot be read or understood.
    pub fn load(file: &Path) -> Result<Option<Self>, CliError> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CliError::io(format_args!("read {}", file.display()), error)),
        };
        toml::from_str(&text).map(Some).map_err(|error| {
            let why = error.message();
            CliError::failed(format!(
                "{} is damaged ({why}); delete it, or start 'takuma up' again",
                file.display()
            ))
        })
    }

    /// Writes the context in one piece.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn save(&self, file: &Path) -> Result<(), CliError> {
        let failed = |error| CliError::io(format_args!("write {}", file.display()), error);
        let folder = file.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(failed)?;
        let text = toml::to_string(self).map_err(CliError::from_source)?;
        let mut part = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        std::io::Write::write_all(&mut part, text.as_bytes()).map_err(failed)?;
        part.persist(file).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

/// The address that flag, environment and saved context agree on, in this order.
///
/// # Errors
/// It is not `HOST:PORT` or `http://HOST:PORT`, or the saved context is damaged.
pub fn resolve(flag: Option<&str>, variable: Option<&str>, file: Option<&Path>) -> Result<Address, CliError> {
    if let Some(given) = flag {
        return Address::parse(given, "from --coordinator");
    }
    if let Some(given) = variable.filter(|given| !given.is_empty()) {
        return Address::parse(given, &format!("from {COORDINATOR_VARIABLE}"));
    }
    if let Some(file) = file
        && let Some(context) = Context::load(file)?
    {
        return Address::parse(&context.coordinator, "of the last 'takuma up'");
    }
    Address::parse(DEFAULT_LISTEN, "the default")
}

impl CoordinatorArgs {
    /// The address to talk to.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn address(&self) -> Result<Address, CliError> {
        let variable = std::env::var(COORDINATOR_VARIABLE).ok();
        resolve(self.coordinator.as_deref(), variable.as_deref(), Context::file().as_deref())
    }
}

impl Address {
    /// Reads `HOST:PORT` or `http://HOST:PORT`.
    ///
    /// # Errors
    /// [`CliError::Usage`] with the form that is meant.
    pub fn parse(given: &str, origin: &str) -> Result<Self, CliError> {
        let refused = |why: &str| {
            CliError::Usage(format!(
                "the coordinator's address '{given}' ({origin}) {why}; give it as HOST:PORT, for example {DEFAULT_LISTEN}"
            ))
        };
        let with_scheme = if given.contains("://") { given.to_owned() } else { format!("http://{given}") };
        let url = url::Url::parse(&with_scheme).map_err(|_| refused("cannot be read"))?;
        if url.scheme() != "http" {
            return Err(refused(&format!(
                "has the scheme '{}', but takuma speaks plain http/2",
                url.scheme()
            )));
        }
        let (Some(host), Some(port)) = (url.host_str(), url.port()) else {
            return Err(refused("lacks a host or a port"));
        };
        if !matches!(url.path(), "" | "/") {
            return Err(refused("has a path"));
        }
        Ok(Self { url: format!("http://{host}:{port}"), origin: origin.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(url: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("takuma/context.toml");
        Context { coordinator: url.to_owned() }.save(&file).unwrap();
        (folder, file)
    }

    #[test]
    fn flag_beats_variable_beats_saved_context() {
        let (_folder, file) = saved("http://127.0.0.1:1");
        let url = |flag, variable| resolve(flag, variable, Some(&file)).unwrap().url;
        assert_eq!(url(Some("h:3"), Some("h:2")), "http://h:3");
        assert_eq!(url(None, Some("h:2")), "http://h:2");
        assert_eq!(url(None, Some("")), "http://127.0.0.1:1");
        assert_eq!(url(None, None), "http://127.0.0.1:1");
    }

    #[test]
    fn nothing_saved_means_the_default_port() {
        let missing = Path::new("/nonexistent/context.toml");
        assert_eq!(resolve(None, None, Some(missing)).unwrap().url, "http://127.0.0.1:7070");
    }

    #[test]
    fn damaged_context_names_file_and_remedy() {
        let (_folder, file) = saved("http://127.0.0.1:1");
        std::fs::write(&file, "coordinator = 3").unwrap();
        let message = resolve(None, None, Some(&file)).unwrap_err().to_string();
        assert!(message.contains("context.toml") && message.contains("delete it"), "{message}");
    }

    #[test]
    fn addresses_without_port_or_with_other_schemes_are_refused() {
        for given in ["localhost", "https://h:1", "http://h:1/x", "", "http://"] {
            let error = Address::parse(given, "from --coordinator").unwrap_err();
            assert!(
                matches!(&error, CliError::Usage(message) if message.contains("HOST:PORT")),
                "{given}: {error}"
            );
        }
        assert_eq!(Address::parse("[::1]:7070", "x").unwrap().url, "http://[::1]:7070");
    }
}
