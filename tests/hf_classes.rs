//! Hugging Face's own classes, where they are installed: what they save is loaded here, and what `train_gpt` and
//! `train_bert` wrote is loaded there; logits agree both ways, and the GPT writes ten tokens there.
//!
//! `HF_PYTHON` names the Python that has the library (default: `python3`). Without it the tests are skipped, and say so;
//! with `HF_PYTHON` set they fail instead. Bound: that of `hf_parity.rs`.

#![cfg(feature = "transformer")]

use fused_dropout::transformer::{
    Bert, BertConfig, BertInput, BertTask, CpuBackend, Gpt, GptConfig, GptInput, Loaded, Params,
    Pass, Specs,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

const BOUND: f64 = 1e-4;

/// The Python with the library; without one, a line past the test harness, which keeps what tests print.
fn python(test: &str) -> Option<OsString> {
    let named = std::env::var_os("HF_PYTHON");
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let output = script(&python, &["check"]);
    if output.as_ref().is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let why = match output {
        Ok(output) => {
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("").to_owned()
        }
        Err(error) => error.to_string(),
    };
    assert!(named.is_none(), "{}: {why}", python.display());
    let line =
        format!("\nSKIPPED {test}: {}: {why} (HF_PYTHON=PATH for another)\n", python.display());
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    None
}

fn script(python: &OsString, arguments: &[&str]) -> std::io::Result<std::process::Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf/exchange.py");
    Command::new(python).arg(script).args(arguments).env("HF_HUB_OFFLINE", "1").output()
}

fn run_script(python: &OsString, arguments: &[&str]) {
    let output = script(python, arguments).unwrap();
    let (out, err) = (&output.stdout, &output.stderr);
    let said = format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err));
    assert!(output.status.success(), "{arguments:?}: {said}");
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn config(folder: &Path) -> String {
    fs::read_to_string(folder.join("config.json")).unwrap()
}

/// `[2, 9]`, as the script has them.
fn ids() -> Vec<u32> {
    (1..19).collect()
}

const BATCH: usize = 2;
const LENGTH: usize = 9;

fn gpt_logits(gpt: &Gpt, weights: &[Vec<f32>], ids: &[u32], batch: usize) -> Vec<f32> {
    let backend = CpuBackend::new();
    let params = Params::upload(&backend, weights).unwrap();
    let mut run = gpt.run(&backend, batch, ids.len() / batch, false).unwrap();
    let input = GptInput { ids, labels: &vec![-100; ids.len()], choice: None };
    let input = gpt.batch(&backend, &run, &input).unwrap();
    gpt.forward(&backend, &params, &mut run, &input, Pass::Evaluate).unwrap();
    fused_dropout::transformer::Backend::read(&backend, run.logits()).unwrap()
}

