//! Configurations of models, from Hugging Face's `config.json`.

use super::refuse;
use super::streams::MAX_LAYERS;
use crate::error::Error;
use crate::mask::Probability;
use crate::ops::bias_act_dropout::Activation;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A GPT-2: pre-norm, causal.
#[derive(Clone, Debug, PartialEq)]
pub struct GptConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Positions, the longest sequence.
    pub n_positions: usize,
    /// Width.
    pub n_embd: usize,
    /// Blocks.
    pub n_layer: usize,
    /// Attention heads.
    pub n_head: usize,
    /// Width of the feed-forward part.
    pub n_inner: usize,
    /// Activation of the feed-forward part.
    pub activation_function: Activation,
    /// Epsilon of the norms.
    pub layer_norm_epsilon: f32,
    /// Standard deviation of new weights.
    pub initializer_range: f32,
    /// Drop probability after the embeddings.
    pub embd_pdrop: Probability,
    /// Drop probability of attention probabilities.
    pub attn_pdrop: Probability,
    /// Drop probability of both residual branches.
    pub resid_pdrop: Probability,
    /// Drop probability before the projection of the sequence summary.
    pub summary_first_dropout: Probability,
    /// Activation of the sequence summary; none where it is the identity.
    pub summary_activation: Activation,
    /// The token that begins a text, if the vocabulary has one.
    pub bos_token_id: Option<usize>,
    /// The token that ends a text, if the vocabulary has one.
    pub eos_token_id: Option<usize>,
    /// Classes of the file's `id2label`. No part of these models has them: the sequence summary has one output.
    pub num_labels: usize,
}

/// A BERT: post-norm, bidirectional.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Positions, the longest sequence.
    pub max_position_embeddings: usize,
    /// Segments.
    pub type_vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Activation of the feed-forward part.
    pub hidden_act: Activation,
    /// Epsilon of the norms.
    pub layer_norm_eps: f32,
    /// Standard deviation of new weights.
    pub initializer_range: f32,
    /// Drop probability after the embeddings and in both residual branches.
    pub hidden_dropout_prob: Probability,
    /// Drop probability of attention probabilities.
    pub attention_probs_dropout_prob: Probability,
    /// Drop probability between pooler and classification head. `null` in the file: `hidden_dropout_prob`.
    pub classifier_dropout: Probability,
    /// The token that fills sequences up. As in the library, its entry of the table is not trained by its use as an input.
    pub pad_token_id: Option<usize>,
    /// Classes.
    pub num_labels: usize,
    /// What a classifier's loss is to the library: none, or the only one that there is here,
    /// `single_label_classification`, the cross-entropy of one class.
    pub problem_type: Option<String>,
}

