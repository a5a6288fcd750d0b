//! Checkpoints and settings as they are published: written here by hand, in every form that Hugging Face's
//! `from_pretrained` takes.

#![cfg(feature = "transformer")]

use fused_dropout::transformer::{Bert, BertConfig, BertTask, Gpt, GptConfig, Loaded, Specs};
use fused_dropout::{Activation, Error};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const SEED: u64 = 3;

fn gpt_settings() -> Value {
    json!({
        "model_type": "gpt2", "vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_layer": 2, "n_head": 2,
    })
}

fn bert_settings() -> Value {
    json!({
        "model_type": "bert", "vocab_size": 7, "max_position_embeddings": 5, "hidden_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    })
}

fn gpt(double_heads: bool) -> Gpt {
    Gpt::new(GptConfig::from_json(&gpt_settings().to_string()).unwrap(), double_heads).unwrap()
}

fn bert(task: BertTask) -> Bert {
    Bert::new(BertConfig::from_json(&bert_settings().to_string()).unwrap(), task).unwrap()
}

/// A tensor of a file.
#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn new(dtype: Dtype, shape: &[usize], values: &[f32]) -> Self {
        let bytes = |value: &f32| match dtype {
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::F64 => f64::from(*value).to_le_bytes().to_vec(),
            Dtype::U8 => vec![*value as u8],
            _ => value.to_le_bytes().to_vec(),
        };
        Self { dtype, shape: shape.to_vec(), bytes: values.iter().flat_map(bytes).collect() }
    }

    fn f32s(dtype: Dtype, view: &TensorView<'_>) -> Self {
        let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        Self::new(dtype, view.shape(), &values.collect::<Vec<_>>())
    }
}

type Tensors = BTreeMap<String, Stored>;

/// The tensors of a model, under the names that it gives them.
fn tensors(specs: &Specs, dtype: Dtype) -> Tensors {
    let file = specs.serialize(&specs.init(SEED)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), Stored::f32s(dtype, &view))).collect()
}

fn renamed(tensors: Tensors, name: impl Fn(&str) -> String) -> Tensors {
    tensors.into_iter().map(|(old, tensor)| (name(&old), tensor)).collect()
}

