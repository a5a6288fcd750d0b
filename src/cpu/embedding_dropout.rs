//! `embedding_dropout` on the CPU: y = D(token + position + segment), and the tables' gradients.

use super::norm::{Affine, Standard};
use super::stream::Stream;
use super::sum_rows::SparseTree;
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::embedding_dropout::{
    Backward, BackwardNorm, Forward, ForwardNorm, Gradients, Ids, Lookup, Lookups, TABLES, Tables,
    check_ids,
};
use crate::ops::norm::Norm;
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Gradient, In, Matrix, read, write};
use rayon::prelude::*;

/// y = D(token + position + segment).
pub(crate) fn forward<T: Dtype>(
    pass: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let lookups = ids(&pass.lookups, cpu)?;
    let sum = Sum::new(pass.shape, &lookups, &pass.tables.try_map(|table| table.read(cpu))?);
    embed(*cpu, params, pass.shape, &sum, pass.y.write(cpu)?);
    Ok(())
}

/// The gradients of the tables.
pub(crate) fn backward<T: Dtype>(
    pass: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let lookups = ids(&pass.lookups, cpu)?;
    table_gradients(cpu, params, pass.shape, &lookups, pass.dy.read(cpu)?, pass.gradients)
}

/// y = D(norm(token + position + segment)).
pub(crate) fn forward_norm<T: Dtype>(
    pass: ForwardNorm<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let (shape, lookups) = (pass.shape, ids(&pass.lookups, cpu)?);
    let sum = Sum::new(shape, &lookups, &pass.tables.try_map(|table| table.read(cpu))?);
    let norm_bias = read(pass.norm_bias, cpu)?;
    let affine = Affine::new(pass.weight.read(cpu)?, norm_bias);
    let stats = write(pass.stats, cpu)?;
    let rows = NormRows { cpu: *cpu, params, norm: pass.norm, shape, sum };
    rows.forward(&affine, pass.y.write(cpu)?, stats);
    Ok(())
}

/// The gradients of the tables and of the norm's parameters.
pub(crate) fn backward_norm<T: Dtype>(
    pass: BackwardNorm<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let (shape, lookups) = (pass.shape, ids(&pass.lookups, cpu)?);
    let sum = Sum::new(shape, &lookups, &pass.tables.try_map(|table| table.read(cpu))?);
    let dy = pass.dy.read(cpu)?;
    let rows = NormRows { cpu: *cpu, params, norm: pass.norm, shape, sum };
    let (weight, stats) = (pass.weight.read(cpu)?, pass.stats.read(cpu)?);
    let (ds, slopes) = match dy {
        [] => Default::default(),
        _ => rows.backward(weight, stats, dy, pass.dweight.is_some()),
    };
    // Everything is kept of what is a gradient already.
    let kept = &MaskParams { threshold: 0, scale: 1.0, ..*params };
    table_gradients(cpu, kept, shape, &lookups, &ds, pass.gradients)?;
    // A parameter is an entry that every row takes.
    let all = Lookup { entries: 1, ids: Ids::Sequence(1) };
    if let Some(gradient) = pass.dweight {
        table_gradient(cpu, kept, shape, &all, &slopes, gradient)?;
    }
    if let Some(gradient) = pass.dnorm_bias {
        table_gradient(cpu, params, shape, &all, dy, gradient)?;
    }
    Ok(())
}

/// The lookups with their ids, each of which is in its table.
fn ids<'a>(lookups: &Lookups<In<'a, u32, Cpu>>, cpu: &'a Cpu) -> Result<Lookups<&'a [u32]>, Error> {
    let lookups = lookups.try_map(|ids| ids.read(cpu))?;
    check_ids(&lookups)?;
    Ok(lookups)
}

/// The tables and what each row takes from them.
struct Sum<'a, T> {
    parts: [Option<Part<'a, T>>; TABLES],
    cols: usize,
}

type Part<'a, T> = (Lookup<&'a [u32]>, &'a [T]);

impl<'a, T: Dtype> Sum<'a, T> {
    fn new(shape: Shape, lookups: &Lookups<&'a [u32]>, tables: &Tables<&'a [T]>) -> Self {
        let (lookups, tables) = (lookups.all(), tables.all());
        let part = |i: usize| lookups[i].zip(tables[i]);
        Self { parts: std::array::from_fn(part), cols: shape.cols }
    }

