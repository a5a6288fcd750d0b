//! Which stream of random numbers each application of dropout takes.

use crate::error::Error;
use crate::mask::{Key, Probability};
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
    if step >= MAX_STEPS {
        return Err(Error::argument("streams", "step", format!("a step below {MAX_STEPS}"), step));
    }
    if layer >= MAX_LAYERS {
        return Err(Error::argument("streams", "layer", format!("below {MAX_LAYERS}"), layer));
    }
    Ok((step << STEP_SHIFT) | ((layer as u64) << 4) | site as u64)
}

/// What a pass through a model is for. Every rank and every micro-batch with the same (seed, step) draws the same masks:
/// give each of them a seed of its own.
///
/// A model does not know which rows of the global batch it has: for the contract they are 0, 1, .. on every rank. The
/// operators do know, where a [`Place`](crate::Place) says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Training step `step` of the run with this seed: dropout acts.
    Train {
        /// The run's seed.
        seed: u64,
        /// The number of the step, below [`MAX_STEPS`].
        step: u64,
    },
    /// Nothing is dropped.
    Evaluate,
}

impl Pass {
    /// The application of dropout at `site` of `layer`.
    ///
    /// # Errors
    /// As [`stream`].
    pub fn dropout(
        self,
        layer: usize,
        site: Site,
        p: Probability,
    ) -> Result<Dropout<'static>, Error> {
        Ok(match self {
            Pass::Train { seed, step } => {
                Dropout::new(Key::new(seed, stream(step, layer, site)?), p)
            }
            Pass::Evaluate => Dropout::new(Key::new(0, 0), p).mode(Mode::Inference),
        })
    }
}

/// Every value is kept as it is: for an operator without a site.
pub(crate) fn kept() -> Dropout<'static> {
    Dropout::new(Key::new(0, 0), Probability::ZERO).mode(Mode::Inference)
}

/// Everything is dropped: a branch that is not there.
pub(crate) fn dropped() -> Dropout<'static> {
    Dropout::new(Key::new(0, 0), Probability::ONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

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
        let pass = Pass::Train { seed: 1, step: MAX_STEPS };
        assert!(pass.dropout(0, Site::Embedding, Probability::ZERO).is_err());
        assert!(stream(0, MAX_LAYERS, Site::Embedding).is_err());
    }
}