fn file(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| {
        (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn load(specs: &Specs, tensors: &Tensors) -> Result<Loaded, Error> {
    specs.load(&[file(tensors)], 11)
}

/// Of a file that has all of the model and nothing else.
fn loads(specs: &Specs, tensors: &Tensors, expected: &[Vec<f32>], what: &str) {
    let loaded = load(specs, tensors).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(loaded.complete().unwrap() == expected, "{what}");
}

/// The tensor that an error names.
fn named<T>(result: Result<T, Error>) -> String {
    match result.map(drop) {
        Err(Error::Tensor { name, .. }) => name,
        other => panic!("{other:?}"),
    }
}

#[test]
fn gpt_2_as_it_is_published() {
    let gpt = gpt(false);
    let (specs, values) = (gpt.specs(), gpt.specs().init(SEED));
    let bare = |name: &str| name.strip_prefix("transformer.").unwrap().to_owned();
    let mut published = renamed(tensors(specs, Dtype::F32), bare);
    for layer in 0..2 {
        let mask = Stored::new(Dtype::U8, &[1, 1, 5, 5], &[1.0; 25]);
        published.insert(format!("h.{layer}.attn.bias"), mask);
        let low = Stored::new(Dtype::F32, &[], &[-1e4]);
        published.insert(format!("h.{layer}.attn.masked_bias"), low);
    }
    loads(specs, &published, &values, "without prefix, with buffers");
    let prefixed = renamed(published, |name| format!("transformer.{name}"));
    loads(specs, &prefixed, &values, "with both");
}

#[test]
fn bert_as_it_is_published() {
    let masked = bert(BertTask::MaskedLanguageModel);
    let classifier = bert(BertTask::Classification);
    let old = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
    };
    // What BERT was pretrained with has both heads and the pooler.
    let mut published = tensors(masked.specs(), Dtype::F32);
    let pooler = tensors(classifier.specs(), Dtype::F32);
    published.extend(pooler.into_iter().filter(|(name, _)| name.starts_with("bert.pooler.")));
    for (part, shape) in [("weight", &[2, 8][..]), ("bias", &[2])] {
        let values = vec![0.5; shape.iter().product()];
        let name = format!("cls.seq_relationship.{part}");
        published.insert(name, Stored::new(Dtype::F32, shape, &values));
    }
    let published = renamed(published, old);
    let foreign = [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    ];
    let loaded = load(masked.specs(), &published).unwrap();
    assert!(loaded.values == masked.specs().init(SEED));
    assert!(loaded.initialised.is_empty());
    assert_eq!(loaded.passed_over, foreign);
    assert_eq!(loaded.to_string(), format!("passed over: {}", foreign.join(", ")));
    assert_eq!(named(loaded.complete()), foreign[0], "asked for in full");

    let loaded = load(classifier.specs(), &published).unwrap();
    assert_eq!(loaded.initialised, ["classifier.weight", "classifier.bias"]);
    assert_eq!(loaded.passed_over.len(), 7, "both heads: {:?}", loaded.passed_over);
    let (old, new) = (classifier.specs().init(SEED), classifier.specs().init(11));
    let head = old.len() - 2;
    assert!(loaded.values[head - 2] != new[head - 2], "the pooler is the file's");
    assert!(loaded.values[head..] == new[head..], "the classifier is new, of the seed given");
    assert!(old[head] != new[head]);
    assert_eq!(named(loaded.complete()), "classifier.weight");
}

#[test]
fn a_bare_bert_and_its_positions() {
    let masked = bert(BertTask::MaskedLanguageModel);
    let bare =
        |(name, tensor): (String, Stored)| Some((name.strip_prefix("bert.")?.to_owned(), tensor));
    let mut bare: Tensors =
        tensors(masked.specs(), Dtype::F32).into_iter().filter_map(bare).collect();
    let positions = Stored::new(Dtype::F32, &[1, 5], &[0.0, 1.0, 2.0, 3.0, 4.0]);
    bare.insert("embeddings.position_ids".into(), positions);
    let loaded = load(masked.specs(), &bare).unwrap();
    assert!(loaded.passed_over.is_empty());
    assert_eq!(loaded.initialised.len(), 5, "the head: {:?}", loaded.initialised);
    assert!(loaded.initialised.iter().all(|name| name.starts_with("cls.predictions.")));
    assert!(loaded.to_string().starts_with("initialised anew: cls.predictions.transform"));
}

#[test]
fn heads_of_gpt_2_are_new_or_passed_over() {
    let (single, double) = (gpt(false), gpt(true));
    let loaded = load(double.specs(), &tensors(single.specs(), Dtype::F32)).unwrap();
    let [weight, bias] =
        ["weight", "bias"].map(|part| format!("multiple_choice_head.summary.{part}"));
    assert_eq!(loaded.initialised, [weight.clone(), bias.clone()]);
    let loaded = load(single.specs(), &tensors(double.specs(), Dtype::F32)).unwrap();
    assert_eq!(loaded.passed_over, [bias, weight]);
}

#[test]
fn what_the_model_itself_lacks_is_an_error() {
    let (gpt, masked) = (gpt(false), bert(BertTask::MaskedLanguageModel));
    let own = tensors(gpt.specs(), Dtype::F32);
    let (position, inner) = ("transformer.wpe.weight", "transformer.h.1.mlp.c_fc.bias");
    for lacking in [position, inner, "transformer.ln_f.bias"] {
        let mut tensors = own.clone();
        let tensor = tensors.remove(lacking).unwrap();
        assert_eq!(named(load(gpt.specs(), &tensors)), lacking);
        let shape = [&[1][..], &tensor.shape].concat();
        tensors.insert(lacking.into(), Stored { shape, ..tensor });
        assert_eq!(named(load(gpt.specs(), &tensors)), lacking, "of another shape");
    }
    // What it has not is passed over, as in from_pretrained; who asks for all of a file is told.
    for name in ["transformer.h.2.ln_1.weight", "h.0.attn.c_attn.lora_A", "ln_f.scale"] {
        let mut tensors = own.clone();
        tensors.insert(name.into(), Stored::new(Dtype::F32, &[8], &[1.0; 8]));
        let loaded = load(gpt.specs(), &tensors).unwrap();
        assert_eq!(loaded.passed_over, [name]);
        assert_eq!(named(loaded.complete()), name);
    }
    // Integers are no weights.
    let mut tensors = own;
    tensors.insert("transformer.ln_f.bias".into(), Stored::new(Dtype::U8, &[8], &[1.0; 8]));
    assert_eq!(named(load(gpt.specs(), &tensors)), "transformer.ln_f.bias");
    // A head of another size is another model's.
    let mut tensors = self::tensors(masked.specs(), Dtype::F32);
    tensors.insert("cls.predictions.bias".into(), Stored::new(Dtype::F32, &[9], &[0.0; 9]));
    assert_eq!(named(load(masked.specs(), &tensors)), "cls.predictions.bias");
}

#[test]
fn tied_weights_stand_under_either_name() {
    let (gpt, masked) = (gpt(false), bert(BertTask::MaskedLanguageModel));
    let words = "bert.embeddings.word_embeddings.weight";
    let ties = [
        (gpt.specs(), "transformer.wte.weight", "lm_head.weight"),
        (masked.specs(), words, "cls.predictions.decoder.weight"),
        (masked.specs(), "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ];
    for (specs, name, alias) in ties {
        let (mut own, values) = (tensors(specs, Dtype::F32), specs.init(SEED));
        let tensor = own[name].clone();
        own.insert(alias.into(), tensor.clone());
        loads(specs, &own, &values, alias);
        own.remove(name);
        loads(specs, &own, &values, &format!("{alias} alone"));

        // Both, in types of different width: the wider one counts, and the other is the same, rounded.
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), &tensor.bytes).unwrap();
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F64] {
            let other = Stored::f32s(dtype, &view);
            own.extend([(name.into(), tensor.clone()), (alias.into(), other.clone())]);
            loads(specs, &own, &values, &format!("{alias} as {dtype:?}"));
            own.extend([(name.into(), other), (alias.into(), tensor.clone())]);
            loads(specs, &own, &values, &format!("{name} as {dtype:?}"));
        }
        let ones = vec![1.0; tensor.shape.iter().product()];
        own.insert(alias.into(), Stored::new(Dtype::F16, &tensor.shape, &ones));
        assert_eq!(named(load(specs, &own)), alias);
    }
}

#[test]
fn sixteen_bits_are_read_and_f64_is_rounded() {
    let gpt = gpt(true);
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F64] {
        let round = |value: f32| match dtype {
            Dtype::F16 => f16::from_f32(value).to_f32(),
            Dtype::BF16 => bf16::from_f32(value).to_f32(),
            _ => value,
        };
        let values = gpt.specs().init(SEED).into_iter();
        let values: Vec<Vec<f32>> = values.map(|v| v.into_iter().map(round).collect()).collect();
        loads(gpt.specs(), &tensors(gpt.specs(), dtype), &values, &format!("{dtype:?}"));
    }
}

