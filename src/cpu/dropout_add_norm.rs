//! `dropout_add_norm` on the CPU: s = residual + D(x + bias), y = norm(s), and its gradients.
//!
//! A thread takes a few rows at a time, which stay in its nearest cache in f32 between the passes: one that
//! adds, three over each row for its statistics and the result.

use super::dropout_add::select_add;
use super::norm::{Affine, Standard};
use super::octets::Segment;
use super::split::Line;
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add_norm::{Backward, Forward, Saved};
use crate::ops::norm::Norm;
use crate::ops::sum_rows::TILE_ROWS;
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Sum, read, source, write};
use rayon::prelude::*;
use std::ops::Range;

/// s = residual + D(x + bias), y = norm(s).
pub(crate) fn forward<T: Dtype>(
    pass: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    draw: &MaskParams<'_>,
) -> Result<(), Error> {
    let add = Add {
        x: pass.x.read(cpu)?,
        bias: read(pass.bias, cpu)?,
        residual: source(pass.residual, cpu)?,
    };
    let norm_bias = read(pass.norm_bias, cpu)?;
    let affine = Affine::new(pass.weight.read(cpu)?, norm_bias);
    let s = write(pass.s, cpu)?;
    let stats = write(pass.stats, cpu)?;
    let task = Task { cpu: *cpu, draw, norm: pass.norm, shape: pass.shape };
    task.forward(&add, &affine, s, pass.y.write(cpu)?, stats);
    Ok(())
}

/// dresidual = ds + dnorm, dx = D(dresidual), and the gradients of the parameters.
pub(crate) fn backward<T: Dtype>(
    pass: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    draw: &MaskParams<'_>,
) -> Result<(), Error> {
    let add = match pass.saved {
        Saved::Sum(s) => Recomputed::Not(s.read(cpu)?),
        Saved::Inputs { x, bias, residual } => Recomputed::From(Add {
            x: x.read(cpu)?,
            bias: read(bias, cpu)?,
            residual: Some(residual.read(cpu)?),
        }),
    };
    let (stats, _) = pass.stats.read(cpu)?.as_chunks::<2>();
    let given = Given {
        s: add,
        weight: &convert::widened(pass.weight.read(cpu)?),
        stats,
        dy: pass.dy.read(cpu)?,
        ds: read(pass.ds, cpu)?,
    };
    let [dbias, dweight, dnorm_bias] = [pass.dbias, pass.dweight, pass.dnorm_bias]
        .map(|gradient| gradient.map(|gradient| Sum::of(gradient, cpu)).transpose());
    let grads = ParamGrads { dbias: dbias?, dweight: dweight?, dnorm_bias: dnorm_bias? };
    let task = Task { cpu: *cpu, draw, norm: pass.norm, shape: pass.shape };
    task.backward(&given, pass.dresidual.write(cpu)?, pass.dx.write(cpu)?, grads);
    Ok(())
}

/// A sum for each parameter whose gradient is asked for.
struct ParamGrads<G> {
    dbias: Option<G>,
    dweight: Option<G>,
    dnorm_bias: Option<G>,
}

/// What s is computed from; the residual lies in s where it is not given.
struct Add<'a, T> {
    x: &'a [T],
    bias: Option<&'a [T]>,
    residual: Option<&'a [T]>,
}

/// Where the backward pass finds s.
enum Recomputed<'a, T> {
    Not(&'a [T]),
    From(Add<'a, T>),
}

/// What a backward pass is computed from.
struct Given<'a, T> {
    s: Recomputed<'a, T>,
    weight: &'a [f32],
    stats: &'a [[f32; 2]],
    dy: &'a [T],
    ds: Option<&'a [T]>,
}

