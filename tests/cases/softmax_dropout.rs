//! `softmax_dropout`: the checks of a row of the table.

use super::backend::Rows;
use super::*;
use crate::oracle;
use fused_dropout::ops::softmax_dropout::{Backward, Forward, STATISTICS};
use fused_dropout::{DtypeId, Scores};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "softmax_dropout", call, forward::<T, B>(backend, call));
    tally.count::<T, B>(backend, "softmax_dropout dx", call, backward::<T, B>(backend, call));
}

/// The case's rows as attention scores: batch, heads and queries whose product they are, and one of
/// the masks.
struct Attention<T> {
    scores: Scores,
    causal: Option<i64>,
    lengths: Option<Vec<u32>>,
    additive: Option<Vec<T>>,
    x: Vec<T>,
}

impl<T: Dtype> Attention<T> {
    fn new(call: &Call) -> Self {
        let Shape { rows, cols } = call.shape;
        let (batch, heads) = match rows {
            0 => (0, 2),
            n if n % 6 == 0 => (3, 2),
            n if n % 2 == 0 => (1, 2),
            _ => (1, 1),
        };
        let queries = if rows == 0 { 4 } else { rows / (batch * heads) };
        let scores = Scores { batch, heads, queries, keys: cols, scale: 0.37 };
        let kind = rows + cols + call.dropout.p.threshold() as usize % 5;
        let lengths = |r: usize| (r * 13 % (cols + 3)) as u32;
        Self {
            scores,
            causal: (kind % 4 == 1 || kind % 7 == 2)
                .then_some(cols as i64 / 2 - queries as i64 / 2),
            lengths: (kind % 4 == 2 || kind % 7 == 2).then(|| (0..rows).map(lengths).collect()),
            additive: (kind % 4 == 3).then(|| additive(batch * queries, cols)),
            x: scores_of(rows, cols),
        }
    }

    fn mask(&self) -> oracle::AttentionMask<'_, T> {
        oracle::AttentionMask {
            causal: self.causal,
            lengths: self.lengths.as_deref(),
            additive: self.additive.as_deref(),
        }
    }
}

/// Scores of up to 16 on either side. Every fourth row has a few special ones; another fourth, ordinary ones beside a
/// large number: their differences are what f32 leaves of them.
fn scores_of<T: Dtype>(rows: usize, cols: usize) -> Vec<T> {
    let far = if T::ID == DtypeId::F16 { 3e4 } else { 1e7 };
    let ordinary = values::<T>(rows * cols, 8, false);
    let special = values::<T>(rows * cols, 8, true);
    let score = |i: usize| {
        let x = ordinary[i].to_f32() * 8.0;
        match i / cols % 4 {
            1 if i.is_multiple_of(7) => special[i],
            2 => T::from_f32(x + far),
            _ => T::from_f32(x),
        }
    };
    (0..rows * cols).map(score).collect()
}

/// What trainers put where a key is masked, in rows of each kind: all of the row, half of it, or a few keys of it.
fn additive<T: Dtype>(rows: usize, cols: usize) -> Vec<T> {
    let mask = |i: usize| match (i / cols % 8, i % cols) {
        (0, col) if col % 5 == 0 => f32::NEG_INFINITY,
        (0, col) => (col % 5) as f32 - 2.5,
        (1, _) => -1e9,
        (2, _) => f32::MIN,
        (3, _) => -65504.0,
        (4, col) => [-1e9, 0.0][usize::from(2 * col < cols)],
        (5, col) => [f32::MIN, 0.5][col % 2],
        (6, _) => f32::NEG_INFINITY,
        (_, col) => [-65504.0, 1e-42, -0.0, 3.0][col % 4],
    };
    (0..rows * cols).map(|i| T::from_f32(mask(i))).collect()
}

/// Scores and mask on a backend.
struct There<'l, T: Dtype, B: TestBackend> {
    backend: &'l B,
    call: &'l Call,
    scores: Scores,
    causal: Option<i64>,
    lengths: Option<B::Tensor<u32>>,
    additive: Option<B::Tensor<T>>,
    x: Rows<B::Tensor<T>>,
}

