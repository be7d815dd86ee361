//! Objects of a run, read through the coordinator: into memory, into a file, or only to see that they are whole.

use std::io::Write;
use std::path::Path;

use sha2::{Digest, Sha256};
use takuma_proto::v1::{ObjectChunk, ReadObjectRequest};
use tempfile::NamedTempFile;
use tonic::Streaming;

use crate::client::Client;
use crate::error::CliError;
use crate::output;

/// The bytes of an object, chunk by chunk.
#[derive(Debug)]
pub struct Reading<'a> {
    client: &'a Client,
    name: String,
    chunks: Streaming<ObjectChunk>,
    received_bytes: u64,
    most_bytes: u64,
}

/// What an object is, whatever was done with its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Its size.
    pub size_bytes: u64,
    /// SHA-256, lower-case hex.
    pub sha256: String,
}

impl<'a> Reading<'a> {
    /// Begins to read an object; more than `most_bytes` is an error.
    ///
    /// # Errors
    /// There is no such object, or the coordinator cannot be reached.
    pub async fn open(
        client: &'a Client,
        run: &str,
        object: &str,
        most_bytes: u64,
    ) -> Result<Self, CliError> {
        let request = ReadObjectRequest { run: run.to_owned(), object: object.to_owned() };
        let chunks = client.call(client.control().read_object(request)).await?;
        let name = format!("{object} of run {run}");
        Ok(Self { client, name, chunks, received_bytes: 0, most_bytes })
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// The object is larger than told, or the connection broke.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, CliError> {
        let chunk = self.client.within(self.chunks.message()).await?;
        let Some(chunk) = chunk.map_err(|status| self.client.refused(status))? else { return Ok(None) };
        self.received_bytes += chunk.data.len() as u64;
        if self.received_bytes > self.most_bytes {
            return Err(CliError::failed(format!("{} is larger than told; try again", self.name)));
        }
        Ok(Some(chunk.data))
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// As [`Reading::next`].
    pub async fn whole(mut self) -> Result<Vec<u8>, CliError> {
        let mut content = Vec::new();
        while let Some(bytes) = self.next().await? {
            content.extend(bytes);
        }
        Ok(content)
    }

    /// Reads to the end and keeps nothing.
    ///
    /// # Errors
    /// As [`Reading::next`].
    pub async fn fingerprint(self) -> Result<Fingerprint, CliError> {
        self.drain(|_| Ok(())).await
    }

    /// Reads into a file beside its later place: whole or not at all, and a rename replaces a link instead of
    /// following it out of the folder.
    ///
    /// # Errors
    /// As [`Reading::next`], or the folder cannot be written.
    pub async fn into_folder(self, dir: &Path) -> Result<(NamedTempFile, Fingerprint), CliError> {
        let failed = |error| CliError::io(format_args!("write into {}", dir.display()), error);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".takuma-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let mut part = builder.tempfile_in(dir).map_err(failed)?;
        let fingerprint = self.drain(|bytes| part.write_all(bytes).map_err(failed)).await?;
        Ok((part, fingerprint))
    }

    async fn drain(
        mut self,
        mut take: impl FnMut(&[u8]) -> Result<(), CliError>,
    ) -> Result<Fingerprint, CliError> {
        let mut hasher = Sha256::new();
        while let Some(bytes) = self.next().await? {
            hasher.update(&bytes);
            take(&bytes)?;
        }
        let sha256 = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Fingerprint { size_bytes: self.received_bytes, sha256 })
    }
}

/// The name itself if it is one of a file in its folder: what a server says must not choose the place.
///
/// # Errors
/// It is not.
pub fn plain_name(name: &str) -> Result<&str, CliError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with('.') || name.len() > 128 || !name.chars().all(allowed) {
        let shown = output::visible(name);
        return Err(CliError::failed(format!(
            "the coordinator names a file '{shown}', which is not a plain file name; nothing was written for it"
        )));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_file_names_are_accepted() {
        for name in ["step-000050.png", "reals.png", "cost_vs_iteration.png", "calm-otter-3"] {
            assert_eq!(plain_name(name).unwrap(), name);
        }
        for name in ["", ".", "..", "../x.png", "/etc/passwd", "a/b.png", "a\\b", ".bashrc", "x\0.png", "a\n"]
        {
            assert!(plain_name(name).is_err(), "{name:?}");
        }
    }
}
