//! What holds of the models beyond their equality with Hugging Face's: dropout at every site, in both directions, and
//! files that do not fit.

#![cfg(feature = "transformer")]

use fused_dropout::Error;
use fused_dropout::transformer::{
    AdamW, Bert, BertConfig, BertInput, BertTask, CpuBackend, Gpt, GptConfig, GptInput, Grads,
    Optimizer, Params, Pass, shifted,
};

const LENGTH: usize = 10;
const BATCH: usize = 3;
const VOCAB: usize = 17;

/// Drop probabilities of GPT's sites: embedding, attention, residual branches, summary.
type GptSites = [f64; 4];

fn gpt(sites: GptSites) -> Gpt {
    let [embd, attn, resid, summary] = sites;
    let text = format!(
        r#"{{"model_type": "gpt2", "vocab_size": {VOCAB}, "n_positions": 12, "n_embd": 24, "n_layer": 3,
        "n_head": 3, "embd_pdrop": {embd}, "attn_pdrop": {attn}, "resid_pdrop": {resid},
        "summary_first_dropout": {summary}, "summary_activation": "tanh", "initializer_range": 0.2}}"#
    );
    Gpt::new(GptConfig::from_json(&text).unwrap(), true).unwrap()
}

/// Drop probabilities of BERT's sites: embedding and residual branches, attention, classifier.
fn bert([hidden, attention, classifier]: [f64; 3], task: BertTask) -> Bert {
    let text = format!(
        r#"{{"model_type": "bert", "vocab_size": {VOCAB}, "max_position_embeddings": 12, "hidden_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
        "hidden_dropout_prob": {hidden}, "attention_probs_dropout_prob": {attention},
        "classifier_dropout": {classifier}, "initializer_range": 0.2}}"#
    );
    Bert::new(BertConfig::from_json(&text).unwrap(), task).unwrap()
}

fn ids() -> Vec<u32> {
    (0..BATCH * LENGTH).map(|i| (i * i * 7 + i / 3) as u32 % VOCAB as u32).collect()
}

/// Loss and gradients of the weights `values`.
fn gpt_step(gpt: &Gpt, values: &[Vec<f32>], pass: Pass, recompute: bool) -> (f32, Vec<Vec<f32>>) {
    let backend = CpuBackend::new();
    let (ids, params) = (ids(), Params::upload(&backend, values).unwrap());
    let labels = shifted(&ids, LENGTH);
    let choice = Some((&[9, 0, 4][..], &[1][..]));
    let mut run = gpt.run(&backend, BATCH, LENGTH, recompute).unwrap();
    let input = GptInput { ids: &ids, labels: &labels, choice };
    let batch = gpt.batch(&backend, &run, &input).unwrap();
    gpt.forward(&backend, &params, &mut run, &batch, pass).unwrap();
    gpt.loss(&backend, &mut run, &batch).unwrap();
    let loss = run.read_loss(&backend).unwrap().total();
    let mut grads = Grads::zeros(&backend, gpt.specs()).unwrap();
    gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads).unwrap();
    (loss, grads.download(&backend).unwrap())
}

fn bert_step(
    bert: &Bert,
    task: BertTask,
    values: &[Vec<f32>],
    pass: Pass,
    recompute: bool,
    padding_first: bool,
) -> (f32, Vec<Vec<f32>>) {
    let backend = CpuBackend::new();
    let (ids, params) = (ids(), Params::upload(&backend, values).unwrap());
    let segments: Vec<u32> = (0..BATCH * LENGTH).map(|i| u32::from(i % LENGTH > 5)).collect();
    // The second sequence has 7 tokens, at its start or at its end.
    let is_token = |i: usize| match i % LENGTH {
        at if padding_first => at >= 3,
        at => at < 7,
    };
    let tokens: Vec<bool> = (0..BATCH * LENGTH).map(|i| i / LENGTH != 1 || is_token(i)).collect();
    let labels = match task {
        BertTask::Classification => vec![0, 1, 1],
        BertTask::MaskedLanguageModel => (0..BATCH * LENGTH)
            .map(|i| if i % 3 == 0 { (i % VOCAB) as i32 } else { -100 })
            .collect(),
    };
    let mut run = bert.run(&backend, BATCH, LENGTH, recompute).unwrap();
    let input = BertInput { ids: &ids, segments: &segments, tokens: &tokens, labels: &labels };
    let batch = bert.batch(&backend, &run, &input).unwrap();
    bert.forward(&backend, &params, &mut run, &batch, pass).unwrap();
    bert.loss(&backend, &mut run, &batch).unwrap();
    let loss = run.read_loss(&backend).unwrap();
    let mut grads = Grads::zeros(&backend, bert.specs()).unwrap();
    bert.backward(&backend, &params, &mut run, &batch, pass, &mut grads).unwrap();
    (loss, grads.download(&backend).unwrap())
}

