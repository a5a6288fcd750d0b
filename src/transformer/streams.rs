//! Which stream of random numbers each application of dropout takes.

use crate::error::Error;
use crate::mask::{Key, Probability, RowMap, Shard};
use crate::ops::{Dropout, Mode};

/// A place in a layer where a model drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// After the sum of the embeddings (layer 0).
    Embedding = 0,
    /// Attention probabilities, after the softmax.
    Attention = 1,
    /// After attention's output projection, before the residual add.
    AttentionOutput = 2,
    /// After the second projection of the feed-forward part, before the residual add.
    MlpOutput = 3,
    /// After BERT's pooler, before the classification head (the layer behind the last block).
    Pooler = 4,
    /// GPT's sequence summary, before its projection (the layer behind the last block).
    Summary = 5,
}

/// Bits of a stream number below the step: layer and site.
pub const STEP_SHIFT: u32 = 20;

/// Layers that stream numbers tell apart: 0 is the embedding, l + 1 is block l, the next one is the head.
pub const MAX_LAYERS: usize = 1 << 16;

/// Training steps that stream numbers tell apart.
pub const MAX_STEPS: u64 = 1 << 44;

/// The stream of `site` in `layer` at `step`: `step · 2^20 + layer · 2^4 + site`.
///
/// It depends on nothing else, neither on the number of layers nor on what ran before: a layer that is
/// computed again draws its mask again.
///
/// # Errors
/// [`Error::Argument`] where there is no such step or layer: their streams would be those of others.
pub fn stream(step: u64, layer: usize, site: Site) -> Result<u64, Error> {
    check_step(step)?;
    if layer >= MAX_LAYERS {
        return Err(Error::argument("streams", "layer", format!("below {MAX_LAYERS}"), layer));
    }
    Ok((step << STEP_SHIFT) | ((layer as u64) << 4) | site as u64)
}

/// Refuses a step that has no streams.
pub(crate) fn check_step(step: u64) -> Result<(), Error> {
    if step < MAX_STEPS {
        return Ok(());
    }
    Err(Error::argument("streams", "step", format!("a step below {MAX_STEPS}"), step))
}

/// How the drop probabilities of a model's sites change from step to step: each is `share · p`, p being the
/// configuration's, rounded to a multiple of 1/65536.
///
/// It follows from the number of the step alone: a resumed run goes on with it, and one captured graph serves all steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DropoutSchedule {
    /// The same at every step.
    #[default]
    Constant,
    /// Dropout below this step, none from it on: early dropout (Liu et al., ICML 2023), which is against underfitting.
    Until(u64),
    /// The same, but falling to 0 in a straight line.
    FallingUntil(u64),
    /// No dropout below this step: late dropout (Liu et al.), which is against overfitting.
    From(u64),
}

impl DropoutSchedule {
    /// The drop probability at `step` of a site that the configuration gives `p`.
    pub fn at(self, step: u64, p: Probability) -> Probability {
        match self {
            Self::Until(end) | Self::FallingUntil(end) if step >= end => Probability::ZERO,
            Self::From(start) if step < start => Probability::ZERO,
            Self::Constant | Self::Until(_) | Self::From(_) => p,
            Self::FallingUntil(end) => {
                let share = (end - step) as f64 / end as f64;
                Probability::new(p.effective() * share).expect("between 0 and p")
            }
        }
    }
}

/// What a pass through a model is for.
///
/// Equal (seed, step) draw equal masks: give each rank a seed of its own, or the sequences of the whole batch that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pass {
    /// Training step `step` of the run with this seed: dropout acts.
    Train {
        /// The run's seed.
        seed: u64,
        /// The number of the step, below [`MAX_STEPS`].
        step: u64,
        /// The first of the step's sequences that this pass has: 0, but for micro-batches and ranks. They draw the masks
        /// that one pass over all of the step's sequences would.
        first_sequence: u64,
        /// What the step makes of the drop probabilities.
        schedule: DropoutSchedule,
    },
    /// Nothing is dropped.
    Evaluate,
}

impl Pass {
    /// Training step `step` of the run with this seed, over all sequences of the step.
    pub const fn train(seed: u64, step: u64) -> Self {
        Self::Train { seed, step, first_sequence: 0, schedule: DropoutSchedule::Constant }
    }

    /// The same with drop probabilities that follow `schedule`.
    pub fn scheduled(self, schedule: DropoutSchedule) -> Self {
        match self {
            Self::Train { seed, step, first_sequence, .. } => {
                Self::Train { seed, step, first_sequence, schedule }
            }
            Self::Evaluate => Self::Evaluate,
        }
    }

