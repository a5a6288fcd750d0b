//! AdamW with decoupled weight decay, gradient clipping, and the usual schedule of the learning rate.

use super::backend::{ADAMW_NUMBERS, Backend, F32, Weight};
use super::params::{Grads, Params, Specs, download, upload, zeros};
use crate::error::Error;

/// The optimiser's name in errors.
const NAME: &str = "adamw";

/// Settings of AdamW (Loshchilov and Hutter, ICLR 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the mean gradient.
    pub beta1: f32,
    /// Decay of the mean square.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Decoupled decay of matrices and tables.
    pub weight_decay: f32,
    /// Gradients longer than this are scaled down to it.
    pub max_norm: f32,
}

impl Default for AdamW {
    /// nanoGPT's for small models.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1, max_norm: 1.0 }
    }
}

impl AdamW {
    /// Refuses what makes no step: decays outside of 0 <= beta < 1, and what is negative or not finite. `max_norm` may be
    /// infinite: nothing is clipped.
    fn check(&self) -> Result<(), Error> {
        let Self { beta1, beta2, epsilon, weight_decay, max_norm } = *self;
        for (name, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::argument(NAME, name, "0 <= beta < 1", beta));
            }
        }
        for (name, value) in [("epsilon", epsilon), ("weight_decay", weight_decay)] {
            if !(0.0..=f32::MAX).contains(&value) {
                return Err(Error::argument(NAME, name, "a finite number, at least 0", value));
            }
        }
        if max_norm > 0.0 {
            return Ok(());
        }
        Err(Error::argument(NAME, "max_norm", "a number above 0", max_norm))
    }
}

/// A learning rate that rises linearly and falls as a cosine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f32,
    /// The rate at the end.
    pub floor: f32,
    /// Steps of the rise.
    pub warmup: u64,
    /// Steps of rise and fall; the rate stays at the floor after them.
    pub steps: u64,
}

impl Schedule {
    /// The rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f32 {
        if step < self.warmup {
            return self.peak * (step as f32 + 1.0) / (self.warmup as f32 + 1.0);
        }
        if step >= self.steps {
            return self.floor;
        }
        let done = (step - self.warmup) as f64 / (self.steps - self.warmup) as f64;
        let share = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.floor + share as f32 * (self.peak - self.floor)
    }
}

/// What AdamW keeps of every weight.
pub struct Optimizer<B: Backend> {
    settings: AdamW,
    /// Elements of each tensor.
    lens: Vec<usize>,
    steps: u64,
    m: Vec<F32<B>>,
    v: Vec<F32<B>>,
    numbers: F32<B>,
    norm: F32<B>,
}

/// The contents of an [`Optimizer`], for a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// Steps taken.
    pub steps: u64,
    /// Mean gradients, in the order of the tensors.
    pub m: Vec<Vec<f32>>,
    /// Mean squares.
    pub v: Vec<Vec<f32>>,
}

impl<B: Backend> Optimizer<B> {
    /// Before the first step.
    ///
    /// # Errors
    /// [`Error::Argument`] where a setting is out of its range; what the backend says.
    pub fn new(backend: &B, specs: &Specs, settings: AdamW) -> Result<Self, Error> {
        settings.check()?;
        Ok(Self {
            settings,
            lens: specs.iter().map(|spec| spec.elements()).collect(),
            steps: 0,
            m: zeros(backend, specs)?,
            v: zeros(backend, specs)?,
            numbers: backend.zeros(ADAMW_NUMBERS)?,
            norm: backend.zeros(2)?,
        })
    }

    /// Where a checkpoint left off.
    ///
    /// # Errors
    /// [`Error::Argument`] where the state is not that of these tensors; what the backend says.
    pub fn restore(
        backend: &B,
        specs: &Specs,
        settings: AdamW,
        state: &OptimizerState,
    ) -> Result<Self, Error> {
        let lens = |values: &[Vec<f32>]| values.iter().map(Vec::len).collect::<Vec<_>>();
        for values in [&state.m, &state.v] {
            specs.check(NAME, "state", &lens(values))?;
        }
        Ok(Self {
            lens: lens(&state.m),
            steps: state.steps,
            m: upload(backend, &state.m)?,
            v: upload(backend, &state.v)?,
            ..Self::new(backend, &Specs::default(), settings)?
        })
    }

