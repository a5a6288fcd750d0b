//! `embedding_dropout`: y = D(token + position + segment), and the tables' gradients; see
//! [`crate::ops::embedding_dropout`].

mod norm;

use super::abi::{Divisor, IndexDivisor, Mask, Octets};
use super::sort_rows::Sorted;
use super::stream::launch_stream;
use super::{Address, Device, Launch, THREADS, aligned, dropout, kernel, launch, layout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::Shape;
use crate::ops::embedding_dropout::{
    Backward, Forward, Gradients, Ids, Lookup, Lookups, NAME, TABLES, Tables,
};
use crate::tensor::{Gradient, In, Out, Sum};
pub(crate) use norm::{backward_norm, forward_norm};

/// `Lookup` in `kernels/embedding.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct LookupParams {
    ids: u64,
    entries: u32,
    sequence: Divisor,
}
const _: () = assert!(size_of::<LookupParams>() == 24);

impl LookupParams {
    /// Where there is no table, every row takes entry 0 of one.
    fn new(lookup: Option<Lookup<u64>>) -> Self {
        let absent = Lookup { entries: 1, ids: Ids::Sequence(1) };
        let Lookup { entries, ids } = lookup.unwrap_or(absent);
        let clamped = |n: usize| n.min(u32::MAX as usize) as u32;
        let (ids, length) = match ids {
            Ids::Given(ids) => (ids, 1),
            Ids::Sequence(length) => (0, clamped(length).max(1)),
        };
        Self { ids, entries: clamped(entries), sequence: Divisor::new(length) }
    }

    fn all(lookups: Lookups<u64>) -> [Self; TABLES] {
        lookups.all().map(Self::new)
    }
}

/// `Embeddings` in `kernels/embedding.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Embeddings {
    lookups: [LookupParams; TABLES],
    tables: [u64; TABLES],
    cols: u64,
}

impl Embeddings {
    fn new(lookups: Lookups<u64>, tables: [u64; TABLES], cols: usize) -> Self {
        Self { lookups: LookupParams::all(lookups), tables, cols: cols as u64 }
    }
}

/// `EmbeddingParams` in `kernels/embedding_dropout.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    embeddings: Embeddings,
    y: u64,
    report: u64,
}
const _: () = assert!(size_of::<ForwardParams>() == 336);

/// y = D(token + position + segment).
pub(crate) fn forward<T: Dtype, D: Device>(
    pass: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    check_rows(shape, u32::MAX as usize)?;
    let mut held = Held(Vec::new());
    let lookups = held.lookups(&pass.lookups, device)?;
    let tables = held.tables(&pass.tables, device)?;
    let y = held.hold(pass.y.write(device))?;
    let report = held.report(pass.report, device)?;
    let [token, position, segment] = tables;
    let kernel = kernel!(NAME, "embedding_dropout", T, in layout::<T>(shape, &[], &[token, position, segment, y]));
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel reads no entry
    // that is not in its table.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| {
            // The rows of a part are known to its mask.
            let tables = tables.map(|table| part.of_row::<T>(table));
            ForwardParams {
                mask,
                octets: part.octets,
                embeddings: Embeddings::new(lookups, tables, shape.cols),
                y: part.of_tensor::<T>(y),
                report,
            }
        })
    }
}

fn check_rows(shape: Shape, most: usize) -> Result<(), Error> {
    if shape.rows <= most || shape.cols == 0 {
        return Ok(());
    }
    Err(Error::argument(NAME, "shape", format!("at most {most} rows"), shape.rows))
}

/// The gradients of the tables.
pub(crate) fn backward<T: Dtype, D: Device>(
    pass: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    check_rows(shape, TABLE_GRAD_ROWS)?;
    let mut held = Held(Vec::new());
    let lookups = held.lookups(&pass.lookups, device)?;
    let dy = held.hold(pass.dy.read(device))?;
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe { table_gradients::<T, D>(device, &mask, shape, lookups, dy, pass.gradients) }
}

