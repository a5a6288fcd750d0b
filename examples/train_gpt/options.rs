//! The command line, and the settings of a run that follow from it.

use super::common::device::Device;
use super::common::encoding;
use super::common::files::{Folder, Place, sha256};
use super::common::probability::probability;
use super::common::settings;
use super::common::trainer::Plan;
use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum, value_parser};
use encoding_rs::Encoding;
use fused_dropout::transformer::{AdamW, DropoutSchedule, GptConfig, Schedule};
use fused_dropout::{Activation, Probability};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Trains a small GPT on a text, every character a token, and lets it write some.
///
/// Without --data, --preset and --dropout: twice on this project's own documents, without dropout and with
/// dropout 0.2, in turns of a few steps, so that the times of both compare.
///
/// The last tenth of the text is for validation. OUT gets metrics.json, curves.svg, model.safetensors and config.json
/// (as Hugging Face's GPT2LMHeadModel reads them), vocabulary.json (the character of each token), and at every
/// evaluation and on Ctrl-C checkpoint.safetensors, from which --resume continues as if nothing had happened: the
/// same options and number of threads give the same losses, bit for bit.
#[derive(Parser)]
#[command(name = "train_gpt", version, args_override_self = true)]
pub struct Arguments {
    /// The text, which may come through a pipe [default: this project's documents of 2026-11-26]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// What the text is written in: utf-8, utf-16le, utf-16be, latin-1, windows-1252 or another of the WHATWG's standard
    /// [default: what its byte order mark says, otherwise utf-8, or windows-1252 where all of it looks like that]
    #[arg(long, value_name = "NAME", value_parser = encoding::by_name)]
    encoding: Option<&'static Encoding>,
    /// The model's size and the length of the training [default: nanogpt-cpu]
    #[arg(long)]
    preset: Option<Preset>,
    /// Drop probability at every site, 0 to 1 in steps of 1/65536 [default: nanogpt-cpu 0.0, nanogpt 0.2, as in nanoGPT]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    dropout: Option<f64>,
    /// No dropout from this step on: early dropout, against underfitting
    #[arg(long, value_name = "STEP", conflicts_with = "dropout_from")]
    dropout_until: Option<u64>,
    /// No dropout before this step: late dropout, against overfitting
    #[arg(long, value_name = "STEP")]
    dropout_from: Option<u64>,
    /// Training steps; the learning rate falls over all of them [default: the preset's]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..1 << 44))]
    steps: Option<u64>,
    /// What weights, batches, masks and the sample follow from [default: 1337]
    #[arg(long, value_name = "U64")]
    seed: Option<u64>,
    /// Where to train [default: cpu]
    #[arg(long)]
    device: Option<Device>,
    /// Steps from one evaluation, and checkpoint, to the next [default: 250]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    eval_interval: Option<u64>,
    /// Characters that the trained model writes
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub sample: usize,
    /// The folder for whatever is written
    #[arg(long, value_name = "DIR", default_value = "target/train_gpt")]
    pub out: PathBuf,
    /// Continue the run that OUT has a checkpoint of; other options are not needed, and must not differ, except --sample,
    /// and --data where the same text is elsewhere now
    #[arg(long)]
    pub resume: bool,
    /// Replace the checkpoint that an earlier run left in OUT, with the first one of this run
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
}

/// Sizes of nanoGPT's examples.
#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// 4 layers, 4 heads, width 128, context 64, batch 12; 2000 steps
    NanogptCpu,
    /// 6 layers, 6 heads, width 384, context 256, batch 64; 5000 steps
    Nanogpt,
}

/// Everything that a run follows from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The text's file; none: this project's documents.
    pub data: Option<Place>,
    pub data_sha256: String,
    #[serde(default)]
    pub encoding: Option<&'static Encoding>,
    pub size: Size,
    /// The drop probability of each run.
    pub dropouts: Vec<f64>,
    /// The step from which nothing is dropped, and the one before which nothing is; at most one of them.
    #[serde(default)]
    pub dropout_until: Option<u64>,
    #[serde(default)]
    pub dropout_from: Option<u64>,
    pub steps: u64,
    pub seed: u64,
    pub device: Device,
    pub eval_interval: u64,
}

/// Of the model and its batches.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
    pub context: usize,
    pub batch: usize,
}

impl Preset {
    fn size(self) -> Size {
        match self {
            Preset::NanogptCpu => Size { layers: 4, heads: 4, width: 128, context: 64, batch: 12 },
            Preset::Nanogpt => Size { layers: 6, heads: 6, width: 384, context: 256, batch: 64 },
        }
    }

    fn steps(self) -> u64 {
        match self {
            Preset::NanogptCpu => 2000,
            Preset::Nanogpt => 5000,
        }
    }

    fn dropout(self) -> f64 {
        match self {
            Preset::NanogptCpu => 0.0,
            Preset::Nanogpt => 0.2,
        }
    }
}

/// Of each of the two runs without options.
const COMPARISON_STEPS: u64 = 1200;

