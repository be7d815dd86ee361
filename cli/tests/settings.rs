//! Where a run's settings come from, and who wins.

#![allow(clippy::unwrap_used)] // The helpers are a test's too.

use std::path::PathBuf;

use takuma_cli::settings::{Layer, known_keys, resolve};
use takuma_core::config::{BatchNorm, RunConfig};

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn environment(pairs: &[(&str, &str)]) -> Layer {
    Layer::from_environment(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))).unwrap()
}

fn set(pairs: &[&str]) -> Layer {
    Layer::from_pairs(&pairs.iter().map(|pair| (*pair).to_owned()).collect::<Vec<_>>()).unwrap()
}

const BASE: &str = "recipe = 'dcgan-tiny'\ndata = 'file:///d'\n";

fn with_base(layers: Vec<Layer>) -> RunConfig {
    let (_folder, path) = file(BASE);
    let mut all = vec![Layer::from_file(&path).unwrap()];
    all.extend(layers);
    resolve(&all).unwrap()
}

#[test]
fn each_source_beats_the_one_before() {
    let (_folder, path) = file(&format!("{BASE}steps = 1\nseed = 1\nworkers = 1\nsample_every = 1\n"));
    let from_file = Layer::from_file(&path).unwrap();
    let from_environment = environment(&[
        ("TAKUMA_RUN_SEED", "2"),
        ("TAKUMA_RUN_WORKERS", "2"),
        ("TAKUMA_RUN_SAMPLE_EVERY", "2"),
    ]);
    let flags = set(&["workers=3", "sample_every=3"]);
    let pairs = set(&["sample_every=4"]);
    let config = resolve(&[from_file, from_environment, flags, pairs]).unwrap();
    assert_eq!((config.steps, config.seed, config.workers, config.sample_every), (Some(1), 2, Some(3), 4));
}

#[test]
fn later_epochs_replace_earlier_steps() {
    let (_folder, path) = file(&format!("{BASE}steps = 100\n"));
    let config = resolve(&[Layer::from_file(&path).unwrap(), set(&["epochs=3"])]).unwrap();
    assert_eq!((config.steps, config.epochs), (None, 3));
}

#[test]
fn unknown_key_names_source_and_nearest() {
    let (_folder, path) = file("sample-evry = 3\n");
    let from_file = Layer::from_file(&path).unwrap_err().to_string();
    assert!(
        from_file.contains("run.toml") && from_file.contains("did you mean 'sample_every'?"),
        "{from_file}"
    );

    let variable = ("TAKUMA_RUN_SEDE".to_owned(), "1".to_owned());
    let from_environment = Layer::from_environment([variable].into_iter()).unwrap_err().to_string();
    assert!(
        from_environment.contains("TAKUMA_RUN_SEDE") && from_environment.contains("'seed'"),
        "{from_environment}"
    );

    let pairs = Layer::from_pairs(&["zzz=1".to_owned()]).unwrap_err().to_string();
    assert!(pairs.contains("--set") && pairs.contains("the keys are "), "{pairs}");
}

#[test]
fn unknown_recipe_suggests_the_nearest() {
    let message = resolve(&[set(&["recipe=dcgan-celebs", "data=file:///d"])]).unwrap_err().to_string();
    assert!(message.contains("did you mean 'dcgan-celeba'?"), "{message}");
}

#[test]
fn wrong_type_names_key_value_and_source() {
    let message = Layer::from_pairs(&["seed=abc".to_owned()]).unwrap_err().to_string();
    assert_eq!(message, "seed is 'abc' in --set, but must be a whole number, 0 or more");
    let (_folder, path) = file("steps = 'many'\n");
    let message = Layer::from_file(&path).unwrap_err().to_string();
    assert!(message.contains("steps") && message.contains("whole number"), "{message}");
}

#[test]
fn broken_toml_names_the_line() {
    let (_folder, path) = file("steps = 1\nseed = = 2\n");
    let message = Layer::from_file(&path).unwrap_err().to_string();
    assert!(message.contains("run.toml:2 is not valid TOML") && !message.contains('\n'), "{message}");
}

#[test]
fn value_out_of_range_says_the_rule() {
    let message =
        resolve(&[set(&["recipe=dcgan-tiny", "data=file:///d", "beta1=1.5"])]).unwrap_err().to_string();
    assert_eq!(message, "beta1 is 1.5, but must be at least 0 and less than 1");
}

#[test]
fn relative_data_in_a_file_is_relative_to_the_file() {
    let (folder, path) = file("recipe = 'dcgan-tiny'\ndata = '../faces/'\n");
    let config = resolve(&[Layer::from_file(&path).unwrap()]).unwrap();
    let parent = folder.path().parent().unwrap().display().to_string();
    assert_eq!(config.data, format!("file://{parent}/faces"));
}

#[test]
fn relative_data_on_the_command_line_is_relative_to_the_current_folder() {
    let here = std::env::current_dir().unwrap().display().to_string();
    assert_eq!(with_base(vec![set(&["data=faces"])]).data, format!("file://{here}/faces"));
    assert_eq!(with_base(vec![set(&["data=s3://b/faces/"])]).data, "s3://b/faces");
}

#[test]
fn missing_recipe_and_data_are_told_apart() {
    assert!(resolve(&[]).unwrap_err().to_string().starts_with("no recipe"));
    assert!(resolve(&[set(&["recipe=dcgan-tiny"])]).unwrap_err().to_string().starts_with("no data"));
}

#[test]
fn every_key_of_a_run_is_known_and_can_be_set() {
    let values = |key: &str| match key {
        "recipe" => "dcgan-tiny",
        "data" => "file:///d",
        "batch_norm" => "local",
        "learning_rate" | "beta1" | "beta2" => "0.25",
        "bucket_bytes" => "8192",
        "exact" | "balance" => "false",
        "on_nan" => "rollback",
        "precision" => "bf16",
        "exchange_timeout_ms" => "500",
        _ => "4",
    };
    let pairs: Vec<String> = known_keys().iter().map(|key| format!("{key}={}", values(key))).collect();
    let config = resolve(&[Layer::from_pairs(&pairs).unwrap()]).unwrap();
    assert_eq!((config.steps, config.batch_norm, config.beta2), (Some(4), BatchNorm::Local, 0.25));
}

#[test]
fn resolved_settings_can_be_read_back_as_a_file() {
    let config = with_base(vec![set(&["steps=9", "workers=2"])]);
    let (_folder, path) = file(&takuma_cli::settings::to_toml(&config).unwrap());
    assert_eq!(resolve(&[Layer::from_file(&path).unwrap()]).unwrap(), config);
}
