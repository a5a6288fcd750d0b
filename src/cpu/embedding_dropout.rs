//! `embedding_dropout` on the CPU: y = D(token + position + segment), and the tables' gradients.

use super::norm::Standard;
use super::stream::Stream;
use super::sum_rows::SparseTree;
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::embedding_dropout::{
    Gradients, Ids, Lens, Lookup, Lookups, NormGradients, TABLES, Tables, check, check_ids,
    check_norm,
};
use crate::ops::norm::{Affine, Norm};
use crate::ops::{Draw, Dropout, Shape};
use rayon::prelude::*;

/// y = D(token\[id\] + position\[pos\] + segment\[seg\]): the entries that a row looks up, added in f32 in this
/// order, times the scale, rounded once, where kept; +0 where dropped. Tables: `[entries, cols]`; ids:
/// `[rows]`; `y`: `[rows, cols]`.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit, or an id is not below its table's
/// entries (the first such id and its row are named); `y` is untouched then.
pub fn forward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
    y: &mut [T],
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.len()))?,
        tables: Some(tables.try_map(|table| Ok(table.len()))?),
        gradients: [None; TABLES],
        values: ("y", y.len()),
    };
    let draw = check(dropout, shape, &lens)?;
    check_ids(lookups)?;
    embed(*cpu, &draw, shape, &Sum::new(shape, lookups, tables), y);
    Ok(())
}

/// Adds the gradients of the tables to `gradients`: g = D(dy), in f32, summed over the rows that took an
/// entry in the order of [`sum_rows`](crate::ops::sum_rows), then one addition. Gradients: `[entries, cols]`;
/// `dy`: `[rows, cols]`. The same bits for any number of threads.
///
/// # Errors
/// As [`forward`]; the gradients are untouched then.
pub fn backward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    dy: &[T],
    gradients: Gradients<&mut [f32]>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.len()))?,
        tables: None,
        gradients: gradients.lens(|gradient| gradient.len()),
        values: ("dy", dy.len()),
    };
    let draw = check(dropout, shape, &lens)?;
    check_ids(lookups)?;
    add_gradients(*cpu, &draw, shape, lookups, dy, gradients);
    Ok(())
}

/// y = D(norm(token + position + segment)), the sum in f32, as BERT has it. Beside what [`forward`] takes, the
/// parts of `affine`: `[cols]`; `stats`, for [`backward_norm`]: `[rows, 2]`, the mean (0 for RMS) and the
/// reciprocal deviation of each row.
///
/// y is within the bound stated in the crate's tests of the exact one. A row whose deviation and epsilon
/// are 0 gives D(bias).
///
/// # Errors
/// As [`forward`], and where epsilon is negative or not finite; the outputs are untouched then.
pub fn forward_norm<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    norm: &Norm,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
    affine: &Affine<&[T]>,
    y: &mut [T],
    stats: Option<&mut [f32]>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.len()))?,
        tables: Some(tables.try_map(|table| Ok(table.len()))?),
        gradients: [None; TABLES],
        values: ("y", y.len()),
    };
    let draw = check(dropout, shape, &lens)?;
    let stats_len = stats.as_deref().map(<[f32]>::len);
    check_norm(norm, shape, &affine.map(<[T]>::len), stats_len, &NormGradients::NONE)?;
    check_ids(lookups)?;
    let rows = NormRows { cpu: *cpu, draw, norm, shape, sum: Sum::new(shape, lookups, tables) };
    rows.forward(affine, y, stats);
    Ok(())
}

/// Adds the gradients of the tables and of the norm's parameters, in f32, each in the order of
/// [`sum_rows`](crate::ops::sum_rows), then one addition. `lookups`, `tables` and `weight` are those of
/// [`forward_norm`], which gave `stats`. `dy`: `[rows, cols]`. Takes up to 8 bytes of memory an element of dy.
///
/// # Errors
/// As [`forward_norm`]; the gradients are untouched then.
pub fn backward_norm<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    norm: &Norm,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
    weight: &[T],
    stats: &[f32],
    dy: &[T],
    gradients: Gradients<&mut [f32]>,
    norm_gradients: NormGradients<&mut [f32]>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.len()))?,
        tables: Some(tables.try_map(|table| Ok(table.len()))?),
        gradients: gradients.lens(|gradient| gradient.len()),
        values: ("dy", dy.len()),
    };
    let draw = check(dropout, shape, &lens)?;
    let affine = Affine { weight: weight.len(), bias: None };
    check_norm(norm, shape, &affine, Some(stats.len()), &norm_gradients.lens(|g| g.len()))?;
    check_ids(lookups)?;
    if shape.rows == 0 || shape.cols == 0 {
        return Ok(());
    }
    let rows = NormRows { cpu: *cpu, draw, norm, shape, sum: Sum::new(shape, lookups, tables) };
    let (ds, slopes) = rows.backward(weight, stats, dy, norm_gradients.weight.is_some());
    // Everything is kept of what is a gradient already.
    let kept = Draw { threshold: 0, scale: 1.0, ..draw };
    add_gradients(*cpu, &kept, shape, lookups, &ds, gradients);
    // A parameter is an entry that every row takes.
    let all = Lookup { entries: 1, ids: Ids::Sequence(1) };
    if let Some(gradient) = norm_gradients.weight {
        add_gradient(*cpu, &kept, shape, &all, &slopes, gradient);
    }
    if let Some(gradient) = norm_gradients.bias {
        add_gradient(*cpu, &draw, shape, &all, dy, gradient);
    }
    Ok(())
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
fn embed<T: Dtype>(cpu: Cpu, draw: &Draw<'_>, shape: Shape, sum: &Sum<'_, T>, y: &mut [T]) {
    let stream = Stream { cpu, draw, shape, inputs: [None; 2], in_place: false };
    stream.run(
        y,
        #[inline(always)]
        |segment, lanes, _, sums| {
            sum.load(segment.elements.start / shape.cols, segment.col, sums);
            dropout::select(draw, lanes, sums);
        },
    );
}

