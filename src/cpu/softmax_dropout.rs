//! `softmax_dropout` on the CPU: y = D(softmax(scale * x + mask)) and its gradient.
//!
//! A thread takes a row, which stays in its caches in f32 between the passes: two for the largest
//! score and the sum, one for the result. The lanes of short rows are drawn for a few of them together.

use super::math::exp;
use super::octets::RowLanes;
use super::reduce::{largest, sum};
use super::split::{Line, Part};
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::softmax_dropout::{
    AttentionMask, Backward, Forward, Mask, STATISTICS, Scores, visible,
};
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Matrix, matrix, matrix_mut, read, source, write};
use rayon::prelude::*;

/// y = D(softmax(scale · x + mask)), and the rows' statistics.
pub(crate) fn forward<T: Dtype>(
    Forward { scores, mask, x, y, statistics }: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let shape = scores.shape()?;
    let x = source(x, shape.cols, cpu)?;
    let (y, statistics) = (matrix_mut(y, shape.cols, cpu)?, write(statistics, cpu)?);
    Task::new(cpu, params, scores, &mask)?.forward(x, y, statistics);
    Ok(())
}

/// dx = scale · P · (g - Σ P g).
pub(crate) fn backward<T: Dtype>(
    Backward { scores, mask, x, statistics, dy, dx }: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let shape = scores.shape()?;
    let (x, statistics) = (matrix(x, shape.cols, cpu)?, read(statistics, cpu)?);
    let (dy, dx) = (source(dy, shape.cols, cpu)?, matrix_mut(dx, shape.cols, cpu)?);
    Task::new(cpu, params, scores, &mask)?.backward(x, statistics, dy, dx);
    Ok(())
}

/// A checked call.
struct Task<'a, T> {
    cpu: Cpu,
    params: &'a MaskParams<'a>,
    scores: Scores,
    mask: AttentionMask<&'a [u32], &'a [T]>,
    shape: Shape,
}

/// What a thread needs for a few rows.
struct Scratch {
    z: Vec<f32>,
    g: Vec<f32>,
    lanes: RowLanes,
}

impl<'a, T: Dtype> Task<'a, T> {
    fn new(
        cpu: &'a Cpu,
        params: &'a MaskParams<'a>,
        scores: Scores,
        mask: &Mask<'a, T, Cpu>,
    ) -> Result<Self, Error> {
        let mask = AttentionMask {
            causal: mask.causal,
            lengths: read(mask.lengths, cpu)?,
            additive: read(mask.additive, cpu)?,
        };
        Ok(Self { cpu: *cpu, params, scores, mask, shape: scores.shape()? })
    }

    fn scratch(&self) -> Scratch {
        let cols = self.shape.cols;
        Scratch { z: vec![0.0; cols], g: vec![0.0; cols], lanes: RowLanes::new() }
    }