impl GptConfig {
    /// From the text of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Setting`] with the setting that is unknown, missing, of another type, or does not fit.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut file = Settings::parse(text, "gpt2")?;
        GPT_SYNONYMS.iter().try_for_each(|&(other, name)| file.synonym(other, name))?;
        let n_embd = file.required("n_embd")?;
        let vocab_size = file.required("vocab_size")?;
        let summary_activation = match file.take::<Option<String>>("summary_activation", None)? {
            Some(name) if !name.is_empty() => activation("summary_activation", &name)?,
            _ => Activation::Identity,
        };
        let config = Self {
            vocab_size,
            n_positions: file.required("n_positions")?,
            n_embd,
            n_layer: file.required("n_layer")?,
            n_head: file.required("n_head")?,
            n_inner: file
                .take::<Option<usize>>("n_inner", None)?
                .unwrap_or_else(|| n_embd.saturating_mul(4)),
            activation_function: file.activation("activation_function", "gelu_new")?,
            layer_norm_epsilon: file.take("layer_norm_epsilon", 1e-5)?,
            initializer_range: file.take("initializer_range", 0.02)?,
            embd_pdrop: file.probability("embd_pdrop", 0.1)?,
            attn_pdrop: file.probability("attn_pdrop", 0.1)?,
            resid_pdrop: file.probability("resid_pdrop", 0.1)?,
            summary_first_dropout: file.probability("summary_first_dropout", 0.1)?,
            summary_activation,
            bos_token_id: file.end_of_text("bos_token_id", vocab_size)?,
            eos_token_id: file.end_of_text("eos_token_id", vocab_size)?,
            num_labels: file.label_names()?.unwrap_or(1),
        };
        file.only("scale_attn_weights", json!(true))?;
        file.only("scale_attn_by_inverse_layer_idx", json!(false))?;
        file.only("summary_type", json!("cls_index"))?;
        file.only("summary_use_proj", json!(true))?;
        file.only("summary_proj_to_labels", json!(true))?;
        // Attention is causal whichever this says; the order of two factors has no influence on a result in f32.
        file.ignore(&["is_decoder", "reorder_and_upcast_attn", "n_ctx", "pad_token_id"]);
        // Of a classifier, which these models have not.
        file.ignore(&["num_labels", "_num_labels", "problem_type"]);
        file.finish()?;
        config.check()?;
        Ok(config)
    }

    /// The text of a `config.json`.
    pub fn to_json(&self) -> String {
        let value = json!({
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "activation_function": activation_name(self.activation_function),
            "layer_norm_epsilon": short(self.layer_norm_epsilon),
            "initializer_range": short(self.initializer_range),
            "embd_pdrop": self.embd_pdrop.effective(),
            "attn_pdrop": self.attn_pdrop.effective(),
            "resid_pdrop": self.resid_pdrop.effective(),
            "summary_first_dropout": self.summary_first_dropout.effective(),
            "summary_activation": match self.summary_activation {
                Activation::Identity => Value::Null,
                other => json!(activation_name(other)),
            },
            // Without these the library takes GPT-2's, whatever the vocabulary.
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "id2label": labels(self.num_labels),
            "tie_word_embeddings": true,
        });
        format!("{value:#}\n")
    }

    /// Whether the sizes fit each other.
    ///
    /// # Errors
    /// [`Error::Setting`] with the one that does not.
    pub fn check(&self) -> Result<(), Error> {
        positive("vocab_size", self.vocab_size)?;
        token("bos_token_id", self.bos_token_id, self.vocab_size)?;
        token("eos_token_id", self.eos_token_id, self.vocab_size)?;
        positive("n_positions", self.n_positions)?;
        positive("n_head", self.n_head)?;
        heads("n_embd", self.n_embd, self.n_head)?;
        positive("n_inner", self.n_inner)?;
        positive("num_labels", self.num_labels)?;
        layers("n_layer", self.n_layer)?;
        finite("layer_norm_epsilon", self.layer_norm_epsilon)?;
        finite("initializer_range", self.initializer_range)?;
        let width = self.n_embd;
        let tables = [
            ("n_embd", width, 4, self.n_layer),
            ("n_inner", self.n_inner, 2, self.n_layer),
            ("vocab_size", self.vocab_size, 1, 1),
            ("n_positions", self.n_positions, 1, 1),
            ("num_labels", self.num_labels, 1, 1),
        ];
        weights_fit(width, tables)
    }
}

