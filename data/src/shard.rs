//! One shard: a safetensors file with a single tensor `images`, uint8 `[images, size, size, 3]`.

use std::ops::Range;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use takuma_core::dataset::ShardEntry;

/// Name of the one tensor.
const TENSOR: &str = "images";

/// The bytes before the pixels. The format wants the header's length, the header in JSON, and spaces so
/// that the data begin at a multiple of 8.
pub(crate) fn header(images: u64, size: u32) -> Vec<u8> {
    let data_bytes = images * 3 * u64::from(size) * u64::from(size);
    let mut json = format!(
        r#"{{"{TENSOR}":{{"dtype":"U8","shape":[{images},{size},{size},3],"data_offsets":[0,{data_bytes}]}}}}"#
    )
    .into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    bytes
}

/// Where image `index` lies in a shard's object, in bytes; the error says in words why that cannot be told.
/// Holds for shards that begin with our own [`header`], as all that we write do.
pub(crate) fn image_range(entry: &ShardEntry, shape: [u64; 3], index: u32) -> Result<Range<u64>, String> {
    let [height, width, channels] = shape;
    let image_bytes = height.checked_mul(width).and_then(|pixels| pixels.checked_mul(channels));
    let data_bytes = image_bytes.and_then(|bytes| bytes.checked_mul(entry.images));
    if let (Some(image_bytes), Some(data_bytes), true) = (image_bytes, data_bytes, height == width)
        && data_bytes <= entry.size_bytes
        && channels == 3
    {
        let header_bytes = header(entry.images, height as u32).len() as u64;
        if header_bytes + data_bytes == entry.size_bytes {
            let begin = header_bytes + u64::from(index) * image_bytes;
            return Ok(begin..begin + image_bytes);
        }
    }
    let ShardEntry { file, images, size_bytes, .. } = entry;
    Err(format!("{file} with {size_bytes} bytes is not laid out as {images} images of {shape:?}"))
}

/// SHA-256 in lower-case hex.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A dataset's identity: SHA-256 over its shards' digests, each as 64 lower-case hex digits, joined in
/// order with nothing between.
pub(crate) fn dataset_digest(shards: &[ShardEntry]) -> String {
    let joined: String = shards.iter().map(|shard| shard.sha256.as_str()).collect();
    sha256_hex(joined.as_bytes())
}

/// A shard in memory, checked against the manifest. Cheap to clone; images are slices of the one read.
#[derive(Debug, Clone)]
pub struct Shard {
    pixels: Bytes,
    image_bytes: usize,
    images: u64,
}

impl Shard {
    /// Checks a whole object against its manifest entry; the error says in words what is wrong.
    pub(crate) fn parse(object: Bytes, entry: &ShardEntry, shape: [u64; 3]) -> Result<Self, String> {
        let fault = |what: String| Err(format!("{} {what}", entry.file));
        if object.len() as u64 != entry.size_bytes {
            return fault(format!("has {} bytes instead of {}", object.len(), entry.size_bytes));
        }
        let sha256 = sha256_hex(&object);
        if sha256 != entry.sha256 {
            return fault(format!("has SHA-256 {sha256} instead of {}", entry.sha256));
        }
        let (header_bytes, metadata) = match SafeTensors::read_metadata(&object) {
            Ok(read) => read,
            Err(error) => return fault(format!("is no safetensors file: {error}")),
        };
        let Some(tensor) = metadata.info(TENSOR) else {
            return fault(format!("has no tensor '{TENSOR}'"));
        };
        let expected: Vec<usize> =
            [entry.images, shape[0], shape[1], shape[2]].iter().map(|&side| side as usize).collect();
        if tensor.dtype != Dtype::U8 || tensor.shape != expected {
            return fault(format!("holds {:?} {:?} instead of U8 {expected:?}", tensor.dtype, tensor.shape));
        }
        // The format's reader has checked that the offsets agree with shape and size.
        let data = 8 + header_bytes;
        let pixels = object.slice(data + tensor.data_offsets.0..data + tensor.data_offsets.1);
        Ok(Self { pixels, image_bytes: expected[1..].iter().product(), images: entry.images })
    }

    /// How many images it holds.
    #[must_use]
    pub fn images(&self) -> u64 {
        self.images
    }

    /// All images' pixels, one behind the other.
    ///
    /// # Shapes
    /// `[images, height, width, channels]`, u8.
    #[must_use]
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// One image's pixels.
    ///
    /// # Shapes
    /// `[height, width, channels]`, u8.
    ///
    /// # Panics
    /// If `index` is not below [`Shard::images`].
    #[must_use]
    pub fn image(&self, index: u32) -> &[u8] {
        let at = index as usize * self.image_bytes;
        &self.pixels[at..at + self.image_bytes]
    }

    /// [`Shard::image`] as a share of the shard's memory.
    pub(crate) fn image_slice(&self, index: u32) -> Bytes {
        self.pixels.slice_ref(self.image(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_begin_at_a_multiple_of_eight() {
        for images in [1, 9, 10, 3166, 100_000] {
            assert_eq!(header(images, 64).len() % 8, 0, "{images}");
        }
    }

    fn entry(images: u64, size_bytes: u64) -> ShardEntry {
        ShardEntry { file: "shard-00000.safetensors".into(), images, size_bytes, sha256: String::new() }
    }

    #[test]
    fn images_lie_one_behind_the_other_up_to_the_end() {
        let begin = header(3, 64).len() as u64;
        let entry = entry(3, begin + 3 * 12_288);
        assert_eq!(image_range(&entry, [64, 64, 3], 0).unwrap(), begin..begin + 12_288);
        assert_eq!(image_range(&entry, [64, 64, 3], 2).unwrap().end, entry.size_bytes);
    }

    #[test]
    fn another_layout_is_told_in_words() {
        let sizes = [0, 3 * 12_288, u64::MAX];
        for (entry, shape) in sizes
            .iter()
            .flat_map(|&size| [(entry(3, size), [64, 64, 3]), (entry(u64::MAX, size), [1 << 32, 1 << 32, 3])])
        {
            let words = image_range(&entry, shape, 0).unwrap_err();
            assert!(words.contains("is not laid out as"), "{words}");
        }
    }
}
