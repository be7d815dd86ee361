//! An image file's bytes in, `size` x `size` RGB out.
//!
//! Grey is expanded, CMYK and YCCK are converted with Adobe's inverted sense, palettes are looked up,
//! 16-bit samples keep their upper 8 bits, and transparency is laid over white. EXIF orientation and
//! colour profiles are ignored: CelebA has neither, and turning some images would move the crop.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, PoisonError};

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

use crate::jpeg;
use crate::quarantine::{Reason, Refusal};

/// Longest side of a plausible photograph, in pixels.
pub(crate) const MAX_SIDE: u32 = 16_384;
/// 64 Mpixel: the largest that phones and cameras commonly write.
pub(crate) const MAX_PIXELS: u64 = 64 << 20;
/// Memory that decoding one image may take: the RGB of 64 Mpixel and some.
pub(crate) const MAX_DECODE_BYTES: u64 = 224 << 20;
/// Memory of all large decodes that run at once, so that many cores stay below 512 MB together.
const LARGE_DECODES_BYTES: u64 = 256 << 20;
/// Below this an image counts as small and waits for nobody.
const SMALL_DECODE_BYTES: u64 = 2 << 20;
/// Progressive files have about ten scans; each more costs time without showing anything.
const MAX_SCANS: usize = 40;
const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";

/// What becomes of an image: the central square is cut out, then resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Side of the central square in pixels; 0 = the largest that fits.
    pub(crate) crop: u32,
    /// Side of the result in pixels.
    pub(crate) size: u32,
}

impl Geometry {
    /// Bytes of one result.
    pub(crate) fn frame_bytes(self) -> usize {
        3 * self.size as usize * self.size as usize
    }

    /// Left, top and side of the square for an image of this size.
    fn square(self, width: u32, height: u32) -> (u32, u32, u32) {
        let side = if self.crop == 0 { width.min(height) } else { self.crop };
        (centred(width, side), centred(height, side), side)
    }

    /// Refuses what must not or need not be decoded.
    fn admit(self, width: u32, height: u32, decode_bytes: u64) -> Result<(), Refusal> {
        let absurd = |why: String| Err(Refusal::new(Reason::AbsurdDimensions, why));
        if width > MAX_SIDE || height > MAX_SIDE {
            return absurd(format!("{width}x{height} pixels; at most {MAX_SIDE} a side are accepted"));
        }
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return absurd(format!(
                "{width}x{height} pixels; at most {} million are accepted",
                MAX_PIXELS >> 20
            ));
        }
        if width.min(height) < self.crop.max(1) {
            let why = format!("{width}x{height} pixels; the crop needs {0}x{0}", self.crop.max(1));
            return Err(Refusal::new(Reason::TooSmall, why));
        }
        if decode_bytes > MAX_DECODE_BYTES {
            let (needs, limit) = (decode_bytes >> 20, MAX_DECODE_BYTES >> 20);
            return absurd(format!(
                "{width}x{height} pixels need {needs} MiB to decode; at most {limit} are accepted"
            ));
        }
        Ok(())
    }
}

/// `round((whole - side) / 2)`; half a pixel rounds to the even offset, as Python's `round` does.
fn centred(whole: u32, side: u32) -> u32 {
    let free = whole - side;
    let half = free / 2;
    half + (free & half & 1)
}

/// Memory for large images, shared by all decoders of a job.
#[derive(Debug)]
pub(crate) struct Budget {
    free_bytes: Mutex<u64>,
    returned: Condvar,
}

struct Loan<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self { free_bytes: Mutex::new(LARGE_DECODES_BYTES), returned: Condvar::new() }
    }

    /// Waits until `bytes` are free. Loans are held only while one image is decoded, and none is larger
    /// than the whole, so every wait ends.
    fn borrow(&self, bytes: u64) -> Option<Loan<'_>> {
        if bytes <= SMALL_DECODE_BYTES {
            return None;
        }
        let mut free = self.free_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        while *free < bytes {
            free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        Some(Loan { budget: self, bytes })
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        *self.budget.free_bytes.lock().unwrap_or_else(PoisonError::into_inner) += self.bytes;
        self.budget.returned.notify_all();
    }
}

