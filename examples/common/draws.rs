//! Random numbers for everything but dropout, as functions of (seed, step): a run that is resumed draws what it would
//! have drawn, and no state is kept.

use fused_dropout::transformer::streams::STEP_SHIFT;
use rand_philox::Philox;

/// The low bits of a step's stream number that name a site. No site of a model has this number, so these streams are
/// none of dropout's (`transformer::streams`).
const NO_SITE: u64 = 15;

/// The numbers for `purpose`, a number below 2^16 of the program's own, at `step`.
pub fn draws(seed: u64, step: u64, purpose: u64) -> Philox {
    let stream = (step << STEP_SHIFT) | (purpose << 4) | NO_SITE;
    Philox::from_u64_seed_stream(seed, stream)
}
