//! Equal input gives equal datasets; what cannot work is said in words and leaves nothing whole behind.
#![allow(missing_docs, clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Bench, distance, pattern, photo, photos, png, prepare, refused, zip};
use rawzip::CompressionMethod;
use takuma_core::noise::{CounterRng, Purpose};
use takuma_data::{
    DataError, Dataset, PrepareOptions, Progress, Stage, SynthOptions, inspect, synth, synth_archive, verify,
};
use takuma_store::Store;

async fn no_dataset(store: &Store) -> bool {
    matches!(Dataset::open(store.clone()).await, Err(DataError::NoDataset { .. }))
}

/// Every object by name and content.
async fn objects(store: &Store) -> Vec<(String, Vec<u8>)> {
    let mut objects = Vec::new();
    for entry in store.list("").await.unwrap() {
        objects.push((entry.name.clone(), store.get(&entry.name).await.unwrap().to_vec()));
    }
    objects
}

#[tokio::test]
async fn threads_order_and_kind_of_source_do_not_change_a_byte() {
    let bench = Bench::new();
    let mut files = photos(90);
    files[17].1.truncate(400);
    files[55].1.clear();
    files.push(("list_attr.txt".into(), b"text".to_vec()));
    files.push(("__MACOSX/._000001.jpg".into(), b"fork".to_vec()));
    files.push((".hidden/1.jpg".into(), b"hidden".to_vec()));
    bench.folder(&files);
    zip(&bench.path("in.zip"), &files, CompressionMethod::STORE);
    files.reverse();
    zip(&bench.path("backwards.zip"), &files, CompressionMethod::DEFLATE);
    tar_of(&bench.path("in.tar"), &files);
    let plain = std::fs::read(bench.path("in.tar")).unwrap();
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packer, &plain).unwrap();
    std::fs::write(bench.path("in.tar.gz"), packer.finish().unwrap()).unwrap();

    let mut datasets = Vec::new();
    for (source, threads) in
        [("in.zip", 1), ("in.zip", 5), ("backwards.zip", 2), ("source", 3), ("in.tar", 2), ("in.tar.gz", 2)]
    {
        let store = bench.store(&format!("{source}-{threads}"));
        let options = PrepareOptions { shards: 8, ..bench.options(source) };
        let report = prepare(options, threads, &store).await.unwrap();
        assert_eq!(
            (report.manifest.images, report.manifest.quarantined, report.ignored),
            (88, 2, 3),
            "{source}"
        );
        let names: Vec<_> = refused(&store).await.into_iter().map(|line| line.file).collect();
        assert_eq!(names, ["img_align_celeba/000017.jpg", "img_align_celeba/000055.jpg"]);
        let mut objects = objects(&store).await;
        objects.retain(|(name, _)| name != "manifest.json");
        datasets.push((source, report.manifest.digest, objects));
    }
    for (source, digest, objects) in &datasets[1..] {
        assert_eq!(digest, &datasets[0].1, "{source}");
        assert!(objects == &datasets[0].2, "{source}");
    }
}

fn tar_of(path: &Path, files: &[(String, Vec<u8>)]) {
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &content[..]).unwrap();
    }
    tar.finish().unwrap();
}

#[tokio::test]
async fn images_lie_where_the_shuffle_says() {
    let bench = Bench::new();
    let picture = |number| pattern(108, 108, number);
    let file = |number| png(&picture(number), (108, 108), png::ColorType::Rgb, png::BitDepth::Eight);
    let files: Vec<_> = (0..10).map(|number| (format!("{number:02}.png"), file(number))).collect();
    let store = bench.store("out");
    let options = PrepareOptions { size: 108, shards: 3, seed: 5, ..bench.folder(&files) };
    prepare(options, 2, &store).await.unwrap();
    let dataset = Dataset::open(store.clone()).await.unwrap();
    assert_eq!(dataset.manifest().shards.iter().map(|shard| shard.images).collect::<Vec<_>>(), [4, 3, 3]);
    let order = CounterRng::new(5, Purpose::DatasetShuffle, 0, 0).permutation(10);
    for (place, &number) in order.iter().enumerate() {
        let shard = dataset.load_shard(place as u32 % 3).await.unwrap();
        assert_eq!(shard.image(place as u32 / 3), picture(number), "image {place}");
    }
    let bytes = store.get("shard-00000.safetensors").await.unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.names(), ["images"]);
    assert_eq!(tensors.tensor("images").unwrap().shape(), [4, 108, 108, 3]);
}