impl<'l, T: Dtype, B: TestBackend> There<'l, T, B> {
    fn new(backend: &'l B, call: &'l Call, a: &Attention<T>) -> Self {
        Self {
            backend,
            call,
            scores: a.scores,
            causal: a.causal,
            lengths: a.lengths.as_ref().map(|lengths| backend.tensor(lengths, call.offset)),
            additive: a.additive.as_ref().map(|additive| backend.tensor(additive, call.offset)),
            x: backend.matrix(&a.x, call, 0),
        }
    }

    fn mask(&self) -> fused_dropout::ops::softmax_dropout::Mask<'_, T, B::Backend> {
        let (lengths, additive) = (given(&self.lengths), given(&self.additive));
        fused_dropout::AttentionMask { causal: self.causal, lengths, additive }
    }

    /// y, from x or in place, and the statistics.
    fn forward(&self, in_place: bool, before: &[T]) -> Result<(Vec<T>, Vec<f32>), String> {
        let mut y = self.backend.matrix(before, self.call, 1);
        let saved = vec![9.0f32; STATISTICS * self.call.shape.rows];
        let mut statistics = self.backend.tensor(&saved, 0);
        let pass = Forward {
            scores: self.scores,
            mask: self.mask(),
            x: if in_place { Source::InPlace } else { Source::Tensor(&self.x) },
            y: &mut y,
            // Not asked for in place.
            statistics: (!in_place).then_some(&mut statistics as _),
        };
        self.backend.run(self.call, pass)?;
        Ok((self.backend.rows(&y)?, self.backend.contents(&statistics)?))
    }

    /// dx, from dy or in place.
    fn backward(
        &self,
        in_place: bool,
        dy: &[T],
        statistics: Option<&[f32]>,
    ) -> Result<Vec<T>, String> {
        let [dy, mut dx] = [1, 2].map(|which| self.backend.matrix(dy, self.call, which));
        let statistics = statistics.map(|statistics| self.backend.tensor(statistics, 0));
        let pass = Backward {
            scores: self.scores,
            mask: self.mask(),
            x: &self.x,
            statistics: given(&statistics),
            dy: if in_place { Source::InPlace } else { Source::Tensor(&dy) },
            dx: &mut dx,
        };
        self.backend.run(self.call, pass)?;
        self.backend.rows(&dx)
    }
}

fn forward<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (expected, rows) = oracle::softmax_dropout(&call.dropout, &a.scores, &a.mask(), &a.x);
    let there = There::new(backend, call, &a);
    let (y, statistics) = there.forward(false, &vec![T::from_f32(5.0); a.x.len()])?;
    within("y", &y, &expected)?;
    for (r, (given, (max, reciprocal))) in
        statistics.as_chunks::<STATISTICS>().0.iter().zip(&rows).enumerate()
    {
        if given[0] != *max || !reciprocal.admits(f64::from(given[1])) {
            return Err(format!("statistics[{r}] are {given:?}, not {max} and {reciprocal:?}"));
        }
    }
    let (again, _) = there.forward(true, &a.x)?;
    same("y in place, against y", &again, &y)
}

fn backward<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let there = There::new(backend, call, &a);
    // Special gradients everywhere in the one, where a dropped or masked key alone does not pass them on; in a few rows
    // of the other.
    let cols = call.shape.cols.max(1);
    let (ordinary, special) = (values::<T>(a.x.len(), 9, false), values::<T>(a.x.len(), 9, true));
    let few = (0..a.x.len()).map(|i| if i / cols % 3 == 1 { special[i] } else { ordinary[i] });
    for dy in [few.collect(), special.clone()] {
        let expected =
            oracle::softmax_dropout_backward(&call.dropout, &a.scores, &a.mask(), &a.x, &dy);
        let dx = there.backward(false, &dy, None)?;
        within("dx", &dx, &expected)?;
        // From what the forward pass saved: the same P, so the same bits; here in place.
        let (_, saved) = there.forward(false, &dy)?;
        let again = there.backward(true, &dy, Some(&saved))?;
        same("dx with saved statistics, against dx", &again, &dx)?;
    }
    Ok(())
}