impl BertConfig {
    /// From the text of a `config.json`.
    ///
    /// # Errors
    /// As [`GptConfig::from_json`].
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut file = Settings::parse(text, "bert")?;
        let hidden_dropout_prob = file.probability("hidden_dropout_prob", 0.1)?;
        let classifier_dropout = match file.take::<Option<f64>>("classifier_dropout", None)? {
            Some(p) => probability("classifier_dropout", p)?,
            None => hidden_dropout_prob,
        };
        let config = Self {
            vocab_size: file.required("vocab_size")?,
            max_position_embeddings: file.required("max_position_embeddings")?,
            type_vocab_size: file.take("type_vocab_size", 2)?,
            hidden_size: file.required("hidden_size")?,
            num_hidden_layers: file.required("num_hidden_layers")?,
            num_attention_heads: file.required("num_attention_heads")?,
            intermediate_size: file.required("intermediate_size")?,
            hidden_act: file.activation("hidden_act", "gelu")?,
            layer_norm_eps: file.take("layer_norm_eps", 1e-12)?,
            initializer_range: file.take("initializer_range", 0.02)?,
            hidden_dropout_prob,
            attention_probs_dropout_prob: file.probability("attention_probs_dropout_prob", 0.1)?,
            classifier_dropout,
            pad_token_id: file.take("pad_token_id", Some(0))?,
            num_labels: file.labels(2)?,
            problem_type: file.take("problem_type", None)?,
        };
        file.never("is_decoder")?;
        file.only("position_embedding_type", json!("absolute"))?;
        file.only("pooler_type", json!("first_token_transform"))?;
        file.only("directionality", json!("bidi"))?;
        // Of the multilingual models, whose pooler is BERT's all the same.
        file.ignore(&[
            "bos_token_id",
            "eos_token_id",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
        ]);
        file.finish()?;
        config.check()?;
        Ok(config)
    }

    /// The text of a `config.json`.
    pub fn to_json(&self) -> String {
        let value = json!({
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "type_vocab_size": self.type_vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "hidden_act": activation_name(self.hidden_act),
            "layer_norm_eps": short(self.layer_norm_eps),
            "initializer_range": short(self.initializer_range),
            "hidden_dropout_prob": self.hidden_dropout_prob.effective(),
            "attention_probs_dropout_prob": self.attention_probs_dropout_prob.effective(),
            "classifier_dropout": self.classifier_dropout.effective(),
            "pad_token_id": self.pad_token_id,
            "id2label": labels(self.num_labels),
            "problem_type": self.problem_type,
            "tie_word_embeddings": true,
        });
        format!("{value:#}\n")
    }

    /// Whether the sizes fit each other.
    ///
    /// # Errors
    /// [`Error::Setting`] with the one that does not.
    pub fn check(&self) -> Result<(), Error> {
        positive("vocab_size", self.vocab_size)?;
        positive("max_position_embeddings", self.max_position_embeddings)?;
        positive("type_vocab_size", self.type_vocab_size)?;
        token("pad_token_id", self.pad_token_id, self.vocab_size)?;
        positive("intermediate_size", self.intermediate_size)?;
        positive("num_labels", self.num_labels)?;
        layers("num_hidden_layers", self.num_hidden_layers)?;
        positive("num_attention_heads", self.num_attention_heads)?;
        heads("hidden_size", self.hidden_size, self.num_attention_heads)?;
        finite("layer_norm_eps", self.layer_norm_eps)?;
        finite("initializer_range", self.initializer_range)?;
        let width = self.hidden_size;
        let tables = [
            ("hidden_size", width, 4, self.num_hidden_layers),
            ("intermediate_size", self.intermediate_size, 2, self.num_hidden_layers),
            ("vocab_size", self.vocab_size, 1, 1),
            ("max_position_embeddings", self.max_position_embeddings, 1, 1),
            ("type_vocab_size", self.type_vocab_size, 1, 1),
            ("num_labels", self.num_labels, 1, 1),
        ];
        weights_fit(width, tables)
    }
}

/// The settings of a file that have not been looked at yet.
struct Settings(Map<String, Value>);

/// Other names of GPT-2's settings, which the library takes as well.
const GPT_SYNONYMS: [(&str, &str); 4] = [
    ("hidden_size", "n_embd"),
    ("max_position_embeddings", "n_positions"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
];

/// GPT-2's token before and behind a text, which its library means where a file says nothing.
const END_OF_TEXT: usize = 50_256;

/// Settings that say nothing about the arithmetic of these models: notes of writers, what the library hands back, and how
/// it stores and computes.
const WITHOUT_INFLUENCE: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "keys_to_ignore_at_inference",
    "label2id",
    "language",
    "n_special",
    "name",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "predict_special_tokens",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    "xla_device",
];