/// Tensors that are held until the pass has been submitted.
struct Held<'a, D: Device + 'a>(Vec<Address<'a, D>>);

impl<'a, D: Device> Held<'a, D> {
    fn hold(&mut self, tensor: Result<Address<'a, D>, Error>) -> Result<u64, Error> {
        let address = tensor?;
        let pointer = address.pointer;
        self.0.push(address);
        Ok(pointer)
    }

    fn lookups(
        &mut self,
        lookups: &Lookups<In<'a, u32, D>>,
        device: &'a D,
    ) -> Result<Lookups<u64>, Error> {
        lookups.try_map(|ids| self.hold(ids.read(device)))
    }

    fn tables<T>(
        &mut self,
        tables: &Tables<In<'a, T, D>>,
        device: &'a D,
    ) -> Result<[u64; TABLES], Error> {
        let tables = tables.try_map(|table| self.hold(table.read(device)))?;
        Ok(tables.all().map(|table| table.unwrap_or(0)))
    }

    /// The report, or a place for what nobody asks for.
    fn report<'t: 'a>(
        &mut self,
        report: Option<Out<'t, u32, D>>,
        device: &'a D,
    ) -> Result<u64, Error> {
        match report {
            Some(report) => self.hold(report.write(device)),
            None => self.hold(device.workspace(1)),
        }
    }
}

/// Rows that the tree of `kernels/embedding_dropout.cu` has levels for.
const TABLE_GRAD_ROWS: usize = 1 << 24;

/// `TableGradParams` in `kernels/embedding_dropout.cu`.
#[repr(C)]
struct TableGradParams {
    mask: Mask,
    dy: u64,
    before: u64,
    after: u64,
    taken: LookupParams,
    lookups: [LookupParams; TABLES],
    cols: u64,
    keys: u64,
    order: u64,
    starts: u64,
    rows: u32,
    by_place: u32,
    log_width: u32,
    blocks: IndexDivisor,
}
const _: () = assert!(size_of::<TableGradParams>() == 368);

/// The gradients of the tables from D(`dy`), with the mask `mask`.
unsafe fn table_gradients<T: Dtype, D: Device>(
    device: &D,
    mask: &Mask,
    shape: Shape,
    lookups: Lookups<u64>,
    dy: u64,
    gradients: Gradients<Gradient<'_, D>>,
) -> Result<(), Error> {
    for (taken, gradient) in lookups.all().into_iter().zip(gradients.all()) {
        let (Some(taken), Some(gradient)) = (taken, gradient) else { continue };
        // SAFETY: the caller's promise.
        unsafe { table_gradient::<T, D>(device, mask, shape, lookups, taken, dy, gradient)? };
    }
    Ok(())
}

/// The gradient of the entries that `taken` says, from D(`source`).
unsafe fn table_gradient<T: Dtype, D: Device>(
    device: &D,
    mask: &Mask,
    shape: Shape,
    lookups: Lookups<u64>,
    taken: Lookup<u64>,
    source: u64,
    gradient: Gradient<'_, D>,
) -> Result<(), Error> {
    let elements = gradient.tensor().elements();
    let Sum { to: address, add } = Sum::of(gradient, device)?;
    let gradient = address.pointer;
    if !add {
        // SAFETY: the tensor's own length.
        unsafe { dropout::zeros(device, mask, elements, gradient)? };
    }
    let candidates = Candidates::new(&taken, shape.rows);
    let octets = shape.cols.div_ceil(OCTET);
    let width = width(octets, candidates.count);
    let blocks = octets.div_ceil(width);
    if blocks == 0 || candidates.count == 0 {
        return Ok(());
    }
    let kernel = kernel!(NAME, "embedding_dropout_table_grad", T, if aligned(shape.cols, [source, gradient]));
    let taken = LookupParams::new(Some(taken));
    let sorted = match candidates.are_sorted {
        // SAFETY: the caller's promise: ids that are sorted are given.
        true => Some(unsafe { Sorted::new(device, taken.ids, shape.rows as u32, taken.entries)? }),
        false => None,
    };
    let order = sorted.as_ref().map(|sorted| [sorted.keys, sorted.rows, sorted.starts]);
    let [keys, order, starts] = order.unwrap_or([0; 3]);
    let params = TableGradParams {
        mask: *mask,
        dy: source,
        before: gradient,
        after: gradient,
        taken,
        lookups: LookupParams::all(lookups),
        cols: shape.cols as u64,
        keys,
        order,
        starts,
        rows: shape.rows as u32,
        by_place: u32::from(candidates.by_place),
        log_width: width.ilog2(),
        blocks: IndexDivisor::new(blocks as u32),
    };
    // SAFETY: the caller's promise; the kernel reads no row beyond the last and writes no entry that is
    // not in its table.
    unsafe { launch(device, kernel, candidates.count.saturating_mul(blocks), &params) }
}

/// What there are blocks for: the entries of a table or, where these are more, the rows.
struct Candidates {
    count: usize,
    /// Whether the rows are sorted by their entries, of ids that are given.
    are_sorted: bool,
    by_place: bool,
}

/// Rows times candidates from which on the rows are sorted. Below, all ids are read from L2 for each candidate, which takes
/// a few microseconds: an estimate, not timed.
const SORTED_FROM: usize = 1 << 22;

impl Candidates {
    fn new(lookup: &Lookup<u64>, rows: usize) -> Self {
        // Of a table of positions only the first entries are taken.
        let entries = match lookup.ids {
            Ids::Given(_) => lookup.entries,
            Ids::Sequence(length) => lookup.entries.min(length).min(rows),
        };
        let count = rows.min(entries);
        let given = matches!(lookup.ids, Ids::Given(_));
        let are_sorted = given && rows.saturating_mul(count) >= SORTED_FROM;
        Self { count, are_sorted, by_place: rows < entries }
    }
}

/// Blocks that are enough for a GPU.
const ENOUGH_BLOCKS: usize = 512;

/// Octets of columns that a block takes, a power of two: as many as leave enough blocks, since each
/// block looks at all ids; at least 64 bytes of a row in 16-bit storage.
fn width(octets: usize, candidates: usize) -> usize {
    let mut width = octets.next_power_of_two().clamp(4, THREADS as usize);
    while width > 4 && candidates.saturating_mul(octets.div_ceil(width)) < ENOUGH_BLOCKS {
        width /= 2;
    }
    width
}