/// One thread's decoder with its buffers.
pub(crate) struct Decoder<'a> {
    geometry: Geometry,
    budget: &'a Budget,
    resizer: Resizer,
    guarded: Vec<u8>,
    pixels: Vec<u8>,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(geometry: Geometry, budget: &'a Budget) -> Self {
        Self { geometry, budget, resizer: Resizer::new(), guarded: Vec::new(), pixels: Vec::new() }
    }

    /// Decodes, crops and resizes one file.
    ///
    /// # Shapes
    /// `out`: `[size, size, 3]`, u8 RGB.
    pub(crate) fn frame(&mut self, file: &[u8], out: &mut [u8]) -> Result<(), Refusal> {
        // The decoders are fuzzed by their authors; should one panic all the same, one image is lost and
        // not the job. Every buffer is overwritten by the next image, so nothing torn is seen.
        let result = catch_unwind(AssertUnwindSafe(|| self.frame_or_panic(file, out)));
        let spare = SMALL_DECODE_BYTES as usize;
        self.pixels.truncate(spare);
        self.pixels.shrink_to(spare);
        self.guarded.truncate(spare);
        self.guarded.shrink_to(spare);
        result.unwrap_or_else(|_| {
            self.resizer = Resizer::new();
            Err(Refusal::new(Reason::DecodeError, "the decoder gave up on it"))
        })
    }

    fn frame_or_panic(&mut self, file: &[u8], out: &mut [u8]) -> Result<(), Refusal> {
        if jpeg::is_jpeg(file) {
            self.jpeg(file, out)
        } else if file.starts_with(PNG_SIGNATURE) {
            self.png(file, out)
        } else if file.is_empty() {
            Err(Refusal::new(Reason::NotAnImage, "the file is empty"))
        } else {
            Err(Refusal::new(Reason::NotAnImage, "neither JPEG nor PNG"))
        }
    }

    fn jpeg(&mut self, file: &[u8], out: &mut [u8]) -> Result<(), Refusal> {
        let survey = jpeg::survey(file)?;
        let (width, height) = (survey.width, survey.height);
        let bytes = 3 * u64::from(width) * u64::from(height);
        let decode_bytes = bytes + survey.coefficient_bytes;
        self.geometry.admit(width, height, decode_bytes)?;
        let _loan = self.budget.borrow(decode_bytes);
        survey.guarded(file, &mut self.guarded);
        // Strict: what the decoder would paint grey is an error instead.
        let options = DecoderOptions::new_fast()
            .set_strict_mode(true)
            .set_max_width(MAX_SIDE as usize)
            .set_max_height(MAX_SIDE as usize)
            .jpeg_set_max_scans(MAX_SCANS)
            .jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&self.guarded[..]), options);
        decoder.decode_headers().map_err(|error| refuse_jpeg(&error))?;
        if decoder.dimensions() != Some((width as usize, height as usize))
            || decoder.output_buffer_size() != Some(bytes as usize)
        {
            return Err(Refusal::new(Reason::DecodeError, "its headers contradict each other"));
        }
        self.pixels.resize(bytes as usize, 0);
        decoder.decode_into(&mut self.pixels).map_err(|error| refuse_jpeg(&error))?;
        self.shrink(width, height, out)
    }

    fn png(&mut self, file: &[u8], out: &mut [u8]) -> Result<(), Refusal> {
        let limits = png::Limits { bytes: SMALL_DECODE_BYTES as usize };
        let mut decoder = png::Decoder::new_with_limits(std::io::Cursor::new(file), limits);
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        let header = decoder.read_header_info().map_err(|error| refuse_png(&error))?;
        let (width, height) = (header.width, header.height);
        // Before the chunks that follow: at most RGBA as decoded, or grey beside its RGB.
        let decode_bytes = u64::from(width) * u64::from(height) * 4;
        self.geometry.admit(width, height, decode_bytes)?;
        let mut reader = decoder.read_info().map_err(|error| refuse_png(&error))?;
        let (color, _) = reader.output_color_type();
        let decode_bytes = u64::from(width) * u64::from(height) * (color.samples() as u64).max(3);
        let _loan = self.budget.borrow(decode_bytes);
        let bytes = reader
            .output_buffer_size()
            .ok_or_else(|| Refusal::new(Reason::DecodeError, "it is too large"))?;
        self.pixels.resize(bytes.max(decode_bytes as usize), 0);
        reader.next_frame(&mut self.pixels[..bytes]).map_err(|error| refuse_png(&error))?;
        reader.finish().map_err(|error| refuse_png(&error))?;
        let pixels = width as usize * height as usize;
        match color {
            png::ColorType::Grayscale => expand_grey(&mut self.pixels, pixels),
            png::ColorType::GrayscaleAlpha => flatten_grey(&mut self.pixels, pixels),
            png::ColorType::Rgba => flatten_rgb(&mut self.pixels, pixels),
            png::ColorType::Rgb => {}
            png::ColorType::Indexed => {
                return Err(Refusal::new(Reason::DecodeError, "its palette was not looked up"));
            }
        }
        self.shrink(width, height, out)
    }

    /// Central square of `self.pixels` to `out`. Bilinear with a support that grows with the scale (as in
    /// Pillow's `resize(BILINEAR)`), so that nothing is skipped when shrinking.
    fn shrink(&mut self, width: u32, height: u32, out: &mut [u8]) -> Result<(), Refusal> {
        let bytes = 3 * width as usize * height as usize;
        shrink(&mut self.resizer, self.geometry, &self.pixels[..bytes], (width, height), out)
    }
}

