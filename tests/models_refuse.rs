//! What the models, the optimiser and the products refuse through their safe functions: sizes, steps, and what belongs to
//! another model. Each with an error that names the argument.
#![cfg(feature = "transformer")]

use fused_dropout::Error;
use fused_dropout::transformer::matmul::{Layout, MatMul};
use fused_dropout::transformer::streams::MAX_STEPS;
use fused_dropout::transformer::{
    AdamW, Backend, Bert, BertConfig, BertInput, BertTask, CpuBackend, Gpt, GptConfig, GptInput,
    Grads, IGNORED, Optimizer, Params, Pass, Schedule, shifted,
};

fn gpt_config(n_embd: usize, n_layer: usize) -> GptConfig {
    let text = format!(
        r#"{{"model_type": "gpt2", "vocab_size": 5, "n_positions": 8, "n_embd": {n_embd}, "n_layer": {n_layer},
            "n_head": 2}}"#
    );
    GptConfig::from_json(&text).unwrap()
}

fn bert_config() -> BertConfig {
    let text = r#"{"model_type": "bert", "vocab_size": 9, "max_position_embeddings": 8, "hidden_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}"#;
    BertConfig::from_json(text).unwrap()
}

/// The setting or argument that an error names.
fn named<T>(result: Result<T, Error>) -> String {
    match result.err().expect("an error") {
        Error::Setting { name, .. } => name,
        Error::Argument { argument, .. } => argument.into(),
        other => panic!("{other}"),
    }
}

#[test]
fn sizes_whose_weights_fit_in_no_memory() {
    let gpt = |change: &dyn Fn(&mut GptConfig)| {
        let mut config = gpt_config(8, 1);
        change(&mut config);
        named(Gpt::new(config, true))
    };
    for large in [1 << 62, 1 << 63, usize::MAX - 1] {
        assert_eq!(gpt(&|c| c.n_embd = large), "n_embd");
        assert_eq!(gpt(&|c| c.n_inner = large), "n_inner");
        assert_eq!(gpt(&|c| c.vocab_size = large), "vocab_size");
        assert_eq!(gpt(&|c| c.n_positions = large), "n_positions");
        assert_eq!(gpt(&|c| c.num_labels = large), "num_labels");
        let bert = |change: &dyn Fn(&mut BertConfig)| {
            let mut config = bert_config();
            change(&mut config);
            named(Bert::new(config, BertTask::Classification))
        };
        assert_eq!(bert(&|c| c.hidden_size = large), "hidden_size");
        assert_eq!(bert(&|c| c.intermediate_size = large), "intermediate_size");
        assert_eq!(bert(&|c| c.vocab_size = large), "vocab_size");
        assert_eq!(bert(&|c| c.max_position_embeddings = large), "max_position_embeddings");
        assert_eq!(bert(&|c| c.type_vocab_size = large), "type_vocab_size");
        assert_eq!(bert(&|c| c.num_labels = large), "num_labels");
    }
    let text = r#"{"model_type": "gpt2", "vocab_size": 5, "n_positions": 8, "n_embd": 9223372036854775808,
        "n_layer": 1, "n_head": 2}"#;
    assert_eq!(named(GptConfig::from_json(text)), "n_embd");
    let text = r#"{"model_type": "gpt2", "vocab_size": 5, "n_positions": 8, "n_embd": 8, "n_layer": 1,
        "n_head": 2, "attn_pdrop": 1e-9}"#;
    assert_eq!(named(GptConfig::from_json(text)), "attn_pdrop", "it would never drop");
}

#[test]
fn runs_whose_tensors_fit_in_no_memory() {
    let backend = CpuBackend::new();
    let gpt = Gpt::new(gpt_config(8, 1), false).unwrap();
    let bert = Bert::new(bert_config(), BertTask::MaskedLanguageModel).unwrap();
    for batch in [0, 1 << 32, 1 << 40, usize::MAX / 2, usize::MAX] {
        assert_eq!(named(gpt.run(&backend, batch, 2, false)), "batch");
        assert_eq!(named(bert.run(&backend, batch, 2, true)), "batch");
    }
    for length in [0, 9, usize::MAX] {
        assert_eq!(named(gpt.run(&backend, 1, length, false)), "length");
        assert_eq!(named(bert.run(&backend, 1, length, false)), "length");
    }
    // What an allocation cannot have is an error and not the end of the process.
    assert_eq!(named(backend.zeros::<f32>(usize::MAX / 8)), "len");
}

