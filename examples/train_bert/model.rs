//! A BERT on texts: as a masked language model, and as a classifier.

use super::common::draws::draws;
use super::common::epochs::Epochs;
use super::common::say::say;
use super::common::trainer::{Scores, Task};
use super::reviews::{Review, Reviews, Sequences};
use super::tokenizer::{MASK, SPECIAL};
use anyhow::Result;
use fused_dropout::transformer::backend::{Backend, F32};
use fused_dropout::transformer::{
    Bert, BertBatch, BertConfig, BertInput, BertRun, BertTask, Grads, IGNORED, Params, Pass, Specs,
};
use fused_dropout::{Dtype, Error};
use rand_philox::Philox;

/// What random numbers are drawn for. (`Epochs` has 0, `reviews` 1.)
const WORDS: u64 = 2;
const WORDS_OF_EVALUATION: u64 = 3;

/// A model, its texts, and the memory for its steps.
pub struct Model<'a, B: Backend> {
    bert: Bert,
    task: BertTask,
    reviews: &'a Reviews,
    epochs: Epochs,
    seed: u64,
    /// The number of the model's first step among all that are trained with the seed.
    first_step: u64,
    /// Texts of a batch.
    texts: usize,
    length: usize,
    run: BertRun<B>,
    /// The batch of a step.
    batch: Option<BertBatch<B>>,
}

impl<'a, B: Backend> Model<'a, B> {
    pub fn new(
        backend: &B,
        config: BertConfig,
        task: BertTask,
        reviews: &'a Reviews,
        texts: usize,
        seed: u64,
        first_step: u64,
    ) -> Result<Self, Error> {
        let bert = Bert::new(config, task)?;
        let length = bert.config().max_position_embeddings;
        let run = bert.run(backend, texts, length, false)?;
        let epochs = Epochs::new(reviews.train.len(), seed);
        Ok(Self { bert, task, reviews, epochs, seed, first_step, texts, length, run, batch: None })
    }

    pub fn bert(&self) -> &Bert {
        &self.bert
    }

    /// Puts texts on the backend. For a masked language model `philox` says which words it has to guess.
    fn upload(
        &self,
        backend: &B,
        texts: Sequences,
        mut philox: Philox,
    ) -> Result<(BertBatch<B>, usize), Error> {
        let Sequences { mut ids, tokens, classes } = texts;
        let labels = match self.task {
            BertTask::Classification => classes,
            BertTask::MaskedLanguageModel => {
                let vocabulary = self.bert.config().vocab_size as u32;
                ids.iter_mut().map(|id| mask(id, vocabulary, &mut philox)).collect()
            }
        };
        let segments = vec![0; ids.len()];
        let input = BertInput { ids: &ids, segments: &segments, tokens: &tokens, labels: &labels };
        let predicted = labels.iter().filter(|&&label| label >= 0).count();
        Ok((self.bert.batch(backend, &self.run, &input)?, predicted))
    }

    /// Mean loss, and the share of classes that are right.
    fn scores(
        &mut self,
        backend: &B,
        params: &Params<B>,
        texts: &[Review],
    ) -> Result<(f64, f64), Error> {
        let (mut sum, mut count, mut right) = (0.0, 0, 0);
        for (number, texts) in texts.chunks(self.texts).enumerate() {
            let philox = draws(self.seed, number as u64, WORDS_OF_EVALUATION);
            let sequences = Sequences::new(texts.iter(), self.texts, self.length);
            let (batch, predicted) = self.upload(backend, sequences, philox)?;
            self.bert.forward(backend, params, &mut self.run, &batch, Pass::Evaluate)?;
            if self.task == BertTask::Classification {
                let logits = backend.read(self.run.logits())?;
                let classes = logits.chunks(self.bert.config().num_labels).map(largest);
                right += classes.zip(texts).filter(|(class, text)| *class == text.class).count();
            }
            self.bert.loss(backend, &mut self.run, &batch)?;
            sum += f64::from(self.run.read_loss(backend)?) * predicted as f64;
            count += predicted;
        }
        Ok((sum / count.max(1) as f64, right as f64 / texts.len() as f64))
    }
}

/// The label of a token: itself for 15 of 100 words, of which 12 are hidden and 1.5 replaced by any word (Devlin et al.,
/// 2019).
fn mask(id: &mut u32, vocabulary: u32, philox: &mut Philox) -> i32 {
    let words = SPECIAL.len() as u32;
    let (chance, any) = (philox.bounded(1000), words + philox.bounded((vocabulary - words).max(1)));
    if *id < words || chance >= 150 {
        return IGNORED;
    }
    let label = *id as i32;
    match chance {
        0..120 => *id = MASK,
        120..135 => *id = any.min(vocabulary - 1),
        _ => {}
    }
    label
}

/// The place of the largest logit.
fn largest<E: Dtype>(logits: &[E]) -> i32 {
    let largest = logits.iter().zip(0..).max_by(|(a, _), (b, _)| a.to_f32().total_cmp(&b.to_f32()));
    largest.map_or(IGNORED, |(_, class)| class)
}

impl<B: Backend> Task<B> for Model<'_, B> {
    /// Batches lie in memory of their own, with padding or without.
    const REPEATS: bool = false;

    fn specs(&self) -> &Specs {
        self.bert.specs()
    }

    fn first_step(&self) -> u64 {
        self.first_step
    }

    fn load(&mut self, backend: &B, step: u64) -> Result<(), Error> {
        let reviews = self.reviews;
        let texts = self.epochs.batch(step, self.texts);
        let texts = texts.iter().map(|&(_, text)| &reviews.train[text]);
        let sequences = Sequences::new(texts, self.texts, self.length);
        let philox = draws(self.seed, self.first_step + step, WORDS);
        let (batch, _) = self.upload(backend, sequences, philox)?;
        self.batch = Some(batch);
        Ok(())
    }

    fn gradients(
        &mut self,
        backend: &B,
        params: &Params<B>,
        number: u64,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let batch = self.batch.as_ref().expect("`load` was called before");
        // Seed and number say what is dropped.
        let pass = Pass::train(self.seed, number);
        self.bert.forward(backend, params, &mut self.run, batch, pass)?;
        self.bert.loss(backend, &mut self.run, batch)?;
        self.bert.backward(backend, params, &mut self.run, batch, pass, grads)
    }

    fn loss(&self) -> &F32<B> {
        self.run.loss()
    }

    /// All that is held out, and as many of the training texts.
    fn evaluate(&mut self, backend: &B, params: &Params<B>) -> Result<Scores, Error> {
        let Reviews { train, held_out, .. } = self.reviews;
        let every = (train.len() / held_out.len()).max(1);
        let some: Vec<Review> = train.iter().step_by(every).cloned().collect();
        let (train_loss, _) = self.scores(backend, params, &some)?;
        let (val_loss, accuracy) = self.scores(backend, params, held_out)?;
        let classifies = self.task == BertTask::Classification;
        Ok(Scores { train_loss, val_loss, accuracy: classifies.then_some(accuracy) })
    }
}

/// What fine-tuning begins with: the weights of a trained model, as its file has them, and a new head. Says what is new.
pub fn inherit(from: &Bert, weights: &[Vec<f32>], to: &Bert, seed: u64) -> Result<Vec<Vec<f32>>> {
    let loaded = to.specs().load(&[from.specs().serialize(weights)?], seed)?;
    say!("\n{loaded}");
    Ok(loaded.values)
}
