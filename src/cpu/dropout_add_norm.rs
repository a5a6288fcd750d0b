//! `dropout_add_norm` on the CPU: s = residual + D(x + bias), y = norm(s), and its gradients.
//!
//! A thread takes a few rows at a time, which stay in its nearest cache in f32 between the passes: one that
//! adds, three over each row for its statistics and the result.

use super::dropout_add::select_add;
use super::norm::{Affine, Standard};
use super::octets::Segment;
use super::split::{Line, Part};
use super::sum_rows::close_run;
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add_norm::{Backward, Forward, Saved};
use crate::ops::norm::Norm;
use crate::ops::sum_rows::{RUN_ROWS, TILE_ROWS};
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Matrix, Sum, matrix, matrix_mut, read, source, write};
use rayon::prelude::*;
use std::ops::Range;

/// s = residual + D(x + bias), y = norm(s).
pub(crate) fn forward<T: Dtype>(
    pass: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let shape = pass.shape;
    let add = Add {
        x: matrix(pass.x, shape.cols, cpu)?,
        bias: read(pass.bias, cpu)?,
        residual: source(pass.residual, shape.cols, cpu)?,
    };
    let norm_bias = read(pass.norm_bias, cpu)?;
    let affine = Affine::new(pass.weight.read(cpu)?, norm_bias);
    let s = pass.s.map(|s| matrix_mut(s, shape.cols, cpu)).transpose()?;
    let (y, stats) = (matrix_mut(pass.y, shape.cols, cpu)?, write(pass.stats, cpu)?);
    Task { cpu: *cpu, params, norm: pass.norm, shape }.forward(&add, &affine, s, y, stats);
    Ok(())
}

/// dresidual = ds + dnorm, dx = D(dresidual), and the gradients of the parameters.
pub(crate) fn backward<T: Dtype>(
    pass: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let shape = pass.shape;
    let add = match pass.saved {
        Saved::Sum(s) => Recomputed::Not(matrix(s, shape.cols, cpu)?),
        Saved::Inputs { x, bias, residual } => Recomputed::From(Add {
            x: matrix(x, shape.cols, cpu)?,
            bias: read(bias, cpu)?,
            residual: Some(matrix(residual, shape.cols, cpu)?),
        }),
    };
    let (stats, _) = pass.stats.read(cpu)?.as_chunks::<2>();
    let given = Given {
        s: add,
        weight: &convert::widened(pass.weight.read(cpu)?),
        stats,
        dy: matrix(pass.dy, shape.cols, cpu)?,
        ds: pass.ds.map(|ds| matrix(ds, shape.cols, cpu)).transpose()?,
    };
    let [dbias, dweight, dnorm_bias] = [pass.dbias, pass.dweight, pass.dnorm_bias]
        .map(|gradient| gradient.map(|gradient| Sum::of(gradient, cpu)).transpose());
    let grads = ParamGrads { dbias: dbias?, dweight: dweight?, dnorm_bias: dnorm_bias? };
    let dresidual = matrix_mut(pass.dresidual, shape.cols, cpu)?;
    let dx = matrix_mut(pass.dx, shape.cols, cpu)?;
    Task { cpu: *cpu, params, norm: pass.norm, shape }.backward(&given, dresidual, dx, grads);
    Ok(())
}

/// A sum for each parameter whose gradient is asked for.
struct ParamGrads<G> {
    dbias: Option<G>,
    dweight: Option<G>,
    dnorm_bias: Option<G>,
}

impl ParamGrads<Vec<f32>> {
    fn zeros(wanted: [bool; 3], len: usize) -> Self {
        let [dbias, dweight, dnorm_bias] = wanted.map(|wanted| wanted.then(|| vec![0.0f32; len]));
        Self { dbias, dweight, dnorm_bias }
    }
}

impl ParamGrads<&mut [f32]> {
    /// Adds a run's sums to these of its tile, and makes zeros of them.
    #[inline(always)]
    fn close_run(&mut self, run: &mut ParamGrads<Vec<f32>>) {
        let tile = [&mut self.dbias, &mut self.dweight, &mut self.dnorm_bias];
        let run = [&mut run.dbias, &mut run.dweight, &mut run.dnorm_bias];
        for (tile, run) in tile.into_iter().flatten().zip(run.into_iter().flatten()) {
            close_run(tile, run);
        }
    }
}

/// What s is computed from; the residual lies in s where it is not given.
struct Add<'a, T> {
    x: Matrix<&'a [T]>,
    bias: Option<&'a [T]>,
    residual: Option<Matrix<&'a [T]>>,
}

