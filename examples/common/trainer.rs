//! A training run: weights, optimiser, and the steps.

use anyhow::{Result, bail, ensure};
use fused_dropout::Error;
use fused_dropout::transformer::backend::F32;
use fused_dropout::transformer::{
    AdamW, Backend, Checkpoint, Grads, Optimizer, OptimizerState, Params, Schedule, Specs,
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// A model with its data: what a step computes, and what an evaluation does.
pub trait Task<B: Backend> {
    /// Whether [`gradients`](Self::gradients) is the same work in the same memory at every step, but for what
    /// [`load`](Self::load) puts there: then a backend may repeat it ([`Backend::repeat`]).
    const REPEATS: bool;

    /// The model's tensors.
    fn specs(&self) -> &Specs;

    /// The number of the model's first step among all that are trained with the seed: no two of them have the same
    /// masks.
    fn first_step(&self) -> u64 {
        0
    }

    /// Puts the batch of the model's step `step` on the backend. Everything random in it follows from the seed and the
    /// number of the step.
    fn load(&mut self, backend: &B, step: u64) -> Result<(), Error>;

    /// The gradients of the batch, with the masks of training step `number`.
    fn gradients(
        &mut self,
        backend: &B,
        params: &Params<B>,
        number: u64,
        grads: &mut Grads<B>,
    ) -> Result<(), Error>;

    /// Where they leave the loss: one value.
    fn loss(&self) -> &F32<B>;

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

impl Evaluation {
    /// Refuses scores of weights that are none any more.
    fn check(&self) -> Result<()> {
        let Scores { train_loss, val_loss, accuracy } = self.scores;
        for (name, value) in [("training", train_loss), ("validation", val_loss)] {
            let step = self.step;
            ensure!(
                value.is_finite(),
                "the {name} loss after {step} steps is {value}: the training has diverged"
            );
        }
        ensure!(accuracy.is_none_or(f64::is_finite), "an accuracy that is not finite");
        Ok(())
    }
}

/// What a run has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The loss of every step.
    pub step_losses: Vec<f32>,
    /// Milliseconds of every step: batch, forward, loss, backward and optimiser. Of steps that were waited for together,
    /// their mean.
    pub step_ms: Vec<f32>,
    pub evaluations: Vec<Evaluation>,
}

impl Record {
    /// Steps whose losses are here.
    pub fn steps(&self) -> u64 {
        self.step_losses.len() as u64
    }

    /// Refuses a record that no run writes.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.step_ms.len() == self.step_losses.len(),
            "its record has steps without a time"
        );
        let steps: Vec<u64> = self.evaluations.iter().map(|evaluation| evaluation.step).collect();
        let in_order = steps.is_sorted_by(|a, b| a < b);
        let taken = steps.last().is_none_or(|&last| last <= self.steps());
        ensure!(
            in_order && taken,
            "its record has evaluations after steps {steps:?} of {}",
            self.steps()
        );
        Ok(())
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
    /// Without the steps that were not waited for.
    pub record: Record,
    plan: Plan,
    optimizer: Optimizer<B>,
    grads: Grads<B>,
    recorded: Option<B::Recorded>,
    ahead: Ahead<B>,
}

/// Steps that were submitted and not waited for: a backend that works beside the host is not kept waiting for it.
struct Ahead<B: Backend> {
    steps: usize,
    /// When the first of them was begun.
    since: Instant,
    /// Their losses, on the backend.
    losses: F32<B>,
}

/// Steps that are waited for together, and how long they may take: what a progress bar and Ctrl-C want.
const MOST_AHEAD: usize = 64;
const LONGEST_AHEAD: Duration = Duration::from_millis(100);

impl<B: Backend> Ahead<B> {
    fn new(backend: &B) -> Result<Self, Error> {
        Ok(Self { steps: 0, since: Instant::now(), losses: backend.zeros(MOST_AHEAD)? })
    }

    fn push(&mut self, backend: &B, loss: &F32<B>) -> Result<(), Error> {
        backend.copy(loss, 0..1, &mut self.losses, self.steps)?;
        self.steps += 1;
        Ok(())
    }

    /// Whether it is time to wait.
    fn is_far(&self) -> bool {
        self.steps == MOST_AHEAD || self.since.elapsed() >= LONGEST_AHEAD
    }
}

impl<'a, B: Backend, T: Task<B>> Trainer<'a, B, T> {
    /// Before the first step, with these weights.
    pub fn new(backend: &'a B, task: T, plan: Plan, weights: &[Vec<f32>]) -> Result<Self> {
        let optimizer = Optimizer::new(backend, task.specs(), plan.optimizer)?;
        Self::with(backend, task, plan, weights, optimizer, Record::default())
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
        check_all_finite(task.specs(), checkpoint)?;
        let state = &checkpoint.optimizer;
        let optimizer = Optimizer::restore(backend, task.specs(), plan.optimizer, state)?;
        Self::with(backend, task, plan, &checkpoint.weights, optimizer, record)
    }

