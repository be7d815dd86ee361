//! Bad images are listed with their reason and cost next to nothing; hostile bytes never stop a job.
#![allow(missing_docs, clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{Bench, jpeg, pattern, photo, png, prepare, refused, zip};
use jpeg_encoder::ColorType;
use proptest::prelude::*;
use rawzip::CompressionMethod;
use takuma_data::{DataError, Reason};

/// A JPEG that claims other sides than it has.
fn claiming(width: u16, height: u16) -> Vec<u8> {
    let mut file = photo(0);
    let frame = file.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    file[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    file[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    file
}

/// A JPEG whose scan lacks its second half but which ends properly.
fn hollow(progressive: bool) -> Vec<u8> {
    let file = jpeg(&pattern(178, 218, 0), (178, 218), ColorType::Rgb, |encoder| {
        encoder.set_progressive(progressive)
    });
    let last_scan = file.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
    let mut cut = file[..last_scan + (file.len() - last_scan) / 2].to_vec();
    while cut.last() == Some(&0xFF) {
        cut.pop();
    }
    cut.extend_from_slice(&[0xFF, 0xD9]);
    cut
}

/// Prepares one bad file beside one good and gives the refusal.
async fn refusal(name: &str, file: Vec<u8>) -> (Reason, String) {
    let bench = Bench::new();
    let store = bench.store("out");
    let report = prepare(bench.folder(&[(name.to_owned(), file), ("z.jpg".into(), photo(1))]), 1, &store)
        .await
        .unwrap();
    assert_eq!((report.manifest.images, report.manifest.quarantined), (1, 1), "{name}");
    let line = refused(&store).await.remove(0);
    assert_eq!(line.file, name);
    (line.reason, line.detail)
}

#[tokio::test]
async fn each_kind_of_bad_image_has_its_reason() {
    let whole = photo(0);
    let picture = png(&pattern(178, 218, 0), (178, 218), png::ColorType::Rgb, png::BitDepth::Eight);
    let mut damaged = picture.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x55;
    let cases = [
        (Reason::Truncated, whole[..whole.len() / 2].to_vec()),
        (Reason::Truncated, whole[..whole.len() - 2].to_vec()),
        (Reason::Truncated, whole[..30].to_vec()),
        (Reason::Truncated, picture[..picture.len() / 2].to_vec()),
        (Reason::Truncated, picture[..picture.len() - 12].to_vec()),
        (Reason::NotAnImage, b"<html>not found</html>".to_vec()),
        (Reason::NotAnImage, Vec::new()),
        (Reason::TooSmall, jpeg(&pattern(107, 218, 0), (107, 218), ColorType::Rgb, |_| {})),
        (Reason::TooSmall, png(&pattern(178, 20, 0), (178, 20), png::ColorType::Rgb, png::BitDepth::Eight)),
        (Reason::AbsurdDimensions, claiming(65500, 65500)),
        (Reason::AbsurdDimensions, claiming(16000, 16000)),
        (Reason::DecodeError, claiming(178, 2180)),
        (Reason::DecodeError, damaged),
        (Reason::DecodeError, hollow(false)),
        (Reason::DecodeError, hollow(true)),
    ];
    for (index, (expected, file)) in cases.into_iter().enumerate() {
        let (reason, detail) = refusal("bad.jpg", file).await;
        assert_eq!(reason, expected, "case {index}: {detail}");
        assert!(!detail.is_empty() && detail.len() <= 220, "case {index}: {detail}");
    }
}

#[tokio::test]
async fn huge_claims_cost_no_memory() {
    // 4 thousand million pixels would be 12 GB; progressive, so that a decoder would keep coefficients too.
    for _ in 0..8 {
        assert_eq!(refusal("bomb.jpg", claiming(65500, 65500)).await.0, Reason::AbsurdDimensions);
    }
    let peak_kib: u64 = std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap();
    assert!(peak_kib < 512 << 10, "{peak_kib} KiB");
}

#[tokio::test]
async fn bombs_and_broken_entries_of_a_zip_are_refused_alone() {
    let bench = Bench::new();
    let bomb = ("b.png".to_owned(), vec![0u8; 40 << 20]);
    zip(&bench.path("in.zip"), &[("a.jpg".into(), photo(0)), bomb], CompressionMethod::DEFLATE);
    let store = bench.store("out");
    let report = prepare(bench.options("in.zip"), 2, &store).await.unwrap();
    assert_eq!(report.manifest.images, 1);
    assert_eq!(refused(&store).await[0].reason, Reason::TooLarge);

    zip(
        &bench.path("two.zip"),
        &[("a.jpg".into(), photo(0)), ("b.jpg".into(), photo(1))],
        CompressionMethod::STORE,
    );
    let mut bytes = std::fs::read(bench.path("two.zip")).unwrap();
    bytes[600] ^= 1;
    std::fs::write(bench.path("two.zip"), bytes).unwrap();
    let store = bench.store("two");
    prepare(bench.options("two.zip"), 2, &store).await.unwrap();
    let lines = refused(&store).await;
    assert_eq!((lines.len(), lines[0].file.as_str(), lines[0].reason), (1, "a.jpg", Reason::Unreadable));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to an image's bytes, the job ends with every image either used or refused.
    #[test]
    fn mutated_images_are_used_or_refused(
        kind in 0..4, cut in 0.0f64..1.3, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12)
    ) {
        let mut file = match kind {
            0 => photo(3),
            1 => jpeg(&pattern(120, 120, 3), (120, 120), ColorType::Rgb, |encoder| encoder.set_progressive(true)),
            2 => jpeg(&pattern(120, 120, 3)[..120 * 120 * 4 / 2].repeat(2), (120, 120), ColorType::Cmyk, |_| {}),
            _ => png(&pattern(120, 120, 3), (120, 120), png::ColorType::Rgb, png::BitDepth::Eight),
        };
        for (place, value) in changes {
            let place = place.index(file.len());
            file[place] = value;
        }
        file.truncate((file.len() as f64 * cut) as usize);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let bench = Bench::new();
        let files = [("a.jpg".to_owned(), file), ("z.jpg".to_owned(), photo(1))];
        let report = runtime.block_on(prepare(bench.folder(&files), 1, &bench.store("out"))).unwrap();
        prop_assert_eq!(report.manifest.images + report.manifest.quarantined, 2);
    }

    /// Whatever happens to a zip's bytes, the job ends, with a dataset or a typed error.
    #[test]
    fn mutated_zips_end_in_words(
        cut in 0.5f64..1.2, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), tail in any::<bool>()
    ) {
        let bench = Bench::new();
        zip(&bench.path("in.zip"), &[("a.jpg".into(), photo(0)), ("b.jpg".into(), photo(1))], CompressionMethod::DEFLATE);
        let mut bytes = std::fs::read(bench.path("in.zip")).unwrap();
        for (place, value) in changes {
            // The directory lies at the end: most bytes of the file are pixels.
            let span = if tail { bytes.len().min(240) } else { bytes.len() };
            let place = bytes.len() - 1 - place.index(span);
            bytes[place] = value;
        }
        bytes.truncate((bytes.len() as f64 * cut) as usize);
        std::fs::write(bench.path("in.zip"), bytes).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        match runtime.block_on(prepare(bench.options("in.zip"), 1, &bench.store("out"))) {
            Ok(report) => prop_assert!(report.manifest.images >= 1),
            Err(DataError::NotAnArchive { .. } | DataError::NoUsableImage { .. } | DataError::FewerImagesThanShards { .. }) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
