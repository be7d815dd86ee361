//! What a JPEG file says about itself, read without decoding it: sides, memory needed, and whether
//! it is all there. Decoders fill what is missing with grey and say nothing.

use memchr::memchr;

use crate::quarantine::{Reason, Refusal};

const SOI: [u8; 2] = [0xFF, 0xD8];
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;

/// Appended to the last scan. No Huffman code consists of ones only, so a decoder that runs past
/// the real data meets an invalid code instead of the end marker, after which it would invent zeros.
const ALL_ONES: [u8; 32] = {
    let mut bytes = [0u8; 32];
    let mut at = 0;
    while at < 32 {
        bytes[at] = 0xFF;
        at += 2;
    }
    bytes
};

/// What the markers of a whole JPEG file say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Survey {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Bytes of coefficients that a decoder keeps: 0 where one scan holds everything.
    pub(crate) coefficient_bytes: u64,
    /// Where the end marker lies.
    end: usize,
    /// Whether [`ALL_ONES`] may follow the last scan.
    guardable: bool,
}

/// Whether the file calls itself a JPEG.
pub(crate) fn is_jpeg(file: &[u8]) -> bool {
    file.starts_with(&SOI)
}

/// Walks over the markers to the end of the image.
pub(crate) fn survey(file: &[u8]) -> Result<Survey, Refusal> {
    let mut frame: Option<Frame> = None;
    let (mut scans, mut first_scan_components) = (0u32, 0u8);
    let mut at = SOI.len();
    loop {
        let (marker, after) = next_marker(file, at).ok_or_else(|| cut_off(file))?;
        at = after;
        match marker {
            EOI => {
                let frame = frame.ok_or_else(|| damaged("it has no frame header"))?;
                if scans == 0 {
                    return Err(Refusal::new(Reason::Truncated, "it ends before its first scan"));
                }
                let one_scan = !frame.progressive && first_scan_components == frame.components;
                return Ok(Survey {
                    width: frame.width,
                    height: frame.height,
                    coefficient_bytes: if one_scan { 0 } else { frame.coefficient_bytes },
                    end: at - 2,
                    guardable: !frame.progressive || scans > 1,
                });
            }
            // Markers without a length.
            0x01 | 0xD0..=0xD8 => continue,
            _ => {}
        }
        let length = file.get(at..at + 2).ok_or_else(|| cut_off(file))?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        let body = file.get(at + 2..at + length.max(2)).ok_or_else(|| cut_off(file))?;
        at += length.max(2);
        match marker {
            // Every kind of frame: the decoder says which ones it cannot read.
            0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                if frame.is_some() {
                    return Err(damaged("it has two frame headers"));
                }
                frame = Some(Frame::parse(marker, body)?);
            }
            SOS => {
                scans += 1;
                if scans == 1 {
                    first_scan_components = body.first().copied().unwrap_or(0);
                }
            }
            _ => {}
        }
    }
}

impl Survey {
    /// The file as the decoder should see it: nothing after the image, and a guard behind its last scan.
    pub(crate) fn guarded(&self, file: &[u8], out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&file[..self.end]);
        if self.guardable {
            out.extend_from_slice(&ALL_ONES);
        }
        out.extend_from_slice(&[0xFF, EOI]);
    }
}

struct Frame {
    width: u32,
    height: u32,
    components: u8,
    progressive: bool,
    coefficient_bytes: u64,
}

impl Frame {
    fn parse(marker: u8, body: &[u8]) -> Result<Self, Refusal> {
        let [_, h1, h0, w1, w0, components, rest @ ..] = body else {
            return Err(damaged("its frame header is too short"));
        };
        let height = u32::from(u16::from_be_bytes([*h1, *h0]));
        let width = u32::from(u16::from_be_bytes([*w1, *w0]));
        if width == 0 || height == 0 {
            return Err(damaged("it has a side of 0 pixels"));
        }
        let factors =
            |component: &[u8]| (u64::from(component[1] >> 4).max(1), u64::from(component[1] & 15).max(1));
        let sampling: Vec<(u64, u64)> = rest.chunks_exact(3).map(factors).collect();
        let h_max = sampling.iter().map(|&(h, _)| h).max().unwrap_or(1);
        let v_max = sampling.iter().map(|&(_, v)| v).max().unwrap_or(1);
        let blocks = u64::from(width).div_ceil(8 * h_max) * u64::from(height).div_ceil(8 * v_max);
        let per_mcu: u64 = sampling.iter().map(|&(h, v)| h * v).sum();
        Ok(Self {
            width,
            height,
            components: *components,
            // Lossless and arithmetic frames are refused by the decoder before it allocates.
            progressive: marker & 3 == 2,
            coefficient_bytes: blocks * per_mcu * 64 * 2,
        })
    }
}

/// The next marker at or after `at` and the place behind it. Stuffed zeros, restart markers and fill
/// bytes inside a scan are passed over.
fn next_marker(file: &[u8], mut at: usize) -> Option<(u8, usize)> {
    loop {
        at += memchr(0xFF, file.get(at..)?)? + 1;
        match *file.get(at)? {
            0x00 | 0xD0..=0xD7 => at += 1,
            0xFF => {}
            marker => return Some((marker, at + 1)),
        }
    }
}

fn cut_off(file: &[u8]) -> Refusal {
    Refusal::new(Reason::Truncated, format!("it ends after {} bytes without an end marker", file.len()))
}

fn damaged(detail: &str) -> Refusal {
    Refusal::new(Reason::DecodeError, detail)
}
