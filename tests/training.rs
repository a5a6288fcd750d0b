//! The examples' trainers, on models that take seconds: they learn, the same seed gives the same bits, and a run that was
//! stopped and continued is the run that was not.

#![cfg(feature = "transformer")]

#[allow(dead_code)] // the examples' comforts are not all needed here
#[path = "../examples/common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "../examples/train_gpt/language_model.rs"]
mod language_model;
#[allow(dead_code)]
#[path = "../examples/train_bert/model.rs"]
mod model;
#[path = "../examples/train_bert/reviews.rs"]
mod reviews;
#[allow(dead_code)]
#[path = "../examples/train_gpt/text.rs"]
mod text;
#[path = "../examples/train_bert/tokenizer.rs"]
mod tokenizer;

use common::trainer::{Plan, Record, Task, Trainer};
use fused_dropout::transformer::{
    AdamW, BertConfig, BertTask, Checkpoint, CpuBackend, GptConfig, Schedule,
};
use fused_dropout::{Activation, Probability};
use language_model::LanguageModel;
use model::{Model, inherit};
use reviews::Reviews;
use text::Text;

const STEPS: u64 = 80;

fn plan() -> Plan {
    let schedule = Schedule { peak: 1e-2, floor: 1e-3, warmup: 10, steps: STEPS };
    Plan { optimizer: AdamW::default(), schedule, eval_interval: 20 }
}

fn p(value: f64) -> Probability {
    Probability::new(value).unwrap()
}

fn some_text() -> Text {
    Text::new(&"the cat sat on the mat; the dog saw it. ".repeat(40), 16).unwrap()
}

fn language_model<'a>(
    backend: &CpuBackend,
    text: &'a Text,
    dropout: f64,
    seed: u64,
) -> LanguageModel<'a, CpuBackend> {
    let config = GptConfig {
        vocab_size: text.vocabulary.len(),
        n_positions: 16,
        n_embd: 16,
        n_layer: 2,
        n_head: 2,
        n_inner: 32,
        activation_function: Activation::GeluTanh,
        layer_norm_epsilon: 1e-5,
        initializer_range: 0.02,
        embd_pdrop: p(dropout),
        attn_pdrop: p(dropout),
        resid_pdrop: p(dropout),
        summary_first_dropout: Probability::ZERO,
        summary_activation: Activation::Identity,
        bos_token_id: None,
        eos_token_id: None,
        num_labels: 1,
    };
    LanguageModel::new(backend, config, text, 3, seed).unwrap()
}

fn some_reviews() -> Reviews {
    let lines =
        |word: &str| (0..30).map(|i| format!("film {} is {word}\n", i % 7)).collect::<String>();
    Reviews::new(&lines("bad"), &lines("good"), 8, 5).unwrap()
}

fn bert<'a>(
    backend: &CpuBackend,
    reviews: &'a Reviews,
    task: BertTask,
    first_step: u64,
) -> Model<'a, CpuBackend> {
    let config = BertConfig {
        vocab_size: reviews.tokenizer.vocabulary.len(),
        max_position_embeddings: 8,
        type_vocab_size: 1,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 32,
        hidden_act: Activation::Gelu,
        layer_norm_eps: 1e-12,
        initializer_range: 0.02,
        hidden_dropout_prob: p(0.1),
        attention_probs_dropout_prob: p(0.2),
        classifier_dropout: p(0.3),
        num_labels: 2,
        problem_type: None,
        pad_token_id: Some(0),
    };
    Model::new(backend, config, task, reviews, 4, 7, first_step).unwrap()
}

/// What is left in nats of the next token for one who knows how often each occurs.
fn entropy(tokens: &[u32]) -> f64 {
    let share = |token| tokens.iter().filter(|&t| t == token).count() as f64 / tokens.len() as f64;
    tokens.iter().map(|token| -share(token).ln()).sum::<f64>() / tokens.len() as f64
}

/// Losses and scores but for the times, and the weights, as bits.
fn bits<T: Task<CpuBackend>>(trainer: &Trainer<'_, CpuBackend, T>) -> (Record, Vec<Vec<u32>>) {
    let record = Record { step_ms: Vec::new(), ..trainer.record.clone() };
    let weights = trainer.params.download(trainer.backend).unwrap();
    (record, weights.iter().map(|values| values.iter().map(|v| v.to_bits()).collect()).collect())
}