    /// The same over a micro-batch, or the share of a rank, that begins with this sequence of the step.
    pub fn from_sequence(self, first_sequence: usize) -> Self {
        match self {
            Self::Train { seed, step, schedule, .. } => {
                Self::Train { seed, step, first_sequence: first_sequence as u64, schedule }
            }
            Self::Evaluate => Self::Evaluate,
        }
    }

    /// What is dropped at `site` of `layer`, where a sequence is `rows` rows.
    pub fn at(self, layer: usize, site: Site, rows: usize, p: Probability) -> Drops {
        Drops::At { pass: self, layer, site, rows, p }
    }
}

/// What an operator of a model drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Drops {
    /// Nothing: the operator has no site.
    Nothing,
    /// Everything: a branch that is not there.
    Everything,
    /// What the pass draws at a site.
    At {
        /// The pass.
        pass: Pass,
        /// 0: the embedding; l + 1: block l; behind them the head.
        layer: usize,
        /// Where in the layer.
        site: Site,
        /// Rows of a sequence.
        rows: usize,
        /// The probability of dropping, before the pass's schedule.
        p: Probability,
    },
}

impl Drops {
    /// The application of dropout.
    ///
    /// # Errors
    /// As [`stream`]; [`Error::Argument`] where the sequences before have more rows than a mask.
    pub fn dropout(self) -> Result<Dropout<'static>, Error> {
        match self {
            Drops::Nothing => {
                Ok(Dropout::new(Key::new(0, 0), Probability::ZERO).mode(Mode::Inference))
            }
            Drops::Everything => Ok(Dropout::new(Key::new(0, 0), Probability::ONE)),
            Drops::At { pass: Pass::Evaluate, p, .. } => {
                Ok(Dropout::new(Key::new(0, 0), p).mode(Mode::Inference))
            }
            Drops::At {
                pass: Pass::Train { seed, step, schedule, .. }, layer, site, p, ..
            } => {
                let key = Key::new(seed, stream(step, layer, site)?);
                Ok(Dropout::new(key, schedule.at(step, p)).shard(self.shard()?))
            }
        }
    }

    /// Where the rows lie in those of the whole step.
    fn shard(self) -> Result<Shard<'static>, Error> {
        let Drops::At { pass: Pass::Train { first_sequence, .. }, rows, .. } = self else {
            return Ok(Shard::WHOLE);
        };
        let first = first_sequence.checked_mul(rows as u64);
        let first = first.and_then(|first| u32::try_from(first).ok()).ok_or_else(|| {
            let expected = "sequences whose rows are below 2^32";
            Error::argument("streams", "first_sequence", expected, first_sequence)
        })?;
        Ok(Shard { first_col: 0, rows: RowMap::Contiguous { first } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn schedules_of_dropout() {
        let p = Probability::new(0.25).unwrap();
        let at = |schedule: DropoutSchedule| {
            [0, 1, 3, 4, MAX_STEPS].map(|step| schedule.at(step, p).effective())
        };
        assert_eq!(at(DropoutSchedule::Constant), [0.25; 5]);
        assert_eq!(at(DropoutSchedule::Until(4)), [0.25, 0.25, 0.25, 0.0, 0.0]);
        assert_eq!(at(DropoutSchedule::FallingUntil(4)), [0.25, 0.1875, 0.0625, 0.0, 0.0]);
        assert_eq!(at(DropoutSchedule::From(3)), [0.0, 0.0, 0.25, 0.25, 0.25]);
        for none in [DropoutSchedule::Until(0), DropoutSchedule::FallingUntil(0)] {
            assert_eq!(at(none), [0.0; 5]);
        }
        assert_eq!(
            DropoutSchedule::FallingUntil(u64::MAX).at(0, Probability::ONE),
            Probability::ONE
        );
    }

    #[test]
    fn every_step_layer_and_site_has_a_stream_of_its_own() {
        let sites = [
            Site::Embedding,
            Site::Attention,
            Site::AttentionOutput,
            Site::MlpOutput,
            Site::Pooler,
            Site::Summary,
        ];
        let mut seen = HashSet::new();
        for step in [0, 1, 2, MAX_STEPS - 1] {
            for layer in (0..40).chain([MAX_LAYERS - 1]) {
                for site in sites {
                    assert!(seen.insert(stream(step, layer, site).unwrap()));
                }
            }
        }
        assert_eq!(stream(3, 2, Site::MlpOutput).unwrap(), (3 << 20) + 35);
        let drops = |pass: Pass| pass.at(0, Site::Embedding, 1 << 20, Probability::ZERO).dropout();
        assert!(drops(Pass::train(1, MAX_STEPS)).is_err());
        assert!(drops(Pass::train(1, 0).from_sequence(1 << 12)).is_err());
        assert!(drops(Pass::train(1, 0).from_sequence(1 << 11)).is_ok());
        assert!(stream(0, MAX_LAYERS, Site::Embedding).is_err());
    }
}