/// A checked call.
struct Task<'a> {
    cpu: Cpu,
    draw: &'a MaskParams<'a>,
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
        s: Option<&mut [T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) {
        let Shape { rows, cols } = self.shape;
        if rows == 0 || cols == 0 {
            let stats = stats.into_iter().flat_map(|stats| stats.as_chunks_mut::<2>().0);
            return stats.for_each(|stats| *stats = Standard::of(&self.norm, &[]).stats());
        }
        let (weight, norm_bias) = (&affine.weight[..], affine.bias.as_deref());
        let (part, group) = (self.part(), self.group());
        let streaming = split::streaming(self.cpu, y);
        // In place, the residual's lines are in the caches anyway.
        let streaming_s = streaming.filter(|_| add.residual.is_some());
        let s = split::optional_chunks(s, part * cols, rows.div_ceil(part)).into_par_iter();
        let stats = split::optional_chunks(stats, part * 2, rows.div_ceil(part)).into_par_iter();
        y.par_chunks_mut(part * cols).zip(s).zip(stats).enumerate().for_each_init(
            || self.scratch(),
            |values, (index, ((y, s), stats))| {
                let mut s = s.into_iter().flat_map(|s| s.chunks_mut(group * cols));
                let mut stats = stats.into_iter().flat_map(|stats| stats.as_chunks_mut::<2>().0);
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        for (index, y) in
                            (index * part..).step_by(group).zip(y.chunks_mut(group * cols))
                        {
                            let values = &mut values[..y.len()];
                            let s = s.next();
                            let rows = index..index + y.len() / cols;
                            self.add(add, rows, values, s, streaming_s);
                            for (row, y) in values.chunks_mut(cols).zip(y.chunks_mut(cols)) {
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
        mut s: Option<&mut [T]>,
        streaming: Option<Line>,
    ) {
        let base = rows.start * self.shape.cols;
        let mut left = 0;
        self.walk(
            rows,
            #[inline(always)]
            |elements| {
                split::prefetch(add.x, elements.clone());
                add.residual.into_iter().for_each(|r| split::prefetch(r, elements.clone()));
            },
            #[inline(always)]
            |segment, lanes| {
                let local = segment.elements.start - base..segment.elements.end - base;
                let x = &add.x[segment.elements.clone()];
                let bias = add.bias.map(|bias| &bias[segment.col..segment.col + x.len()]);
                let residual = match (add.residual, s.as_deref()) {
                    (Some(residual), _) => &residual[segment.elements],
                    (None, s) => &s.unwrap_or_default()[local.clone()],
                };
                let sums = &mut values[local.clone()];
                select_add(self.draw, lanes, x, bias, residual, sums);
                convert::round::<T>(sums);
                if let Some(s) = s.as_deref_mut().filter(|_| segment.last) {
                    split::emit(&values[left..local.end], &mut s[left..local.end], streaming);
                    left = local.end;
                }
            },
        );
    }

    /// Walks the octets of `rows`.
    #[inline(always)]
    fn walk(
        &self,
        rows: Range<usize>,
        prefetch: impl Fn(Range<usize>),
        body: impl FnMut(Segment, &[u16]),
    ) {
        let a_row = octets::count(Shape { rows: 1, ..self.shape });
        octets::walk(self.draw, self.shape, rows.start * a_row..rows.end * a_row, prefetch, body);
    }

    fn backward<T: Dtype>(
        &self,
        given: &Given<'_, T>,
        dresidual: &mut [T],
        dx: &mut [T],
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
        let tile_rows = if wanted.contains(&true) { TILE_ROWS } else { self.part() };
        let tiles = rows.div_ceil(tile_rows);
        let [of_dbias, of_dweight, of_dnorm_bias] =
            wanted.map(|wanted| wanted.then(|| vec![0.0f32; tiles * cols]));
        let mut sums =
            ParamGrads { dbias: of_dbias, dweight: of_dweight, dnorm_bias: of_dnorm_bias };
        let parts = dresidual
            .par_chunks_mut(tile_rows * cols)
            .zip(dx.par_chunks_mut(tile_rows * cols))
            .zip(chunks(&mut sums, cols, tiles));
        let streaming = split::streaming(self.cpu, given.dy);
        parts.enumerate().for_each_init(
            || Scratch { s: self.scratch(), g: self.scratch() },
            |scratch, (index, ((dresidual, dx), mut sums))| {
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        let first = index * tile_rows;
                        let parts = dresidual.chunks_mut(self.group() * cols);
                        let parts = parts.zip(dx.chunks_mut(self.group() * cols));
                        for (group, (dresidual, dx)) in parts.enumerate() {
                            let first = first + group * self.group();
                            let rows = first..first + dx.len() / cols;
                            let g = self.gradient(given, rows.clone(), scratch, &mut sums);
                            split::emit(g, dresidual, streaming);
                            self.drop(rows, g, dx, &mut sums.dbias, streaming);
                        }
                        split::fence();
                    },
                );
            },
        );
        finish(sums.dbias, self.draw.scale, dbias);
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
        sums: &mut ParamGrads<&mut [f32]>,
    ) -> &'s mut [f32] {
        let cols = self.shape.cols;
        let elements = rows.start * cols..rows.end * cols;
        let (s, g) = (&mut scratch.s[..elements.len()], &mut scratch.g[..elements.len()]);
        split::prefetch(given.dy, elements.clone());
        match &given.s {
            Recomputed::Not(saved) => convert::load(&saved[elements.clone()], s),
            Recomputed::From(add) => self.add(add, rows.clone(), s, None, None),
        }
        convert::load(&given.dy[elements.clone()], g);
        for (row, (s, g)) in rows.zip(s.chunks(cols).zip(g.chunks_mut(cols))) {
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
            g.iter_mut().zip(&ds[elements]).for_each(|(g, &ds)| *g += convert::widen(ds));
        }
        g
    }

    /// dx = D(g) of `rows`, and their part of the sum of kept g.
    #[inline(always)]
    fn drop<T: Dtype>(
        &self,
        rows: Range<usize>,
        g: &mut [f32],
        dx: &mut [T],
        dbias: &mut Option<&mut [f32]>,
        streaming: Option<Line>,
    ) {
        let base = rows.start * self.shape.cols;
        let unscaled = MaskParams { scale: 1.0, ..*self.draw };
        self.walk(
            rows,
            |_| {},
            #[inline(always)]
            |segment, lanes| {
                let local = segment.elements.start - base..segment.elements.end - base;
                let g = &mut g[local.clone()];
                dropout::select(&unscaled, lanes, g);
                if let Some(sums) = dbias {
                    let sums = &mut sums[segment.col..segment.col + g.len()];
                    // A dropped element adds +0, which changes no sum that started from +0.
                    sums.iter_mut().zip(&*g).for_each(|(sum, g)| *sum += g);
                }
                // +0 stays +0: the scale is finite and not negative.
                g.iter_mut().for_each(|g| *g *= self.draw.scale);
                split::emit(g, &mut dx[local], streaming);
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
