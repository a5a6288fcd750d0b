//! A GPT on a text: its training steps, its evaluations, and the text that it writes.

use super::common::draws::draws;
use super::common::epochs::Epochs;
use super::common::interrupt;
use super::common::trainer::{Scores, Task};
use super::text::{Text, even_windows};
use fused_dropout::transformer::backend::{Backend, F32};
use fused_dropout::transformer::{
    DropoutSchedule, Gpt, GptBatch, GptConfig, GptInput, GptRun, Grads, IGNORED, Params, Pass,
    Specs,
};
use fused_dropout::{Dtype, Error};
use rand_philox::u32_to_unit_f32;

/// Tokens of either part of the text that an evaluation looks at, at most: so many, or the batches of so many steps.
const EVALUATED: usize = 48 << 10;
const EVALUATED_BATCHES: usize = 8;

/// What random numbers are drawn for. (`Epochs` has 0.)
const OFFSET: u64 = 1;
const SAMPLE: u64 = 2;

/// A model, its text, and the memory for its steps.
pub struct LanguageModel<'a, B: Backend> {
    gpt: Gpt,
    text: &'a Text,
    seed: u64,
    schedule: DropoutSchedule,
    /// Sequences of a step.
    sequences: usize,
    epochs: Epochs,
    run: GptRun<B>,
    batch: GptBatch<B>,
}

impl<'a, B: Backend> LanguageModel<'a, B> {
    pub fn new(
        backend: &B,
        config: GptConfig,
        text: &'a Text,
        sequences: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        let gpt = Gpt::new(config, false)?;
        let context = gpt.config().n_positions;
        let run = gpt.run(backend, sequences, context, false)?;
        let tokens = sequences * context;
        let nothing =
            GptInput { ids: &vec![0; tokens], labels: &vec![IGNORED; tokens], choice: None };
        let batch = gpt.batch(backend, &run, &nothing)?;
        // One window less than the text has, so that each epoch may begin elsewhere.
        let epochs = Epochs::new(text.train.len() / context - 1, seed);
        let schedule = DropoutSchedule::Constant;
        Ok(Self { gpt, text, seed, schedule, sequences, epochs, run, batch })
    }

    /// The same with drop probabilities that follow a schedule.
    pub fn scheduled(self, schedule: DropoutSchedule) -> Self {
        Self { schedule, ..self }
    }

    pub fn gpt(&self) -> &Gpt {
        &self.gpt
    }

    fn context(&self) -> usize {
        self.gpt.config().n_positions
    }

    /// Where the windows of a step begin: each epoch goes through the text in windows that do not overlap.
    fn windows(&mut self, step: u64) -> Vec<usize> {
        let (context, seed) = (self.context(), self.seed);
        let window = |(epoch, number)| {
            let offset = draws(seed, epoch, OFFSET).bounded(context as u32) as usize;
            offset + number * context
        };
        self.epochs.batch(step, self.sequences).into_iter().map(window).collect()
    }

    /// Puts windows of a part of the text into the batch. Sequences without a window predict nothing. Says how many
    /// tokens are predicted.
    fn fill(&mut self, backend: &B, tokens: &[u32], windows: &[usize]) -> Result<usize, Error> {
        let context = self.context();
        let mut ids = vec![0; self.sequences * context];
        let mut labels = vec![IGNORED; self.sequences * context];
        let places = ids.chunks_mut(context).zip(labels.chunks_mut(context));
        for (&start, (ids, labels)) in windows.iter().zip(places) {
            ids.copy_from_slice(&tokens[start..start + context]);
            let next = tokens[start + 1..].iter().map(|&token| token as i32);
            labels.iter_mut().zip(next).for_each(|(label, next)| *label = next);
        }
        self.gpt.refill(backend, &self.run, &mut self.batch, &ids, &labels)?;
        Ok(windows.len() * context)
    }

