//! `softmax_dropout`: y = D(softmax(scale * x + mask)) along the keys, attention's probabilities.
//!
//! With z = scale * x + mask over the visible keys of a row, m = max z, S = sum exp(z - m):
//!
//! - forward: y = D(exp(z - m) / S), and the row's statistics (m, 1 / S);
//! - backward: with P = exp(z - m) / S and g = D(dy): dx = scale * P * (g - sum P g).
//!
//! z is rounded once, to f32; both passes have the same z. A masked key has y = +0 and dx = +0, whatever its dy; so
//! has a key whose P is 0 in f32. A row without a visible key, or whose z are all -infinity, gives zeros, the
//! statistics (-infinity, 0) and a zero gradient. A NaN or +infinity among a row's z makes all kept elements of
//! that row NaN, as the mathematics has it, also those of keys that an additive mask hides; keys beyond the row's length
//! or the causal limit stay +0.
//!
//! # The statistics of a row
//! Two f32 a row, `[rows, 2]`: the largest z, m, and 1 / S. The backward pass takes the same P from them as the forward
//! pass had, without two of its reductions. Their log-sum-exp is m + ln S = m - ln(1 / S); it is not what is saved,
//! since rounded to f32 it loses ln S where |m| is large: a row of n keys that a mask of -1e9 covers has P = 1 / n.
//! Two parts of a row merge as m = max(m1, m2), S = S1 exp(m1 - m) + S2 exp(m2 - m).
//!
//! x, y, dy and dx may be [`Strided`](crate::Strided): rows of keys that are padded. The additive mask is contiguous.

use super::{Check, Shape};
use crate::error::Error;
use crate::tensor::{In, Memory, Out, Source};

/// The operator's name in errors.
pub(crate) const NAME: &str = "softmax_dropout";

/// Numbers that a row's statistics are: its largest z, and the reciprocal of the sum of exp(z - largest).
pub const STATISTICS: usize = 2;

/// The shape of the scores, `[batch, heads, queries, keys]`, and the factor before the softmax.
///
/// For the contract, row (b * heads + h) * queries + q is the local row, and the key is the column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Batch entries.
    pub batch: usize,
    /// Attention heads.
    pub heads: usize,
    /// Queries a head.
    pub queries: usize,
    /// Keys a query: the columns of a row.
    pub keys: usize,
    /// What x is multiplied by, usually `1 / sqrt(head width)`. Finite.
    pub scale: f32,
}

/// Which keys a query sees. All parts that are given apply together.
///
/// `L` and `A` are how the two tensors are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionMask<L, A> {
    /// Causal: query q sees keys k <= q + offset. 0 for a square; `keys - queries` where the queries
    /// are the last ones (a cache of earlier keys); negative offsets blind the first queries.
    pub causal: Option<i64>,
    /// Valid keys of each row, `[batch * heads * queries]`: row r sees keys `k < lengths[r]`.
    pub lengths: Option<L>,
    /// Added to scale * x: `[batch, queries, keys]`, the same for all heads. -infinity masks.
    pub additive: Option<A>,
}

impl<L, A> AttentionMask<L, A> {
    /// Every query sees every key.
    pub const NONE: Self = Self { causal: None, lengths: None, additive: None };

    /// Query q sees keys k <= q + offset.
    pub fn causal(offset: i64) -> Self {
        Self { causal: Some(offset), ..Self::NONE }
    }
}

impl<L, A> Default for AttentionMask<L, A> {
    fn default() -> Self {
        Self::NONE
    }
}

impl Scores {
    /// Rows and columns, or an error where the sizes do not fit.
    pub(crate) fn shape(&self) -> Result<Shape, Error> {
        let rows = self.batch.checked_mul(self.heads).and_then(|n| n.checked_mul(self.queries));
        let shape = Shape::new(rows.unwrap_or(usize::MAX), self.keys);
        if rows.is_none() {
            let given = format!("{} x {} x {}", self.batch, self.heads, self.queries);
            return Err(Error::argument(NAME, "scores", "rows that fit in memory", given));
        }
        shape.elements(NAME)?;
        Ok(shape)
    }

