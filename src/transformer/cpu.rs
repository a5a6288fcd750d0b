//! Models on the CPU: the operators of [`crate::cpu`], matrix products by the crate `gemm`, in f32.

use super::backend::{ADAMW_NUMBERS, Backend, Element, MatMul, Weight};
use super::streams::kept;
use crate::cpu::{self, Cpu};
use crate::error::Error;
use crate::ops::dropout_add_norm::{Inputs, ParamGrads, Saved};
use crate::ops::embedding_dropout::{Gradients, Lookups, NormGradients, Tables};
use crate::ops::softmax_dropout::STATISTICS;
use crate::ops::{Dropout, Shape, check_len};
use crate::{Activation, Affine, AttentionMask, Norm, Scores};
use rayon::prelude::*;
use std::convert::Infallible;
use std::ops::Range;

/// The CPU, with all threads of rayon's pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuBackend {
    cpu: Cpu,
}

impl CpuBackend {
    /// With the best instruction set of this machine.
    pub fn new() -> Self {
        Self::default()
    }

    /// With this instruction set in the operators. (`gemm` chooses its own.)
    pub fn with(cpu: Cpu) -> Self {
        Self { cpu }
    }
}

/// Elements of a gradient that are added up on their own, whatever the number of threads.
const CHUNK: usize = 1 << 13;

impl Backend for CpuBackend {
    type Elem = f32;
    type Buffer<E: Element> = Vec<E>;
    type Recorded = Infallible;

    fn repeat(
        &self,
        _: &mut Option<Infallible>,
        _: u64,
        mut work: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        work()
    }

    fn zeros<E: Element>(&self, len: usize) -> Result<Vec<E>, Error> {
        // A reservation that fails is an error; of `vec!` it would be the end of the process.
        Vec::<E>::new()
            .try_reserve_exact(len)
            .map_err(|_| Error::argument("zeros", "len", "elements that fit in memory", len))?;
        Ok(vec![E::default(); len])
    }

    fn write<E: Element>(&self, buffer: &mut Vec<E>, values: &[E]) -> Result<(), Error> {
        let (len, room) = (values.len(), buffer.len());
        let Some(start) = buffer.get_mut(..len) else {
            return Err(Error::argument(
                "write",
                "values",
                format!("at most {room} elements"),
                len,
            ));
        };
        start.copy_from_slice(values);
        Ok(())
    }

    fn read<E: Element>(&self, buffer: &Vec<E>) -> Result<Vec<E>, Error> {
        Ok(buffer.clone())
    }

    fn copy(&self, from: &Vec<f32>, to: &mut Vec<f32>, at: usize) -> Result<(), Error> {
        let part = at..at.saturating_add(from.len());
        part_of("copy", to, part)?.copy_from_slice(from);
        Ok(())
    }

    fn clear<E: Element>(&self, buffer: &mut Vec<E>) -> Result<(), Error> {
        buffer.fill(E::default());
        Ok(())
    }

    fn clear_part(&self, buffer: &mut Vec<f32>, part: Range<usize>) -> Result<(), Error> {
        part_of("clear_part", buffer, part)?.fill(0.0);
        Ok(())
    }

    fn matmul(
        &self,
        what: &MatMul,
        a: &Vec<f32>,
        b: &Vec<f32>,
        c: &mut Vec<f32>,
    ) -> Result<(), Error> {
        matmul(what, a, b, c)
    }

    fn matmul_f32(
        &self,
        what: &MatMul,
        a: &Vec<f32>,
        b: &Vec<f32>,
        c: &mut Vec<f32>,
    ) -> Result<(), Error> {
        matmul(what, a, b, c)
    }

    fn embedding(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        lookups: &Lookups<&Vec<u32>>,
        tables: &Tables<&Vec<f32>>,
        y: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (lookups, tables) = (slices(lookups)?, tables.try_map(|table| Ok(&table[..]))?);
        cpu::embedding_dropout::forward(&self.cpu, dropout, shape, &lookups, &tables, y)
    }

    fn embedding_backward(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        lookups: &Lookups<&Vec<u32>>,
        dy: &Vec<f32>,
        gradients: Gradients<&mut Vec<f32>>,
    ) -> Result<(), Error> {
        let gradients = table_gradients(gradients);
        cpu::embedding_dropout::backward(
            &self.cpu,
            dropout,
            shape,
            &slices(lookups)?,
            dy,
            gradients,
        )
    }