/// Settings of the generation of text, which is not the models' business.
const OF_GENERATION: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "penalty_alpha",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

impl Settings {
    fn parse(text: &str, model_type: &str) -> Result<Self, Error> {
        // Some editors begin a file with a byte order mark.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let map = serde_json::from_str(text).map_err(|error| Error::File {
            path: "config.json".into(),
            reason: error.to_string(),
        })?;
        let mut settings = Self(map);
        settings.only("model_type", json!(model_type))?;
        settings.only("tie_word_embeddings", json!(true))?;
        settings.never("add_cross_attention")?;
        settings.never("is_encoder_decoder")?;
        settings.never("pruned_heads")?;
        Ok(settings)
    }

    fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, Error> {
        let value = self.0.remove(name).ok_or_else(|| refuse::setting(name, "a value", "none"))?;
        read(name, value)
    }

    fn take<T: DeserializeOwned>(&mut self, name: &str, default: T) -> Result<T, Error> {
        self.0.remove(name).map_or(Ok(default), |value| read(name, value))
    }

    fn probability(&mut self, name: &str, default: f64) -> Result<Probability, Error> {
        let p = self.take(name, default)?;
        probability(name, p)
    }

    fn activation(&mut self, name: &str, default: &str) -> Result<Activation, Error> {
        let given = self.take(name, default.to_owned())?;
        activation(name, &given)
    }

    /// How many classes are named, if any.
    fn label_names(&mut self) -> Result<Option<usize>, Error> {
        let names = self.take::<Option<Map<String, Value>>>("id2label", None)?;
        Ok(names.map(|names| names.len()).filter(|&count| count > 0))
    }

    /// The number of classes: by their names, or by a number. Versions of the library differ in which of two counts.
    fn labels(&mut self, default: usize) -> Result<usize, Error> {
        let mut labels = self.label_names()?;
        let counts = ["num_labels", "_num_labels"]
            .map(|name| Ok((name, self.take::<Option<usize>>(name, None)?)));
        for count in counts {
            let (name, Some(count)) = count? else { continue };
            if let Some(labels) = labels.filter(|&labels| labels != count) {
                return Err(refuse::setting(name, format!("the {labels} of the others"), count));
            }
            labels = Some(count);
        }
        Ok(labels.unwrap_or(default))
    }

    /// A token before or behind a text: the first, where there are several, and none that the vocabulary has not.
    fn end_of_text(&mut self, name: &str, vocab_size: usize) -> Result<Option<usize>, Error> {
        let token = match self.0.remove(name) {
            None => Some(END_OF_TEXT),
            Some(Value::Array(tokens)) => read(name, tokens.first().cloned().unwrap_or_default())?,
            Some(token) => read(name, token)?,
        };
        Ok(token.filter(|&token| token < vocab_size))
    }

    /// Takes a setting under its other name.
    fn synonym(&mut self, other: &str, name: &str) -> Result<(), Error> {
        let Some(value) = self.0.remove(other) else { return Ok(()) };
        match self.0.get(name) {
            Some(known) if *known != value => {
                Err(refuse::setting(other, format!("{known}, as {name}"), value))
            }
            _ => {
                self.0.insert(name.to_owned(), value);
                Ok(())
            }
        }
    }

    /// A setting that these models have in one form only.
    fn only(&mut self, name: &str, expected: Value) -> Result<(), Error> {
        match self.0.remove(name) {
            Some(given) if given != expected => Err(refuse::setting(name, expected, given)),
            _ => Ok(()),
        }
    }

    /// Something that these models do not do: false, null or empty.
    fn never(&mut self, name: &str) -> Result<(), Error> {
        let nothing = [json!(false), json!({}), json!([])];
        match self.0.remove(name).filter(|given| !nothing.contains(given)) {
            Some(given) if !given.is_null() => {
                Err(refuse::setting(name, "false, null or nothing", given))
            }
            _ => Ok(()),
        }
    }

    fn ignore(&mut self, names: &[&str]) {
        names.iter().for_each(|&name| _ = self.0.remove(name));
    }

    fn finish(mut self) -> Result<(), Error> {
        self.ignore(WITHOUT_INFLUENCE);
        self.ignore(OF_GENERATION);
        // What is null has not been set.
        match self.0.into_iter().find(|(_, given)| !given.is_null()) {
            Some((name, given)) => Err(refuse::setting(name, "a setting that is known", given)),
            None => Ok(()),
        }
    }
}