const TRAIN: Pass = Pass::train(7, 5);

/// Walks from `values` along the gradient to both sides, so far that the loss moves by `MOVE`: the difference quotient of the
/// loss is the gradient's length.
///
/// The loss's rounding, some 1e-6, is 1e-4 of the difference; the curve's third derivative is off the line by some
/// MOVE². A mask that the backward pass draws otherwise changes a third of the elements of a site, which is not below a hundredth.
fn check_gradient(
    values: &[Vec<f32>],
    step: impl Fn(&[Vec<f32>]) -> (f32, Vec<Vec<f32>>),
    what: &str,
) {
    const MOVE: f32 = 0.01;
    let (_, grads) = step(values);
    let squares = grads.iter().flatten().map(|&g| f64::from(g) * f64::from(g));
    let length = squares.sum::<f64>().sqrt() as f32;
    let by = MOVE / length;
    let moved = |by: f32| {
        let moved = values.iter().zip(&grads).map(|(values, grads)| {
            values.iter().zip(grads).map(|(value, grad)| value + by * grad / length).collect()
        });
        step(&moved.collect::<Vec<_>>()).0
    };
    let quotient = (moved(by) - moved(-by)) / (2.0 * by);
    assert!((quotient / length - 1.0).abs() < 0.01, "{what}: {quotient}, not {length}");
}

#[test]
fn gradients_of_gpt_hold_with_dropout_at_each_site() {
    for site in 0..4 {
        let mut sites = [0.0; 4];
        sites[site] = 0.3;
        let gpt = gpt(sites);
        let values = gpt.specs().init(1);
        let step = |values: &[Vec<f32>]| gpt_step(&gpt, values, TRAIN, false);
        check_gradient(&values, step, &format!("gpt, site {site}"));
        let kept = gpt_step(&gpt, &values, Pass::Evaluate, false).0;
        assert_ne!(step(&values).0, kept, "site {site} drops");
    }
}

#[test]
fn gradients_of_bert_hold_with_dropout_at_each_site() {
    for task in [BertTask::Classification, BertTask::MaskedLanguageModel] {
        for site in 0..3 {
            let mut sites = [0.0; 3];
            sites[site] = 0.3;
            let bert = bert(sites, task);
            let values = bert.specs().init(1);
            let step = |values: &[Vec<f32>]| bert_step(&bert, task, values, TRAIN, false, false);
            check_gradient(&values, step, &format!("{task:?}, site {site}"));
            let kept = bert_step(&bert, task, &values, Pass::Evaluate, false, false).0;
            let drops = site < 2 || task == BertTask::Classification;
            assert_eq!(step(&values).0 != kept, drops, "{task:?}: site {site}");
        }
    }
}

#[test]
fn a_layer_that_is_computed_again_gives_the_same_bits() {
    let model = gpt([0.1, 0.2, 0.3, 0.4]);
    let values = model.specs().init(3);
    let kept = gpt_step(&model, &values, TRAIN, false);
    assert!(kept == gpt_step(&model, &values, TRAIN, true));
    let next = Pass::train(7, 6);
    assert!(kept != gpt_step(&model, &values, next, true), "the next step has other masks");

    let task = BertTask::Classification;
    let model = bert([0.1, 0.2, 0.3], task);
    let values = model.specs().init(3);
    let kept = bert_step(&model, task, &values, TRAIN, false, true);
    assert!(kept == bert_step(&model, task, &values, TRAIN, true, true));
}