/// A folder of its own for a test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("published-{name}"));
    _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn files_folders_and_shards() {
    let gpt = gpt(false);
    let (specs, values) = (gpt.specs(), gpt.specs().init(SEED));
    let own = tensors(specs, Dtype::F32);
    let folder = folder("shards");
    let failed = |path: &Path| match specs.open(path, 0) {
        Err(Error::File { path, .. }) => PathBuf::from(path),
        other => panic!("{other:?}"),
    };
    assert_eq!(failed(&folder), folder, "an empty folder");

    let (mut shards, mut map) = ([Tensors::new(), Tensors::new()], BTreeMap::new());
    let shard = |number: usize| format!("model-0000{number}-of-00002.safetensors");
    for (number, (name, tensor)) in own.clone().into_iter().enumerate() {
        map.insert(name.clone(), shard(number % 2 + 1));
        shards[number % 2].insert(name, tensor);
    }
    let write_index = |map: &BTreeMap<String, String>| {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(folder.join(INDEX), format!("\u{feff}{index}")).unwrap();
    };
    write_index(&map);
    let (first, second) = (folder.join(shard(1)), folder.join(shard(2)));
    fs::write(first, file(&shards[0])).unwrap();
    assert_eq!(failed(&folder), second, "a shard that is not there");
    let bytes = file(&shards[1]);
    fs::write(&second, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(failed(&folder), second, "a shard that ends early");
    fs::write(&second, &bytes).unwrap();
    for path in [folder.clone(), folder.join(INDEX)] {
        assert!(specs.open(&path, 0).unwrap().complete().unwrap() == values);
    }
    map.insert("more".into(), shard(1));
    write_index(&map);
    assert_eq!(named(specs.open(&folder, 0)), "more");
    map.insert("more".into(), "../elsewhere.safetensors".into());
    write_index(&map);
    assert_eq!(failed(&folder), folder.join(INDEX));

    // A whole file comes first.
    let whole = folder.join("model.safetensors");
    fs::write(&whole, file(&own)).unwrap();
    for path in [&folder, &whole] {
        assert!(specs.open(path, 0).unwrap().complete().unwrap() == values);
    }
}

/// The setting that an error names, and what it was.
fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, String) {
    match result {
        Err(Error::Setting { name, given, .. }) => (name, given),
        other => panic!("{other:?}"),
    }
}