fn read<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, Error> {
    let given = value.to_string();
    serde_json::from_value(value).map_err(|error| refuse::setting(name, error, given))
}

fn probability(name: &str, p: f64) -> Result<Probability, Error> {
    Probability::nonvanishing(p).map_err(|error| match error {
        Error::Argument { expected, .. } => refuse::setting(name, expected, p),
        other => other,
    })
}

/// The activations under Hugging Face's names.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("linear", Activation::Identity),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

fn activation(setting: &str, name: &str) -> Result<Activation, Error> {
    ACTIVATIONS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, activation)| activation)
        .ok_or_else(|| {
            let known: Vec<_> = ACTIVATIONS.iter().map(|(known, _)| *known).collect();
            refuse::setting(setting, format!("one of {}", known.join(", ")), name)
        })
}

fn activation_name(activation: Activation) -> &'static str {
    let found = ACTIVATIONS.iter().find(|(_, known)| *known == activation);
    found.expect("every activation has a name").0
}

/// Names of so many classes.
fn labels(count: usize) -> Map<String, Value> {
    (0..count).map(|label| (label.to_string(), json!(format!("LABEL_{label}")))).collect()
}

/// The f64 that is written as shortly as the f32.
fn short(value: f32) -> f64 {
    value.to_string().parse().expect("a number as Rust writes it")
}

fn positive(name: &str, value: usize) -> Result<(), Error> {
    if value > 0 { Ok(()) } else { Err(refuse::setting(name, "at least 1", value)) }
}

fn token(name: &str, token: Option<usize>, vocab_size: usize) -> Result<(), Error> {
    match token.filter(|&token| token >= vocab_size) {
        Some(token) => Err(refuse::setting(name, format!("null, or below {vocab_size}"), token)),
        None => Ok(()),
    }
}

fn layers(name: &str, value: usize) -> Result<(), Error> {
    // Layer 0 is the embedding, the last one the head.
    let most = MAX_LAYERS - 2;
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(refuse::setting(name, format!("1 to {most}"), value))
}

fn heads(name: &str, width: usize, heads: usize) -> Result<(), Error> {
    if heads > 0 && width > 0 && width.is_multiple_of(heads) {
        return Ok(());
    }
    Err(refuse::setting(name, format!("a multiple of the {heads} heads"), width))
}

/// Refuses sizes whose matrices, `[size, width]` so many times a layer, hold more f32 than memory has addresses, by the
/// first size that is too large. A quarter of them each, and an eighth is left for biases and heads: so no sum of sizes
/// overflows either.
fn weights_fit<const N: usize>(
    width: usize,
    tables: [(&str, usize, usize, usize); N],
) -> Result<(), Error> {
    let most = isize::MAX as u128 / size_of::<f32>() as u128 / 8;
    for (name, size, matrices, layers) in tables {
        let elements = (size as u128).saturating_mul(width as u128);
        let elements = elements.saturating_mul(matrices as u128).saturating_mul(layers as u128);
        if elements > most {
            return Err(refuse::setting(name, "a size whose weights fit in memory", size));
        }
    }
    Ok(())
}

fn finite(name: &str, value: f32) -> Result<(), Error> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(refuse::setting(name, "a finite number, at least 0", value))
}
