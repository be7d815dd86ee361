//! What proves a run: its audit, and its checkpoints to the byte; against a pretended coordinator.

#![allow(clippy::unwrap_used)] // The helpers are a test's too.

mod support;

use sha2::{Digest, Sha256};
use support::{Fake, Script, checkpoint, run_view};
use takuma_core::checkpoint::{CHECKPOINT_FORMAT, CHECKPOINT_PARTS, CheckpointManifest, CheckpointPart};
use takuma_core::config::{Recipe, RunConfig};
use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest, ShardEntry};
use takuma_core::ids::Generation;
use takuma_core::layout::{DATASET_MANIFEST, checkpoint_object, part_file, shard_file};
use takuma_core::record::{DatasetFacts, Origin, RUN_FORMAT, RunRecord, RunStatus};
use takuma_core::time::Timestamp;
use takuma_proto::v1;

const STEPS: u64 = 9;

fn config() -> RunConfig {
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
    (config.global_batch, config.seed, config.steps) = (4, 7, Some(STEPS));
    config
}

fn dataset() -> DatasetManifest {
    let shard = |file| ShardEntry { file, images: 5, size_bytes: 1, sha256: String::new() };
    DatasetManifest {
        format: DATASET_FORMAT,
        name: "d".into(),
        images: 20,
        height: 64,
        width: 64,
        channels: 3,
        quarantined: 0,
        crop: 0,
        seed: 0,
        source: "drawn".into(),
        digest: "one".into(),
        shards: (0..4).map(shard_file).map(shard).collect(),
    }
}

fn record(origin: Option<Origin>) -> RunRecord {
    RunRecord {
        format: RUN_FORMAT,
        name: "calm-otter-3".into(),
        id: "id-1".into(),
        config: config(),
        dataset: DatasetFacts { digest: "one".into(), images: 20, steps_per_epoch: 5 },
        created: Timestamp(0),
        queued: Timestamp(0),
        status: RunStatus::Succeeded,
        generation: Generation(3),
        generations_reserved: Generation(1003),
        lineage: Generation(1),
        origin,
        passed_over: Default::default(),
        step: STEPS,
        target_steps: STEPS,
        elapsed_ms: 0,
        workers: 2,
        pace_s: None,
        checkpoint: None,
        weights_sha256: String::new(),
        error: String::new(),
    }
}

/// Lines of metrics as they must be.
fn metrics(steps: impl IntoIterator<Item = u64>) -> String {
    let slots = config().slot_map(&dataset()).unwrap();
    let line =
        |step| format!("{{\"step\":{step},\"fed\":{},\"generation\":1}}\n", slots.expected_fed(step - 1));
    steps.into_iter().map(line).collect()
}

async fn audited(metrics: String, origin: Option<Origin>, arguments: &[&str]) -> support::Ran {
    let mut script = Script { run: run_view(v1::RunStatus::Succeeded, STEPS), ..Script::default() };
    script.objects.insert("run.json".into(), record(origin).to_json().into_bytes());
    script.objects.insert(DATASET_MANIFEST.into(), serde_json::to_vec(&dataset()).unwrap());
    script.objects.insert("metrics.jsonl".into(), metrics.into_bytes());
    let all: Vec<&str> = ["run", "audit", "calm"].into_iter().chain(arguments.iter().copied()).collect();
    Fake::start(script).await.takuma(&all).await
}

#[tokio::test]
async fn audit_of_a_run_that_was_fed_as_due_is_one_line() {
    let ran = audited(metrics(1..=STEPS), None, &[]).await;
    let told = "9 steps, 36 images, every image of an epoch at most once: ok\n";
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, told, ""));
    let origin = Origin { run: "old".into(), step: 4 };
    let ran = audited(metrics(5..=STEPS), Some(origin), &["-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let due = serde_json::json!({ "run": "calm-otter-3", "ok": true, "steps": 5, "images": 20, "first_step": 5,
        "last_step": 9, "error": null });
    assert_eq!(json, due);
}