    fn with(
        backend: &'a B,
        task: T,
        plan: Plan,
        weights: &[Vec<f32>],
        optimizer: Optimizer<B>,
        record: Record,
    ) -> Result<Self> {
        let params = Params::upload(backend, weights)?;
        let grads = Grads::zeros(backend, task.specs())?;
        let (recorded, ahead) = (None, Ahead::new(backend)?);
        Ok(Self { backend, task, params, record, plan, optimizer, grads, recorded, ahead })
    }

    /// What [`resume`](Self::resume) takes, with the notes that `notes` makes of the record. Refuses weights and moments
    /// that are not finite: nothing can be continued with them.
    pub fn checkpoint(
        &mut self,
        notes: impl FnOnce(&Record) -> Result<String>,
    ) -> Result<Checkpoint> {
        self.catch_up()?;
        let notes = notes(&self.record)?;
        let weights = self.params.download(self.backend)?;
        let optimizer = self.optimizer.state(self.backend)?;
        let checkpoint = Checkpoint { weights, optimizer, notes };
        check_all_finite(self.task.specs(), &checkpoint)?;
        Ok(checkpoint)
    }

    /// Takes steps until they were waited for, so that nothing of this run takes time after it.
    pub fn turn(&mut self) -> Result<()> {
        self.step()?;
        while self.ahead.steps > 0 {
            if self.finished() || self.evaluation_due() {
                return self.catch_up();
            }
            self.step()?;
        }
        Ok(())
    }

    /// Submits one step, and from time to time waits for those that were submitted.
    pub fn step(&mut self) -> Result<()> {
        let step = self.steps_taken();
        if self.ahead.steps == 0 {
            self.ahead.since = Instant::now();
        }
        let Self { backend, task, params, optimizer, grads, recorded, .. } = self;
        task.load(backend, step)?;
        optimizer.advance(*backend, self.plan.schedule.rate(step))?;
        let number = task.first_step() + step;
        let mut work = || {
            task.gradients(backend, params, number, grads)?;
            optimizer.apply(*backend, task.specs(), params, grads)
        };
        match T::REPEATS {
            true => backend.repeat(recorded, number, work)?,
            false => work()?,
        }
        self.ahead.push(self.backend, self.task.loss())?;
        if self.ahead.is_far() { self.catch_up() } else { Ok(()) }
    }

    /// Waits for all steps that were submitted, and records their losses. Nothing to do is no error.
    pub fn catch_up(&mut self) -> Result<()> {
        let steps = std::mem::take(&mut self.ahead.steps);
        if steps == 0 {
            return Ok(());
        }
        let losses = self.backend.read(&self.ahead.losses)?;
        let ms = self.ahead.since.elapsed().as_secs_f32() * 1e3 / steps as f32;
        for &loss in &losses[..steps] {
            let step = self.record.steps();
            ensure!(
                loss.is_finite(),
                "the loss of step {step} is {loss}: the training has diverged"
            );
            self.record.step_losses.push(loss);
            self.record.step_ms.push(ms);
        }
        Ok(())
    }

    /// Steps that were submitted.
    pub fn steps_taken(&self) -> u64 {
        self.record.steps() + self.ahead.steps as u64
    }

    /// Whether an evaluation belongs here and has not been made.
    pub fn evaluation_due(&self) -> bool {
        let step = self.steps_taken();
        let last = self.record.evaluations.last().map(|last| last.step);
        (step.is_multiple_of(self.plan.eval_interval) || self.finished()) && last != Some(step)
    }

    /// The scores of the weights as they are.
    pub fn evaluate(&mut self) -> Result<Evaluation> {
        self.catch_up()?;
        let scores = self.task.evaluate(self.backend, &self.params)?;
        let evaluation = Evaluation { step: self.record.steps(), scores };
        evaluation.check()?;
        self.record.evaluations.push(evaluation);
        Ok(evaluation)
    }

    /// Whether all steps are taken.
    pub fn finished(&self) -> bool {
        self.steps_taken() >= self.plan.schedule.steps
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.plan.schedule.steps
    }
}

/// Refuses weights and moments that are not all finite.
fn check_all_finite(specs: &Specs, checkpoint: &Checkpoint) -> Result<()> {
    let Checkpoint { weights, optimizer: OptimizerState { m, v, steps }, .. } = checkpoint;
    check_finite(specs, "weight", *steps, weights)?;
    check_finite(specs, "mean gradient", *steps, m)?;
    check_finite(specs, "mean squared gradient", *steps, v)
}

/// Refuses values, one list for each tensor, that are not all finite.
fn check_finite(specs: &Specs, what: &str, steps: u64, values: &[Vec<f32>]) -> Result<()> {
    for (spec, values) in specs.iter().zip(values) {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            let name = &spec.parts[0].name;
            bail!("a {what} of {name} after {steps} steps is {value}: the training has diverged");
        }
    }
    Ok(())
}