#[tokio::test]
async fn impossible_jobs_are_one_sentence_and_leave_no_dataset() {
    let bench = Bench::new();
    let good = bench.folder(&photos(3));
    std::fs::write(bench.path("text.zip"), "this is no zip").unwrap();
    zip(&bench.path("bad.zip"), &[("a.jpg".into(), b"x".to_vec())], CompressionMethod::STORE);
    zip(&bench.path("empty.zip"), &[("a.txt".into(), b"x".to_vec())], CompressionMethod::STORE);
    let cases = [
        (bench.options("nothing.zip"), "there is no"),
        (bench.options("text.zip"), "not a whole zip or tar"),
        (bench.options("bad.zip"), "1 refused (the first: a.jpg: not_an_image"),
        (bench.options("empty.zip"), "holds no usable image"),
        (
            PrepareOptions { shards: 4, ..good.clone() },
            "3 usable images cannot fill 4 shards; choose --shards 3",
        ),
        (PrepareOptions { shards: 0, ..good.clone() }, "--shards 0 is not possible"),
        (PrepareOptions { size: 0, ..good.clone() }, "--size 0 is not possible"),
        (
            PrepareOptions { source: "s3://bucket/in.zip".into(), ..good.clone() },
            "download the archive first",
        ),
    ];
    for (options, expected) in cases {
        let store = bench.store("out");
        let message = prepare(options, 2, &store).await.unwrap_err().to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
        assert!(no_dataset(&store).await, "{expected}");
    }
}

#[tokio::test]
async fn images_lost_to_quarantine_can_leave_too_few_for_the_shards() {
    let bench = Bench::new();
    let mut files = photos(4);
    files[0].1.truncate(100);
    let store = bench.store("out");
    let options = PrepareOptions { shards: 4, ..bench.folder(&files) };
    let error = prepare(options, 2, &store).await.unwrap_err();
    assert!(matches!(error, DataError::FewerImagesThanShards { images: 3, shards: 4 }), "{error}");
    assert!(no_dataset(&store).await);
}

#[tokio::test]
async fn unwritable_destination_is_found_before_decoding() {
    let bench = Bench::new();
    let options = bench.folder(&photos(2));
    std::fs::write(bench.path("file"), "in the way").unwrap();
    let stages = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stages);
    let store = bench.store("file/out");
    let tell = move |progress: Progress| seen.lock().unwrap().push(progress.stage);
    let error = takuma_data::prepare(options, &store, tell).await.unwrap_err();
    assert!(matches!(error, DataError::DestinationUnwritable { .. }), "{error}");
    assert!(!stages.lock().unwrap().contains(&Stage::Decoding));
}

#[tokio::test]
async fn a_dataset_is_never_overwritten() {
    let bench = Bench::new();
    let store = bench.store("out");
    let options = bench.folder(&photos(2));
    let first = prepare(options.clone(), 1, &store).await.unwrap();
    let error = prepare(PrepareOptions { seed: 9, ..options }, 1, &store).await.unwrap_err();
    assert!(matches!(error, DataError::DestinationTaken { .. }), "{error}");
    assert_eq!(*Dataset::open(store).await.unwrap().manifest(), first.manifest);
}

#[tokio::test]
async fn what_a_crashed_job_left_is_removed_and_nothing_else() {
    let bench = Bench::new();
    let store = bench.store("out");
    for name in ["shard-00007.safetensors", "quarantine.jsonl", "notes.txt", "shard-x.safetensors"] {
        store.put(name, "left").await.unwrap();
    }
    std::fs::write(bench.path("out/shard-00003.safetensors#1"), "half").unwrap();
    prepare(bench.folder(&photos(2)), 1, &store).await.unwrap();
    let mut names: Vec<_> = std::fs::read_dir(bench.path("out"))
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected =
        ["manifest.json", "notes.txt", "quarantine.jsonl", "shard-00000.safetensors", "shard-x.safetensors"];
    assert_eq!(names, expected);
}

#[tokio::test]
async fn a_dropped_job_leaves_no_dataset() {
    let bench = Bench::new();
    let store = bench.store("out");
    let options = bench.folder(&photos(40));
    let (send, mut decoding) = tokio::sync::mpsc::channel(1);
    // The first progress of the decoding stage tells that the job is in the middle of it.
    let tell = move |progress: Progress| {
        if progress.stage == Stage::Decoding && send.try_send(()).is_err() {
            // Told already, or the receiver has gone with the job.
        }
    };
    {
        let job = takuma_data::prepare(options, &store, tell);
        tokio::select! {
            biased;
            _ = decoding.recv() => {}
            result = job => panic!("the job ended first: {result:?}"),
        }
    }
    assert!(no_dataset(&store).await);
}

#[tokio::test]
async fn verify_names_a_flipped_bit_and_a_missing_shard() {
    let bench = Bench::new();
    let store = bench.store("out");
    let options = PrepareOptions { shards: 3, ..bench.folder(&photos(7)) };
    let manifest = prepare(options, 2, &store).await.unwrap().manifest;
    let whole = verify(&store, |_| {}).await.unwrap();
    assert_eq!((whole.shards, whole.images, whole.digest), (3, 7, manifest.digest));

    let mut bytes = store.get("shard-00001.safetensors").await.unwrap().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    store.put("shard-00001.safetensors", bytes).await.unwrap();
    store.delete("shard-00002.safetensors").await.unwrap();
    let error = verify(&store, |_| {}).await.unwrap_err();
    let DataError::Damaged { faults, .. } = &error else { panic!("{error}") };
    assert!(faults[0].starts_with("shard-00001.safetensors has SHA-256"), "{error}");
    assert_eq!(faults[1], "shard-00002.safetensors is missing");
    let dataset = Dataset::open(store).await.unwrap();
    assert_eq!(dataset.load_shard(0).await.unwrap().images(), 3);
    assert!(matches!(dataset.load_shard(1).await, Err(DataError::Damaged { .. })));
    assert!(matches!(dataset.load_shard(3).await, Err(DataError::NoSuchShard { .. })));
}

