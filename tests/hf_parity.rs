//! The models compute what Hugging Face's compute: outputs, loss and every gradient, for each folder below
//! `HF_FIXTURES` (by default `tests/hf`) with `config.json`, `model.safetensors` (or its shards and their index) and
//! `expected.safetensors`.
//!
//! The class follows from the configuration and the outputs that are expected. Bound: 1e-4 of a tensor's norm. The models' sums in
//! f32 differ from the library's by their order: some 10 roundings of 6e-8 deep in each of the two layers' dozen products
//! and norms is 1e-5 at most, and a wrong factor anywhere is not below 1e-4.

#![cfg(feature = "transformer")]

use fused_dropout::Error;
use fused_dropout::transformer::backend::{Backend, Element};
use fused_dropout::transformer::{
    Bert, BertConfig, BertInput, BertTask, CpuBackend, Gpt, GptConfig, GptInput, Grads, Params,
    Pass, Specs, shifted,
};
use safetensors::SafeTensors;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

const BOUND: f64 = 1e-4;

#[test]
fn models_equal_hugging_face_on_the_cpu() {
    for folder in folders() {
        for recompute in [false, true] {
            Fixture::open(&folder).check(&CpuBackend::new(), recompute);
        }
    }
}

#[cfg(feature = "emulator")]
#[test]
fn models_equal_hugging_face_on_the_emulated_kernels() {
    use fused_dropout::emulator::Emulator;
    use fused_dropout::transformer::device::Accelerator;
    let backend = Accelerator::<_, f32>::new(Emulator::new()).unwrap();
    for folder in folders() {
        Fixture::open(&folder).check(&backend, false);
    }
}

/// The folders with models; a directory without any is a mistake.
pub(crate) fn folders() -> Vec<PathBuf> {
    let root = std::env::var_os("HF_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf"), PathBuf::from);
    let entries = fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut folders: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    folders.sort();
    assert!(!folders.is_empty(), "no folder with a config.json in {}", root.display());
    folders
}

/// A model of Hugging Face with its answers.
pub(crate) struct Fixture {
    name: String,
    config: String,
    folder: PathBuf,
    expected: Vec<u8>,
}

