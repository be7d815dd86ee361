//! [`write`]: an object is written in place of the version that this coordinator knows, and of no other.
//!
//! A coordinator that was stopped in the middle of a write and goes on minutes later, or whose last packets were slow,
//! must not undo what its successor wrote. The lease holds back writes that are not begun; those that are begun lose,
//! because the successor has made another version since.

use bytes::Bytes;
use takuma_store::{Store, StoreError, Version};

/// Writes `content` in place of the version `known`; none is known of an object that is not there yet. Returns the new
/// version.
///
/// Where another version lies, it may be this very write, which landed although it was answered by an error: then it
/// is done. Otherwise `give_way` looks at it and says whether it stays; then nothing is written, and `None` is
/// returned. An object that somebody removed is made again.
///
/// # Errors
/// The store's answer. It may have been done all the same; the call can be repeated as it is.
pub async fn write(
    store: &Store,
    object: &str,
    content: &Bytes,
    known: Option<&Version>,
    give_way: impl Fn(&[u8]) -> bool,
) -> Result<Option<Version>, StoreError> {
    let written = match known {
        Some(known) => store.replace_versioned(object, content.clone(), known).await?,
        None => store.create_versioned(object, content.clone()).await?,
    };
    if written.is_some() {
        return Ok(written);
    }
    let written = match store.get_versioned(object).await? {
        None => store.create_versioned(object, content.clone()).await?,
        Some((present, version)) if present == *content => Some(version),
        // A store may answer "conflict" to a write that met another one, which came to nothing.
        Some((present, version)) if known != Some(&version) && give_way(&present) => return Ok(None),
        Some((_, version)) => store.replace_versioned(object, content.clone(), &version).await?,
    };
    let busy = || StoreError::Busy { action: "write", url: format!("{}/{object}", store.url()) };
    written.map(Some).ok_or_else(busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn known(store: &Store, object: &str) -> Version {
        store.get_versioned(object).await.unwrap().unwrap().1
    }

    #[tokio::test]
    async fn the_known_version_is_replaced_and_a_removed_object_is_made_again() {
        let store = Store::memory();
        let one = write(&store, "x", &"1".into(), None, |_| true).await.unwrap().unwrap();
        let two = write(&store, "x", &"2".into(), Some(&one), |_| true).await.unwrap().unwrap();
        assert_eq!((store.get("x").await.unwrap(), known(&store, "x").await), ("2".into(), two.clone()));
        store.delete("x").await.unwrap();
        write(&store, "x", &"3".into(), Some(&two), |_| true).await.unwrap().unwrap();
        assert_eq!(store.get("x").await.unwrap(), "3");
    }

    #[tokio::test]
    async fn another_version_is_shown_before_it_is_replaced_or_stays() {
        let store = Store::memory();
        let old = write(&store, "x", &"old".into(), None, |_| true).await.unwrap();
        store.put("x", "theirs").await.unwrap();
        let asked = write(&store, "x", &"ours".into(), old.as_ref(), |present| present == b"theirs").await;
        assert_eq!(asked.unwrap(), None);
        assert_eq!(store.get("x").await.unwrap(), "theirs");
        write(&store, "x", &"ours".into(), old.as_ref(), |_| false).await.unwrap().unwrap();
        assert_eq!(store.get("x").await.unwrap(), "ours");
    }

    #[tokio::test]
    async fn a_write_that_landed_unheard_is_found() {
        let store = Store::memory();
        let old = write(&store, "x", &"old".into(), None, |_| true).await.unwrap();
        store.put("x", "new").await.unwrap();
        let again = write(&store, "x", &"new".into(), old.as_ref(), |_| true).await.unwrap();
        assert_eq!(again, Some(known(&store, "x").await));
    }
}
