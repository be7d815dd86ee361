//! TensorBoard event files: TFRecord framing around the three messages that scalars and images need.
//!
//! Object stores cannot append, so every flush is a new file; TensorBoard reads all files of a folder in
//! the order of their names. Its page shows a sample of the images of a tag unless it is started with
//! `--samples_per_plugin images=0`; the files hold every one.
//!
//! # Source
//! TensorFlow's `record_writer.h`, `event.proto` and `summary.proto` (field numbers).

use prost::Message;

/// Added to a rotated checksum so that a checksum of data that holds checksums stays useful.
const MASK_DELTA: u32 = 0xa282_ead8;

/// Length, its checksum, and the message's checksum.
const RECORD_OVERHEAD: usize = 8 + 4 + 4;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.START`: TensorBoard forgets what it read of this step and later ones.
const SESSION_START: i32 = 1;
/// RGB.
const COLORSPACE_RGB: i32 = 3;

/// The content of an event file that is being filled.
#[derive(Debug, Default)]
pub struct EventFile {
    records: Vec<u8>,
}

impl EventFile {
    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Adds scalars of one step.
    pub fn scalars(&mut self, wall_time: f64, step: u64, scalars: &[(&str, f64)]) {
        let value = scalars
            .iter()
            .map(|&(tag, value)| Value { tag: tag.to_owned(), simple_value: Some(value as f32), image: None })
            .collect();
        self.add(Event { summary: Some(Summary { value }), ..event(wall_time, step) });
    }

    /// Adds a PNG.
    pub fn image(&mut self, wall_time: f64, step: u64, tag: &str, size: (u32, u32), png: Vec<u8>) {
        let (height, width) = (size.0 as i32, size.1 as i32);
        let image = Image { height, width, colorspace: COLORSPACE_RGB, encoded: png };
        let value = vec![Value { tag: tag.to_owned(), simple_value: None, image: Some(image) }];
        self.add(Event { summary: Some(Summary { value }), ..event(wall_time, step) });
    }

    /// Lets TensorBoard forget this step and later ones: the run goes on from before.
    pub fn restart(&mut self, wall_time: f64, step: u64) {
        let session_log = Some(SessionLog { status: SESSION_START });
        self.add(Event { session_log, ..event(wall_time, step) });
    }

    /// The file's bytes; a new file is begun.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.records)
    }

    fn add(&mut self, added: Event) {
        if self.records.is_empty() {
            let version = Some("brain.Event:2".to_owned());
            frame(&mut self.records, &Event { file_version: version, ..event(added.wall_time, 0) });
        }
        frame(&mut self.records, &added);
    }
}

/// The file without the events after a step, or `None` if it has none of them. A file that would be left with
/// nothing but its version is empty. What cannot be parsed is kept: it is not ours to judge.
#[must_use]
pub fn without_later(file: &[u8], step: u64) -> Option<Vec<u8>> {
    let last = i64::try_from(step).unwrap_or(i64::MAX);
    let (mut kept, mut kept_events, mut dropped) = (Vec::new(), 0, 0);
    let mut rest = file;
    while let Some((record, data, after)) = next_record(rest) {
        let event = Event::decode(data).ok()?;
        if event.step > last {
            dropped += 1;
        } else {
            kept.extend_from_slice(record);
            kept_events += usize::from(event.file_version.is_none());
        }
        rest = after;
    }
    let whole = rest.is_empty() && dropped > 0;
    whole.then(|| if kept_events == 0 { Vec::new() } else { kept })
}

/// The first record, its message, and what comes after it.
fn next_record(file: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let length = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    let end = usize::try_from(length).ok()?.checked_add(RECORD_OVERHEAD)?;
    let record = file.get(..end)?;
    Some((record, &record[12..end - 4], &file[end..]))
}

fn event(wall_time: f64, step: u64) -> Event {
    let step = i64::try_from(step).unwrap_or(i64::MAX);
    Event { wall_time, step, file_version: None, summary: None, session_log: None }
}

/// Length, its checksum, the message, its checksum; all little-endian.
fn frame(out: &mut Vec<u8>, event: &Event) {
    let data = event.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(&data);
    out.extend_from_slice(&masked_crc(&data).to_le_bytes());
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(MASK_DELTA)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_record_is_the_one_that_tensorboard_writes() {
        // The first record of a file of tensorboard 2.20's EventFileWriter, with wall time 0.
        let mut file = EventFile::default();
        file.scalars(0.0, 1, &[("d_loss", 0.5)]);
        let records = file.take();
        assert_eq!(u64::from_le_bytes(records[..8].try_into().unwrap()), 15);
        assert_eq!(&records[12..27], b"\x1a\x0dbrain.Event:2");
        assert!(file.is_empty());
    }

    #[test]
    fn later_steps_are_cut_and_the_rest_is_kept_to_the_byte() {
        let mut file = EventFile::default();
        file.scalars(0.0, 1, &[("d_loss", 0.5)]);
        let first = file.records.clone();
        file.image(0.0, 2, "samples", (1, 1), vec![1, 2, 3]);
        let both = file.take();
        assert_eq!(without_later(&both, 2), None);
        assert_eq!(without_later(&both, 1), Some(first));
        assert_eq!(without_later(&both, 0), Some(Vec::new()));
        assert_eq!(without_later(&both[..both.len() - 1], 0), None, "a torn file is left alone");
    }

    #[test]
    fn checksums_are_masked_crc32c() {
        // RFC 3720 B.4: the CRC-32C of 32 zero bytes is 8a9136aa.
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(MASK_DELTA));
    }
}