#[test]
fn steps_without_a_stream() {
    let backend = CpuBackend::new();
    let gpt = Gpt::new(gpt_config(8, 1), false).unwrap();
    let params = Params::upload(&backend, &gpt.specs().init(1)).unwrap();
    let mut grads = Grads::zeros(&backend, gpt.specs()).unwrap();
    let mut run = gpt.run(&backend, 1, 3, false).unwrap();
    let ids = [1, 2, 3];
    let input = GptInput { ids: &ids, labels: &shifted(&ids, 3), choice: None };
    let batch = gpt.batch(&backend, &run, &input).unwrap();
    for step in [MAX_STEPS, 1 << 45, u64::MAX] {
        let pass = Pass::train(1, step);
        assert_eq!(named(gpt.forward(&backend, &params, &mut run, &batch, pass)), "step");
        let backward = gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads);
        assert_eq!(named(backward), "step");
    }
    let pass = Pass::train(1, MAX_STEPS - 1);
    gpt.forward(&backend, &params, &mut run, &batch, pass).unwrap();
}

#[test]
fn weights_memory_and_moments_of_another_model() {
    let backend = CpuBackend::new();
    let pass = Pass::train(1, 0);
    let ids = [1, 2, 3];
    let input = GptInput { ids: &ids, labels: &shifted(&ids, 3), choice: None };
    let gpt = Gpt::new(gpt_config(8, 2), false).unwrap();
    let mut params = Params::upload(&backend, &gpt.specs().init(1)).unwrap();
    let mut grads = Grads::zeros(&backend, gpt.specs()).unwrap();
    let mut run = gpt.run(&backend, 1, 3, false).unwrap();
    let batch = gpt.batch(&backend, &run, &input).unwrap();
    // Wider; of more and of fewer blocks.
    for config in [gpt_config(16, 2), gpt_config(8, 3), gpt_config(8, 1)] {
        let other = Gpt::new(config, false).unwrap();
        let mut other_params = Params::upload(&backend, &other.specs().init(1)).unwrap();
        let mut other_grads = Grads::zeros(&backend, other.specs()).unwrap();
        let mut other_run = other.run(&backend, 1, 3, false).unwrap();
        assert_eq!(named(gpt.forward(&backend, &other_params, &mut run, &batch, pass)), "params");
        gpt.forward(&backend, &params, &mut other_run, &batch, pass).unwrap_err();
        gpt.forward(&backend, &params, &mut run, &batch, pass).unwrap();
        gpt.loss(&backend, &mut run, &batch).unwrap();
        let backward = gpt.backward(&backend, &params, &mut run, &batch, pass, &mut other_grads);
        assert_eq!(named(backward), "grads");

        let settings = AdamW::default();
        let mut others = Optimizer::new(&backend, other.specs(), settings).unwrap();
        let step = others.step(&backend, gpt.specs(), &mut params, &grads, 1e-3);
        assert_eq!(named(step), "self", "it would move nothing");
        let mut own = Optimizer::new(&backend, gpt.specs(), settings).unwrap();
        let step = own.step(&backend, gpt.specs(), &mut other_params, &grads, 1e-3);
        assert_eq!(named(step), "params");
        let step = own.step(&backend, gpt.specs(), &mut params, &other_grads, 1e-3);
        assert_eq!(named(step), "grads");
        let state = others.state(&backend).unwrap();
        assert_eq!(named(Optimizer::restore(&backend, gpt.specs(), settings, &state)), "state");
    }
    gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads).unwrap();

    let bert = Bert::new(bert_config(), BertTask::Classification).unwrap();
    let bert_params = Params::upload(&backend, &bert.specs().init(1)).unwrap();
    let mut long = bert.run(&backend, 1, 4, false).unwrap();
    let short = bert.run(&backend, 1, 3, false).unwrap();
    let input = BertInput { ids: &[1, 2, 3], segments: &[0; 3], tokens: &[true; 3], labels: &[1] };
    let batch = bert.batch(&backend, &short, &input).unwrap();
    assert_eq!(named(bert.forward(&backend, &bert_params, &mut long, &batch, pass)), "batch");
    assert_eq!(named(bert.forward(&backend, &params, &mut long, &batch, pass)), "params");
}

