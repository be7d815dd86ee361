//! [`Resident`]: the images behind a worker's slots, in the memory of its device.

use std::collections::{BTreeMap, VecDeque};

use takuma_core::slots::ImageRef;
use takuma_data::Shard;
use tch::{Device, Kind, Tensor};

/// Left free on a GPU for networks, feature maps, workspaces and copies of the state.
const TRAINING_BYTES: i64 = 4 << 30;

/// Whole shards on the device, as bytes; a step names its images by row. They are brought shard by shard, so
/// that training goes on meanwhile.
pub(super) struct Resident {
    /// u8 `[images, H, W, 3]`.
    images_nhwc: Tensor,
    /// By shard.
    first_rows: BTreeMap<u32, i64>,
    /// Shards that are not there yet, with their first rows.
    missing: VecDeque<(i64, Shard)>,
}

impl Resident {
    /// Takes memory for `shards` of square images; `None` if the device has not enough of it.
    pub(super) fn begin(shards: Vec<(u32, Shard)>, image_size: i64, device: Device) -> Option<Self> {
        let mut first_rows = BTreeMap::new();
        let mut missing = VecDeque::new();
        let mut rows = 0;
        for (number, shard) in shards {
            let images = shard.images() as i64;
            first_rows.insert(number, rows);
            missing.push_back((rows, shard));
            rows += images;
        }
        let size = [rows, image_size, image_size, 3];
        let bytes = (Kind::Uint8, device);
        // What training still needs goes back to libtorch's allocator, which keeps it for that.
        let with_room = || -> Result<Tensor, tch::TchError> {
            let images = Tensor::f_empty(size, bytes)?;
            if device.is_cuda() {
                drop(Tensor::f_empty([TRAINING_BYTES], bytes)?);
            }
            Ok(images)
        };
        match with_room() {
            Ok(images_nhwc) => Some(Self { images_nhwc, first_rows, missing }),
            Err(error) => {
                tracing::info!("the images stay in the host's memory, the device has no room: {error}");
                None
            }
        }
    }

    /// Brings one more shard. Returns whether all are there.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn advance(&mut self) -> Result<bool, tch::TchError> {
        if let Some((first, shard)) = self.missing.pop_front() {
            let mut size = self.images_nhwc.size();
            size[0] = shard.images() as i64;
            let pixels = Tensor::f_from_data_size(shard.pixels(), &size, Kind::Uint8)?;
            self.images_nhwc.f_narrow(0, first, size[0])?.f_copy_(&pixels)?;
        }
        Ok(self.missing.is_empty())
    }

    /// u8 `[images, H, W, 3]`, on the device.
    pub(super) fn images_nhwc(&self) -> Tensor {
        self.images_nhwc.shallow_clone()
    }

    /// Where images lie, on the host: i64, one for each of `places`; `None` if one lies in no shard that is here.
    pub(super) fn rows(&self, places: impl Iterator<Item = ImageRef>) -> Option<Tensor> {
        let row = |place: ImageRef| Some(self.first_rows.get(&place.shard)? + i64::from(place.index));
        Some(Tensor::from_slice(&places.map(row).collect::<Option<Vec<i64>>>()?))
    }
}