fn bert_logits(
    bert: &Bert,
    task: BertTask,
    weights: &[Vec<f32>],
    ids: &[u32],
    batch: usize,
) -> Vec<f32> {
    let backend = CpuBackend::new();
    let params = Params::upload(&backend, weights).unwrap();
    let mut run = bert.run(&backend, batch, ids.len() / batch, false).unwrap();
    let labels = match task {
        BertTask::Classification => vec![-100; batch],
        BertTask::MaskedLanguageModel => vec![-100; ids.len()],
    };
    let (segments, tokens) = (vec![0; ids.len()], vec![true; ids.len()]);
    let input = BertInput { ids, segments: &segments, tokens: &tokens, labels: &labels };
    let input = bert.batch(&backend, &run, &input).unwrap();
    bert.forward(&backend, &params, &mut run, &input, Pass::Evaluate).unwrap();
    fused_dropout::transformer::Backend::read(&backend, run.logits()).unwrap()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Against the logits that the script left, if the file's head gives them.
fn compare(folder: &Path, ours: &[f32]) {
    let bytes = fs::read(folder.join("answers.safetensors")).unwrap();
    let answers = SafeTensors::deserialize(&bytes).unwrap();
    let Ok(theirs) = answers.tensor("logits") else { return };
    let theirs: Vec<f32> =
        theirs.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert_eq!(ours.len(), theirs.len(), "{}", folder.display());
    let distance = norm(ours.iter().zip(&theirs).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let size = norm(theirs.iter().map(|&value| f64::from(value)));
    assert!(distance <= BOUND * size, "{}: {distance:.2e} of {size:.2e}", folder.display());
}

fn open(specs: &Specs, folder: &Path) -> Loaded {
    specs.open(folder, 5).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

#[test]
fn models_that_the_library_saved_are_loaded_here() {
    let Some(python) = python("models_that_the_library_saved_are_loaded_here") else { return };
    let root = folder("hf-saved");
    run_script(&python, &["write", root.to_str().unwrap()]);
    let mut folders: Vec<_> =
        fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 9 * 4, "nine classes, three types and shards");
    for folder in folders {
        let name = folder.file_name().unwrap().to_str().unwrap().split('-').next().unwrap();
        let (initialised, passed_over) = match name {
            "GPT2LMHeadModel" | "GPT2Model" => (0, 0),
            "GPT2DoubleHeadsModel" => (0, 2),
            "GPT2ForSequenceClassification" => (0, 1),
            "BertForMaskedLM" | "BertForSequenceClassification" => (0, 0),
            "BertForPreTraining" => (0, 4),
            "BertModel" => (5, 2),
            "BertForTokenClassification" => (5, 2),
            other => panic!("{other}"),
        };
        let loaded = if name.starts_with("GPT2") {
            let gpt = Gpt::new(GptConfig::from_json(&config(&folder)).unwrap(), false).unwrap();
            let loaded = open(gpt.specs(), &folder);
            compare(&folder, &gpt_logits(&gpt, &loaded.values, &ids(), BATCH));
            loaded
        } else {
            let task = match name {
                "BertForSequenceClassification" => BertTask::Classification,
                _ => BertTask::MaskedLanguageModel,
            };
            let bert = Bert::new(BertConfig::from_json(&config(&folder)).unwrap(), task).unwrap();
            let loaded = open(bert.specs(), &folder);
            compare(&folder, &bert_logits(&bert, task, &loaded.values, &ids(), BATCH));
            loaded
        };
        let differs = (loaded.initialised.len(), loaded.passed_over.len());
        assert_eq!(differs, (initialised, passed_over), "{}: {loaded}", folder.display());
    }
}

/// Runs an example as a user does.
fn example(name: &str, arguments: &[&str]) -> String {
    let cargo = ["run", "--quiet", "--features", "transformer", "--example", name, "--"];
    let output = Command::new(env!("CARGO"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(cargo)
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Lets the library's class check logits of a folder's model for `ids`, two sequences.
fn read_there(
    python: &OsString,
    folder: &Path,
    class: &str,
    ids: &[u32],
    logits: &[f32],
    shape: &[usize],
) {
    let ids: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let logits: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let length = ids.len() / 8 / BATCH;
    let view =
        |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    let tensors = [
        ("ids", view(Dtype::I64, &[BATCH, length], &ids)),
        ("logits", view(Dtype::F32, shape, &logits)),
    ];
    let answers = safetensors::serialize(tensors, None).unwrap();
    fs::write(folder.join("answers.safetensors"), answers).unwrap();
    run_script(python, &["read", folder.to_str().unwrap(), class]);
}

#[test]
fn what_train_gpt_wrote_is_loaded_there_and_generates() {
    let Some(python) = python("what_train_gpt_wrote_is_loaded_there_and_generates") else { return };
    let folder = folder("hf-train-gpt");
    let data = folder.join("text.txt");
    fs::write(&data, "the cat sat on the mat; the dog saw it. ".repeat(40)).unwrap();
    let (data, out) = (data.to_str().unwrap(), folder.join("out"));
    let arguments =
        ["--data", data, "--steps", "3", "--sample", "0", "--out", out.to_str().unwrap()];
    example("train_gpt", &arguments);

    let gpt = Gpt::new(GptConfig::from_json(&config(&out)).unwrap(), false).unwrap();
    let weights = open(gpt.specs(), &out).complete().unwrap();
    let ids: Vec<u32> = ids().into_iter().map(|id| id % 10).collect();
    let logits = gpt_logits(&gpt, &weights, &ids, BATCH);
    let shape = [BATCH, LENGTH, gpt.config().vocab_size];
    read_there(&python, &out, "GPT2LMHeadModel", &ids, &logits, &shape);
}

#[test]
fn what_train_bert_wrote_is_loaded_there() {
    let Some(python) = python("what_train_bert_wrote_is_loaded_there") else { return };
    let folder = folder("hf-train-bert");
    let texts = |word: &str| {
        let path = folder.join(word);
        let lines = (0..30).map(|i| format!("film {} is {word}\n", i % 7));
        fs::write(&path, lines.collect::<String>()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (good, bad, out) = (texts("good"), texts("bad"), folder.join("out"));
    let said = example(
        "train_bert",
        &[
            "--positive",
            &good,
            "--negative",
            &bad,
            "--masked-epochs",
            "1",
            "--epochs",
            "1",
            "--out",
            out.to_str().unwrap(),
        ],
    );
    assert!(said.contains("initialised anew: bert.pooler.dense.weight"), "{said}");
    assert!(said.contains("passed over: cls.predictions.bias"), "{said}");

    let ids: Vec<u32> = ids().into_iter().map(|id| 1 + id % 6).collect();
    let classes = [
        (out.join("masked"), BertTask::MaskedLanguageModel, "BertForMaskedLM"),
        (out, BertTask::Classification, "BertForSequenceClassification"),
    ];
    for (folder, task, class) in classes {
        let bert = Bert::new(BertConfig::from_json(&config(&folder)).unwrap(), task).unwrap();
        let weights = open(bert.specs(), &folder).complete().unwrap();
        let logits = bert_logits(&bert, task, &weights, &ids, BATCH);
        let shape = match task {
            BertTask::MaskedLanguageModel => vec![BATCH, LENGTH, bert.config().vocab_size],
            BertTask::Classification => vec![BATCH, bert.config().num_labels],
        };
        read_there(&python, &folder, class, &ids, &logits, &shape);
    }
}