    /// What [`restore`](Self::restore) takes.
    ///
    /// # Errors
    /// What the backend says.
    pub fn state(&self, backend: &B) -> Result<OptimizerState, Error> {
        let (m, v) = (download(backend, &self.m)?, download(backend, &self.v)?);
        Ok(OptimizerState { steps: self.steps, m, v })
    }

    /// Writes the numbers of the next step: the only part of [`step`](Self::step) that a captured graph leaves to the host.
    ///
    /// # Errors
    /// [`Error::Argument`] where the rate is not finite or no step is left; what the backend says.
    pub fn advance(&mut self, backend: &B, rate: f32) -> Result<(), Error> {
        if !rate.is_finite() {
            return Err(Error::argument(NAME, "rate", "a finite number", rate));
        }
        let Some(steps) = self.steps.checked_add(1) else {
            return Err(Error::argument(NAME, "steps", "fewer than 2^64 steps", self.steps));
        };
        self.steps = steps;
        let AdamW { beta1, beta2, epsilon, .. } = self.settings;
        let correction = |beta: f32| {
            let power = f64::from(beta).powi(self.steps.min(i32::MAX as u64) as i32);
            (1.0 / (1.0 - power)) as f32
        };
        let numbers = [rate, beta1, beta2, epsilon, correction(beta1), correction(beta2)];
        backend.write(&mut self.numbers, &numbers)
    }

    /// Clips the gradients and moves every weight, with the numbers of [`advance`](Self::advance).
    ///
    /// # Errors
    /// [`Error::Argument`] where `params`, `grads` or the optimiser are those of another model; what the backend says.
    pub fn apply(
        &mut self,
        backend: &B,
        specs: &Specs,
        params: &mut Params<B>,
        grads: &Grads<B>,
    ) -> Result<(), Error> {
        for (argument, lens) in
            [("self", &self.lens[..]), ("params", params.lens()), ("grads", grads.lens())]
        {
            specs.check(NAME, argument, lens)?;
        }
        backend.gradient_norm(&grads.buffers, self.settings.max_norm, &mut self.norm)?;
        let decay = self.settings.weight_decay;
        let mut masters = params.masters.iter_mut().flatten();
        let moments = self.m.iter_mut().zip(&mut self.v);
        let weights = params.weights.iter_mut().zip(&grads.buffers).zip(moments).zip(specs.iter());
        let weights = weights.map(|(((weight, grad), (m, v)), spec)| {
            let decay = if spec.decays() { decay } else { 0.0 };
            Weight { weight, master: masters.next(), grad, m, v, decay }
        });
        backend.adamw(&self.numbers, &self.norm, weights.collect())
    }

    /// [`advance`](Self::advance) and [`apply`](Self::apply).
    ///
    /// # Errors
    /// As both.
    pub fn step(
        &mut self,
        backend: &B,
        specs: &Specs,
        params: &mut Params<B>,
        grads: &Grads<B>,
        rate: f32,
    ) -> Result<(), Error> {
        self.advance(backend, rate)?;
        self.apply(backend, specs, params, grads)
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The length of the last step's gradient, before it was clipped. Waits for the backend.
    ///
    /// # Errors
    /// What the backend says.
    pub fn gradient_norm(&self, backend: &B) -> Result<f32, Error> {
        Ok(backend.read(&self.norm)?[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_falls_and_stays() {
        let schedule = Schedule { peak: 1.0, floor: 0.1, warmup: 3, steps: 13 };
        let rates: Vec<f32> = (0..20).map(|step| schedule.rate(step)).collect();
        assert_eq!(rates[..3], [0.25, 0.5, 0.75]);
        assert_eq!(rates[3], 1.0);
        assert!(rates[3..13].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[8] - 0.55).abs() < 1e-6, "half way down: {}", rates[8]);
        assert!(rates[13..].iter().all(|&rate| rate == 0.1));
        let endless = Schedule { warmup: u64::MAX, steps: 0, ..schedule };
        assert!(endless.rate(0) > 0.0 && endless.rate(u64::MAX - 1) <= 1.0);
        assert_eq!(endless.rate(u64::MAX), 0.1);
    }
}