    fn embedding_norm(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        lookups: &Lookups<&Vec<u32>>,
        tables: &Tables<&Vec<f32>>,
        affine: &Affine<&Vec<f32>>,
        y: &mut Vec<f32>,
        stats: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (lookups, tables) = (slices(lookups)?, tables.try_map(|table| Ok(&table[..]))?);
        let affine = affine.map(|part| &part[..]);
        cpu::embedding_dropout::forward_norm(
            &self.cpu,
            dropout,
            norm,
            shape,
            &lookups,
            &tables,
            &affine,
            y,
            Some(stats),
        )
    }

    fn embedding_norm_backward(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        lookups: &Lookups<&Vec<u32>>,
        tables: &Tables<&Vec<f32>>,
        weight: &Vec<f32>,
        stats: &Vec<f32>,
        dy: &Vec<f32>,
        gradients: Gradients<&mut Vec<f32>>,
        norm_gradients: NormGradients<&mut Vec<f32>>,
    ) -> Result<(), Error> {
        let (lookups, tables) = (slices(lookups)?, tables.try_map(|table| Ok(&table[..]))?);
        let norm_gradients = NormGradients {
            weight: norm_gradients.weight.map(|gradient| &mut gradient[..]),
            bias: norm_gradients.bias.map(|gradient| &mut gradient[..]),
        };
        cpu::embedding_dropout::backward_norm(
            &self.cpu,
            dropout,
            norm,
            shape,
            &lookups,
            &tables,
            weight,
            stats,
            dy,
            table_gradients(gradients),
            norm_gradients,
        )
    }

    fn bias_act_dropout(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        activation: Activation,
        x: &Vec<f32>,
        bias: &Vec<f32>,
        y: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let bias = Some(&bias[..]);
        cpu::bias_act_dropout::forward(&self.cpu, dropout, shape, activation, x, bias, y)
    }

    fn bias_act_dropout_backward(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        activation: Activation,
        x: &Vec<f32>,
        bias: &Vec<f32>,
        dy: &mut Vec<f32>,
        dbias: &mut Vec<f32>,
    ) -> Result<(), Error> {
        cpu::bias_act_dropout::backward_in_place(
            &self.cpu,
            dropout,
            shape,
            activation,
            x,
            Some(&bias[..]),
            dy,
            Some(dbias),
        )
    }

    fn add_bias(&self, shape: Shape, x: &mut Vec<f32>, bias: &Vec<f32>) -> Result<(), Error> {
        let (identity, bias) = (Activation::Identity, Some(&bias[..]));
        cpu::bias_act_dropout::forward_in_place(&self.cpu, &kept(), shape, identity, x, bias)
    }

    fn bias_grad(
        &self,
        shape: Shape,
        dy: &mut Vec<f32>,
        dbias: &mut Vec<f32>,
    ) -> Result<(), Error> {
        cpu::dropout_add::backward_in_place(&self.cpu, &kept(), shape, dy, Some(dbias))
    }

    fn dropout_add_norm(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        inputs: &Inputs<&Vec<f32>>,
        affine: &Affine<&Vec<f32>>,
        s: Option<&mut Vec<f32>>,
        y: &mut Vec<f32>,
        stats: &mut Vec<f32>,
    ) -> Result<(), Error> {
        cpu::dropout_add_norm::forward(
            &self.cpu,
            dropout,
            norm,
            shape,
            &inputs.map(|input| &input[..]),
            &affine.map(|part| &part[..]),
            s.map(|s| &mut s[..]),
            y,
            Some(stats),
        )
    }

    fn dropout_add_norm_backward(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        saved: &Saved<&Vec<f32>>,
        weight: &Vec<f32>,
        stats: &Vec<f32>,
        dy: &Vec<f32>,
        ds: Option<&Vec<f32>>,
        dresidual: &mut Vec<f32>,
        dx: &mut Vec<f32>,
        grads: ParamGrads<&mut Vec<f32>>,
    ) -> Result<(), Error> {
        cpu::dropout_add_norm::backward(
            &self.cpu,
            dropout,
            norm,
            shape,
            &saved.map(|saved| &saved[..]),
            weight,
            stats,
            dy,
            ds.map(|ds| &ds[..]),
            dresidual,
            dx,
            grads.map(|grad| &mut grad[..]),
        )
    }

    fn softmax_dropout(
        &self,
        dropout: &Dropout<'_>,
        scores: &Scores,
        mask: &AttentionMask<&Vec<u32>, &Vec<f32>>,
        x: &Vec<f32>,
        y: &mut Vec<f32>,
        statistics: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (mask, statistics) = (mask_slices(mask), Some(&mut statistics[..]));
        cpu::softmax_dropout::forward(&self.cpu, dropout, scores, &mask, x, y, statistics)
    }