/// Asserts that gradients of parts of a step add up to `whole`. Sums of a few hundred products in another order: their
/// roundings are below a hundredth of a thousandth of the tensor's largest gradient. Other masks change gradients by their
/// own size.
fn assert_adds_up(whole: &[Vec<f32>], parts: &[Vec<f32>], what: &str) {
    for (tensor, (whole, parts)) in whole.iter().zip(parts).enumerate() {
        let largest = whole.iter().fold(1e-3f32, |largest, g| largest.max(g.abs()));
        for (a, b) in whole.iter().zip(parts) {
            assert!((a - b).abs() <= 1e-5 * largest, "{what}, tensor {tensor}: {b}, not {a}");
        }
    }
}

/// Each part has one of the three sequences.
#[test]
fn micro_batches_of_gpt_are_the_step() {
    let backend = CpuBackend::new();
    let gpt = Gpt::new(gpt([0.3, 0.2, 0.3, 0.0]).config().clone(), false).unwrap();
    let params = Params::upload(&backend, &gpt.specs().init(3)).unwrap();
    let (ids, labels) = (ids(), shifted(&ids(), LENGTH));
    let count = labels.iter().filter(|&&label| label >= 0).count();
    let mut grads = Grads::zeros(&backend, gpt.specs()).unwrap();
    let mut run_of = |sequences: std::ops::Range<usize>, pass: Pass, add: bool| {
        let mut run = gpt.run(&backend, sequences.len(), LENGTH, false).unwrap();
        let tokens = sequences.start * LENGTH..sequences.end * LENGTH;
        let input = GptInput { ids: &ids[tokens.clone()], labels: &labels[tokens], choice: None };
        let mut batch = gpt.batch(&backend, &run, &input).unwrap();
        batch.part_of(&backend, count, 0).unwrap();
        gpt.forward(&backend, &params, &mut run, &batch, pass).unwrap();
        gpt.loss(&backend, &mut run, &batch).unwrap();
        grads.add(add);
        gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads).unwrap();
        (run.read_loss(&backend).unwrap().tokens, grads.download(&backend).unwrap())
    };
    let (loss, whole) = run_of(0..BATCH, TRAIN, false);
    let mut sum = 0.0;
    let mut parts = Vec::new();
    for i in 0..BATCH {
        let (loss, grads) = run_of(i..i + 1, TRAIN.from_sequence(i), i > 0);
        (sum, parts) = (sum + loss, grads);
    }
    assert!((sum - loss).abs() < 1e-5 * loss, "{sum}, not {loss}");
    assert_adds_up(&whole, &parts, "gpt");
    // Without its own sequences a part draws the first one's masks.
    let (_, of_last) = run_of(2..3, TRAIN.from_sequence(2), false);
    let (_, of_first) = run_of(2..3, TRAIN, false);
    assert_ne!(of_last, of_first);
}

