//! What a training leaves behind: numbers, curves, and where they are.

use super::common::device::Device;
use super::common::files::Folder;
use super::common::plot::{self, Curve};
use super::common::say::say;
use super::common::settings::realised;
use super::common::trainer::{Evaluation, Record};
use super::options::Settings;
use super::{Trained, Training};
use anyhow::Result;
use fused_dropout::transformer::Bert;
use serde::Serialize;

/// The contents of `metrics.json`.
#[derive(Serialize)]
struct Metrics<'a> {
    /// The share of the held-out texts that the classifier gets right after its last epoch.
    accuracy: f64,
    /// That after its best epoch. It was chosen by the held-out texts, so it is somewhat too good.
    best_accuracy: f64,
    best_epoch: u64,
    #[serde(flatten)]
    classifier: Losses<'a>,
    masked: Losses<'a>,
    held_out: usize,
    seed: u64,
    device: Device,
    threads: usize,
    settings: &'a Settings,
}

/// Of either model.
#[derive(Serialize)]
struct Losses<'a> {
    /// The lowest loss on the held-out texts, in nats.
    best_val_loss: f64,
    /// That after the last epoch.
    final_val_loss: f64,
    /// The median over the steps: batch, forward, loss, backward and optimiser.
    ms_per_step: f32,
    steps: u64,
    curve: &'a [Evaluation],
    step_losses: &'a [f32],
}

impl<'a> Losses<'a> {
    fn new(record: &'a Record) -> Self {
        let losses = || record.evaluations.iter().map(|evaluation| evaluation.scores.val_loss);
        Self {
            best_val_loss: losses().fold(f64::INFINITY, f64::min),
            final_val_loss: losses().next_back().unwrap_or(f64::INFINITY),
            ms_per_step: record.ms_per_step(),
            steps: record.steps(),
            curve: &record.evaluations,
            step_losses: &record.step_losses,
        }
    }
}

/// What is trained, in a few words.
pub fn title(name: &str, training: &Training, bert: &Bert) -> String {
    let size = training.settings.size;
    format!(
        "{name}: {} layers, {} heads, width {}, {} weights, {} words; {} texts, {} steps an epoch\n\
         Dropout {} in residual branches, {} of attention, {} before the classifier",
        size.layers,
        size.heads,
        size.width,
        bert.specs().elements(),
        bert.config().vocab_size,
        training.reviews.train.len(),
        training.epoch,
        realised(training.settings.hidden_dropout),
        realised(training.settings.attention_dropout),
        realised(training.settings.classifier_dropout),
    )
}

/// Writes metrics, curves and vocabulary, and says where.
pub fn write(training: &Training, masked: &Trained, classifier: &Trained) -> Result<()> {
    let [masked_out, out] = &training.folders;
    let vocabulary = training.reviews.tokenizer.vocabulary.join("\n") + "\n";
    for folder in &training.folders {
        folder.write("vocabulary.txt", vocabulary.as_bytes())?;
    }
    let metrics = metrics(training, &masked.record, &classifier.record);
    out.write_json("metrics.json", &metrics)?;
    let unit = "loss, nats";
    plot::write(masked_out, "loss.svg", "Masked language model", unit, &losses(&masked.record))?;
    plot::write(out, "loss.svg", "Classifier", unit, &losses(&classifier.record))?;
    let accuracy = accuracies(&classifier.record);
    plot::write(out, "accuracy.svg", "Held-out accuracy", "percent", &[accuracy])?;
    say!(
        "\nheld-out accuracy of {} texts: {:.2} % at the end, {:.2} % at best (epoch {})\n",
        metrics.held_out,
        100.0 * metrics.accuracy,
        100.0 * metrics.best_accuracy,
        metrics.best_epoch,
    );
    show_files(out);
    Ok(())
}

fn metrics<'a>(training: &'a Training, masked: &'a Record, classifier: &'a Record) -> Metrics<'a> {
    let accuracies = || {
        let evaluations = classifier.evaluations.iter();
        evaluations.map(|evaluation| (evaluation.scores.accuracy.unwrap_or(0.0), evaluation.step))
    };
    let best = accuracies().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or_default();
    Metrics {
        accuracy: accuracies().next_back().unwrap_or_default().0,
        best_accuracy: best.0,
        best_epoch: best.1 / training.epoch,
        classifier: Losses::new(classifier),
        masked: Losses::new(masked),
        held_out: training.reviews.held_out.len(),
        seed: training.settings.seed,
        device: training.settings.device,
        threads: rayon::current_num_threads(),
        settings: &training.settings,
    }
}

fn losses(record: &Record) -> [Curve; 2] {
    let curve = |name: &str, dashed, loss: fn(&Evaluation) -> f64| Curve {
        name: name.to_owned(),
        points: record.evaluations.iter().map(|e| (e.step as f64, loss(e))).collect(),
        colour: 0,
        dashed,
    };
    [
        curve("training", true, |evaluation| evaluation.scores.train_loss),
        curve("held out", false, |evaluation| evaluation.scores.val_loss),
    ]
}

fn accuracies(record: &Record) -> Curve {
    let point = |e: &Evaluation| Some((e.step as f64, 100.0 * e.scores.accuracy?));
    Curve {
        name: "held out".to_owned(),
        points: record.evaluations.iter().filter_map(point).collect(),
        colour: 0,
        dashed: false,
    }
}

fn show_files(out: &Folder) {
    for (what, file) in [
        ("curves", "loss.svg"),
        ("accuracy", "accuracy.svg"),
        ("metrics", "metrics.json"),
        ("weights", Folder::MODEL),
        ("checkpoint", Folder::CHECKPOINT),
    ] {
        say!("{what:<10}  {}", out.path(file).display());
    }
}
