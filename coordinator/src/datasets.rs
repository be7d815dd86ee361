//! What the coordinator reads of datasets: their manifests.

use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest};
use takuma_core::event::Refusal;
use takuma_core::layout;
use takuma_store::Store;

use crate::status::refusal_of_store;

/// Reads the manifest of the dataset at a URL, through the coordinator's own store if it lies there; also returns the URL
/// in full, as workers elsewhere need it.
///
/// # Errors
/// No such dataset, with the command that makes one; an unreadable manifest; a store that does not answer.
pub async fn read_manifest(own: &Store, url: &str) -> Result<(DatasetManifest, String), Refusal> {
    let store = match url.strip_prefix(own.url()).and_then(|rest| rest.strip_prefix('/')) {
        Some(folder) if is_plain(folder) => own.at(folder),
        _ => Store::open(url).map_err(|error| refusal_of_store(&error))?,
    };
    let found = store.get_if_exists(layout::MANIFEST_FILE).await.map_err(|error| refusal_of_store(&error))?;
    let Some(json) = found else {
        let url = store.url();
        return Err(Refusal::NotFound(format!(
            "there is no dataset at {url}: prepare one with 'takuma dataset prepare SRC {url}'"
        )));
    };
    let unreadable = |reason: String| {
        Refusal::Invalid(format!(
            "the dataset's manifest {}/{} cannot be read: {reason}; prepare the dataset again",
            store.url(),
            layout::MANIFEST_FILE
        ))
    };
    let manifest: DatasetManifest =
        serde_json::from_slice(&json).map_err(|error| unreadable(error.to_string()))?;
    if manifest.format != DATASET_FORMAT {
        let found = manifest.format;
        return Err(unreadable(format!(
            "it has format {found}, but this takuma reads format {DATASET_FORMAT}"
        )));
    }
    Ok((manifest, store.url().to_owned()))
}

/// Whether a path says the same to every store: names and slashes.
fn is_plain(path: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    path.split('/').all(|name| !matches!(name, "" | "." | "..") && name.bytes().all(is_plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_dataset_is_told_with_the_command_that_makes_one() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}", folder.path().join("faces").display());
        let refusal = read_manifest(&Store::memory(), &url).await.unwrap_err();
        let told =
            format!("there is no dataset at {url}: prepare one with 'takuma dataset prepare SRC {url}'");
        assert_eq!(refusal, Refusal::NotFound(told));
    }

    #[test]
    fn only_plain_paths_are_read_through_the_coordinators_own_store() {
        assert!(is_plain("datasets/celeba-64_v1.0"));
        for path in ["", "a//b", "a/", "../a", "a/./b", "a%20b", "a?b"] {
            assert!(!is_plain(path), "{path}");
        }
    }

    #[tokio::test]
    async fn a_manifest_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("manifest.json"), "{}").unwrap();
        let refusal = read_manifest(&Store::memory(), folder.path().to_str().unwrap()).await.unwrap_err();
        assert!(matches!(&refusal, Refusal::Invalid(text) if text.contains("missing field")), "{refusal}");
    }
}