#[test]
fn micro_batches_of_bert_are_the_step() {
    let (backend, ids) = (CpuBackend::new(), ids());
    let segments: Vec<u32> = (0..BATCH * LENGTH).map(|i| u32::from(i % LENGTH > 5)).collect();
    let tokens: Vec<bool> =
        (0..BATCH * LENGTH).map(|i| i / LENGTH != 1 || i % LENGTH < 7).collect();
    for task in [BertTask::Classification, BertTask::MaskedLanguageModel] {
        let bert = bert([0.3, 0.2, 0.3], task);
        let params = Params::upload(&backend, &bert.specs().init(3)).unwrap();
        let (labels, a_sequence) = match task {
            BertTask::Classification => (vec![0, 1, 1], 1),
            BertTask::MaskedLanguageModel => {
                let label = |i: usize| if i.is_multiple_of(3) { (i % VOCAB) as i32 } else { -100 };
                ((0..BATCH * LENGTH).map(label).collect(), LENGTH)
            }
        };
        let count = labels.iter().filter(|&&label| label >= 0).count();
        let mut grads = Grads::zeros(&backend, bert.specs()).unwrap();
        let mut run_of = |sequences: std::ops::Range<usize>, pass: Pass, add: bool| {
            let mut run = bert.run(&backend, sequences.len(), LENGTH, false).unwrap();
            let of = |each: usize| sequences.start * each..sequences.end * each;
            let input = BertInput {
                ids: &ids[of(LENGTH)],
                segments: &segments[of(LENGTH)],
                tokens: &tokens[of(LENGTH)],
                labels: &labels[of(a_sequence)],
            };
            let mut batch = bert.batch(&backend, &run, &input).unwrap();
            batch.part_of(&backend, count).unwrap();
            bert.forward(&backend, &params, &mut run, &batch, pass).unwrap();
            bert.loss(&backend, &mut run, &batch).unwrap();
            grads.add(add);
            bert.backward(&backend, &params, &mut run, &batch, pass, &mut grads).unwrap();
            grads.download(&backend).unwrap()
        };
        let whole = run_of(0..BATCH, TRAIN, false);
        run_of(0..1, TRAIN, false);
        let parts = run_of(1..BATCH, TRAIN.from_sequence(1), true);
        assert_adds_up(&whole, &parts, &format!("{task:?}"));
    }
}

#[test]
fn a_run_repeats_bit_for_bit() {
    let losses = || {
        let backend = CpuBackend::new();
        let gpt = gpt([0.2; 4]);
        let mut params = Params::upload(&backend, &gpt.specs().init(1)).unwrap();
        let mut optimizer = Optimizer::new(&backend, gpt.specs(), AdamW::default()).unwrap();
        let mut grads = Grads::zeros(&backend, gpt.specs()).unwrap();
        let mut run = gpt.run(&backend, BATCH, LENGTH, false).unwrap();
        let (ids, choice) = (ids(), Some((&[9, 0, 4][..], &[1][..])));
        let input = GptInput { ids: &ids, labels: &shifted(&ids, LENGTH), choice };
        let batch = gpt.batch(&backend, &run, &input).unwrap();
        let mut losses = Vec::new();
        for step in 0..30 {
            let pass = Pass::train(1, step);
            gpt.forward(&backend, &params, &mut run, &batch, pass).unwrap();
            gpt.loss(&backend, &mut run, &batch).unwrap();
            losses.push(run.read_loss(&backend).unwrap().tokens);
            gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads).unwrap();
            optimizer.step(&backend, gpt.specs(), &mut params, &grads, 1e-2).unwrap();
        }
        losses
    };
    let first = losses();
    assert!(first[29] < 0.7 * first[0], "it learns: {first:?}");
    assert_eq!(first, losses());
}