#[tokio::test]
async fn audit_names_the_first_error_with_its_place() {
    let cases = [
        (metrics((1..=4).chain(6..=STEPS)), "step 5 is missing: line 5 of metrics.jsonl is step 6"),
        (metrics((1..=4).chain(4..=STEPS)), "line 5 of metrics.jsonl is step 4 once more"),
        (metrics(1..=7), "metrics.jsonl ends at step 7, but the run has finished 9 steps"),
        (metrics(1..=2) + "torn", "line 3 of metrics.jsonl cannot be read"),
        (
            metrics(1..=2) + "{\"step\":3,\"fed\":1,\"generation\":2}\n",
            "step 3 was fed other images than due",
        ),
    ];
    for (metrics, told) in cases {
        let ran = audited(metrics, None, &[]).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{told}");
        let begin = format!("error: run calm-otter-3 does not pass its audit: {told}");
        assert!(ran.stderr.starts_with(&begin), "{}", ran.stderr);
    }
    let ran = audited(metrics(1..=2) + &metrics(2..=STEPS), None, &["-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, &json["ok"], &json["steps"]), (1, &false.into(), &2.into()));
    let error = &json["error"];
    assert_eq!(
        (&error["kind"], &error["line"], &error["step"]),
        (&"repeated_step".into(), &3.into(), &2.into())
    );
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checkpoints of two steps, all of them whole.
fn checkpointed() -> Script {
    let mut script = Script {
        run: run_view(v1::RunStatus::Succeeded, STEPS),
        checkpoints: vec![checkpoint(5), checkpoint(9)],
        ..Script::default()
    };
    for step in [5, 9] {
        let content = |file: &str| format!("{file} of step {step}").into_bytes();
        let part = |file: &str| CheckpointPart {
            file: part_file(Generation(1), file),
            size_bytes: content(file).len() as u64,
            sha256: sha256(&content(file)),
        };
        let manifest = CheckpointManifest {
            format: CHECKPOINT_FORMAT,
            run: "calm-otter-3".into(),
            step,
            config: config(),
            dataset_digest: "one".into(),
            generation: Generation(1),
            writer: "worker-1".into(),
            version: "0".into(),
            created_unix_s: 0.0,
            weights_sha256: String::new(),
            parts: CHECKPOINT_PARTS.map(part).to_vec(),
        };
        let json = serde_json::to_vec(&manifest).unwrap();
        script.objects.insert(checkpoint_object(step, "manifest.json"), json);
        for file in CHECKPOINT_PARTS {
            script.objects.insert(checkpoint_object(step, &part_file(Generation(1), file)), content(file));
        }
    }
    script
}

#[tokio::test]
async fn whole_checkpoints_are_verified_to_the_byte() {
    let fake = Fake::start(checkpointed()).await;
    let ran = fake.takuma(&["checkpoint", "verify", "calm"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "step 9: 3 parts, 97 B: ok\n"), "{ran:?}");
    let ran = fake.takuma(&["checkpoint", "verify", "calm", "--all"]).await;
    assert_eq!((ran.code, ran.stdout.lines().count()), (0, 2));
    let ran = fake.takuma(&["checkpoint", "verify", "calm", "7"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("has no checkpoint of step 7"), "{}", ran.stderr);
}

#[tokio::test]
async fn damage_is_named_and_another_checkpoint_offered() {
    let mut script = checkpointed();
    let flipped = script.objects.get_mut(&checkpoint_object(9, "g1/generator.safetensors")).unwrap();
    flipped[3] ^= 1;
    script.objects.get_mut(&checkpoint_object(9, "g1/discriminator.safetensors")).unwrap().pop();
    script.objects.remove(&checkpoint_object(9, "g1/optimizer.safetensors"));
    let fake = Fake::start(script).await;
    let ran = fake.takuma(&["checkpoint", "verify", "calm", "--all"]).await;
    assert_eq!(ran.code, 1);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(
        lines,
        [
            "step 5: 3 parts, 97 B: ok",
            "step 9: generator.safetensors has another SHA-256 than its manifest says",
            "step 9: discriminator.safetensors has 34 bytes, but 35 are due",
            "step 9: optimizer.safetensors is not there",
        ]
    );
    let told = "error: run calm-otter-3: the checkpoint of step 9 is damaged; step 5 is whole: 'takuma run fork \
                calm-otter-3@5' goes on from it\n";
    assert_eq!(ran.stderr, told);
    let ran = fake.takuma(&["checkpoint", "verify", "calm", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&json[0]["step"], &json[0]["ok"]), (&9.into(), &false.into()));
    assert_eq!(json[0]["parts"][1]["problem"], "has 34 bytes, but 35 are due");
    assert_eq!(ran.code, 1);
}

#[tokio::test]
async fn download_writes_verified_files_and_the_manifest_last() {
    let fake = Fake::start(checkpointed()).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("weights");
    let ran = fake.takuma(&["checkpoint", "download", "calm", "5", dir.to_str().unwrap()]).await;
    assert_eq!((ran.code, ran.stdout.trim_end()), (0, dir.to_str().unwrap()), "{ran:?}");
    assert_eq!(std::fs::read(dir.join("optimizer.safetensors")).unwrap(), b"optimizer.safetensors of step 5");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 4, "no partial files are left");

    let newest = folder.path().join("newest");
    let ran = fake.takuma(&["checkpoint", "download", "calm", newest.to_str().unwrap(), "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&json["step"], json["written"].as_array().unwrap().len()), (&9.into(), 4));

    let mut script = checkpointed();
    script.objects.get_mut(&checkpoint_object(5, "g1/optimizer.safetensors")).unwrap()[0] ^= 1;
    let fake = Fake::start(script).await;
    let torn = folder.path().join("torn");
    let ran = fake.takuma(&["checkpoint", "download", "calm", "5", torn.to_str().unwrap()]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("has another SHA-256 than its manifest says"), "{}", ran.stderr);
    assert!(!torn.join("manifest.json").exists() && !torn.join("optimizer.safetensors").exists());
}
