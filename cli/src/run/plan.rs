//! What a run will do, in words.

use takuma_core::config::{Precision, RunConfig};
use takuma_proto::v1::Plan;

use crate::output::{count, duration};

/// The plan, line by line.
#[must_use]
pub fn describe(config: &RunConfig, plan: &Plan) -> Vec<String> {
    let epochs =
        if plan.steps_per_epoch == 0 { 0.0 } else { plan.steps as f64 / plan.steps_per_epoch as f64 };
    let shares: Vec<String> = plan.slots_per_worker.iter().map(u32::to_string).collect();
    let split = if shares.len() > 1 { format!(" = {} a worker", shares.join(" + ")) } else { String::new() };
    let eta = match plan.eta_s {
        Some(eta_s) => format!("{}, as measured on the last such run", duration(eta_s)),
        None => "known after the first steps (no such run was measured yet)".to_owned(),
    };
    let kept = match config.keep_checkpoints {
        None => String::new(),
        Some(1) => " (the newest one stays)".to_owned(),
        Some(kept) => format!(" (the newest {kept} stay)"),
    };
    let line = |key: &str, value: String| format!("  {key:<12}{value}");
    let mut lines = vec![
        line("recipe", config.recipe.to_string()),
        line(
            "data",
            format!(
                "{} ({}, {} an epoch)",
                config.data,
                count(plan.images, "image"),
                count(plan.steps_per_epoch, "step")
            ),
        ),
        line("length", format!("{} ({epochs:.1} epochs), seed {}", count(plan.steps, "step"), config.seed)),
        line("workers", format!("{} ({} idle now)", plan.workers, plan.workers_idle)),
        line("batch", format!("{} images{split}", plan.global_batch)),
        line(
            "output",
            format!(
                "a grid every {}, a checkpoint every {}{kept}",
                count(config.sample_every, "step"),
                count(config.checkpoint_every, "step")
            ),
        ),
        line("ETA", eta),
        line("start", start(plan)),
    ];
    match config.precision {
        Precision::F32 => {}
        Precision::Tf32 => lines.insert(5, line("precision", "TF32 in convolutions on GPUs".to_owned())),
        Precision::Bf16 => lines.insert(5, line("precision", "bfloat16 in convolutions".to_owned())),
    }
    if config.exact {
        let lanes = count(config.lanes.into(), "lane");
        let most = count(config.lanes.into(), "worker");
        let exact = line("exact", format!("{lanes}: the same bits whatever workers train, {most} at most"));
        lines.insert(5, exact);
    }
    lines
}

fn start(plan: &Plan) -> String {
    if plan.runs_ahead > 0 {
        format!("after {} in the queue", count(plan.runs_ahead.into(), "run"))
    } else if plan.workers_idle < plan.workers.max(1) {
        match plan.workers {
            0 | 1 => "when a worker is idle".to_owned(),
            workers => format!("when {} are idle", count(workers.into(), "worker")),
        }
    } else {
        "at once".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use takuma_core::config::Recipe;

    fn plan() -> Plan {
        Plan {
            workers: 3,
            slots_per_worker: vec![22, 21, 21],
            global_batch: 64,
            steps: 300,
            steps_per_epoch: 93,
            images: 6000,
            eta_s: Some(161.0),
            workers_idle: 3,
            runs_ahead: 0,
        }
    }

    #[test]
    fn plan_tells_split_length_and_eta() {
        let text = describe(&RunConfig::new(Recipe::DcganCeleba, "file:///d"), &plan()).join("\n");
        for part in ["22 + 21 + 21", "300 steps (3.2 epochs)", "2m41s", "6000 images", "at once"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn exact_mode_names_its_lanes_and_what_they_bound() {
        let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
        config.exact = true;
        let text = describe(&config, &plan()).join("\n");
        assert!(
            text.contains("exact       8 lanes: the same bits whatever workers train, 8 workers at most"),
            "{text}"
        );
    }

    #[test]
    fn precision_is_told_where_it_is_not_the_full_one() {
        let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
        assert!(!describe(&config, &plan()).join("\n").contains("precision"));
        config.precision = Precision::Bf16;
        let text = describe(&config, &plan()).join("\n");
        assert!(text.contains("precision   bfloat16 in convolutions"), "{text}");
    }

    #[test]
    fn start_says_what_comes_before() {
        assert_eq!(start(&Plan { runs_ahead: 1, ..plan() }), "after 1 run in the queue");
        assert_eq!(start(&Plan { workers_idle: 1, ..plan() }), "when 3 workers are idle");
        assert_eq!(start(&Plan { workers: 1, workers_idle: 0, ..plan() }), "when a worker is idle");
    }
}
