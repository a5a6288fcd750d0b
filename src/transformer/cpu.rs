//! Models on the CPU: the operators of [`crate::cpu`], matrix products by the crate `gemm`, in f32.

use super::backend::{ADAMW_NUMBERS, Backend, Element, Weight};
use super::matmul::{Layout, MatMul};
use super::streams::Drops;
use crate::cpu::Cpu;
use crate::error::Error;
use crate::ops::softmax_dropout::{self, STATISTICS};
use crate::ops::{Shape, check_len};
use crate::{AttentionMask, Scores, Source};
use rayon::prelude::*;
use std::cell::RefMut;
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
    type Memory = Cpu;
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

    fn run<'a, P: crate::Pass<'a, Cpu>>(&self, drops: Drops, pass: P) -> Result<(), Error> {
        self.cpu.run(&drops.dropout()?, pass)
    }

    fn report(&self) -> Option<RefMut<'_, Vec<u32>>> {
        None
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

    fn copy(
        &self,
        from: &Vec<f32>,
        part: Range<usize>,
        to: &mut Vec<f32>,
        at: usize,
    ) -> Result<(), Error> {
        let refuse = |argument, part: &Range<usize>, len: usize| {
            Error::argument(
                "copy",
                argument,
                format!("a part of {len} elements"),
                format!("{part:?}"),
            )
        };
        let (from_len, to_len) = (from.len(), to.len());
        let from = from.get(part.clone()).ok_or_else(|| refuse("part", &part, from_len))?;
        let place = at..at.saturating_add(from.len());
        let to = to.get_mut(place.clone()).ok_or_else(|| refuse("at", &place, to_len))?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn clear<E: Element>(&self, buffer: &mut Vec<E>) -> Result<(), Error> {
        buffer.fill(E::default());
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
        let softmax = softmax_dropout::Forward {
            scores,
            mask: AttentionMask::NONE,
            x: Source::InPlace,
            y: logits,
            statistics: Some(&mut statistics),
        };
        self.run(Drops::Nothing, softmax)?;
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
    let start = |layout: &Layout| layout.offset + at[0] * layout.batch[0] + at[1] * layout.batch[1];
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
