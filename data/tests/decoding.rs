//! Every kind of JPEG and PNG becomes the RGB it stands for.
#![allow(missing_docs, clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{distance, jpeg, pixels_of, png};
use jpeg_encoder::{ColorType, SamplingFactor};
use png::BitDepth;

const SIDES: (u32, u32) = (64, 64);

/// A smooth picture, on which JPEG and chroma subsampling lose little.
fn smooth() -> Vec<u8> {
    (0..64u32)
        .flat_map(|y| {
            (0..64u32).flat_map(move |x| [(40 + 3 * x) as u8, (200 - 2 * y) as u8, (60 + x + y) as u8])
        })
        .collect()
}

fn flat(rgb: [u8; 3]) -> Vec<u8> {
    rgb.repeat(64 * 64)
}

#[tokio::test]
async fn baseline_progressive_restarted_and_subsampled_jpegs_decode_alike() {
    for sampling in [SamplingFactor::F_1_1, SamplingFactor::F_2_1, SamplingFactor::F_2_2] {
        for (progressive, restart) in [(false, 0), (true, 0), (false, 1), (false, 4), (true, 4)] {
            let file = jpeg(&smooth(), SIDES, ColorType::Rgb, |encoder| {
                encoder.set_sampling_factor(sampling);
                encoder.set_progressive(progressive);
                if restart > 0 {
                    encoder.set_restart_interval(restart);
                }
            });
            let off = distance(&pixels_of("a.jpg", file, 64).await, &smooth());
            assert!(off <= 12, "{sampling:?}, progressive {progressive}, restart {restart}: off by {off}");
        }
    }
}

#[tokio::test]
async fn grey_jpeg_becomes_equal_channels() {
    let file = jpeg(&[77; 64 * 64], SIDES, ColorType::Luma, |_| {});
    assert!(distance(&pixels_of("a.jpg", file, 64).await, &flat([77; 3])) <= 2);
}

#[tokio::test]
async fn cmyk_and_ycck_are_converted_in_adobes_sense() {
    // Cyan 0, magenta 255, yellow 255, no black: red. Half black: dark red.
    for (cmyk, rgb) in
        [([0, 255, 255, 0], [255, 0, 0]), ([0, 255, 255, 128], [127, 0, 0]), ([0, 0, 0, 0], [255; 3])]
    {
        for kind in [ColorType::Cmyk, ColorType::CmykAsYcck] {
            let file = jpeg(&cmyk.repeat(64 * 64), SIDES, kind, |_| {});
            let off = distance(&pixels_of("a.jpg", file, 64).await, &flat(rgb));
            assert!(off <= 4, "{kind:?} {cmyk:?}: off by {off}");
        }
    }
}

#[tokio::test]
async fn every_kind_of_png_is_exact() {
    let cases = [
        ("rgb", png(&smooth(), SIDES, png::ColorType::Rgb, BitDepth::Eight), smooth()),
        ("grey", png(&[9; 64 * 64], SIDES, png::ColorType::Grayscale, BitDepth::Eight), flat([9; 3])),
        ("bits", png(&[0xFF; 64 * 8], SIDES, png::ColorType::Grayscale, BitDepth::One), flat([255; 3])),
        (
            "palette",
            png(&[1; 64 * 64], SIDES, png::ColorType::Indexed, BitDepth::Eight),
            flat([200, 100, 50]),
        ),
        (
            "deep",
            png(&[80, 255, 90, 0, 100, 7].repeat(64 * 64), SIDES, png::ColorType::Rgb, BitDepth::Sixteen),
            flat([80, 90, 100]),
        ),
    ];
    for (name, file, expected) in cases {
        assert_eq!(pixels_of("a.png", file, 64).await, expected, "{name}");
    }
}

#[tokio::test]
async fn transparency_is_laid_over_white() {
    let rgba = png(&[200, 100, 0, 51].repeat(64 * 64), SIDES, png::ColorType::Rgba, BitDepth::Eight);
    assert_eq!(pixels_of("a.png", rgba, 64).await, flat([244, 224, 204]));
    let grey = png(&[0, 0].repeat(64 * 64), SIDES, png::ColorType::GrayscaleAlpha, BitDepth::Eight);
    assert_eq!(pixels_of("a.png", grey, 64).await, flat([255; 3]));
}

#[tokio::test]
async fn the_bytes_decide_and_not_the_name() {
    let file = png(&smooth(), SIDES, png::ColorType::Rgb, BitDepth::Eight);
    assert_eq!(pixels_of("a.jpg", file, 64).await, smooth());
}

#[tokio::test]
async fn shrinking_averages_what_it_covers() {
    // Stripes of one pixel: a filter that skips pixels would show black or white, not grey.
    let stripes: Vec<u8> = (0..64 * 64).flat_map(|pixel| [if pixel % 2 == 0 { 0 } else { 255 }; 3]).collect();
    let small = pixels_of("a.png", png(&stripes, SIDES, png::ColorType::Rgb, BitDepth::Eight), 8).await;
    assert!(small.iter().all(|&value| value.abs_diff(127) <= 12), "{small:?}");
}
