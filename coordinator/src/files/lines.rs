//! [`LineFile`]: a text object that grows by lines. Objects cannot be appended to, so it is rewritten; the
//! time between rewrites grows with the size, which bounds the bytes written per second.

use std::time::Duration;

use bytes::Bytes;
use takuma_store::Store;
use tokio::time::Instant;

use super::persist::{Patience, persist};

/// A small file is at most so old in the store.
const SHORTEST_PERIOD: Duration = Duration::from_secs(2);
/// For every so many bytes the period grows by its shortest form: at most 128 KiB are rewritten per second.
const BYTES_PER_PERIOD: u64 = 256 << 10;

/// The file's content and how much of it the store has.
#[derive(Debug)]
pub struct LineFile {
    object: &'static str,
    content: Vec<u8>,
    stored_bytes: usize,
    stored: Instant,
}

impl LineFile {
    /// Reads the object, if there is one.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn open(store: &Store, patience: &Patience, object: &'static str) -> Result<Self, String> {
        let content = persist(patience, || store.get_if_exists(object)).await?.unwrap_or_default();
        // A line without an end is a torn one.
        let whole = content.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let content = content[..whole].to_vec();
        Ok(Self { object, stored_bytes: content.len(), content, stored: Instant::now() })
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
        let ends = self.content.iter().enumerate().filter(|&(_, &byte)| byte == b'\n').map(|(at, _)| at + 1);
        let keep = if count == 0 { 0 } else { ends.into_iter().nth(count - 1).unwrap_or(self.content.len()) };
        if keep < self.content.len() {
            self.content.truncate(keep);
            // Whatever is added now, the store's version is another one.
            self.stored_bytes = usize::MAX;
        }
    }

    /// When the content should be stored next; `None` while the store has all of it.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let periods = 1 + self.content.len() as u64 / BYTES_PER_PERIOD;
        let period = SHORTEST_PERIOD * u32::try_from(periods).unwrap_or(u32::MAX);
        (self.stored_bytes != self.content.len()).then(|| self.stored + period)
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
        persist(patience, || store.put(self.object, content.clone())).await?;
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
        let mut file = LineFile::open(&store, &patience(), "m").await.unwrap();
        assert_eq!(file.due(), None);
        file.push(&3);
        file.flush(&store, &patience()).await.unwrap();
        assert_eq!(store.get("m").await.unwrap(), "1\n2\n3\n");
    }

    #[tokio::test]
    async fn truncation_reaches_the_store_even_at_equal_length() {
        let store = Store::memory();
        store.put("m", "1\n2\n").await.unwrap();
        let mut file = LineFile::open(&store, &patience(), "m").await.unwrap();
        file.truncate(1);
        file.push(&9);
        file.flush(&store, &patience()).await.unwrap();
        assert_eq!(store.get("m").await.unwrap(), "1\n9\n");
        file.truncate(0);
        assert_eq!(file.lines().count(), 0);
    }
}