impl Arguments {
    /// The settings of a new run.
    pub fn settings(&self) -> Settings {
        let preset = self.preset.unwrap_or(Preset::NanogptCpu);
        let comparison = self.data.is_none() && self.preset.is_none() && self.dropout.is_none();
        let mut settings = Settings {
            data: None,
            data_sha256: String::new(),
            encoding: None,
            size: preset.size(),
            dropouts: vec![preset.dropout()],
            dropout_until: None,
            dropout_from: None,
            steps: preset.steps(),
            seed: 1337,
            device: Device::Cpu,
            eval_interval: 250,
        };
        if comparison {
            settings.dropouts = vec![0.0, 0.2];
            settings.steps = COMPARISON_STEPS;
        }
        self.over(settings)
    }

    /// These settings but for what was given.
    pub fn over(&self, base: Settings) -> Settings {
        Settings {
            data: self.data.as_deref().map(Place::new).or(base.data),
            encoding: self.encoding.or(base.encoding),
            size: self.preset.map_or(base.size, Preset::size),
            dropouts: self.dropout.map_or(base.dropouts, |p| vec![p]),
            dropout_until: self.dropout_until.or(base.dropout_until),
            dropout_from: self.dropout_from.or(base.dropout_from),
            steps: self.steps.unwrap_or(base.steps),
            seed: self.seed.unwrap_or(base.seed),
            device: self.device.unwrap_or(base.device),
            eval_interval: self.eval_interval.unwrap_or(base.eval_interval),
            ..base
        }
    }
}

impl settings::Settings for Settings {
    const PLACES: &[&str] = &["data"];

    fn check(&self) -> Result<()> {
        ensure!(
            matches!(self.dropouts.len(), 1 | 2),
            "expected 1 or 2 dropouts, got {}",
            self.dropouts.len()
        );
        ensure!(
            self.dropout_until.is_none() || self.dropout_from.is_none(),
            "expected dropout_until or dropout_from, got both"
        );
        ensure!(
            self.schedule() == DropoutSchedule::Constant || self.dropouts.iter().any(|&p| p != 0.0),
            "expected a --dropout above 0 beside --dropout-until or --dropout-from"
        );
        ensure!(self.steps > 0, "expected at least 1 step, got 0");
        ensure!(self.eval_interval > 0, "expected an eval_interval of at least 1, got 0");
        Ok(())
    }

    fn folders(&self, out: &Folder) -> Vec<Folder> {
        match self.dropouts.len() {
            2 => folders(out).into(),
            _ => vec![out.clone()],
        }
    }
}

impl Settings {
    /// Of a run on the text with these bytes: refuses another one than before.
    pub fn with_text(self, bytes: &[u8]) -> Result<Self> {
        let data_sha256 = sha256(bytes);
        ensure!(
            self.data_sha256.is_empty() || self.data_sha256 == data_sha256,
            "cannot resume: the text has changed (--data FILE for where it is now)"
        );
        Ok(Self { data_sha256, ..self })
    }

    /// A model of so many characters with this drop probability at every site.
    pub fn config(&self, characters: usize, dropout: f64) -> Result<GptConfig> {
        let p = Probability::nonvanishing(dropout)?;
        // Tensor cores want rows of whole 16 bytes: the last tokens stand for no character there.
        let vocab_size = match self.device {
            Device::Cpu => characters,
            Device::Cuda => characters.next_multiple_of(8),
        };
        Ok(GptConfig {
            vocab_size,
            n_positions: self.size.context,
            n_embd: self.size.width,
            n_layer: self.size.layers,
            n_head: self.size.heads,
            n_inner: self.size.width.saturating_mul(4),
            activation_function: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            embd_pdrop: p,
            attn_pdrop: p,
            resid_pdrop: p,
            // Of the multiple-choice head, which this model has not.
            summary_first_dropout: Probability::ZERO,
            summary_activation: Activation::Identity,
            bos_token_id: None,
            eos_token_id: None,
            num_labels: 1,
        })
    }

    /// At which steps there is dropout.
    pub fn schedule(&self) -> DropoutSchedule {
        match (self.dropout_until, self.dropout_from) {
            (Some(step), _) => DropoutSchedule::Until(step),
            (None, Some(step)) => DropoutSchedule::From(step),
            (None, None) => DropoutSchedule::Constant,
        }
    }

    /// nanoGPT's optimiser and rates.
    pub fn plan(&self) -> Plan {
        let schedule = Schedule { peak: 1e-3, floor: 1e-4, warmup: 100, steps: self.steps };
        Plan { optimizer: AdamW::default(), schedule, eval_interval: self.eval_interval }
    }
}

const WITHOUT_DROPOUT: &str = "without-dropout";

/// The folders below OUT that may hold a run: that without dropout of a comparison, and OUT itself.
pub fn folders(out: &Folder) -> [Folder; 2] {
    [out.inner(WITHOUT_DROPOUT), out.clone()]
}