    /// What a row takes from each table, columns `col .. col + count`.
    #[inline(always)]
    fn entries(&self, row: usize, col: usize, count: usize) -> impl Iterator<Item = &'a [T]> {
        self.parts.iter().flatten().map(move |(lookup, table)| {
            let first = lookup.entry(row) * self.cols + col;
            &table[first..first + count]
        })
    }

    /// The sums of a row, from column `col` on.
    #[inline(always)]
    fn load(&self, row: usize, col: usize, sums: &mut [f32]) {
        for (i, entry) in self.entries(row, col, sums.len()).enumerate() {
            match i {
                0 => convert::load(entry, sums),
                _ => sums.iter_mut().zip(entry).for_each(|(s, &v)| *s += convert::widen(v)),
            }
        }
    }
}

/// y = D(sum).
fn embed<T: Dtype>(cpu: Cpu, params: &MaskParams<'_>, shape: Shape, sum: &Sum<'_, T>, y: &mut [T]) {
    let stream = Stream { cpu, params, shape, inputs: [None; 2], in_place: false };
    stream.run(
        Matrix { data: y, stride: shape.cols },
        #[inline(always)]
        |segment, lanes, _, sums| {
            sum.load(segment.row, segment.cols.start, sums);
            dropout::select(params, lanes, sums);
        },
    );
}

/// A checked call of the normalised form. A thread takes a row at a time, which stays in its caches in f32.
struct NormRows<'a, T> {
    cpu: Cpu,
    params: &'a MaskParams<'a>,
    norm: Norm,
    shape: Shape,
    sum: Sum<'a, T>,
}

impl<T: Dtype> NormRows<'_, T> {
    fn forward(&self, affine: &Affine, y: &mut [T], stats: Option<&mut [f32]>) {
        let Shape { rows, cols } = self.shape;
        let stats = stats.map(|stats| stats.as_chunks_mut::<2>().0);
        if rows == 0 || cols == 0 {
            let empty = Standard::of(&self.norm, &[]).stats();
            return stats.into_iter().flatten().for_each(|stats| *stats = empty);
        }
        // Rows of a thread's piece of work.
        let part = rows.div_ceil(4 * rayon::current_num_threads());
        let streaming = split::streaming::<T>(self.cpu, self.shape);
        let stats = split::optional_chunks(stats, part, rows.div_ceil(part)).into_par_iter();
        y.par_chunks_mut(part * cols).zip(stats).enumerate().for_each_init(
            || vec![0.0; cols],
            |values, (index, (y, stats))| {
                let mut stats = stats.into_iter().flatten();
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        for (row, y) in (index * part..).zip(y.chunks_mut(cols)) {
                            self.sum.load(row, 0, values);
                            let standard = Standard::of(&self.norm, values);
                            stats.by_ref().take(1).for_each(|stats| *stats = standard.stats());
                            standard.normalise(values, &affine.weight, affine.bias.as_deref());
                            self.drop(row, values);
                            split::emit(values, y, streaming);
                        }
                        split::fence();
                    },
                )
            },
        );
    }

    /// The gradients of the sums and, where they are asked for, h * xhat.
    fn backward(
        &self,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        with_slopes: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        let (cols, kind) = (self.shape.cols, self.norm.kind);
        let weight = convert::widened(weight);
        let (stats, _) = stats.as_chunks::<2>();
        let mut ds = vec![0.0f32; dy.len()];
        let mut slopes = vec![0.0f32; if with_slopes { dy.len() } else { 0 }];
        let slope_rows =
            split::optional_chunks(with_slopes.then_some(&mut slopes[..]), cols, self.shape.rows);
        let rows = ds.par_chunks_mut(cols).zip(slope_rows.into_par_iter()).zip(stats).enumerate();
        rows.for_each_init(
            || vec![0.0; cols],
            |values, (row, ((g, slopes), &stats))| {
                self.cpu.vectorised(
                    #[inline(always)]
                    || {
                        self.sum.load(row, 0, values);
                        let standard = Standard::saved(kind, values, stats);
                        convert::load(&dy[row * cols..(row + 1) * cols], g);
                        self.drop(row, g);
                        for (slope, (&h, &s)) in
                            slopes.into_iter().flatten().zip(g.iter().zip(&*values))
                        {
                            *slope = h * standard.apply(s);
                        }
                        g.iter_mut().zip(&weight).for_each(|(g, weight)| *g *= weight);
                        standard.gradient(kind, values, g);
                    },
                )
            },
        );
        (ds, slopes)
    }

    /// D of a row.
    #[inline(always)]
    fn drop(&self, row: usize, values: &mut [f32]) {
        let a_row = octets::count(Shape { rows: 1, ..self.shape });
        octets::walk(
            self.params,
            self.shape,
            row * a_row..(row + 1) * a_row,
            #[inline(always)]
            |_| {},
            #[inline(always)]
            |segment, lanes| {
                dropout::select(self.params, lanes, &mut values[segment.cols]);
            },
        );
    }
}