    /// The batch entry and the query of a local row.
    pub(crate) fn batch_and_query(&self, row: usize) -> (usize, usize) {
        (row / self.queries / self.heads, row % self.queries)
    }
}

/// How many keys, from the first, a row of query `query` can see: the causal limit and the row's
/// length together.
pub(crate) fn visible(
    keys: usize,
    causal: Option<i64>,
    query: usize,
    length: Option<u32>,
) -> usize {
    let limit = match causal {
        // Saturating: an offset may be any i64. A negative count is none.
        Some(offset) => (query as i64).saturating_add(offset).saturating_add(1).max(0) as usize,
        None => keys,
    };
    let length = length.map_or(keys, |length| length as usize);
    keys.min(limit).min(length)
}

/// The mask of a pass.
pub type Mask<'a, T, M> = AttentionMask<In<'a, u32, M>, In<'a, T, M>>;

/// y = D(softmax(scale · x + mask)) along the keys.
///
/// Each probability is within the bound that CONTRACT.md states of the exact one; a dropped or masked one is +0. A row
/// that sees no key is zeros, its statistics (-infinity, 0).
pub struct Forward<'a, T, M: Memory> {
    /// The shape of the scores, and their factor.
    pub scores: Scores,
    /// Which keys a query sees: lengths `[batch, heads, queries]`, additive mask `[batch, queries, keys]`.
    pub mask: Mask<'a, T, M>,
    /// `[batch, heads, queries, keys]`. The backward pass needs it: compute in place only where a copy is kept.
    pub x: Source<In<'a, T, M>>,
    /// `[batch, heads, queries, keys]`.
    pub y: Out<'a, T, M>,
    /// For the backward pass, `[batch, heads, queries, 2]`: a row's largest z and the reciprocal of its sum.
    pub statistics: Option<Out<'a, f32, M>>,
}

/// dx = scale · P · (g - Σ P g) with g = D(dy) and P = softmax(scale · x + mask), which is computed again.
pub struct Backward<'a, T, M: Memory> {
    /// As in the forward pass.
    pub scores: Scores,
    /// As in the forward pass.
    pub mask: Mask<'a, T, M>,
    /// The forward pass's, `[batch, heads, queries, keys]`.
    pub x: In<'a, T, M>,
    /// The forward pass's, `[batch, heads, queries, 2]`; without it two reductions are done again.
    pub statistics: Option<In<'a, f32, M>>,
    /// `[batch, heads, queries, keys]`.
    pub dy: Source<In<'a, T, M>>,
    /// `[batch, heads, queries, keys]`.
    pub dx: Out<'a, T, M>,
}

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = checked(&self.scores)?;
        check.source("x", &self.x)?;
        check.matrix("y", &*self.y)?;
        if let Some(statistics) = &self.statistics {
            check.len("statistics", STATISTICS * self.scores.shape()?.rows, &**statistics)?;
        }
        check_mask(&check, &self.scores, &self.mask)?;
        self.scores.shape()
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = checked(&self.scores)?;
        check.matrix("x", self.x)?;
        check.source("dy", &self.dy)?;
        check.matrix("dx", &*self.dx)?;
        if let Some(statistics) = self.statistics {
            check.len("statistics", STATISTICS * self.scores.shape()?.rows, statistics)?;
        }
        check_mask(&check, &self.scores, &self.mask)?;
        self.scores.shape()
    }
}

fn checked(scores: &Scores) -> Result<Check, Error> {
    let check = Check::new(NAME, scores.shape()?)?;
    if scores.scale.is_finite() {
        return Ok(check);
    }
    Err(Error::argument(NAME, "scale", "a finite factor", scores.scale))
}

fn check_mask<T, M: Memory>(
    check: &Check,
    scores: &Scores,
    mask: &Mask<'_, T, M>,
) -> Result<(), Error> {
    if let Some(lengths) = mask.lengths {
        check.len("lengths", scores.shape()?.rows, lengths)?;
    }
    // At most the scores' elements, unless there are no heads: saturate, and let the comparison refuse.
    let plane = scores.queries.saturating_mul(scores.keys);
    let elements = scores.batch.saturating_mul(plane);
    mask.additive.map_or(Ok(()), |additive| check.len("additive", elements, additive))
}