    fn softmax_dropout_backward(
        &self,
        dropout: &Dropout<'_>,
        scores: &Scores,
        mask: &AttentionMask<&Vec<u32>, &Vec<f32>>,
        x: &Vec<f32>,
        statistics: &Vec<f32>,
        dy: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (mask, statistics) = (mask_slices(mask), Some(&statistics[..]));
        cpu::softmax_dropout::backward_in_place(
            &self.cpu, dropout, scores, &mask, x, statistics, dy,
        )
    }

    fn cross_entropy(
        &self,
        shape: Shape,
        factor: &Vec<f32>,
        labels: &Vec<i32>,
        logits: &mut Vec<f32>,
        loss: &mut Vec<f32>,
    ) -> Result<(), Error> {
        const NAME: &str = "cross_entropy";
        let Shape { rows, cols } = shape;
        check_len(NAME, "logits", shape.elements(NAME)?, logits.len())?;
        check_len(NAME, "labels", rows, labels.len())?;
        check_len(NAME, "loss", 1, loss.len())?;
        check_len(NAME, "factor", 1, factor.len())?;
        let factor = factor[0];
        if let Some(label) = labels.iter().find(|&&label| label >= 0 && label as usize >= cols) {
            return Err(Error::argument(NAME, "labels", format!("below {cols}"), label));
        }
        let label_logits: Vec<f32> = labels
            .iter()
            .enumerate()
            .map(|(row, &label)| if label < 0 { 0.0 } else { logits[row * cols + label as usize] })
            .collect();
        // The gradient of a row is its softmax, less 1 at the label.
        let scores = Scores { batch: 1, heads: 1, queries: rows, keys: cols, scale: 1.0 };
        let mut statistics = vec![0.0; STATISTICS * rows];
        let (kept, mask, saved) = (kept(), AttentionMask::NONE, Some(&mut statistics[..]));
        cpu::softmax_dropout::forward_in_place(&self.cpu, &kept, &scores, &mask, logits, saved)?;
        if cols > 0 {
            logits.par_chunks_mut(cols).zip(labels).with_min_len(64).for_each(|(row, &label)| {
                if label < 0 {
                    return row.fill(0.0);
                }
                row[label as usize] -= 1.0;
                row.iter_mut().for_each(|value| *value *= factor);
            });
        }
        // ln S - (logit - max): the log-sum-exp itself would lose ln S beside a large maximum.
        let (statistics, _) = statistics.as_chunks::<STATISTICS>();
        let rows = labels.iter().zip(statistics.iter().zip(&label_logits));
        let sum = rows.filter(|(label, _)| **label >= 0).fold(0.0, |sum, (_, (row, logit))| {
            let [max, reciprocal] = row.map(f64::from);
            sum + (max - f64::from(*logit) - reciprocal.ln())
        });
        loss[0] = (f64::from(factor) * sum) as f32;
        Ok(())
    }

    fn accumulate(&self, from: &Vec<f32>, to: &mut Vec<f32>) -> Result<(), Error> {
        check_len("accumulate", "from", to.len(), from.len())?;
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        Ok(())
    }

    fn gradient_norm(
        &self,
        grads: &[Vec<f32>],
        max_norm: f32,
        norm: &mut Vec<f32>,
    ) -> Result<(), Error> {
        check_len("gradient_norm", "norm", 2, norm.len())?;
        let chunks: Vec<&[f32]> = grads.iter().flat_map(|grad| grad.chunks(CHUNK)).collect();
        let sums: Vec<f64> = chunks.into_par_iter().map(sum_of_squares).collect();
        // Not `sum`, which is -0 of nothing.
        let length = sums.into_iter().fold(0.0, |sum, part| sum + part).sqrt();
        // Written so that a norm that is not finite clips to no number: it must not go unseen.
        let factor = f64::from(max_norm) / (length + 1e-6) + 0.0 * length;
        let factor = if factor > 1.0 { 1.0 } else { factor };
        norm.copy_from_slice(&[length as f32, factor as f32]);
        Ok(())
    }

    fn adamw(
        &self,
        numbers: &Vec<f32>,
        norm: &Vec<f32>,
        weights: Vec<Weight<'_, Self>>,
    ) -> Result<(), Error> {
        const NAME: &str = "adamw";
        check_len(NAME, "numbers", ADAMW_NUMBERS, numbers.len())?;
        check_len(NAME, "norm", 2, norm.len())?;
        for Weight { weight, grad, m, v, .. } in &weights {
            for (name, len) in [("grad", grad.len()), ("m", m.len()), ("v", v.len())] {
                check_len(NAME, name, weight.len(), len)?;
            }
        }
        let (numbers, clip) = (&numbers[..], norm[1]);
        for Weight { weight, grad, m, v, decay, .. } in weights {
            let parts = weight.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
            let parts = parts.zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)));
            parts.for_each(|((weight, grad), (m, v))| {
                adamw(numbers, clip, decay, weight, grad, m, v);
            });
        }
        Ok(())
    }
}