fn train<T: Task<CpuBackend>>(trainer: &mut Trainer<'_, CpuBackend, T>, to: u64) {
    while trainer.steps_taken() < to {
        if trainer.evaluation_due() {
            trainer.evaluate().unwrap();
        }
        trainer.step().unwrap();
    }
    if trainer.evaluation_due() {
        trainer.evaluate().unwrap();
    }
}

/// A run from the first step to the last.
fn whole<T: Task<CpuBackend>>(backend: &CpuBackend, task: T) -> Trainer<'_, CpuBackend, T> {
    let weights = task.specs().init(3);
    let mut trainer = Trainer::new(backend, task, plan(), &weights).unwrap();
    train(&mut trainer, STEPS);
    trainer
}

/// The same, stopped after `at` steps and continued from the file by another trainer.
fn in_two<T: Task<CpuBackend>>(
    backend: &CpuBackend,
    [first, second]: [T; 2],
    at: u64,
) -> Trainer<'_, CpuBackend, T> {
    let weights = first.specs().init(3);
    let mut trainer = Trainer::new(backend, first, plan(), &weights).unwrap();
    train(&mut trainer, at);
    let notes = |record: &Record| Ok(serde_json::to_string(record)?);
    let file = trainer.checkpoint(notes).unwrap().serialize(trainer.task.specs()).unwrap();
    drop(trainer);

    let checkpoint = Checkpoint::parse(second.specs(), &file).unwrap();
    let record = serde_json::from_str(&checkpoint.notes).unwrap();
    let mut trainer = Trainer::resume(backend, second, plan(), &checkpoint, record).unwrap();
    train(&mut trainer, STEPS);
    trainer
}

#[test]
fn a_gpt_learns_and_the_same_seed_gives_the_same_bits() {
    let (backend, text) = (CpuBackend::new(), some_text());
    let run = |dropout, seed| whole(&backend, language_model(&backend, &text, dropout, seed));
    let trainer = run(0.1, 7);
    let scores: Vec<f64> = trainer.record.evaluations.iter().map(|e| e.scores.val_loss).collect();
    assert_eq!(scores.len(), 5, "before the first step and after every 20");
    assert!(
        scores[4] < entropy(&text.validation),
        "it sees more than single characters: {scores:?}"
    );
    assert_eq!(bits(&trainer), bits(&run(0.1, 7)));
    assert_ne!(bits(&trainer), bits(&run(0.1, 8)));
    assert_ne!(bits(&trainer), bits(&run(0.0, 7)));
}

#[test]
fn a_gpt_that_was_stopped_continues_as_if_it_had_not_been() {
    let (backend, text) = (CpuBackend::new(), some_text());
    let model = || language_model(&backend, &text, 0.2, 7);
    let expected = bits(&whole(&backend, model()));
    for at in [1, 20, 33, STEPS] {
        assert_eq!(bits(&in_two(&backend, [model(), model()], at)), expected, "stopped at {at}");
    }
}

/// Losses are looked at later than they are computed.
#[test]
fn a_training_that_diverges_ends_with_the_step_that_shows_it() {
    let (backend, text) = (CpuBackend::new(), some_text());
    let task = language_model(&backend, &text, 0.0, 7);
    let weights = task.specs().init(3);
    let schedule = Schedule { peak: f32::MAX, floor: 0.0, warmup: 0, steps: STEPS };
    let mut trainer = Trainer::new(&backend, task, Plan { schedule, ..plan() }, &weights).unwrap();
    let error = (0..STEPS).find_map(|_| trainer.step().err()).expect("weights of no size");
    assert!(error.to_string().contains("the loss of step 1 is NaN"), "{error}");
    assert_eq!(trainer.record.steps(), 1);
}

#[test]
fn nothing_that_is_not_finite_is_recorded_or_saved() {
    let (backend, text) = (CpuBackend::new(), some_text());
    let new = |poison| {
        let task = language_model(&backend, &text, 0.0, 7);
        let mut weights = task.specs().init(3);
        weights[1][0] = poison;
        Trainer::new(&backend, task, plan(), &weights).unwrap()
    };
    for poison in [f32::NAN, f32::INFINITY] {
        let mut trainer = new(poison);
        let error = trainer.evaluate().unwrap_err().to_string();
        assert!(error.contains("loss after 0 steps is NaN"), "{error}");
        assert_eq!(trainer.record, Record::default());
        let error = trainer.checkpoint(|_| Ok(String::new())).unwrap_err().to_string();
        assert!(
            error
                .contains(&format!("a weight of transformer.wpe.weight after 0 steps is {poison}")),
            "{error}"
        );
    }
    // Nor is it resumed from.
    let mut checkpoint = new(0.0).checkpoint(|_| Ok(String::new())).unwrap();
    checkpoint.optimizer.v[2][0] = f32::NAN;
    let task = language_model(&backend, &text, 0.0, 7);
    let resumed = Trainer::resume(&backend, task, plan(), &checkpoint, Record::default());
    let error = resumed.err().unwrap().to_string();
    assert!(error.contains("a mean squared gradient of transformer.h.0"), "{error}");
}

