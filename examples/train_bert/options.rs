//! The command line, and the settings of a run that follow from it.

use super::common::device::Device;
use super::common::files::{Folder, sha256};
use super::common::settings;
use super::common::trainer::Plan;
use super::tokenizer::PAD;
use anyhow::{Context, Result, ensure};
use clap::Parser;
use fused_dropout::transformer::{AdamW, BertConfig, Schedule};
use fused_dropout::{Activation, Probability};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Trains a small BERT on two files of texts, one a line, and fine-tunes it to tell which file a text is of.
///
/// First it learns to guess hidden words (a masked language model), then, from those weights, the classes. A tenth of
/// either file, chosen by the seed, is held out from both; so are its words.
///
/// OUT gets metrics.json, loss.svg, accuracy.svg, model.safetensors and config.json (as Hugging Face's
/// BertForSequenceClassification reads them) and vocabulary.txt; OUT/masked the same of the masked language model. At the
/// end of every epoch and on Ctrl-C checkpoint.safetensors is written, from which --resume continues as if nothing had
/// happened: the same options and number of threads give the same losses, bit for bit.
#[derive(Parser)]
#[command(name = "train_bert", version)]
pub struct Arguments {
    /// Texts of the class `positive`, one a line: UTF-8, otherwise taken as Latin-1
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    positive: Option<PathBuf>,
    /// Texts of the class `negative`
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    negative: Option<PathBuf>,
    /// Drop probability at every site that has no option of its own, 0 to 1
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    dropout: Option<f64>,
    /// Drop probability after the embeddings and in both residual branches [default: 0.3]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    hidden_dropout: Option<f64>,
    /// Drop probability of attention probabilities [default: 0.3]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    attention_dropout: Option<f64>,
    /// Drop probability before the classification head [default: 0.3]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    classifier_dropout: Option<f64>,
    /// Epochs of the masked language model; 0: classes are learnt from new weights [default: 3]
    #[arg(long, value_name = "N")]
    masked_epochs: Option<u64>,
    /// Epochs of the classifier [default: 4]
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// What the held-out texts, weights, batches and masks follow from [default: 1337]
    #[arg(long, value_name = "U64")]
    seed: Option<u64>,
    /// Where to train [default: cpu]
    #[arg(long)]
    device: Option<Device>,
    /// The folder for whatever is written
    #[arg(long, value_name = "DIR", default_value = "target/train_bert")]
    pub out: PathBuf,
    /// Continue the run that OUT has a checkpoint of; other options are not needed, and must not differ, except --positive
    /// and --negative where the same texts are elsewhere now
    #[arg(long)]
    pub resume: bool,
    /// Replace the checkpoint that an earlier run left in OUT, with the first one of this run
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
}

/// Everything that a run follows from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub positive: PathBuf,
    pub negative: PathBuf,
    pub data_sha256: String,
    pub size: Size,
    pub hidden_dropout: f64,
    pub attention_dropout: f64,
    pub classifier_dropout: f64,
    pub masked_epochs: u64,
    pub epochs: u64,
    pub seed: u64,
    pub device: Device,
}

/// Of the model and its batches.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
    pub length: usize,
    pub batch: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            positive: PathBuf::new(),
            negative: PathBuf::new(),
            data_sha256: String::new(),
            size: Size { layers: 2, heads: 2, width: 64, length: 48, batch: 32 },
            hidden_dropout: 0.3,
            attention_dropout: 0.3,
            classifier_dropout: 0.3,
            masked_epochs: 3,
            epochs: 4,
            seed: 1337,
            device: Device::Cpu,
        }
    }
}

impl Arguments {
    /// The settings of a new run.
    pub fn settings(&self) -> Result<Settings> {
        self.over(Settings::default())
    }

    /// These settings but for what was given.
    pub fn over(&self, base: Settings) -> Result<Settings> {
        let path = |given: &Option<PathBuf>, base| match given {
            Some(path) => {
                path.canonicalize().with_context(|| format!("cannot read {}", path.display()))
            }
            None => Ok(base),
        };
        let p = |own: Option<f64>, base| own.or(self.dropout).unwrap_or(base);
        let settings = Settings {
            positive: path(&self.positive, base.positive)?,
            negative: path(&self.negative, base.negative)?,
            hidden_dropout: p(self.hidden_dropout, base.hidden_dropout),
            attention_dropout: p(self.attention_dropout, base.attention_dropout),
            classifier_dropout: p(self.classifier_dropout, base.classifier_dropout),
            masked_epochs: self.masked_epochs.unwrap_or(base.masked_epochs),
            epochs: self.epochs.unwrap_or(base.epochs),
            seed: self.seed.unwrap_or(base.seed),
            device: self.device.unwrap_or(base.device),
            ..base
        };
        // Refuses what is no probability.
        settings.config(1)?;
        Ok(settings)
    }
}

impl settings::Settings for Settings {
    const PLACES: &[&str] = &["positive", "negative"];

    fn folders(&self, out: &Folder) -> Vec<Folder> {
        folders(out).into()
    }
}

impl Settings {
    /// Of a run on files with these bytes: refuses others than before.
    pub fn with_texts(self, negative: &[u8], positive: &[u8]) -> Result<Self> {
        let data_sha256 = [negative, positive].map(sha256).join(" ");
        ensure!(
            self.data_sha256.is_empty() || self.data_sha256 == data_sha256,
            "cannot resume: the texts have changed (--positive and --negative for where they are now)"
        );
        Ok(Self { data_sha256, ..self })
    }

    /// The model, of either task.
    pub fn config(&self, vocab_size: usize) -> Result<BertConfig> {
        Ok(BertConfig {
            vocab_size,
            max_position_embeddings: self.size.length,
            type_vocab_size: 1,
            hidden_size: self.size.width,
            num_hidden_layers: self.size.layers,
            num_attention_heads: self.size.heads,
            intermediate_size: 4 * self.size.width,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            hidden_dropout_prob: Probability::new(self.hidden_dropout)?,
            attention_probs_dropout_prob: Probability::new(self.attention_dropout)?,
            classifier_dropout: Probability::new(self.classifier_dropout)?,
            num_labels: 2,
            problem_type: None,
            pad_token_id: Some(PAD as usize),
        })
    }

    /// How the masked language model learns, in epochs of so many steps.
    pub fn masked_plan(&self, epoch: u64) -> Plan {
        plan(self.masked_epochs, epoch)
    }

    /// How the classifier learns.
    pub fn plan(&self, epoch: u64) -> Plan {
        plan(self.epochs, epoch)
    }
}

/// Both models begin with many weights that are new: they learn at the same rates.
fn plan(epochs: u64, epoch: u64) -> Plan {
    let schedule = Schedule { peak: 1e-3, floor: 1e-4, warmup: 100, steps: epochs * epoch };
    let optimizer = AdamW { beta2: 0.999, ..AdamW::default() };
    Plan { optimizer, schedule, eval_interval: epoch }
}

/// The folders of the masked language model and of the classifier.
pub fn folders(out: &Folder) -> [Folder; 2] {
    [out.inner("masked"), out.clone()]
}