#[tokio::test]
async fn a_manifest_that_was_tampered_with_is_refused() {
    let bench = Bench::new();
    let store = bench.store("out");
    prepare(bench.folder(&photos(2)), 1, &store).await.unwrap();
    let text = String::from_utf8(store.get("manifest.json").await.unwrap().to_vec()).unwrap();
    for (from, to) in [
        ("shard-00000.safetensors", "../secret"),
        ("\"format\": 1", "\"format\": 2"),
        ("\"images\": 2", "\"images\": 3"),
    ] {
        assert!(text.contains(from));
        store.put("manifest.json", text.replacen(from, to, 1)).await.unwrap();
        let error = Dataset::open(store.clone()).await.unwrap_err();
        assert!(matches!(error, DataError::Manifest { .. }), "{from}: {error}");
    }
}

#[tokio::test]
async fn inspect_counts_reasons_steps_and_bytes() {
    let bench = Bench::new();
    let mut files = photos(130);
    files[3].1.clear();
    files[4].1.clear();
    let store = bench.store("out");
    prepare(PrepareOptions { shards: 64, ..bench.folder(&files) }, 2, &store).await.unwrap();
    let seen = inspect(&store).await.unwrap();
    assert_eq!(seen.quarantine.into_iter().collect::<Vec<_>>(), [("not_an_image".to_owned(), 2)]);
    assert_eq!(seen.steps_per_epoch, Some(2));
    assert_eq!(seen.size_bytes, 64 * (2 * 12288 + u64::from(header_bytes(&store).await)));
}

async fn header_bytes(store: &Store) -> u32 {
    let shard = store.get("shard-00000.safetensors").await.unwrap();
    8 + u32::try_from(u64::from_le_bytes(shard[..8].try_into().unwrap())).unwrap()
}

#[tokio::test]
async fn drawn_faces_are_the_same_for_the_same_seed_and_differ_otherwise() {
    let make = async |seed| {
        let store = Store::memory();
        let options = SynthOptions { count: 16, shards: 2, seed, ..SynthOptions::default() };
        let report = synth(options, &store, |_| {}).await.unwrap();
        assert_eq!((report.manifest.images, report.manifest.height), (16, 64));
        report.manifest.digest
    };
    let first = make(1).await;
    assert_eq!(first, make(1).await);
    assert_ne!(first, make(2).await);
}

#[tokio::test]
async fn a_drawn_archive_prepares_to_the_same_faces() {
    let bench = Bench::new();
    synth_archive(6, 4, &bench.path("faces.zip"), |_| {}).unwrap();
    let (from_zip, drawn) = (bench.store("zip"), bench.store("drawn"));
    let options = PrepareOptions { shards: 2, seed: 4, ..bench.options("faces.zip") };
    assert_eq!(prepare(options, 2, &from_zip).await.unwrap().manifest.images, 6);
    synth(SynthOptions { count: 6, shards: 2, seed: 4, ..SynthOptions::default() }, &drawn, |_| {})
        .await
        .unwrap();
    let (a, b) = (Dataset::open(from_zip).await.unwrap(), Dataset::open(drawn).await.unwrap());
    let (a, b) = (a.load_shard(1).await.unwrap(), b.load_shard(1).await.unwrap());
    for index in 0..3 {
        let mean: f64 =
            a.image(index).iter().zip(b.image(index)).map(|(&a, &b)| f64::from(a.abs_diff(b))).sum::<f64>()
                / 12288.0;
        assert!(mean < 6.0, "face {index}: {mean}");
        assert!(distance(a.image(index), b.image((index + 1) % 3)) > 60);
    }
}

#[tokio::test]
async fn progress_ends_with_every_shard_written() {
    let bench = Bench::new();
    let last = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&last);
    let options = PrepareOptions {
        shards: 2,
        ..bench.folder(&[("a.jpg".into(), photo(0)), ("b.jpg".into(), photo(1))])
    };
    let tell = move |progress: Progress| *seen.lock().unwrap() = Some(progress);
    takuma_data::prepare(options, &bench.store("out"), tell).await.unwrap();
    let expected = Progress { stage: Stage::Writing, done: 2, total: Some(2), quarantined: 0 };
    assert_eq!(*last.lock().unwrap(), Some(expected));
}

#[tokio::test]
async fn six_thousand_real_files_are_all_usable() {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/avatars-6000.zip");
    if !archive.is_file() {
        println!("skipped: there is no {}", archive.display());
        return;
    }
    let bench = Bench::new();
    let options =
        PrepareOptions { source: archive.to_str().unwrap().to_owned(), ..PrepareOptions::default() };
    let report = prepare(options, 2, &bench.store("out")).await.unwrap();
    assert_eq!(
        (report.manifest.images, report.manifest.quarantined, report.manifest.shards.len()),
        (6000, 0, 64)
    );
}