    fn forward(
        &self,
        x: Option<Matrix<&[T]>>,
        y: Matrix<&mut [T]>,
        statistics: Option<&mut [f32]>,
    ) {
        let Shape { rows, cols } = self.shape;
        let saved = statistics.map(|statistics| statistics.as_chunks_mut::<STATISTICS>().0);
        if rows == 0 || cols == 0 {
            // No keys: nothing to normalise over.
            return saved.into_iter().flatten().for_each(|saved| *saved = EMPTY);
        }
        let streaming = x.and_then(|_| split::streaming::<T>(self.cpu, self.shape));
        let group = RowLanes::rows(self.shape);
        let saved = split::optional_chunks(saved, group, rows.div_ceil(group)).into_par_iter();
        let groups: Vec<_> = Part::whole(y).chunks(group).collect();
        groups.into_par_iter().zip(saved).enumerate().for_each_init(
            || self.scratch(),
            |scratch, (index, (mut y, saved))| {
                let first = index * group;
                let mut saved = saved.into_iter().flatten();
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        let rows = y.rows(cols);
                        self.draw(&mut scratch.lanes, first, rows.len());
                        for (row, y) in (first..).zip(rows) {
                            let x = x.map_or(&*y, |x| x.row(row, 0..cols));
                            let z = self.logits(&mut scratch.z, row, x);
                            let [max, reciprocal] = exponentials(z);
                            self.dropped(&scratch.lanes, row, z, reciprocal);
                            let (seen, hidden) = y.split_at_mut(z.len());
                            emit(z, seen, streaming);
                            hidden.fill(T::from_f32(0.0));
                            saved.by_ref().take(1).for_each(|saved| *saved = [max, reciprocal]);
                        }
                        split::fence();
                    },
                );
            },
        );
    }

    fn backward(
        &self,
        x: Matrix<&[T]>,
        statistics: Option<&[f32]>,
        dy: Option<Matrix<&[T]>>,
        dx: Matrix<&mut [T]>,
    ) {
        let Shape { rows, cols } = self.shape;
        if rows == 0 || cols == 0 {
            return;
        }
        let saved = statistics.map(|statistics| statistics.as_chunks::<STATISTICS>().0);
        let streaming = dy.and_then(|_| split::streaming::<T>(self.cpu, self.shape));
        let group = RowLanes::rows(self.shape);
        let groups: Vec<_> = Part::whole(dx).chunks(group).collect();
        groups.into_par_iter().enumerate().for_each_init(
            || self.scratch(),
            |scratch, (index, mut dx)| {
                let first = index * group;
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        let rows = dx.rows(cols);
                        self.draw(&mut scratch.lanes, first, rows.len());
                        for (row, dx) in (first..).zip(rows) {
                            let dy = dy.map_or(&*dx, |dy| dy.row(row, 0..cols));
                            let p = self.logits(&mut scratch.z, row, x.row(row, 0..cols));
                            probabilities(p, saved.map(|saved| saved[row]));
                            let g = &mut scratch.g[..p.len()];
                            convert::load(&dy[..p.len()], g);
                            self.dropped(&scratch.lanes, row, g, 1.0);
                            self.gradient(p, g);
                            let (seen, hidden) = dx.split_at_mut(p.len());
                            emit(g, seen, streaming);
                            hidden.fill(T::from_f32(0.0));
                        }
                        split::fence();
                    },
                );
            },
        );
    }

    /// scale * p * (g - sum p g) in place of g. Where p is 0 the result is +0, whatever g is there.
    #[inline(always)]
    fn gradient(&self, p: &[f32], g: &mut [f32]) {
        let dot = sum(p, g, |p, g| if p == 0.0 { 0.0 } else { p * g });
        let scale = self.scores.scale;
        let of = |p: f32, g: f32| if p == 0.0 { 0.0 } else { scale * (p * (g - dot)) };
        g.iter_mut().zip(p).for_each(|(g, &p)| *g = of(p, *g));
    }

    /// Draws the lanes of `rows` rows from `first` on, where rows are drawn together.
    #[inline(always)]
    fn draw(&self, lanes: &mut RowLanes, first: usize, rows: usize) {
        if RowLanes::rows(self.shape) > 1 {
            lanes.draw(
                self.params,
                first..first + rows,
                #[inline(always)]
                |row| self.seen(row),
            );
        }
    }

    /// How many keys, from the first, a row can see.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        let (_, query) = self.scores.batch_and_query(row);
        let length = self.mask.lengths.map(|lengths| lengths[row]);
        visible(self.shape.cols, self.mask.causal, query, length)
    }

    /// scale * x + mask of the keys that the row sees. What comes back is shorter than the row where
    /// keys at its end are masked.
    #[inline(always)]
    fn logits<'s>(&self, z: &'s mut [f32], row: usize, x: &[T]) -> &'s mut [f32] {
        let (batch, query) = self.scores.batch_and_query(row);
        let seen = self.seen(row);
        let z = &mut z[..seen];
        convert::load(&x[..seen], z);
        let scale = self.scores.scale;
        let Some(additive) = self.mask.additive else {
            z.iter_mut().for_each(|z| *z *= scale);
            return z;
        };
        let first = (batch * self.scores.queries + query) * self.shape.cols;
        let mut buffer = [0.0; octets::ELEMENTS];
        let parts = additive[first..first + seen].chunks(octets::ELEMENTS);
        for (z, part) in z.chunks_mut(octets::ELEMENTS).zip(parts) {
            convert::load(part, &mut buffer[..part.len()]);
            // One rounding, as in the kernels.
            z.iter_mut().zip(&buffer).for_each(|(z, &a)| *z = z.mul_add(scale, a));
        }
        z
    }

    /// Multiplies `values`, the start of a row, by `factor`, then drops.
    #[inline(always)]
    fn dropped(&self, lanes: &RowLanes, row: usize, values: &mut [f32], factor: f32) {
        if factor != 1.0 {
            values.iter_mut().for_each(|value| *value *= factor);
        }
        if RowLanes::rows(self.shape) > 1 {
            return dropout::select(self.params, lanes.of(row), values);
        }
        let first = row * self.shape.cols.div_ceil(OCTET);
        let range = first..first + values.len().div_ceil(OCTET);
        octets::walk(
            self.params,
            self.shape,
            range,
            |_| {},
            #[inline(always)]
            |segment, lanes| {
                let end = values.len().min(segment.cols.end);
                let values = &mut values[segment.cols.start..end];
                dropout::select(self.params, &lanes[..values.len()], values);
            },
        );
    }
}

/// Rounds a row into its output.
#[inline(always)]
fn emit<T: Dtype>(from: &[f32], to: &mut [T], streaming: Option<Line>) {
    let parts = from.chunks(octets::ELEMENTS).zip(to.chunks_mut(octets::ELEMENTS));
    parts.for_each(|(from, to)| split::emit(from, to, streaming));
}

/// The statistics of a row without a visible key.
const EMPTY: [f32; STATISTICS] = [f32::NEG_INFINITY, 0.0];

/// Replaces z by exp(z - max z), and answers max z and the reciprocal of their sum. Where nothing is seen, or all
/// is -infinity: zeros.
#[inline(always)]
fn exponentials(z: &mut [f32]) -> [f32; STATISTICS] {
    let max = largest(z);
    if max == f32::NEG_INFINITY && !z.iter().any(|z| z.is_nan()) {
        z.fill(0.0);
        return EMPTY;
    }
    z.iter_mut().for_each(|z| *z = exp(*z - max));
    [max, 1.0 / sum(z, z, |e, _| e)]
}

/// Replaces z by its softmax, with the row's statistics where they are given.
#[inline(always)]
fn probabilities(z: &mut [f32], saved: Option<[f32; STATISTICS]>) {
    let reciprocal = match saved {
        Some(EMPTY) => return z.fill(0.0),
        Some([max, reciprocal]) => {
            z.iter_mut().for_each(|z| *z = exp(*z - max));
            reciprocal
        }
        None => exponentials(z)[1],
    };
    z.iter_mut().for_each(|e| *e *= reciprocal);
}