/// D(dy) as the gradients of the tables.
fn table_gradients<T: Dtype>(
    cpu: &Cpu,
    params: &MaskParams<'_>,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    dy: &[T],
    gradients: Gradients<Gradient<'_, Cpu>>,
) -> Result<(), Error> {
    for (lookup, gradient) in lookups.all().into_iter().zip(gradients.all()) {
        if let (Some(lookup), Some(gradient)) = (lookup, gradient) {
            table_gradient(cpu, params, shape, &lookup, dy, gradient)?;
        }
    }
    Ok(())
}

/// D(dy) as the gradient of one table.
fn table_gradient<T: Dtype>(
    cpu: &Cpu,
    params: &MaskParams<'_>,
    shape: Shape,
    lookup: &Lookup<&[u32]>,
    dy: &[T],
    gradient: Gradient<'_, Cpu>,
) -> Result<(), Error> {
    let (gradient, add) = gradient.into_parts();
    let gradient = gradient.write(cpu)?;
    if !add {
        gradient.fill(0.0);
    }
    if shape.rows > 0 && shape.cols > 0 {
        add_gradient(*cpu, params, shape, lookup, dy, gradient);
    }
    Ok(())
}

/// Adds D(dy) to the gradient of one table. A thread takes some columns of an entry, and adds up the
/// rows that took it; so nothing depends on who does it.
fn add_gradient<T: Dtype>(
    cpu: Cpu,
    params: &MaskParams<'_>,
    shape: Shape,
    lookup: &Lookup<&[u32]>,
    dy: &[T],
    gradient: &mut [f32],
) {
    // Entry and row: rows of an entry stand together, in ascending order. A row fits: there are at most
    // 2^32 of them.
    let mut taken: Vec<(u32, u32)> =
        (0..shape.rows).map(|row| (lookup.entry(row) as u32, row as u32)).collect();
    taken.par_sort_unstable();
    let groups: Vec<&[(u32, u32)]> = taken.chunk_by(|a, b| a.0 == b.0).collect();
    let width = columns_a_thread(shape, groups.len());
    let mut rows = gradient.chunks_mut(shape.cols);
    let mut passed = 0;
    let mut work = Vec::with_capacity(groups.len() * shape.cols.div_ceil(width));
    for group in groups {
        let entry = group[0].0 as usize;
        let row = rows.nth(entry - passed).expect("the ids were checked");
        passed = entry + 1;
        let pieces = row.chunks_mut(width).enumerate();
        work.extend(pieces.map(|(i, piece)| (group, i * width, piece)));
    }
    work.into_par_iter().for_each_init(SparseTree::new, |tree, (group, col, gradient)| {
        cpu.vectorised(
            #[inline(always)]
            || {
                let mut values = [0.0; octets::ELEMENTS];
                let values = &mut values[..gradient.len()];
                split::prefetch(gradient, 0..gradient.len());
                for &(_, row) in group {
                    load_dropped(params, shape, dy, row as usize, col, values);
                    tree.add(row as usize, values);
                }
                tree.finish(gradient);
            },
        )
    });
}

/// Columns that a thread takes of an entry: few where there are few entries (segments), so that every
/// thread has some; a block of octets at most.
fn columns_a_thread(shape: Shape, entries: usize) -> usize {
    let wanted = (4 * rayon::current_num_threads()).div_ceil(entries.max(1));
    shape.cols.div_ceil(wanted).next_multiple_of(16 * OCTET).min(octets::ELEMENTS)
}

/// D(dy) of a row, from column `col` on: at most a block of octets.
#[inline(always)]
fn load_dropped<T: Dtype>(
    params: &MaskParams<'_>,
    shape: Shape,
    dy: &[T],
    row: usize,
    col: usize,
    values: &mut [f32],
) {
    let first = row * shape.cols.div_ceil(OCTET) + col / OCTET;
    octets::walk(
        params,
        shape,
        first..first + values.len().div_ceil(OCTET),
        #[inline(always)]
        |block| Matrix { data: dy, stride: shape.cols }.prefetch(&block),
        #[inline(always)]
        |segment, lanes| {
            convert::load(&dy[segment.elements(shape.cols)], values);
            dropout::select(params, lanes, values);
        },
    );
}
