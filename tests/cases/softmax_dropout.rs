//! `softmax_dropout`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
use crate::oracle::AttentionMask;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;
use fused_dropout::ops::softmax_dropout::STATISTICS;
use fused_dropout::{DtypeId, Scores};

/// y = D(softmax(...)). `x` and `dy` are `None` for a call in place.
pub trait SoftmaxDropoutCalls {
    fn softmax_dropout<T: Dtype>(
        &self,
        call: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: Option<&[T]>,
        y: &mut [T],
        statistics: Option<&mut [f32]>,
    ) -> Result<(), Error>;
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        call: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        statistics: Option<&[f32]>,
        dy: Option<&[T]>,
        dx: &mut [T],
    ) -> Result<(), Error>;
}

impl SoftmaxDropoutCalls for Cpu {
    fn softmax_dropout<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: Option<&[T]>,
        y: &mut [T],
        statistics: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::softmax_dropout as op;
        match x {
            Some(x) => op::forward(self, &c.dropout, scores, &slices(mask), x, y, statistics),
            None => op::forward_in_place(self, &c.dropout, scores, &slices(mask), y, statistics),
        }
    }
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        statistics: Option<&[f32]>,
        dy: Option<&[T]>,
        dx: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::softmax_dropout as op;
        match dy {
            Some(dy) => {
                op::backward(self, &c.dropout, scores, &slices(mask), x, statistics, dy, dx)
            }
            None => {
                op::backward_in_place(self, &c.dropout, scores, &slices(mask), x, statistics, dx)
            }
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> SoftmaxDropoutCalls for Kernels<L> {
    fn softmax_dropout<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: Option<&[T]>,
        y: &mut [T],
        statistics: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use device::softmax_dropout as op;
        let mut statistics = statistics;
        self.call(c, &mut |call, d| {
            self.0.optional(mask.lengths, 0, &mut |lengths| {
                self.0.optional(mask.additive, c.offset, &mut |additive| {
                    let mask =
                        fused_dropout::AttentionMask { causal: mask.causal, lengths, additive };
                    self.0.optional(x, c.offset, &mut |x| {
                        self.0.with(y, c.offset, &mut |y| {
                            self.0.optional_out(
                                statistics.as_deref_mut(),
                                &mut |statistics| match x {
                                    Some(x) => {
                                        op::forward(call, d, scores, &mask, x, y, statistics)
                                    }
                                    None => {
                                        op::forward_in_place(call, d, scores, &mask, y, statistics)
                                    }
                                },
                            )
                        })
                    })
                })
            })
        })
    }
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        statistics: Option<&[f32]>,
        dy: Option<&[T]>,
        dx: &mut [T],
    ) -> Result<(), Error> {
        use device::softmax_dropout as op;
        self.call(c, &mut |call, d| {
            self.0.optional(mask.lengths, 0, &mut |lengths| {
                self.0.optional(mask.additive, c.offset, &mut |additive| {
                    let mask =
                        fused_dropout::AttentionMask { causal: mask.causal, lengths, additive };
                    self.0.reading(x, c.offset, &mut |x| {
                        self.0.optional(statistics, 0, &mut |statistics| {
                            self.0.optional(dy, c.offset, &mut |dy| {
                                self.0.with(dx, c.offset, &mut |dx| match dy {
                                    Some(dy) => {
                                        op::backward(call, d, scores, &mask, x, statistics, dy, dx)
                                    }
                                    None => op::backward_in_place(
                                        call, d, scores, &mask, x, statistics, dx,
                                    ),
                                })
                            })
                        })
                    })
                })
            })
        })
    }
}

/// Runs the checks of one row of the table.
pub fn check<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
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

    fn mask(&self) -> AttentionMask<'_, T> {
        AttentionMask {
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

/// What a backend's forward pass saves, one entry a row.
fn statistics_of<T: Dtype, B: Backend>(
    backend: &B,
    call: &Call,
    a: &Attention<T>,
    y: &mut [T],
) -> Result<Vec<f32>, Error> {
    let mut statistics = vec![9.0f32; STATISTICS * call.shape.rows];
    let (mask, saved) = (a.mask(), Some(&mut statistics[..]));
    backend.softmax_dropout(call, &a.scores, &mask, Some(&a.x), y, saved)?;
    Ok(statistics)
}

fn forward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (mask, x) = (a.mask(), &a.x);
    let (expected, rows) = oracle::softmax_dropout(&call.dropout, &a.scores, &mask, x);
    let mut statistics = Guarded::new(&vec![9.0f32; STATISTICS * call.shape.rows], 0);
    let y = output(&vec![T::from_f32(5.0); x.len()], call, |y| {
        let saved = Some(statistics.tensor());
        backend.softmax_dropout(call, &a.scores, &mask, Some(x), y, saved)
    })?;
    within("y", &y, &expected)?;
    let statistics = statistics.finish()?;
    for (r, (given, (max, reciprocal))) in
        statistics.as_chunks::<STATISTICS>().0.iter().zip(&rows).enumerate()
    {
        if given[0] != *max || !reciprocal.admits(f64::from(given[1])) {
            return Err(format!("statistics[{r}] are {given:?}, not {max} and {reciprocal:?}"));
        }
    }
    let again =
        output(x, call, |y| backend.softmax_dropout(call, &a.scores, &mask, None, y, None))?;
    same("y in place, against y", &again, &y)
}

fn backward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (mask, x) = (a.mask(), &a.x);
    // Special gradients everywhere in the one, where a dropped or masked key alone does not pass them on; in a few rows
    // of the other.
    let cols = call.shape.cols.max(1);
    let (ordinary, special) = (values::<T>(x.len(), 9, false), values::<T>(x.len(), 9, true));
    let few = (0..x.len()).map(|i| if i / cols % 3 == 1 { special[i] } else { ordinary[i] });
    for dy in [few.collect(), special.clone()] {
        let expected = oracle::softmax_dropout_backward(&call.dropout, &a.scores, &mask, x, &dy);
        let dx = output(&dy, call, |dx| {
            backend.softmax_dropout_backward(call, &a.scores, &mask, x, None, Some(&dy), dx)
        })?;
        within("dx", &dx, &expected)?;
        // From what the forward pass saved: the same P, so the same bits; here in place.
        let again = output(&dy, call, |dx| {
            let mut y = vec![T::from_f32(0.0); x.len()];
            let saved = statistics_of(backend, call, &a, &mut y)?;
            backend.softmax_dropout_backward(call, &a.scores, &mask, x, Some(&saved), None, dx)
        })?;
        same("dx with saved statistics, against dx", &again, &dx)?;
    }
    Ok(())
}

fn slices<'a, T>(mask: &AttentionMask<'a, T>) -> fused_dropout::AttentionMask<&'a [u32], &'a [T]> {
    let AttentionMask { causal, lengths, additive } = *mask;
    fused_dropout::AttentionMask { causal, lengths, additive }
}