impl Fixture {
    pub(crate) fn open(folder: &Path) -> Self {
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            config: String::from_utf8(read("config.json")).unwrap(),
            folder: folder.to_owned(),
            expected: read("expected.safetensors"),
        }
    }

    pub(crate) fn check<B: Backend>(&self, backend: &B, recompute: bool) {
        let config: serde_json::Value = serde_json::from_str(&self.config).unwrap();
        let result = match config["model_type"].as_str() {
            Some("gpt2") => self.check_gpt(backend, recompute),
            Some("bert") => self.check_bert(backend, recompute),
            other => panic!("{}: model_type {other:?}", self.name),
        };
        result.unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    fn check_gpt<B: Backend>(&self, backend: &B, recompute: bool) -> Result<(), Error> {
        let double = self.has("output.mc_logits");
        let gpt = Gpt::new(GptConfig::from_json(&self.config)?, double)?;
        let params = Params::upload(backend, &self.weights(gpt.specs())?)?;
        let ids: Vec<u32> = self.integers("input.input_ids");
        let length = *self.shape("input.input_ids").last().unwrap();
        let mut run = gpt.run(backend, ids.len() / length, length, recompute)?;
        let labels = match self.has("input.labels") {
            true => shift(&self.integers("input.labels"), length),
            false => shifted(&ids, length),
        };
        let choice =
            double.then(|| (self.integers("input.mc_token_ids"), self.integers("input.mc_labels")));
        let choice = choice.as_ref().map(|(tokens, labels)| (&tokens[..], &labels[..]));
        let input = GptInput { ids: &ids, labels: &labels, choice };
        let batch = gpt.batch(backend, &run, &input)?;
        gpt.forward(backend, &params, &mut run, &batch, PASS)?;
        self.compare("output.logits", &floats(backend, run.logits())?);
        if let Some(logits) = run.choice_logits() {
            self.compare("output.mc_logits", &floats(backend, logits)?);
        }
        gpt.loss(backend, &mut run, &batch)?;
        let loss = run.read_loss(backend)?;
        if let Some(choices) = loss.choices {
            self.compare("output.lm_loss", &[loss.tokens]);
            self.compare("output.mc_loss", &[choices]);
        }
        self.compare("loss", &[loss.total()]);
        let mut grads = Grads::zeros(backend, gpt.specs())?;
        gpt.backward(backend, &params, &mut run, &batch, PASS, &mut grads)?;
        self.compare_gradients(gpt.specs(), &grads.download(backend)?);
        Ok(())
    }

    fn check_bert<B: Backend>(&self, backend: &B, recompute: bool) -> Result<(), Error> {
        let task = match self.shape("output.logits").len() {
            2 => BertTask::Classification,
            _ => BertTask::MaskedLanguageModel,
        };
        let bert = Bert::new(BertConfig::from_json(&self.config)?, task)?;
        let params = Params::upload(backend, &self.weights(bert.specs())?)?;
        let ids: Vec<u32> = self.integers("input.input_ids");
        let length = *self.shape("input.input_ids").last().unwrap();
        let segments = match self.has("input.token_type_ids") {
            true => self.integers("input.token_type_ids"),
            false => vec![0; ids.len()],
        };
        let tokens: Vec<bool> = match self.has("input.attention_mask") {
            true => {
                self.integers::<u32>("input.attention_mask").iter().map(|&seen| seen != 0).collect()
            }
            false => vec![true; ids.len()],
        };
        let labels: Vec<i32> = self.integers("input.labels");
        let mut run = bert.run(backend, ids.len() / length, length, recompute)?;
        let input = BertInput { ids: &ids, segments: &segments, tokens: &tokens, labels: &labels };
        let batch = bert.batch(backend, &run, &input)?;
        bert.forward(backend, &params, &mut run, &batch, PASS)?;
        self.compare("output.logits", &floats(backend, run.logits())?);
        bert.loss(backend, &mut run, &batch)?;
        self.compare("loss", &[run.read_loss(backend)?]);
        let mut grads = Grads::zeros(backend, bert.specs())?;
        bert.backward(backend, &params, &mut run, &batch, PASS, &mut grads)?;
        self.compare_gradients(bert.specs(), &grads.download(backend)?);
        Ok(())
    }

    fn answers(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.expected).unwrap()
    }

    fn has(&self, name: &str) -> bool {
        self.answers().tensor(name).is_ok()
    }

    /// None of them new.
    fn weights(&self, specs: &Specs) -> Result<Vec<Vec<f32>>, Error> {
        let loaded = specs.open(&self.folder, 0)?;
        assert!(loaded.initialised.is_empty(), "{}: {loaded}", self.name);
        Ok(loaded.values)
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.answers().tensor(name).unwrap().shape().to_vec()
    }

    fn integers<I: TryFrom<i64, Error: std::fmt::Debug>>(&self, name: &str) -> Vec<I> {
        let answers = self.answers();
        let bytes = answers.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        let values = bytes.data().as_chunks::<8>().0.iter().copied().map(i64::from_le_bytes);
        values.map(|value| I::try_from(value).unwrap()).collect()
    }

    fn values(&self, name: &str) -> Vec<f32> {
        let answers = self.answers();
        let tensor = answers.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        tensor.data().as_chunks::<4>().0.iter().copied().map(f32::from_le_bytes).collect()
    }

    /// Every gradient that is expected, no other, and none forgotten.
    fn compare_gradients(&self, specs: &Specs, grads: &[Vec<f32>]) {
        let answers = self.answers();
        let mut left: HashSet<_> =
            answers.names().into_iter().filter_map(|name| name.strip_prefix("grad.")).collect();
        for (spec, grad) in specs.iter().zip(grads) {
            let mut rest = &grad[..];
            for part in &spec.parts {
                let (grad, behind) = rest.split_at(part.elements());
                rest = behind;
                assert!(left.remove(part.name.as_str()), "{}: no grad.{}", self.name, part.name);
                self.compare(&format!("grad.{}", part.name), grad);
            }
        }
        assert!(left.is_empty(), "{}: not computed: {left:?}", self.name);
    }

    fn compare(&self, name: &str, ours: &[f32]) {
        let theirs = self.values(name);
        assert_eq!(ours.len(), theirs.len(), "{}: {name}", self.name);
        let distance = norm(ours.iter().zip(&theirs).map(|(&a, &b)| f64::from(a) - f64::from(b)));
        let mut size = norm(theirs.iter().map(|&value| f64::from(value)));
        let unseen = ["attention.self.key.bias", "multiple_choice_head.summary.bias"];
        if unseen.iter().any(|bias| name.ends_with(bias)) {
            // A bias of all keys, or of all choices, moves what a softmax is taken of as a whole, which it does not see: the
            // gradient is 0 but for rounding, and is held to what it is a sum of, that of the weights beside it. (With
            // an activation behind the choices' bias it is not 0.)
            let terms = self.values(&name.replace(".bias", ".weight"));
            let terms = norm(terms.into_iter().map(f64::from));
            size = if size < 1e-5 * terms { terms } else { size };
        }
        assert!(
            distance <= BOUND * size,
            "{}: {name}: differs by {distance:.2e}, {:.2e} of {size:.2e}",
            self.name,
            distance / size
        );
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Dropout acts, with the configuration's probability 0.
const PASS: Pass = Pass::train(42, 0);

/// Labels that stand at their own token, moved to the position that predicts it.
fn shift(labels: &[i32], length: usize) -> Vec<i32> {
    let next = |sequence: &[i32]| [&sequence[1..], &[-100]].concat();
    labels.chunks(length).flat_map(next).collect()
}

fn floats<B: Backend, E: Element + fused_dropout::Dtype>(
    backend: &B,
    buffer: &B::Buffer<E>,
) -> Result<Vec<f32>, Error> {
    Ok(backend.read(buffer)?.into_iter().map(fused_dropout::Dtype::to_f32).collect())
}