fn part_of<'a>(
    operation: &'static str,
    buffer: &'a mut [f32],
    part: Range<usize>,
) -> Result<&'a mut [f32], Error> {
    let (len, given) = (buffer.len(), format!("{part:?}"));
    let expected = || format!("a part of {len} elements");
    buffer.get_mut(part).ok_or_else(|| Error::argument(operation, "part", expected(), given))
}

fn slices<'a>(lookups: &Lookups<&'a Vec<u32>>) -> Result<Lookups<&'a [u32]>, Error> {
    lookups.try_map(|ids| Ok(&ids[..]))
}

fn table_gradients(gradients: Gradients<&mut Vec<f32>>) -> Gradients<&mut [f32]> {
    Gradients {
        token: gradients.token.map(|gradient| &mut gradient[..]),
        position: gradients.position.map(|gradient| &mut gradient[..]),
        segment: gradients.segment.map(|gradient| &mut gradient[..]),
    }
}

fn mask_slices<'a>(
    mask: &AttentionMask<&'a Vec<u32>, &'a Vec<f32>>,
) -> cpu::softmax_dropout::Mask<'a, f32> {
    AttentionMask {
        causal: mask.causal,
        lengths: mask.lengths.map(|lengths| &lengths[..]),
        additive: mask.additive.map(|additive| &additive[..]),
    }
}

/// A product's c, for the threads that each write one matrix of it.
#[derive(Clone, Copy)]
struct Output(*mut f32);
// SAFETY: the matrices of a batch have no element in common (`MatMul::check`), and each has one thread.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// c = a · b or c += a · b: one product on all threads, or a batch with a thread a product.
pub(super) fn matmul(what: &MatMul, a: &[f32], b: &[f32], c: &mut [f32]) -> Result<(), Error> {
    let Some(what) = &what.check([a.len(), b.len(), c.len()])? else { return Ok(()) };
    let c = Output(c.as_mut_ptr());
    let threads = rayon::current_num_threads();
    let [outer, inner] = what.batch;
    if outer * inner == 1 {
        // SAFETY: the matrices were checked against the buffers.
        unsafe { product(what, [0, 0], a, b, c, gemm::Parallelism::Rayon(threads)) };
        return Ok(());
    }
    (0..outer * inner).into_par_iter().for_each(|index| {
        let at = [index / inner, index % inner];
        // SAFETY: as above; nobody else writes this matrix of c.
        unsafe { product(what, at, a, b, c, gemm::Parallelism::None) };
    });
    Ok(())
}

/// The product at `at` of the batch.
///
/// # Safety
/// `what` was checked against the lengths of a, b and the buffer that `c` points to, and nobody else uses that
/// matrix of c.
unsafe fn product(
    what: &MatMul,
    at: [usize; 2],
    a: &[f32],
    b: &[f32],
    c: Output,
    parallelism: gemm::Parallelism,
) {
    let start = |layout: &super::backend::Layout| {
        layout.offset + at[0] * layout.batch[0] + at[1] * layout.batch[1]
    };
    let [m, n, k] = what.mnk;
    // SAFETY: every element of the three matrices lies in its buffer, by the caller's check.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.at(start(&what.c)),
            what.c.col as isize,
            what.c.row as isize,
            what.add,
            a.as_ptr().wrapping_add(start(&what.a)),
            what.a.col as isize,
            what.a.row as isize,
            b.as_ptr().wrapping_add(start(&what.b)),
            what.b.col as isize,
            what.b.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// In 16 sums, for the vector unit, then over these in order. In f64, in which no square overflows or is rounded.
fn sum_of_squares(values: &[f32]) -> f64 {
    let square = |&value: &f32| f64::from(value) * f64::from(value);
    let (chunks, rest) = values.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += square(value));
    }
    sums.into_iter().chain(rest.iter().map(square)).sum()
}

fn adamw(
    numbers: &[f32],
    clip: f32,
    decay: f32,
    weight: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    let &[lr, beta1, beta2, epsilon, correction1, correction2] = numbers else { return };
    let moments = m.iter_mut().zip(v);
    for ((w, grad), (m, v)) in weight.iter_mut().zip(grad).zip(moments) {
        let g = grad * clip;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let decayed = *w - lr * decay * *w;
        *w = decayed - lr * (*m * correction1) / ((*v * correction2).sqrt() + epsilon);
    }
}