#[test]
fn settings_that_do_not_fit_are_named() {
    let refused = |change: (&str, serde_json::Value), name: &str| {
        let mut config: serde_json::Value = serde_json::json!({
            "model_type": "gpt2", "vocab_size": 9, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2,
        });
        assert!(GptConfig::from_json(&config.to_string()).is_ok());
        config[change.0] = change.1;
        match GptConfig::from_json(&config.to_string()) {
            Err(Error::Setting { name: given, .. }) => assert_eq!(given, name),
            other => panic!("{change:?}: {other:?}", change = change.0),
        }
    };
    refused(("model_type", "bert".into()), "model_type");
    refused(("n_head", 3.into()), "n_embd");
    refused(("n_layer", 0.into()), "n_layer");
    refused(("attn_pdrop", 1.5.into()), "attn_pdrop");
    refused(("activation_function", "mish".into()), "activation_function");
    refused(("n_embd", "eight".into()), "n_embd");
    refused(("n_emdb", 8.into()), "n_emdb");
    refused(("summary_type", "last".into()), "summary_type");
    refused(("tie_word_embeddings", false.into()), "tie_word_embeddings");
    let missing = GptConfig::from_json(r#"{"model_type": "gpt2", "n_embd": 8}"#);
    assert!(matches!(missing, Err(Error::Setting { name, .. }) if name == "vocab_size"));
    assert!(matches!(GptConfig::from_json("{"), Err(Error::File { .. })));
}

#[test]
fn configurations_survive_their_file() {
    let gpt = gpt([0.1, 0.2, 0.3, 0.4]);
    assert_eq!(GptConfig::from_json(&gpt.config().to_json()).unwrap(), *gpt.config());
    let bert = bert([0.1, 0.2, 0.3], BertTask::Classification);
    assert_eq!(BertConfig::from_json(&bert.config().to_json()).unwrap(), *bert.config());
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let model = gpt([0.0; 4]);
    let values = model.specs().init(1);
    let whole = model.specs().serialize(&values).unwrap();
    assert!(model.specs().parse(&whole).unwrap() == values);

    let name = |result: Result<Vec<Vec<f32>>, Error>| match result {
        Err(Error::Tensor { name, .. }) => name,
        other => panic!("{:?}", other.map(|values| values.len())),
    };
    let single = Gpt::new(model.config().clone(), false).unwrap();
    let lacking = single.specs().serialize(&single.specs().init(1)).unwrap();
    assert_eq!(name(model.specs().parse(&lacking)), "multiple_choice_head.summary.weight");
    assert_eq!(name(single.specs().parse(&whole)), "multiple_choice_head.summary.bias");
    let wider = GptConfig { n_inner: 100, ..model.config().clone() };
    let wider = Gpt::new(wider, true).unwrap();
    assert_eq!(name(wider.specs().parse(&whole)), "transformer.h.0.mlp.c_fc.weight");
    assert!(matches!(model.specs().parse(&whole[..100]), Err(Error::File { .. })));

    // A tied weight under its second name must be the same.
    let file = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let mut tensors: Vec<_> = file.iter().collect();
    tensors.push(("lm_head.weight", file.tensor("transformer.wte.weight").unwrap()));
    let tied = safetensors::serialize(tensors.clone(), None).unwrap();
    assert!(model.specs().parse(&tied).is_ok());
    let other = vec![0u8; VOCAB * 24 * 4];
    let shape = vec![VOCAB, 24];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &other);
    tensors.last_mut().unwrap().1 = view.unwrap();
    let untied = safetensors::serialize(tensors, None).unwrap();
    assert_eq!(name(model.specs().parse(&untied)), "lm_head.weight");
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let (backend, gpt) = (CpuBackend::new(), gpt([0.0; 4]));
    assert!(gpt.run(&backend, BATCH, 13, false).is_err(), "more tokens than positions");
    assert!(gpt.run(&backend, 0, LENGTH, false).is_err());
    let run = gpt.run(&backend, BATCH, LENGTH, false).unwrap();
    let (ids, tokens, right) = (ids(), [9, 0, 4], [1]);
    let labels = shifted(&ids, LENGTH);
    let fits = GptInput { ids: &ids, labels: &labels, choice: Some((&tokens, &right)) };
    assert!(gpt.batch(&backend, &run, &fits).is_ok());
    let (mut large, mut label) = (ids.clone(), labels.clone());
    (large[5], label[5]) = (VOCAB as u32, VOCAB as i32);
    let refused = [
        GptInput { ids: &ids[1..], ..fits },
        GptInput { ids: &large, ..fits },
        GptInput { labels: &label, ..fits },
        GptInput { choice: None, ..fits },
        GptInput { choice: Some((&[10, 0, 4], &right)), ..fits },
        GptInput { choice: Some((&tokens, &[3])), ..fits },
        GptInput { choice: Some((&tokens, &[0, 0])), ..fits },
    ];
    for input in refused {
        let result = gpt.batch(&backend, &run, &input);
        assert!(matches!(result, Err(Error::Argument { operator: "gpt", .. })), "{input:?}");
    }
}