/// Where the backward pass finds s.
enum Recomputed<'a, T> {
    Not(Matrix<&'a [T]>),
    From(Add<'a, T>),
}

/// What a backward pass is computed from.
struct Given<'a, T> {
    s: Recomputed<'a, T>,
    weight: &'a [f32],
    stats: &'a [[f32; 2]],
    dy: Matrix<&'a [T]>,
    ds: Option<Matrix<&'a [T]>>,
}

/// A checked call.
struct Task<'a> {
    cpu: Cpu,
    params: &'a MaskParams<'a>,
    norm: Norm,
    shape: Shape,
}

/// Elements of the rows that a thread has in its nearest cache at a time; a longer row is one.
const GROUP: usize = 4096;

/// Elements of y that leave at a time, past the caches: a longer burst waits for the memory. 2^22 elements, one
/// thread of a Zen 2, rows of 8192: 5.7 ms, against 6.5 with a row at a time. Refuted: bursts across rows, which left
/// rows of 768 as slow as they are (7.7 against 5.8 at 1024) and cost 0.7 where y is the only output.
const BURST: usize = 1024;

/// Rows in f32.
struct Scratch {
    s: Vec<f32>,
    g: Vec<f32>,
}

impl Task<'_> {
    /// Rows that a thread has in its nearest cache at a time.
    fn group(&self) -> usize {
        (GROUP / self.shape.cols).max(1)
    }

    /// Rows of a thread's piece of work.
    fn part(&self) -> usize {
        self.shape.rows.div_ceil(4 * rayon::current_num_threads()).max(self.group())
    }

    fn scratch(&self) -> Vec<f32> {
        vec![0.0; self.group() * self.shape.cols]
    }

    fn forward<T: Dtype>(
        &self,
        add: &Add<'_, T>,
        affine: &Affine,
        s: Option<Matrix<&mut [T]>>,
        y: Matrix<&mut [T]>,
        stats: Option<&mut [f32]>,
    ) {
        let Shape { rows, cols } = self.shape;
        if rows == 0 || cols == 0 {
            let stats = stats.into_iter().flat_map(|stats| stats.as_chunks_mut::<2>().0);
            return stats.for_each(|stats| *stats = Standard::of(&self.norm, &[]).stats());
        }
        let (weight, norm_bias) = (&affine.weight[..], affine.bias.as_deref());
        let (part, group) = (self.part(), self.group());
        let streaming = split::streaming::<T>(self.cpu, self.shape);
        // In place, the residual's lines are in the caches anyway.
        let streaming_s = streaming.filter(|_| add.residual.is_some());
        let s = split::optional_rows(s, part, rows.div_ceil(part)).into_par_iter();
        let stats = split::optional_chunks(stats, part * 2, rows.div_ceil(part)).into_par_iter();
        let parts: Vec<_> = Part::whole(y).chunks(part).collect();
        parts.into_par_iter().zip(s).zip(stats).enumerate().for_each_init(
            || self.scratch(),
            |values, (index, ((y, s), stats))| {
                let mut s = s.into_iter().flat_map(|s| s.chunks(group));
                let mut stats = stats.into_iter().flat_map(|stats| stats.as_chunks_mut::<2>().0);
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        for (index, mut y) in (index * part..).step_by(group).zip(y.chunks(group)) {
                            let y = y.rows(cols);
                            let values = &mut values[..y.len() * cols];
                            let rows = index..index + y.len();
                            self.add(add, rows, values, s.next(), streaming_s);
                            for (row, y) in values.chunks_mut(cols).zip(y) {
                                let standard = Standard::of(&self.norm, row);
                                stats.by_ref().take(1).for_each(|stats| *stats = standard.stats());
                                for at in (0..cols).step_by(BURST) {
                                    let end = (at + BURST).min(cols);
                                    let bias = norm_bias.map(|bias| &bias[at..end]);
                                    standard.normalise(&mut row[at..end], &weight[at..end], bias);
                                    split::emit(&row[at..end], &mut y[at..end], streaming);
                                }
                            }
                        }
                        split::fence();
                    },
                );
            },
        );
    }

    /// s of `rows`, rounded to T, into `values`, and into `s` where there is one: these rows, which hold the
    /// residual where the call was not given it.
    #[inline(always)]
    fn add<T: Dtype>(
        &self,
        add: &Add<'_, T>,
        rows: Range<usize>,
        values: &mut [f32],
        mut s: Option<Part<'_, T>>,
        streaming: Option<Line>,
    ) {
        let cols = self.shape.cols;
        let base = rows.start * cols;
        let strided = s.as_ref().is_some_and(|s| s.stride != cols);
        let mut left = 0;
        self.walk(
            rows,
            #[inline(always)]
            |block| {
                add.x.prefetch(&block);
                add.residual.into_iter().for_each(|residual| residual.prefetch(&block));
            },
            #[inline(always)]
            |segment, lanes| {
                let Range { start, end } = segment.elements(cols);
                let (start, end) = (start - base, end - base);
                let bias = add.bias.map(|bias| &bias[segment.cols.clone()]);
                let residual = match (add.residual, &s) {
                    (Some(residual), _) => residual.at(&segment),
                    (None, s) => s.as_ref().map_or(&[][..], |s| s.at(&segment)),
                };
                let sums = &mut values[start..end];
                select_add(self.params, lanes, add.x.at(&segment), bias, residual, sums);
                convert::round::<T>(sums);
                if let Some(s) = s.as_mut().filter(|_| segment.last || strided) {
                    split::emit(&values[left..end], s.up_to(&segment, end - left), streaming);
                    left = end;
                }
            },
        );
    }

    /// Walks the octets of `rows`.
    #[inline(always)]
    fn walk(
        &self,
        rows: Range<usize>,
        prefetch: impl Fn(Segment),
        body: impl FnMut(Segment, &[u16]),
    ) {
        let a_row = octets::count(Shape { rows: 1, ..self.shape });
        octets::walk(self.params, self.shape, rows.start * a_row..rows.end * a_row, prefetch, body);
    }

    fn backward<T: Dtype>(
        &self,
        given: &Given<'_, T>,
        dresidual: Matrix<&mut [T]>,
        dx: Matrix<&mut [T]>,
        grads: ParamGrads<Sum<'_, Cpu>>,
    ) {
        let Shape { rows, cols } = self.shape;
        let ParamGrads { dbias, dweight, dnorm_bias } = grads;
        if rows == 0 || cols == 0 {
            let sums = [dbias, dweight, dnorm_bias].into_iter().flatten();
            return sums.for_each(|sum_of_nothing| sum_of_nothing.finish(Vec::new(), 1.0));
        }
        let wanted = [&dbias, &dweight, &dnorm_bias].map(Option::is_some);
        // Without a sum over rows nothing asks for tiles.
        let (tile_rows, run_rows) = match wanted.contains(&true) {
            true => (TILE_ROWS, RUN_ROWS),
            false => (self.part(), self.part()),
        };
        let tiles = rows.div_ceil(tile_rows);
        let mut sums = ParamGrads::zeros(wanted, tiles * cols);
        let streaming = split::streaming::<T>(self.cpu, self.shape);
        let outs = Part::whole(dresidual).chunks(tile_rows).zip(Part::whole(dx).chunks(tile_rows));
        let parts: Vec<_> = outs.zip(chunks(&mut sums, cols, tiles)).collect();
        parts.into_par_iter().enumerate().for_each_init(
            || {
                let scratch = Scratch { s: self.scratch(), g: self.scratch() };
                (scratch, ParamGrads::zeros(wanted, cols))
            },
            |(scratch, of_run), (index, ((dresidual, dx), mut of_tile))| {
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        let mut first = index * tile_rows;
                        for (dresidual, dx) in dresidual.chunks(run_rows).zip(dx.chunks(run_rows)) {
                            let group = self.group();
                            for (mut dresidual, dx) in dresidual.chunks(group).zip(dx.chunks(group))
                            {
                                let rows = first..first + dresidual.rows(cols).len();
                                first = rows.end;
                                let g = self.gradient(given, rows.clone(), scratch, of_run);
                                self.emit(g, &mut dresidual, streaming);
                                self.drop(rows, g, dx, &mut of_run.dbias, streaming);
                            }
                            of_tile.close_run(of_run);
                        }
                        split::fence();
                    },
                );
            },
        );
        finish(sums.dbias, self.params.scale, dbias);
        finish(sums.dweight, 1.0, dweight);
        finish(sums.dnorm_bias, 1.0, dnorm_bias);
    }

    /// dresidual of `rows`, and their part of the sums of the norm's gradients.
    #[inline(always)]
    fn gradient<'s, T: Dtype>(
        &self,
        given: &Given<'_, T>,
        rows: Range<usize>,
        scratch: &'s mut Scratch,
        sums: &mut ParamGrads<Vec<f32>>,
    ) -> &'s mut [f32] {
        let cols = self.shape.cols;
        let elements = rows.start * cols..rows.end * cols;
        let (s, g) = (&mut scratch.s[..elements.len()], &mut scratch.g[..elements.len()]);
        given.dy.prefetch(&Segment { row: rows.start, cols: 0..elements.len(), last: true });
        match &given.s {
            Recomputed::Not(saved) => self.load(saved, rows.clone(), s),
            Recomputed::From(add) => self.add(add, rows.clone(), s, None, None),
        }
        self.load(&given.dy, rows.clone(), g);
        for (row, (s, g)) in rows.clone().zip(s.chunks(cols).zip(g.chunks_mut(cols))) {
            let standard = Standard::saved(self.norm.kind, s, given.stats[row]);
            if let Some(sums) = &mut sums.dnorm_bias {
                sums.iter_mut().zip(&*g).for_each(|(sum, dy)| *sum += dy);
            }
            if let Some(sums) = &mut sums.dweight {
                let terms = g.iter().zip(s).map(|(dy, &s)| dy * standard.apply(s));
                sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            }
            g.iter_mut().zip(given.weight).for_each(|(g, weight)| *g *= weight);
            standard.gradient(self.norm.kind, s, g);
        }
        if let Some(ds) = given.ds {
            for (row, g) in rows.zip(g.chunks_mut(cols)) {
                let ds = ds.row(row, 0..cols);
                g.iter_mut().zip(ds).for_each(|(g, &ds)| *g += convert::widen(ds));
            }
        }
        g
    }

    /// Rows of a matrix in f32: all at once where they follow each other.
    #[inline(always)]
    fn load<T: Dtype>(&self, from: &Matrix<&[T]>, rows: Range<usize>, to: &mut [f32]) {
        let cols = self.shape.cols;
        if from.stride == cols {
            return convert::load(&from.data[rows.start * cols..rows.end * cols], to);
        }
        let to = rows.zip(to.chunks_mut(cols));
        to.for_each(|(row, to)| convert::load(from.row(row, 0..cols), to));
    }

    /// Rounds rows into their output: all at once where they follow each other.
    #[inline(always)]
    fn emit<T: Dtype>(&self, from: &[f32], to: &mut Part<'_, T>, streaming: Option<Line>) {
        let cols = self.shape.cols;
        if to.stride == cols {
            return split::emit(from, to.data, streaming);
        }
        let rows = from.chunks(cols).zip(to.rows(cols));
        rows.for_each(|(from, to)| split::emit(from, to, streaming));
    }

    /// dx = D(g) of `rows`, and their part of the sum of kept g.
    #[inline(always)]
    fn drop<T: Dtype>(
        &self,
        rows: Range<usize>,
        g: &mut [f32],
        mut dx: Part<'_, T>,
        dbias: &mut Option<Vec<f32>>,
        streaming: Option<Line>,
    ) {
        let cols = self.shape.cols;
        let base = rows.start * cols;
        let unscaled = MaskParams { scale: 1.0, ..*self.params };
        self.walk(
            rows,
            |_| {},
            #[inline(always)]
            |segment, lanes| {
                let Range { start, end } = segment.elements(cols);
                let g = &mut g[start - base..end - base];
                dropout::select(&unscaled, lanes, g);
                if let Some(sums) = dbias {
                    let sums = &mut sums[segment.cols.clone()];
                    // A dropped element adds +0, which changes no sum that started from +0.
                    sums.iter_mut().zip(&*g).for_each(|(sum, g)| *sum += g);
                }
                // +0 stays +0: the scale is finite and not negative.
                g.iter_mut().for_each(|g| *g *= self.params.scale);
                split::emit(g, dx.up_to(&segment, g.len()), streaming);
            },
        );
    }
}

/// The tiles' parts of the sums that there are.
fn chunks(
    sums: &mut ParamGrads<Vec<f32>>,
    cols: usize,
    tiles: usize,
) -> Vec<ParamGrads<&mut [f32]>> {
    let chunks = |sums| split::optional_chunks(sums, cols, tiles).into_iter();
    let ParamGrads { dbias, dweight, dnorm_bias } = sums;
    let norm = chunks(dweight.as_deref_mut()).zip(chunks(dnorm_bias.as_deref_mut()));
    let parts = chunks(dbias.as_deref_mut()).zip(norm);
    parts.map(|(dbias, (dweight, dnorm_bias))| ParamGrads { dbias, dweight, dnorm_bias }).collect()
}

/// The tree above the tiles, for a gradient that was asked for.
fn finish(sums: Option<Vec<f32>>, factor: f32, grad: Option<Sum<'_, Cpu>>) {
    if let (Some(sums), Some(grad)) = (sums, grad) {
        grad.finish(sums, factor);
    }
}