/// As many losses as steps, each of its own step, whenever they are waited for.
#[test]
fn losses_do_not_depend_on_when_they_are_waited_for() {
    let (backend, text) = (CpuBackend::new(), some_text());
    let new = || {
        let task = language_model(&backend, &text, 0.2, 7);
        let weights = task.specs().init(3);
        Trainer::new(&backend, task, plan(), &weights).unwrap()
    };
    let (mut often, mut seldom) = (new(), new());
    for step in 1..=STEPS {
        often.step().unwrap();
        often.catch_up().unwrap();
        seldom.step().unwrap();
        assert_eq!((often.record.steps(), seldom.steps_taken()), (step, step));
    }
    seldom.catch_up().unwrap();
    seldom.catch_up().unwrap();
    assert_eq!(bits(&often), bits(&seldom));
    assert_eq!(seldom.record.step_ms.len() as u64, STEPS);
}

#[test]
fn a_bert_that_was_stopped_continues_as_if_it_had_not_been() {
    let (backend, reviews) = (CpuBackend::new(), some_reviews());
    for task in [BertTask::MaskedLanguageModel, BertTask::Classification] {
        let model = || bert(&backend, &reviews, task, 0);
        let expected = bits(&whole(&backend, model()));
        // Within epochs of 13.5 steps, and between two.
        for at in [5, 27, 50] {
            let stopped = in_two(&backend, [model(), model()], at);
            assert_eq!(bits(&stopped), expected, "{task:?} stopped at {at}");
        }
        let later = whole(&backend, bert(&backend, &reviews, task, 1));
        assert_ne!(bits(&later), expected, "steps of other numbers draw other masks");
    }
}

#[test]
fn a_classifier_inherits_what_both_models_have_and_learns() {
    let (backend, reviews) = (CpuBackend::new(), some_reviews());
    let masked = bert(&backend, &reviews, BertTask::MaskedLanguageModel, 0);
    let from = masked.specs().init(1);
    let classifier = bert(&backend, &reviews, BertTask::Classification, STEPS);
    let new = classifier.specs().init(2);
    let weights = inherit(masked.bert(), &from, classifier.bert(), 2).unwrap();
    for (index, spec) in classifier.specs().iter().enumerate() {
        let name = &spec.parts[0].name;
        let shared = name.starts_with("bert.") && !name.starts_with("bert.pooler.");
        let place = masked.specs().iter().position(|other| other == spec);
        assert_eq!(shared, place.is_some(), "{name}");
        assert_eq!(weights[index], place.map_or(&new[index], |place| &from[place])[..], "{name}");
    }
    let mut trainer = Trainer::new(&backend, classifier, plan(), &weights).unwrap();
    train(&mut trainer, STEPS);
    let last = trainer.record.evaluations.last().unwrap().scores;
    assert_eq!(last.accuracy, Some(1.0), "one word says it all: {last:?}");
}

#[test]
fn a_run_is_not_continued_with_other_settings_or_other_weights() {
    use common::settings::check_same;
    let settings = |seed, steps| serde_json::json!({ "seed": seed, "steps": steps });
    assert!(check_same(&settings(1, 2), &settings(1, 2)).is_ok());
    let error = check_same(&settings(1, 2), &settings(1, 3)).unwrap_err().to_string();
    assert_eq!(error, "cannot resume: the checkpoint has steps = 2, not 3");

    let (backend, text) = (CpuBackend::new(), some_text());
    let model = || language_model(&backend, &text, 0.2, 7);
    let mut trainer = whole(&backend, model());
    let checkpoint = trainer.checkpoint(|_| Ok(String::new())).unwrap();
    let record = Record::default();
    assert!(Trainer::resume(&backend, model(), plan(), &checkpoint, record).is_err());
}
