//! The oracle: one element at a time, written from CONTRACT.md on top of `rand_philox`, sharing no code
//! with the crate but its argument types. Exact where the contract is exact, f64 with a bound where
//! it is not.
#![allow(dead_code)] // every test file uses a part

mod bias_act_dropout;
mod dropout;
mod dropout_add;
mod dropout_add_norm;
mod embedding_dropout;
mod norm;
mod softmax_dropout;
mod swiglu_dropout;

pub use bias_act_dropout::{bias_act_dropout, bias_act_dropout_backward};
pub use dropout::dropout;
pub use dropout_add::{dbias, dropout_add};
pub use dropout_add_norm::{dropout_add_norm_backward, normalised};
pub use embedding_dropout::{
    embedding_dropout, embedding_gradient, embedding_norm, embedding_norm_backward,
};
pub use norm::Affine;
pub use softmax_dropout::{AttentionMask, softmax_dropout, softmax_dropout_backward};
pub use swiglu_dropout::{swiglu_dropout, swiglu_dropout_backward};

use fused_dropout::{Dropout, Dtype, DtypeId, Mode, RowMap, Scaling, Shape};
use rand_philox::Philox;

/// The logical row of a local row.
pub fn logical(map: &RowMap<'_>, r: u64) -> u64 {
    match *map {
        RowMap::Contiguous { first } => u64::from(first) + r,
        RowMap::Blocks { first, block, stride } => {
            let block = u64::from(block);
            u64::from(first) + r / block * u64::from(stride) + r % block
        }
        RowMap::Attention { first, heads, queries, head_stride, batch_stride } => {
            let (heads, queries) = (u64::from(heads), u64::from(queries));
            let (b, h, q) = (r / (heads * queries), r / queries % heads, r % queries);
            u64::from(first) + b * u64::from(batch_stride) + h * u64::from(head_stride) + q
        }
        RowMap::Explicit(list) => u64::from(list[r as usize]),
        ref other => unreachable!("{other:?} has no formula here"),
    }
}

/// round_half_even(p * 65536) of the probability that was realised, from what the crate gives back.
fn threshold(dropout: &Dropout<'_>) -> u32 {
    (dropout.p.effective() * 65536.0) as u32
}

/// What a kept value is multiplied by, and the threshold that really acts.
pub fn scale_and_threshold(dropout: &Dropout<'_>) -> (f32, u32) {
    let t = threshold(dropout);
    let keep = f64::from(65536 - t) / 65536.0;
    match (dropout.mode, dropout.scaling) {
        (Mode::Training, Scaling::Inverted) if t == 65536 => (0.0, t),
        (Mode::Training, Scaling::Inverted) => ((1.0 / keep) as f32, t),
        (Mode::Training, Scaling::Classic) => (1.0, t),
        (Mode::Inference, Scaling::Inverted) => (1.0, 0),
        (Mode::Inference, Scaling::Classic) if t == 65536 => (0.0, t),
        (Mode::Inference, Scaling::Classic) => (keep as f32, 0),
    }
}

/// The mask: true for kept, row by row.
pub fn keep_mask(dropout: &Dropout<'_>, shape: Shape) -> Vec<bool> {
    let (_, threshold) = scale_and_threshold(dropout);
    let mut keep = Vec::with_capacity(shape.rows * shape.cols);
    let mut philox = Philox::from_u64_seed_stream(dropout.key.seed, dropout.key.stream);
    for r in 0..shape.rows {
        let row = logical(&dropout.shard.rows, r as u64) / u64::from(dropout.groups.rows);
        let mut drawn = (u64::MAX, [0u32; 4]);
        for c in 0..shape.cols {
            let col = match dropout.groups.columns_together {
                true => 0,
                false => dropout.shard.first_col + c as u64,
            };
            if drawn.0 != col / 8 {
                let counter = (u128::from(dropout.key.stream) << 64)
                    | (u128::from(row) << 32)
                    | u128::from(col / 8);
                philox.seek(counter);
                drawn = (col / 8, std::array::from_fn(|_| philox.next_u32()));
            }
            let j = (col % 8) as usize;
            let lane = (drawn.1[j / 2] >> (16 * (j % 2))) & 0xffff;
            keep.push(lane >= threshold);
        }
    }
    keep
}

/// A sum over rows: the tree of 16, 4, and then 64 terms, as its definition reads.
fn tree(mut sums: Vec<f32>) -> f32 {
    // At least one level: 16 terms from +0.
    for radix in [16, 4].into_iter().chain(std::iter::repeat(64)) {
        let add = |group: &[f32]| group.iter().fold(0.0f32, |sum, term| sum + term);
        sums = sums.chunks(radix).map(add).collect();
        if sums.len() <= 1 {
            break;
        }
    }
    sums.first().copied().unwrap_or(0.0)
}

/// A value and how far an implementation may be from it.
#[derive(Clone, Copy, Debug)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

impl Bounded {
    /// NaN or an infinity: an infinity times what may be 0 or of either sign.
    pub const NOT_FINITE: Self = Self { value: f64::NAN, error: f64::INFINITY };

    /// Whatever comes out, where an implementation may or may not lose a value to an infinity.
    pub const UNSPECIFIED: Self = Self { value: f64::NAN, error: f64::NAN };

    /// Whether `given` is the value within its bound; NaN and infinities must be themselves.
    pub fn admits(self, given: f64) -> bool {
        if self.error.is_nan() {
            return true;
        }
        if self.value.is_nan() {
            return given.is_nan() || self.error == f64::INFINITY && given.is_infinite();
        }
        if self.value.is_infinite() {
            return given == self.value;
        }
        given == self.value || (given - self.value).abs() <= self.error
    }
}

/// What a product that is subnormal in f32 may lack.
const SUBNORMAL: f64 = 2.802_596_928_649_634e-45;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// Half a unit in the last place of T, relative, and absolute for subnormal results.
fn rounding<T: Dtype>() -> (f64, f64) {
    match T::ID {
        DtypeId::F32 => (U, 2f64.powi(-150)),
        DtypeId::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DtypeId::Bf16 => (2f64.powi(-8), 2f64.powi(-134)),
        other => unreachable!("{other:?} has no bound here"),
    }
}

/// factor * the sum of `term(element)` over the rows, column by column.
fn exact_sum_rows(shape: Shape, factor: f32, term: impl Fn(usize) -> f32) -> Vec<f32> {
    let column = |c| tree((0..shape.rows).map(|r| term(r * shape.cols + c)).collect()) * factor;
    (0..shape.cols).map(column).collect()
}

/// A value that was computed within `error`, as it is stored.
fn stored<T: Dtype>(value: f64, error: f64) -> Bounded {
    if value.is_nan() {
        return Bounded { value, error };
    }
    let (relative, absolute) = rounding::<T>();
    let error = error * 1.01;
    Bounded { value, error: error + (value.abs() + error) * relative + absolute }
}

/// The sum of one column's terms in the order of `ops::sum_rows`: an addition a term and level, each a
/// rounding of what is below the sum of the absolute values.
fn sum_rows(terms: impl Iterator<Item = Bounded>) -> Bounded {
    let (mut value, mut error, mut size, mut count) = (0.0, 0.0, 0.0, 0u32);
    for term in terms {
        value += term.value;
        error += term.error;
        size += term.value.abs();
        count += 1;
    }
    if value.is_nan() {
        return Bounded { value, error };
    }
    // 20 additions for 64 rows, and 64 for each level above.
    let above = f64::from(count.max(2).ilog(64));
    Bounded { value, error: 1.01 * error + (20.0 + 64.0 * above) * U * size }
}
