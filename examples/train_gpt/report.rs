//! What a training leaves behind: numbers, curves, and where they are.

use super::common::device::Device;
use super::common::files::Folder;
use super::common::plot::{self, Curve};
use super::common::say::say;
use super::common::settings::realised;
use super::common::trainer::{Evaluation, Record};
use super::language_model::LanguageModel;
use super::options::Settings;
use super::text::Text;
use anyhow::Result;
use fused_dropout::transformer::{Backend, DropoutSchedule, GptConfig};
use serde::Serialize;
use serde_json::Value;

/// The numbers of a run, as `metrics.json` has them.
#[derive(Clone, Serialize)]
pub struct Run {
    dropout: f64,
    /// The lowest validation loss of all evaluations, in nats per character.
    best_val_loss: f64,
    /// That after the last step.
    final_val_loss: f64,
    /// The median over the steps: batch, forward, loss, backward and optimiser; no evaluation. On a GPU, which is not
    /// waited for at every step, of means over the steps between two waits.
    ms_per_step: f32,
    tokens_per_second: f32,
    /// Steps taken.
    steps: u64,
    curve: Vec<Evaluation>,
    /// The loss of every step's batch.
    step_losses: Vec<f32>,
    /// The model's `config.json`.
    config: Value,
}

impl Run {
    pub fn new(dropout: f64, config: &GptConfig, record: Record, tokens: usize) -> Result<Self> {
        let losses = || record.evaluations.iter().map(|evaluation| evaluation.scores.val_loss);
        let ms_per_step = record.ms_per_step();
        Ok(Self {
            dropout,
            best_val_loss: losses().fold(f64::INFINITY, f64::min),
            final_val_loss: losses().next_back().unwrap_or(f64::INFINITY),
            ms_per_step,
            tokens_per_second: tokens as f32 / ms_per_step * 1e3,
            steps: record.steps(),
            curve: record.evaluations,
            step_losses: record.step_losses,
            config: serde_json::from_str(&config.to_json())?,
        })
    }
}

/// The contents of `metrics.json`: the last run, and where there were two, both.
#[derive(Serialize)]
struct Metrics<'a> {
    #[serde(flatten)]
    last: &'a Run,
    seed: u64,
    device: Device,
    device_name: &'a str,
    threads: usize,
    settings: &'a Settings,
    #[serde(skip_serializing_if = "<[Run]>::is_empty")]
    runs: &'a [Run],
}

/// What is trained, in a few words.
pub fn title<B: Backend>(
    settings: &Settings,
    text: &Text,
    dropout: f64,
    model: &LanguageModel<'_, B>,
) -> String {
    let size = settings.size;
    let when = match settings.schedule() {
        DropoutSchedule::Until(step) => format!(" until step {step}"),
        DropoutSchedule::From(step) => format!(" from step {step}"),
        _ => String::new(),
    };
    format!(
        "Dropout {}{when}: {} layers, {} heads, width {}, {} weights; batches of {} x {} of {} characters",
        realised(dropout),
        size.layers,
        size.heads,
        size.width,
        model.gpt().specs().elements(),
        size.batch,
        size.context,
        text.train.len(),
    )
}

/// Writes metrics, curves and vocabulary, and says where.
pub fn write(
    out: &Folder,
    settings: &Settings,
    device_name: &str,
    text: &Text,
    runs: &[Run],
) -> Result<()> {
    let Some(last) = runs.last() else { return Ok(()) };
    let metrics = Metrics {
        last,
        seed: settings.seed,
        device: settings.device,
        device_name,
        threads: rayon::current_num_threads(),
        settings,
        runs: if runs.len() > 1 { runs } else { &[] },
    };
    out.write_json("metrics.json", &metrics)?;
    out.write_json("vocabulary.json", &text.vocabulary)?;
    let curves: Vec<Curve> = runs.iter().enumerate().flat_map(curves).collect();
    plot::write(out, "curves.svg", "GPT", "loss, nats per character", &curves)?;
    show(runs);
    say!();
    for (what, file) in [
        ("curves", "curves.svg"),
        ("metrics", "metrics.json"),
        ("weights", Folder::MODEL),
        ("checkpoint", Folder::CHECKPOINT),
    ] {
        say!("{what:<10}  {}", out.path(file).display());
    }
    Ok(())
}

fn curves((colour, run): (usize, &Run)) -> [Curve; 2] {
    let curve = |part: &str, dashed, loss: fn(&Evaluation) -> f64| Curve {
        name: format!("dropout {}, {part}", run.dropout),
        points: run
            .curve
            .iter()
            .map(|evaluation| (evaluation.step as f64, loss(evaluation)))
            .collect(),
        colour,
        dashed,
    };
    [
        curve("training", true, |evaluation| evaluation.scores.train_loss),
        curve("validation", false, |evaluation| evaluation.scores.val_loss),
    ]
}

fn show(runs: &[Run]) {
    say!(
        "\n{:>12}{:>16}{:>16}{:>12}{:>12}",
        "dropout",
        "best val loss",
        "final val loss",
        "ms/step",
        "tokens/s"
    );
    for run in runs {
        say!(
            "{:>12}{:>16.4}{:>16.4}{:>12.2}{:>12.0}",
            run.dropout,
            run.best_val_loss,
            run.final_val_loss,
            run.ms_per_step,
            run.tokens_per_second
        );
    }
}
