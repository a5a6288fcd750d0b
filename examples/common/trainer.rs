//! A training run: weights, optimiser, and the steps.

use anyhow::{Result, ensure};
use fused_dropout::Error;
use fused_dropout::transformer::{
    AdamW, Backend, Checkpoint, Grads, Optimizer, Params, Schedule, Specs,
};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// A model with its data: what a step computes, and what an evaluation does.
pub trait Task<B: Backend> {
    /// The model's tensors.
    fn specs(&self) -> &Specs;

    /// The gradients of training step `step`. Everything random in it follows from the seed and `step`.
    fn gradients(
        &mut self,
        backend: &B,
        params: &Params<B>,
        step: u64,
        grads: &mut Grads<B>,
    ) -> Result<(), Error>;

    /// The loss of that step. Waits for the backend.
    fn loss(&self, backend: &B) -> Result<f32, Error>;

    /// The losses on fixed parts of the data, nothing dropped.
    fn evaluate(&mut self, backend: &B, params: &Params<B>) -> Result<Scores, Error>;
}

/// What an evaluation finds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Mean loss on a part of the training data.
    pub train_loss: f64,
    /// Mean loss on data that was not trained on.
    pub val_loss: f64,
    /// The share of it that is classified correctly, where there are classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

/// The scores after so many steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: u64,
    #[serde(flatten)]
    pub scores: Scores,
}

/// What a run has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The loss of every step.
    pub step_losses: Vec<f32>,
    /// Milliseconds of every step: batch, forward, loss, backward and optimiser.
    pub step_ms: Vec<f32>,
    pub evaluations: Vec<Evaluation>,
}

impl Record {
    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step_losses.len() as u64
    }

    /// The median time of a step.
    pub fn ms_per_step(&self) -> f32 {
        let mut sorted = self.step_ms.clone();
        sorted.sort_by(f32::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
    }
}

/// How long and how fast a run learns.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub optimizer: AdamW,
    /// The rates; its `steps` are the run's.
    pub schedule: Schedule,
    /// Steps from one evaluation to the next.
    pub eval_interval: u64,
}

/// A run.
pub struct Trainer<'a, B: Backend, T> {
    pub backend: &'a B,
    pub task: T,
    pub params: Params<B>,
    pub record: Record,
    plan: Plan,
    optimizer: Optimizer<B>,
    grads: Grads<B>,
}

impl<'a, B: Backend, T: Task<B>> Trainer<'a, B, T> {
    /// Before the first step, with these weights.
    pub fn new(backend: &'a B, task: T, plan: Plan, weights: &[Vec<f32>]) -> Result<Self> {
        let params = Params::upload(backend, weights)?;
        let optimizer = Optimizer::new(backend, task.specs(), plan.optimizer)?;
        let grads = Grads::zeros(backend, task.specs())?;
        Ok(Self { backend, task, params, record: Record::default(), plan, optimizer, grads })
    }

    /// Where a checkpoint with this record left off.
    pub fn resume(
        backend: &'a B,
        task: T,
        plan: Plan,
        checkpoint: &Checkpoint,
        record: Record,
    ) -> Result<Self> {
        let steps = checkpoint.optimizer.steps;
        ensure!(
            record.steps() == steps,
            "a record of {} steps with weights of {steps}",
            record.steps()
        );
        let specs = task.specs();
        let optimizer = Optimizer::restore(backend, specs, plan.optimizer, &checkpoint.optimizer)?;
        let params = Params::upload(backend, &checkpoint.weights)?;
        let grads = Grads::zeros(backend, specs)?;
        Ok(Self { backend, task, params, record, plan, optimizer, grads })
    }

    /// What [`resume`](Self::resume) takes, with `notes`.
    pub fn checkpoint(&self, notes: String) -> Result<Checkpoint> {
        let weights = self.params.download(self.backend)?;
        Ok(Checkpoint { weights, optimizer: self.optimizer.state(self.backend)?, notes })
    }

    /// One step: its loss.
    pub fn step(&mut self) -> Result<f32> {
        let start = Instant::now();
        let (backend, step) = (self.backend, self.record.steps());
        self.task.gradients(backend, &self.params, step, &mut self.grads)?;
        let rate = self.plan.schedule.rate(step);
        self.optimizer.step(backend, self.task.specs(), &mut self.params, &self.grads, rate)?;
        let loss = self.task.loss(backend)?;
        ensure!(loss.is_finite(), "the loss of step {step} is {loss}: the training has diverged");
        self.record.step_losses.push(loss);
        self.record.step_ms.push(start.elapsed().as_secs_f32() * 1e3);
        Ok(loss)
    }

    /// Whether an evaluation belongs here and has not been made.
    pub fn evaluation_due(&self) -> bool {
        let step = self.record.steps();
        let last = self.record.evaluations.last().map(|last| last.step);
        (step.is_multiple_of(self.plan.eval_interval) || self.finished()) && last != Some(step)
    }

    /// The scores of the weights as they are.
    pub fn evaluate(&mut self) -> Result<Evaluation> {
        let scores = self.task.evaluate(self.backend, &self.params)?;
        let evaluation = Evaluation { step: self.record.steps(), scores };
        self.record.evaluations.push(evaluation);
        Ok(evaluation)
    }

    /// Whether all steps are taken.
    pub fn finished(&self) -> bool {
        self.record.steps() >= self.plan.schedule.steps
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.plan.schedule.steps
    }
}
