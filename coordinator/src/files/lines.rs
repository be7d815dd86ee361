//! [`LineFile`]: a text object that grows by lines. Objects cannot be appended to, so it is rewritten; the
//! time between rewrites grows with the size, which bounds the bytes written per second. Each rewrite replaces the
//! version before: a late one of a former coordinator would take lines away.

use std::time::Duration;

use bytes::Bytes;
use takuma_store::{Store, Version};
use tokio::time::Instant;

use super::fenced;
use super::persist::{Patience, persist};

/// A small file is at most so old in the store.
const SHORTEST_PERIOD: Duration = Duration::from_secs(2);
/// For every so many bytes the period grows by its shortest form: at most 128 KiB are rewritten per second.
const BYTES_PER_PERIOD: u64 = 256 << 10;
/// A file that grows fast is not waited for so long: each rewrite has at least an eighth of new lines, so all rewrites
/// together are some nine times the file.
const SHARE_THAT_WAITS: usize = 8;
const LEAST_THAT_WAITS: usize = 1 << 20;
/// Workers keep the lines until they are stored, and these are fewer than they can keep.
const MOST_THAT_WAITS: usize = 12 << 20;

/// The file's content and how much of it the store has.
#[derive(Debug)]
pub struct LineFile {
    object: String,
    content: Vec<u8>,
    stored_bytes: usize,
    /// None: there is no such object yet.
    version: Option<Version>,
    stored: Instant,
}

impl LineFile {
    /// Reads the object, if there is one.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn open(store: &Store, patience: &Patience, object: String) -> Result<Self, String> {
        let (content, version) = persist(patience, || store.get_versioned(&object)).await?.unzip();
        let content = content.unwrap_or_default();
        // A line without an end is a torn one.
        let whole = content.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let content = content[..whole].to_vec();
        Ok(Self { object, stored_bytes: content.len(), version, content, stored: Instant::now() })
    }

    /// Adds a line.
    pub fn push(&mut self, line: &impl serde::Serialize) {
        let json = serde_json::to_vec(line).expect("lines have only string keys");
        self.content.extend_from_slice(&json);
        self.content.push(b'\n');
    }

    /// Size of the content.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.content.len()
    }

    /// The lines.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.content.split(|&byte| byte == b'\n').filter(|line| !line.is_empty())
    }

    /// Keeps only the first `count` lines.
    pub fn truncate(&mut self, count: usize) {
        let lines = self.content.split_inclusive(|&byte| byte == b'\n');
        let kept = lines.filter(|line| *line != b"\n").take(count).collect::<Vec<_>>().concat();
        if kept.len() < self.content.len() {
            self.content = kept;
            // Whatever is added now, the store's version is another one.
            self.stored_bytes = usize::MAX;
        }
    }

    /// When it was stored last.
    #[must_use]
    pub fn stored(&self) -> Instant {
        self.stored
    }

    /// When the content should be stored next; `None` while the store has all of it.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let size = self.content.len();
        if self.stored_bytes == size {
            return None;
        }
        // All of it, if the store has lines that were cut off here.
        let unstored = size.checked_sub(self.stored_bytes).unwrap_or(size);
        if unstored >= (size / SHARE_THAT_WAITS).clamp(LEAST_THAT_WAITS, MOST_THAT_WAITS) {
            return Some(self.stored + SHORTEST_PERIOD);
        }
        let periods = 1 + size as u64 / BYTES_PER_PERIOD;
        let period = SHORTEST_PERIOD * u32::try_from(periods).unwrap_or(u32::MAX);
        Some(self.stored + period)
    }

    /// Stores the content, if the store lacks any of it; `false` if it had all.
    ///
    /// # Errors
    /// The store's last error, in words.
    pub async fn flush(&mut self, store: &Store, patience: &Patience) -> Result<bool, String> {
        if self.stored_bytes == self.content.len() {
            return Ok(false);
        }
        let content = Bytes::copy_from_slice(&self.content);
        // Another version is a late write of a former coordinator: these lines stand in its place, since its workers
        // send anew what is not among them.
        let (object, known) = (&self.object, self.version.as_ref());
        self.version = persist(patience, || fenced::write(store, object, &content, known, |_| false)).await?;
        self.stored_bytes = self.content.len();
        self.stored = Instant::now();
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn patience() -> Patience {
        let first_pause = Duration::from_millis(1);
        Patience { outage: Duration::from_secs(1), first_pause, hurry: CancellationToken::new() }
    }

    #[tokio::test]
    async fn a_torn_last_line_is_dropped_and_growth_is_kept() {
        let store = Store::memory();
        store.put("m", "1\n2\n{\"torn").await.unwrap();
        let mut file = LineFile::open(&store, &patience(), "m".to_owned()).await.unwrap();
        assert_eq!(file.due(), None);
        file.push(&3);
        file.flush(&store, &patience()).await.unwrap();
        assert_eq!(store.get("m").await.unwrap(), "1\n2\n3\n");
    }

    #[tokio::test]
    async fn truncation_reaches_the_store_even_at_equal_length() {
        let store = Store::memory();
        store.put("m", "1\n2\n").await.unwrap();
        let mut file = LineFile::open(&store, &patience(), "m".to_owned()).await.unwrap();
        file.truncate(1);
        file.push(&9);
        file.flush(&store, &patience()).await.unwrap();
        assert_eq!(store.get("m").await.unwrap(), "1\n9\n");
        file.truncate(0);
        assert_eq!(file.lines().count(), 0);
    }

    #[tokio::test]
    async fn empty_lines_do_not_count() {
        let store = Store::memory();
        store.put("m", "\n1\n\n2\n3\n").await.unwrap();
        let mut file = LineFile::open(&store, &patience(), "m".to_owned()).await.unwrap();
        file.truncate(2);
        assert_eq!(file.lines().collect::<Vec<_>>(), [b"1", b"2"]);
    }

    #[tokio::test]
    async fn a_late_write_of_a_former_coordinator_is_replaced() {
        let store = Store::memory();
        store.put("m", "1\n").await.unwrap();
        let mut file = LineFile::open(&store, &patience(), "m".to_owned()).await.unwrap();
        store.put("m", "1\n2, late\n").await.unwrap();
        file.push(&2);
        file.flush(&store, &patience()).await.unwrap();
        assert_eq!(store.get("m").await.unwrap(), "1\n2\n");
    }
}
