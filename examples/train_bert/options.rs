//! The command line, and the settings of a run that follow from it.

use super::common::device::Device;
use super::common::encoding;
use super::common::files::{Folder, Place, sha256};
use super::common::probability::probability;
use super::common::settings;
use super::common::trainer::Plan;
use super::tokenizer::PAD;
use anyhow::{Result, ensure};
use clap::{Parser, value_parser};
use encoding_rs::Encoding;
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
#[command(name = "train_bert", version, args_override_self = true)]
pub struct Arguments {
    /// Texts of the class `positive`, one a line; they may come through a pipe
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    positive: Option<PathBuf>,
    /// Texts of the class `negative`
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    negative: Option<PathBuf>,
    /// What both are written in: utf-8, utf-16le, utf-16be, latin-1, windows-1252 or another of the WHATWG's standard
    /// [default: what its byte order mark says, otherwise utf-8, or windows-1252 where all of it looks like that]
    #[arg(long, value_name = "NAME", value_parser = encoding::by_name)]
    encoding: Option<&'static Encoding>,
    /// Drop probability at every site that has no option of its own, 0 to 1 in steps of 1/65536
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    dropout: Option<f64>,
    /// Drop probability after the embeddings and in both residual branches [default: 0.3]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    hidden_dropout: Option<f64>,
    /// Drop probability of attention probabilities [default: 0.3]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    attention_dropout: Option<f64>,
    /// Drop probability before the classification head [default: 0.3]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    classifier_dropout: Option<f64>,
    /// Epochs of the masked language model; 0: classes are learnt from new weights [default: 3]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(..1 << 20))]
    masked_epochs: Option<u64>,
    /// Epochs of the classifier [default: 4]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(..1 << 20))]
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
    pub positive: Place,
    pub negative: Place,
    pub data_sha256: String,
    #[serde(default)]
    pub encoding: Option<&'static Encoding>,
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
            positive: Place::default(),
            negative: Place::default(),
            data_sha256: String::new(),
            encoding: None,
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
    pub fn settings(&self) -> Settings {
        self.over(Settings::default())
    }

    /// These settings but for what was given.
    pub fn over(&self, base: Settings) -> Settings {
        let place = |given: &Option<PathBuf>, base| given.as_deref().map_or(base, Place::new);
        let p = |own: Option<f64>, base| own.or(self.dropout).unwrap_or(base);
        Settings {
            positive: place(&self.positive, base.positive),
            negative: place(&self.negative, base.negative),
            encoding: self.encoding.or(base.encoding),
            hidden_dropout: p(self.hidden_dropout, base.hidden_dropout),
            attention_dropout: p(self.attention_dropout, base.attention_dropout),
            classifier_dropout: p(self.classifier_dropout, base.classifier_dropout),
            masked_epochs: self.masked_epochs.unwrap_or(base.masked_epochs),
            epochs: self.epochs.unwrap_or(base.epochs),
            seed: self.seed.unwrap_or(base.seed),
            device: self.device.unwrap_or(base.device),
            ..base
        }
    }
}

impl settings::Settings for Settings {
    const PLACES: &[&str] = &["positive", "negative"];

    fn check(&self) -> Result<()> {
        let Size { length, batch, .. } = self.size;
        ensure!(length > 2 && batch > 0, "expected texts in batches, got {:?}", self.size);
        Ok(())
    }

    fn folders(&self, out: &Folder) -> Vec<Folder> {
        folders(out).into()
    }
}

impl Settings {
    /// Of a run on files with these bytes, negative and positive: refuses others than before.
    pub fn with_texts(self, texts: &[Vec<u8>; 2]) -> Result<Self> {
        let data_sha256 = texts.each_ref().map(|bytes| sha256(bytes)).join(" ");
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
            intermediate_size: self.size.width.saturating_mul(4),
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            hidden_dropout_prob: Probability::nonvanishing(self.hidden_dropout)?,
            attention_probs_dropout_prob: Probability::nonvanishing(self.attention_dropout)?,
            classifier_dropout: Probability::nonvanishing(self.classifier_dropout)?,
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
    let schedule =
        Schedule { peak: 1e-3, floor: 1e-4, warmup: 100, steps: epochs.saturating_mul(epoch) };
    let optimizer = AdamW { beta2: 0.999, ..AdamW::default() };
    Plan { optimizer, schedule, eval_interval: epoch }
}

/// The folders of the masked language model and of the classifier.
pub fn folders(out: &Folder) -> [Folder; 2] {
    [out.inner("masked"), out.clone()]
}