/// Crops and resizes one RGB image.
///
/// # Shapes
/// `pixels`: `[height, width, 3]` for `sides` = (width, height); `out`: `[size, size, 3]`.
pub(crate) fn shrink(
    resizer: &mut Resizer,
    geometry: Geometry,
    pixels: &[u8],
    sides: (u32, u32),
    out: &mut [u8],
) -> Result<(), Refusal> {
    let failed = |error: String| Refusal::new(Reason::DecodeError, format!("it cannot be resized: {error}"));
    let (width, height) = sides;
    let (left, top, side) = geometry.square(width, height);
    let from =
        ImageRef::new(width, height, pixels, PixelType::U8x3).map_err(|error| failed(error.to_string()))?;
    let mut to = Image::from_slice_u8(geometry.size, geometry.size, out, PixelType::U8x3)
        .map_err(|error| failed(error.to_string()))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).crop(
        f64::from(left),
        f64::from(top),
        f64::from(side),
        f64::from(side),
    );
    resizer.resize(&from, &mut to, &options).map_err(|error| failed(error.to_string()))
}

/// Grey to RGB in place, from the end, where the buffer has room for both.
fn expand_grey(buffer: &mut [u8], pixels: usize) {
    for pixel in (0..pixels).rev() {
        let grey = buffer[pixel];
        buffer[3 * pixel..3 * pixel + 3].fill(grey);
    }
}

/// Grey with alpha to RGB in place, from the end.
fn flatten_grey(buffer: &mut [u8], pixels: usize) {
    for pixel in (0..pixels).rev() {
        let grey = over_white(buffer[2 * pixel], buffer[2 * pixel + 1]);
        buffer[3 * pixel..3 * pixel + 3].fill(grey);
    }
}

/// RGBA to RGB in place, from the start.
fn flatten_rgb(buffer: &mut [u8], pixels: usize) {
    for pixel in 0..pixels {
        let alpha = buffer[4 * pixel + 3];
        for channel in 0..3 {
            buffer[3 * pixel + channel] = over_white(buffer[4 * pixel + channel], alpha);
        }
    }
}

fn over_white(value: u8, alpha: u8) -> u8 {
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
}

fn refuse_jpeg(error: &DecodeErrors) -> Refusal {
    let reason = match error {
        DecodeErrors::ExhaustedData => Reason::Truncated,
        DecodeErrors::FormatStatic(text) if text.starts_with("Premature") => Reason::Truncated,
        _ => Reason::DecodeError,
    };
    Refusal::new(reason, one_line(&error.to_string()))
}

fn refuse_png(error: &png::DecodingError) -> Refusal {
    let reason = match error {
        png::DecodingError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => {
            Reason::Truncated
        }
        _ => Reason::DecodeError,
    };
    Refusal::new(reason, one_line(&error.to_string()))
}

/// Decoders' messages come from hostile input: one line, bounded.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_python_rounds() {
        assert_eq!(centred(178, 108), 35);
        assert_eq!(centred(218, 108), 55);
        assert_eq!(centred(109, 108), 0);
        assert_eq!(centred(111, 108), 2);
        assert_eq!(centred(113, 108), 2);
    }

    #[test]
    fn transparent_is_white_and_opaque_is_itself() {
        assert_eq!(over_white(10, 0), 255);
        assert_eq!(over_white(10, 255), 10);
        assert_eq!(over_white(0, 128), 127);
    }
}