    /// The mean loss on windows spread over a part of the text.
    fn mean_loss(&mut self, backend: &B, params: &Params<B>, tokens: &[u32]) -> Result<f64, Error> {
        let context = self.context();
        let most = (EVALUATED / context).max(EVALUATED_BATCHES * self.sequences);
        let windows = even_windows(tokens.len(), context, most);
        let (mut sum, mut count) = (0.0, 0);
        for windows in windows.chunks(self.sequences) {
            let predicted = self.fill(backend, tokens, windows)?;
            self.gpt.forward(backend, params, &mut self.run, &self.batch, Pass::Evaluate)?;
            self.gpt.loss(backend, &mut self.run, &self.batch)?;
            sum += f64::from(self.run.read_loss(backend)?.tokens) * predicted as f64;
            count += predicted;
        }
        Ok(sum / count as f64)
    }

    /// Lets the model write `length` characters, or less if Ctrl-C comes, each drawn from what it expects, made somewhat
    /// surer of itself.
    pub fn write(&self, backend: &B, params: &Params<B>, length: usize) -> Result<String, Error> {
        const TEMPERATURE: f32 = 0.8;
        let context = self.context();
        let (vocabulary, characters) = (self.gpt.config().vocab_size, self.text.vocabulary.len());
        let mut philox = draws(self.seed, 0, SAMPLE);
        let mut run = self.gpt.run(backend, 1, context, false)?;
        let labels = vec![IGNORED; context];
        // It begins as the text does.
        let mut written = vec![self.text.train[0]];
        while written.len() < length && !interrupt::asked() {
            let seen = &written[written.len().saturating_sub(context)..];
            // What stands behind the last token does not reach it: attention is causal.
            let mut ids = seen.to_vec();
            ids.resize(context, 0);
            let input = GptInput { ids: &ids, labels: &labels, choice: None };
            let batch = self.gpt.batch(backend, &run, &input)?;
            self.gpt.forward(backend, params, &mut run, &batch, Pass::Evaluate)?;
            let logits = backend.read(run.logits())?;
            let last = &logits[(seen.len() - 1) * vocabulary..][..vocabulary];
            let last = last[..characters].iter().map(|logit| logit.to_f32() / TEMPERATURE);
            let share = u32_to_unit_f32(philox.next_u32());
            written.push(pick(&last.collect::<Vec<_>>(), share));
        }
        Ok(self.text.decode(&written))
    }
}

/// The token that `share`, between 0 and 1, falls to when each has its part by softmax.
fn pick(logits: &[f32], share: f32) -> u32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let parts: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let mut left = share * parts.iter().sum::<f32>();
    for (token, part) in parts.iter().enumerate() {
        left -= part;
        if left < 0.0 {
            return token as u32;
        }
    }
    // Rounding left something over.
    parts.len() as u32 - 1
}

impl<B: Backend> Task<B> for LanguageModel<'_, B> {
    const REPEATS: bool = true;

    fn specs(&self) -> &Specs {
        self.gpt.specs()
    }

    fn load(&mut self, backend: &B, step: u64) -> Result<(), Error> {
        let text = self.text;
        let windows = self.windows(step);
        self.fill(backend, &text.train, &windows).map(drop)
    }

    fn gradients(
        &mut self,
        backend: &B,
        params: &Params<B>,
        number: u64,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        // Seed, number and schedule say what is dropped; the backward pass draws the same masks again.
        let pass = Pass::train(self.seed, number).scheduled(self.schedule);
        let (run, batch) = (&mut self.run, &self.batch);
        self.gpt.forward(backend, params, run, batch, pass)?;
        self.gpt.loss(backend, run, batch)?;
        self.gpt.backward(backend, params, run, batch, pass, grads)
    }

    fn loss(&self) -> &F32<B> {
        self.run.loss()
    }

    fn evaluate(&mut self, backend: &B, params: &Params<B>) -> Result<Scores, Error> {
        let text = self.text;
        let train_loss = self.mean_loss(backend, params, &text.train)?;
        let val_loss = self.mean_loss(backend, params, &text.validation)?;
        Ok(Scores { train_loss, val_loss, accuracy: None })
    }
}
