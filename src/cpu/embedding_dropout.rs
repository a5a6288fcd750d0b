//! `embedding_dropout` on the CPU: y = D(token + position + segment), and the tables' gradients.

use super::stream::Stream;
use super::sum_rows::SparseTree;
use super::{Cpu, convert, dropout, octets};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::embedding_dropout::{
    Gradients, Lens, Lookup, Lookups, TABLES, Tables, check, check_ids,
};
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

/// Adds D(dy) to the gradients of the tables.
fn add_gradients<T: Dtype>(
    cpu: Cpu,
    draw: &Draw<'_>,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    dy: &[T],
    gradients: Gradients<&mut [f32]>,
) {
    if shape.cols == 0 {
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
                tree.clear(values.len());
                for &(_, row) in group {
                    load_dropped(draw, shape, dy, row as usize, col, values);
                    tree.add(row as usize, values);
                }
                gradient.iter_mut().zip(tree.finish()).for_each(|(g, sum)| *g += sum);
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
        |_| {},
        #[inline(always)]
        |segment, lanes| {
            convert::load(&dy[segment.elements], values);
            dropout::select(draw, lanes, values);
        },
    );
}