#[test]
fn numbers_that_make_no_step() {
    let backend = CpuBackend::new();
    let gpt = Gpt::new(gpt_config(8, 1), false).unwrap();
    let usual = AdamW::default();
    for (settings, name) in [
        (AdamW { beta1: 1.0, ..usual }, "beta1"),
        (AdamW { beta2: f32::NAN, ..usual }, "beta2"),
        (AdamW { epsilon: -1e-8, ..usual }, "epsilon"),
        (AdamW { weight_decay: f32::INFINITY, ..usual }, "weight_decay"),
        (AdamW { max_norm: 0.0, ..usual }, "max_norm"),
        (AdamW { max_norm: f32::NAN, ..usual }, "max_norm"),
    ] {
        assert_eq!(named(Optimizer::new(&backend, gpt.specs(), settings)), name);
    }
    let mut optimizer = Optimizer::new(&backend, gpt.specs(), usual).unwrap();
    assert_eq!(named(optimizer.advance(&backend, f32::NAN)), "rate");
    let mut state = optimizer.state(&backend).unwrap();
    state.steps = u64::MAX;
    let mut last = Optimizer::restore(&backend, gpt.specs(), usual, &state).unwrap();
    assert_eq!(named(last.advance(&backend, 1e-3)), "steps");
    let schedule = Schedule { peak: 1.0, floor: 0.0, warmup: u64::MAX, steps: u64::MAX };
    assert!((schedule.rate(u64::MAX - 1) - 1.0).abs() < 1e-6);
}

#[test]
fn products_along_dimensions_of_one_step_have_any_stride() {
    let backend = CpuBackend::new();
    let [a, b] = [[2.0f32; 4], [3.0; 4]].map(|values| backend.upload(&values).unwrap());
    let far = usize::MAX;
    let row = Layout { offset: 0, row: far, col: 1, batch: [far, far] };
    let column = Layout { offset: 0, row: 1, col: far, batch: [far, far] };
    // A row times a column, and a column times a row of one.
    for (mnk, a_layout, b_layout, expected) in
        [([1, 1, 4], row, column, 24.0), ([1, 4, 1], row, row, 6.0), ([4, 1, 1], column, row, 6.0)]
    {
        let c_layout = if mnk[0] == 1 { row } else { column };
        let what = MatMul { mnk, batch: [1, 1], a: a_layout, b: b_layout, c: c_layout, add: false };
        let mut c = backend.zeros(mnk[0] * mnk[1]).unwrap();
        backend.matmul(&what, &a, &b, &mut c).unwrap();
        assert!(backend.read(&c).unwrap().iter().all(|&c| c == expected), "{what:?}");
    }
    // Of nothing, however often.
    let what = MatMul { mnk: [0, 0, 1], batch: [far, far], a: row, b: row, c: row, add: false };
    backend.matmul(&what, &a, &b, &mut backend.zeros(0).unwrap()).unwrap();
    // Sums of nothing are 0.
    let what = MatMul { mnk: [1, 4, 0], batch: [1, 1], a: row, b: row, c: row, add: false };
    let mut c = backend.upload(&[7.0f32; 4]).unwrap();
    backend.matmul(&what, &a, &b, &mut c).unwrap();
    assert_eq!(backend.read(&c).unwrap(), [0.0; 4]);
}

#[test]
fn the_loss_of_a_batch_without_labels_is_positive_zero() {
    let backend = CpuBackend::new();
    let gpt = Gpt::new(gpt_config(8, 1), false).unwrap();
    let params = Params::upload(&backend, &gpt.specs().init(1)).unwrap();
    let mut run = gpt.run(&backend, 1, 3, false).unwrap();
    let input = GptInput { ids: &[1, 2, 3], labels: &[IGNORED; 3], choice: None };
    let batch = gpt.batch(&backend, &run, &input).unwrap();
    gpt.forward(&backend, &params, &mut run, &batch, Pass::Evaluate).unwrap();
    gpt.loss(&backend, &mut run, &batch).unwrap();
    assert_eq!(run.read_loss(&backend).unwrap().tokens.to_bits(), 0);
}