/// A checked call of the normalised form. A thread takes a row at a time, which stays in its caches in f32.
struct NormRows<'a, T> {
    cpu: Cpu,
    draw: Draw<'a>,
    norm: &'a Norm,
    shape: Shape,
    sum: Sum<'a, T>,
}

impl<T: Dtype> NormRows<'_, T> {
    fn forward(&self, affine: &Affine<&[T]>, y: &mut [T], stats: Option<&mut [f32]>) {
        let Shape { rows, cols } = self.shape;
        let stats = stats.map(|stats| stats.as_chunks_mut::<2>().0);
        if rows == 0 || cols == 0 {
            let empty = Standard::of(self.norm, &[]).stats();
            return stats.into_iter().flatten().for_each(|stats| *stats = empty);
        }
        // Rows of a thread's piece of work.
        let part = rows.div_ceil(4 * rayon::current_num_threads());
        let affine = affine.map(convert::widened);
        let streaming = split::streaming(self.cpu, y);
        let stats = split::optional_chunks(stats, part, rows.div_ceil(part)).into_par_iter();
        y.par_chunks_mut(part * cols).zip(stats).enumerate().for_each_init(
            || vec![0.0; cols],
            |values, (index, (y, stats))| {
                let mut stats = stats.into_iter().flatten();
                self.cpu.run(
                    #[inline(always)]
                    || {
                        for (row, y) in (index * part..).zip(y.chunks_mut(cols)) {
                            self.sum.load(row, 0, values);
                            let standard = Standard::of(self.norm, values);
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
                self.cpu.run(
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
            &self.draw,
            self.shape,
            row * a_row..(row + 1) * a_row,
            #[inline(always)]
            |_| {},
            #[inline(always)]
            |segment, lanes| {
                let values = &mut values[segment.col..segment.col + lanes.len()];
                dropout::select(&self.draw, lanes, values);
            },
        );
    }
}

/// Adds D(dy) to the gradients of the tables.
fn add_gradients<T: Dtype>(
    cpu: Cpu,
    draw: &Draw<'_>,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    dy: &[T],
    gradients: Gradients<&mut [f32]>,
) {
    if shape.rows == 0 || shape.cols == 0 {
        return;
    }
    for (lookup, gradient) in lookups.all().into_iter().zip(gradients.all()) {
        if let (Some(lookup), Some(gradient)) = (lookup, gradient) {
            add_gradient(cpu, draw, shape, &lookup, dy, gradient);
        }
    }
}

/// Adds D(dy) to the gradient of one table. A thread takes some columns of an entry, and adds up the
/// rows that took it; so nothing depends on who does it.
fn add_gradient<T: Dtype>(
    cpu: Cpu,
    draw: &Draw<'_>,
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
        cpu.run(
            #[inline(always)]
            || {
                let mut values = [0.0; octets::ELEMENTS];
                let values = &mut values[..gradient.len()];
                split::prefetch(gradient, 0..gradient.len());
                for &(_, row) in group {
                    load_dropped(draw, shape, dy, row as usize, col, values);
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
    draw: &Draw<'_>,
    shape: Shape,
    dy: &[T],
    row: usize,
    col: usize,
    values: &mut [f32],
) {
    let first = row * shape.cols.div_ceil(OCTET) + col / OCTET;
    octets::walk(
        draw,
        shape,
        first..first + values.len().div_ceil(OCTET),
        #[inline(always)]
        |elements| split::prefetch(dy, elements),
        #[inline(always)]
        |segment, lanes| {
            convert::load(&dy[segment.elements], values);
            dropout::select(draw, lanes, values);
        },
    );
}