fn with(mut settings: Value, name: &str, value: Value) -> String {
    settings[name] = value;
    settings.to_string()
}

#[test]
fn settings_that_change_nothing_are_taken() {
    let harmless = [
        ("num_labels", json!(3)),
        ("_num_labels", json!(3)),
        ("num_labels", json!(null)),
        ("id2label", json!(null)),
        ("id2label", json!({})),
        ("label2id", json!(null)),
        ("id2label", json!({"0": "no", "1": "yes"})),
        ("n_special", json!(0)),
        ("predict_special_tokens", json!(true)),
        ("pruned_heads", json!({})),
        ("pruned_heads", json!(null)),
        ("is_decoder", json!(false)),
        ("is_decoder", json!(null)),
        ("add_cross_attention", json!(false)),
        ("problem_type", json!(null)),
        ("problem_type", json!("single_label_classification")),
        ("problem_type", json!("regression")), // of a classifier; see below
        ("do_sample", json!(true)),
        ("max_length", json!(50)),
        ("repetition_penalty", json!(1.2)),
        ("eos_token_id", json!([3, 5])),
        ("pad_token_id", json!(null)),
        ("output_past", json!(true)),
        ("gradient_checkpointing", json!(false)),
        ("torch_dtype", json!("float16")),
        ("xla_device", json!(true)),
        ("something_new", json!(null)),
    ];
    for (name, value) in harmless {
        let gpt = GptConfig::from_json(&with(gpt_settings(), name, value.clone()));
        assert!(gpt.and_then(|config| Gpt::new(config, true)).is_ok(), "{name}");
        let bert = BertConfig::from_json(&with(bert_settings(), name, value));
        let masked = bert.and_then(|config| Bert::new(config, BertTask::MaskedLanguageModel));
        assert!(masked.is_ok(), "{name}: {masked:?}");
    }
    let multilingual = [
        ("directionality", json!("bidi")),
        ("pooler_fc_size", json!(768)),
        ("pooler_num_attention_heads", json!(12)),
        ("pooler_num_fc_layers", json!(3)),
        ("pooler_size_per_head", json!(128)),
        ("pooler_type", json!("first_token_transform")),
    ];
    for (name, value) in multilingual {
        assert!(BertConfig::from_json(&with(bert_settings(), name, value)).is_ok(), "{name}");
    }
    let marked = format!("\u{feff}{}", bert_settings());
    assert!(BertConfig::from_json(&marked).is_ok(), "a byte order mark");
    assert!(GptConfig::from_json(&format!("\u{feff}{}", gpt_settings())).is_ok());
}

#[test]
fn settings_that_change_a_model_are_refused_by_name_and_value() {
    let both = [
        ("pruned_heads", json!({"0": [1]})),
        ("add_cross_attention", json!(true)),
        ("is_encoder_decoder", json!(true)),
        ("tie_word_embeddings", json!(false)),
        ("quantization_config", json!({"bits": 4})),
        ("something_new", json!(1)),
    ];
    for (name, value) in both {
        let expected = (name.to_owned(), value.to_string());
        let text = with(gpt_settings(), name, value.clone());
        assert_eq!(refused(GptConfig::from_json(&text)), expected);
        let text = with(bert_settings(), name, value);
        assert_eq!(refused(BertConfig::from_json(&text)), expected);
    }
    for (name, value) in [
        ("is_decoder", json!(true)),
        ("position_embedding_type", json!("relative_key")),
        ("pooler_type", json!("mean")),
        ("num_attention_heads", json!(0)),
        ("hidden_size", json!(0)),
    ] {
        let text = with(bert_settings(), name, value);
        assert_eq!(refused(BertConfig::from_json(&text)).0, name);
    }
    for (name, value) in [
        ("scale_attn_weights", json!(false)),
        ("scale_attn_by_inverse_layer_idx", json!(true)),
        ("hidden_size", json!(16)),
        ("n_head", json!(0)),
        ("n_embd", json!(0)),
    ] {
        let text = with(gpt_settings(), name, value);
        assert_eq!(refused(GptConfig::from_json(&text)).0, name);
    }
}

