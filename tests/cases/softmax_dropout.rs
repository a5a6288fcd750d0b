//! `softmax_dropout`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
use crate::oracle::AttentionMask;
use fused_dropout::Scores;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;

/// y = D(softmax(...)). `x` and `dy` are `None` for a call in place.
pub trait SoftmaxDropoutCalls {
    fn softmax_dropout<T: Dtype>(
        &self,
        call: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: Option<&[T]>,
        y: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error>;
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        call: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        lse: Option<&[f32]>,
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
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::softmax_dropout as op;
        match x {
            Some(x) => op::forward(self, &c.dropout, scores, &slices(mask), x, y, lse),
            None => op::forward_in_place(self, &c.dropout, scores, &slices(mask), y, lse),
        }
    }
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        lse: Option<&[f32]>,
        dy: Option<&[T]>,
        dx: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::softmax_dropout as op;
        match dy {
            Some(dy) => op::backward(self, &c.dropout, scores, &slices(mask), x, lse, dy, dx),
            None => op::backward_in_place(self, &c.dropout, scores, &slices(mask), x, lse, dx),
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
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use device::softmax_dropout as op;
        let mut lse = lse;
        self.call(c, &mut |call, d| {
            self.0.optional(mask.lengths, 0, &mut |lengths| {
                self.0.optional(mask.additive, c.offset, &mut |additive| {
                    let mask =
                        fused_dropout::AttentionMask { causal: mask.causal, lengths, additive };
                    self.0.optional(x, c.offset, &mut |x| {
                        self.0.with(y, c.offset, &mut |y| {
                            self.0.optional_out(lse.as_deref_mut(), &mut |lse| match x {
                                Some(x) => op::forward(call, d, scores, &mask, x, y, lse),
                                None => op::forward_in_place(call, d, scores, &mask, y, lse),
                            })
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
        lse: Option<&[f32]>,
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
                        self.0.optional(lse, 0, &mut |lse| {
                            self.0.optional(dy, c.offset, &mut |dy| {
                                self.0.with(dx, c.offset, &mut |dx| match dy {
                                    Some(dy) => {
                                        op::backward(call, d, scores, &mask, x, lse, dy, dx)
                                    }
                                    None => {
                                        op::backward_in_place(call, d, scores, &mask, x, lse, dx)
                                    }
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
        let additive = |i: usize| match i % 5 {
            0 => f32::NEG_INFINITY,
            n => n as f32 - 2.5,
        };
        Self {
            scores,
            causal: (kind % 4 == 1 || kind % 7 == 2)
                .then_some(cols as i64 / 2 - queries as i64 / 2),
            lengths: (kind % 4 == 2 || kind % 7 == 2).then(|| (0..rows).map(lengths).collect()),
            additive: (kind % 4 == 3)
                .then(|| (0..batch * queries * cols).map(|i| T::from_f32(additive(i))).collect()),
            x: values::<T>(rows * cols, 8, false)
                .into_iter()
                .map(|x| T::from_f32(x.to_f32() * 8.0))
                .collect(),
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

fn forward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (mask, x) = (a.mask(), &a.x);
    let (expected, expected_lse) = oracle::softmax_dropout(&call.dropout, &a.scores, &mask, x);
    let mut lse = Guarded::new(&vec![9.0f32; call.shape.rows], 0);
    let y = output(&vec![T::from_f32(5.0); x.len()], call, |y| {
        backend.softmax_dropout(call, &a.scores, &mask, Some(x), y, Some(lse.tensor()))
    })?;
    within("y", &y, &expected)?;
    for (r, (given, expected)) in lse.finish()?.into_iter().zip(&expected_lse).enumerate() {
        if !expected.admits(f64::from(given)) {
            return Err(format!("lse[{r}] is {given:e}, not {expected:?}"));
        }
    }
    let again =
        output(x, call, |y| backend.softmax_dropout(call, &a.scores, &mask, None, y, None))?;
    same("y in place, against y", &again, &y)
}

fn backward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (mask, x) = (a.mask(), &a.x);
    let dy = values::<T>(x.len(), 9, false);
    let (_, lse) = oracle::softmax_dropout(&call.dropout, &a.scores, &mask, x);
    let lse: Vec<f32> = lse.iter().map(|lse| lse.value as f32).collect();
    for saved in [false, true] {
        let lse = saved.then_some(&lse[..]);
        let expected =
            oracle::softmax_dropout_backward(&call.dropout, &a.scores, &mask, x, &dy, saved);
        let dx = output(&dy, call, |dx| {
            // In place for one of the two.
            let dy = saved.then_some(&dy[..]);
            backend.softmax_dropout_backward(call, &a.scores, &mask, x, lse, dy, dx)
        })?;
        within("dx", &dx, &expected)?;
    }
    Ok(())
}

fn slices<'a, T>(mask: &AttentionMask<'a, T>) -> fused_dropout::AttentionMask<&'a [u32], &'a [T]> {
    let AttentionMask { causal, lengths, additive } = *mask;
    fused_dropout::AttentionMask { causal, lengths, additive }
}
