//! Random numbers for everything but dropout, as functions of (seed, step): a run that is resumed draws what it would
//! have drawn, and no state is kept.

use fused_dropout::transformer::streams::STEP_SHIFT;
use rand_philox::Philox;

/// What numbers are drawn for.
#[derive(Clone, Copy)]
pub enum Purpose {
    /// Which sequences a step trains on.
    Batch = 0,
    /// Which words a masked language model has to guess.
    Words = 1,
    /// A text that the model writes.
    Sample = 2,
    /// Which texts are held out.
    Split = 3,
}

/// The low bits of a step's stream number that name a site. No site of a model has this number, so these streams are
/// none of dropout's (`transformer::streams`).
const NO_SITE: u64 = 15;

/// The numbers for `purpose` at `step`.
pub fn draws(seed: u64, step: u64, purpose: Purpose) -> Philox {
    let stream = (step << STEP_SHIFT) | ((purpose as u64) << 4) | NO_SITE;
    Philox::from_u64_seed_stream(seed, stream)
}

/// The numbers below `count` in a random order (Fisher and Yates).
pub fn shuffled(count: usize, mut philox: Philox) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, philox.bounded(last as u32 + 1) as usize);
    }
    order
}