#[test]
fn classifiers_of_another_loss_are_refused() {
    let classifier = |name: &str, value: Value| {
        let config = BertConfig::from_json(&with(bert_settings(), name, value));
        config.and_then(|config| Bert::new(config, BertTask::Classification))
    };
    for problem in ["regression", "multi_label_classification"] {
        let expected = ("problem_type".into(), problem.into());
        assert_eq!(refused(classifier("problem_type", problem.into())), expected);
    }
    assert!(classifier("problem_type", "single_label_classification".into()).is_ok());
    // One class is a regression, to the library.
    assert_eq!(refused(classifier("num_labels", 1.into())), ("num_labels".into(), "1".into()));
    assert_eq!(refused(classifier("id2label", json!({"0": "a"}))).0, "num_labels");
    let text = with(bert_settings(), "problem_type", "regression".into());
    let config = BertConfig::from_json(&text).unwrap();
    assert_eq!(BertConfig::from_json(&config.to_json()).unwrap(), config, "not forgotten");
}

#[test]
fn classes_are_counted_by_names_or_by_a_number() {
    let classes = |settings: &Value| BertConfig::from_json(&settings.to_string());
    let mut settings = bert_settings();
    assert_eq!(classes(&settings).unwrap().num_labels, 2);
    settings["num_labels"] = json!(3);
    assert_eq!(classes(&settings).unwrap().num_labels, 3);
    settings["id2label"] = json!({"0": "a", "1": "b", "2": "c"});
    assert_eq!(classes(&settings).unwrap().num_labels, 3);
    settings["id2label"] = json!({"0": "a"});
    assert_eq!(refused(classes(&settings)), ("num_labels".into(), "3".into()));
}

#[test]
fn a_choice_has_one_output_whatever_the_labels() {
    let text = with(gpt_settings(), "id2label", json!({"0": "a", "1": "b", "2": "c"}));
    let double = Gpt::new(GptConfig::from_json(&text).unwrap(), true).unwrap();
    let head = double.specs().iter().find(|spec| spec.parts[0].name.ends_with("summary.weight"));
    assert_eq!(head.unwrap().parts[0].shape, [1, 8]);
}

#[test]
fn ends_of_texts_are_those_of_the_vocabulary() {
    let ends = |text: &str| {
        let config = GptConfig::from_json(text).unwrap();
        (config.bos_token_id, config.eos_token_id)
    };
    assert_eq!(ends(&gpt_settings().to_string()), (None, None), "50256 is no token of seven");
    assert_eq!(ends(&with(gpt_settings(), "eos_token_id", json!(50_256))), (None, None));
    assert_eq!(ends(&with(gpt_settings(), "eos_token_id", json!([4, 5]))), (None, Some(4)));
    let whole = with(gpt_settings(), "vocab_size", json!(50_257));
    assert_eq!(ends(&whole), (Some(50_256), Some(50_256)));

    let written = |config: GptConfig| -> Value { serde_json::from_str(&config.to_json()).unwrap() };
    let value = written(GptConfig::from_json(&gpt_settings().to_string()).unwrap());
    for name in ["bos_token_id", "eos_token_id"] {
        assert_eq!(value.get(name), Some(&Value::Null), "written, and none");
    }
    let config = GptConfig::from_json(&whole).unwrap();
    assert_eq!(written(config.clone())["eos_token_id"], 50_256);
    let refused = refused(GptConfig { vocab_size: 65, ..config }.check());
    assert_eq!(refused, ("bos_token_id".into(), "50256".into()));
}

#[test]
fn every_activation_is_read_as_it_was_written() {
    for activation in Activation::ALL {
        let gpt = GptConfig::from_json(&gpt_settings().to_string()).unwrap();
        let gpt =
            GptConfig { activation_function: activation, summary_activation: activation, ..gpt };
        assert_eq!(GptConfig::from_json(&gpt.to_json()).unwrap(), gpt);
        let bert = BertConfig::from_json(&bert_settings().to_string()).unwrap();
        let bert = BertConfig { hidden_act: activation, ..bert };
        assert_eq!(BertConfig::from_json(&bert.to_json()).unwrap(), bert);
    }
}

#[test]
fn files_say_that_they_are_pytorchs() {
    let gpt = gpt(false);
    let bytes = gpt.specs().serialize(&gpt.specs().init(SEED)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
}
