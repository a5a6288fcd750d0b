//! `embedding_dropout`: y = D(token + position + segment), and the tables' gradients; see
//! [`crate::ops::embedding_dropout`].

mod norm;

use super::abi::{Divisor, IndexDivisor, Mask, Octets};
use super::sort_rows::Sorted;
use super::stream::launch_stream;
use super::{Address, Device, Launch, THREADS, aligned, dropout, kernel, launch, layout, pointer};
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
    let gradients = TableGradient::all(lookups, pass.gradients, device)?;
    let scratch = match TableGradient::scratch(&gradients, shape) {
        0 => None,
        elements => Some(device.workspace(elements)?),
    };
    let tables = GivenTables { device, shape, lookups, scratch: pointer(&scratch) };
    gradients.iter().try_for_each(|gradient| {
        // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
        unsafe { tables.gradient::<T>(&mask, dy, gradient) }
    })
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
#[derive(Clone, Copy)]
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
    rows: u32,
    candidates: u32,
    by_row: u32,
    log_width: u32,
    blocks: IndexDivisor,
    padding: u32,
}
const _: () = assert!(size_of::<TableGradParams>() == 368);

/// Where the gradient of a table goes, and which of its entries the rows take.
struct TableGradient<'a, D: Device + 'a> {
    taken: Lookup<u64>,
    elements: usize,
    sum: Sum<'a, D>,
}

impl<'a, D: Device> TableGradient<'a, D> {
    fn new<'g: 'a>(
        taken: Lookup<u64>,
        gradient: Gradient<'g, D>,
        device: &'a D,
    ) -> Result<Self, Error> {
        let elements = gradient.tensor().elements();
        Ok(Self { taken, elements, sum: Sum::of(gradient, device)? })
    }

    /// Those that are asked for.
    fn all<'g: 'a>(
        lookups: Lookups<u64>,
        gradients: Gradients<Gradient<'g, D>>,
        device: &'a D,
    ) -> Result<Vec<Self>, Error> {
        let tables = lookups.all().into_iter().zip(gradients.all());
        let asked = tables.filter_map(|(taken, gradient)| Some((taken?, gradient?)));
        asked.map(|(taken, gradient)| Self::new(taken, gradient, device)).collect()
    }

    /// Elements of scratch memory that gradients need, one after the other.
    fn scratch(gradients: &[Self], shape: Shape) -> usize {
        let sorts = gradients.iter().any(|gradient| Way::new(&gradient.taken, shape).sorted);
        if sorts { Sorted::elements(shape.rows) } else { 0 }
    }
}

/// What the gradients of the tables of a call have in common.
struct GivenTables<'a, D: Device> {
    device: &'a D,
    shape: Shape,
    lookups: Lookups<u64>,
    /// [`TableGradient::scratch`] elements.
    scratch: u64,
}

impl<D: Device> GivenTables<'_, D> {
    /// The gradient of a table from D(`source`), with the mask `mask`.
    ///
    /// # Safety
    /// On the device, `source` is a tensor of T of the shape, the ids have an element a row, and the gradient as many rows as
    /// its table has entries. They and the scratch memory are valid until the kernels have run, and no two overlap.
    unsafe fn gradient<T: Dtype>(
        &self,
        mask: &Mask,
        source: u64,
        gradient: &TableGradient<'_, D>,
    ) -> Result<(), Error> {
        let &Self { device, shape, lookups, scratch } = self;
        let TableGradient { taken, elements, sum: Sum { to, add } } = gradient;
        let after = to.pointer;
        if !add {
            // SAFETY: the tensor's own length.
            unsafe { dropout::zeros(device, mask, *elements, after)? };
        }
        if shape.cols == 0 {
            return Ok(());
        }
        let way = Way::new(taken, shape);
        let octets = shape.cols.div_ceil(OCTET);
        let taken = LookupParams::new(Some(*taken));
        let [keys, order] = match way.sorted {
            true => {
                let rows = shape.rows as u32;
                // SAFETY: the caller's promise: ids that are sorted are given.
                let sorted =
                    unsafe { Sorted::new(device, scratch, taken.ids, rows, taken.entries)? };
                [sorted.keys, sorted.rows]
            }
            false => [0; 2],
        };
        let whole = aligned(shape.cols, [source, after]);
        let params = TableGradParams {
            mask: *mask,
            dy: source,
            before: after,
            after,
            taken,
            lookups: LookupParams::all(lookups),
            cols: shape.cols as u64,
            keys,
            order,
            rows: shape.rows as u32,
            candidates: way.walks as u32,
            by_row: u32::from(way.by_row),
            log_width: 0,
            blocks: IndexDivisor::new(1),
            padding: 0,
        };
        if way.walks > 0 {
            let kernel = kernel!(NAME, "embedding_dropout_table_walk", T, if whole);
            let blocks = octets.div_ceil(WALK_OCTETS);
            let params = TableGradParams { blocks: IndexDivisor::new(blocks as u32), ..params };
            let groups = way.walks.div_ceil(WALKS_A_BLOCK);
            // SAFETY: the caller's promise; the kernel reads no row beyond the last and writes no entry that is not in its table.
            unsafe { launch(device, kernel, groups.saturating_mul(blocks), &params)? };
        }
        if way.blocks > 0 {
            let kernel = kernel!(NAME, "embedding_dropout_table_grad", T, if whole);
            let width = width(octets, way.blocks);
            let blocks = octets.div_ceil(width);
            let log_width = width.ilog2();
            let params =
                TableGradParams { log_width, blocks: IndexDivisor::new(blocks as u32), ..params };
            // SAFETY: as above.
            unsafe { launch(device, kernel, way.blocks.saturating_mul(blocks), &params)? };
        }
        Ok(())
    }
}

/// How a table's gradient is computed: the top of `kernels/embedding_dropout.cu`.
struct Way {
    /// Whether the rows are sorted by their entries, of ids that are given.
    sorted: bool,
    /// Warps of the walk for each 32 octets of columns; 0: there is no walk.
    walks: usize,
    /// What there are blocks for; 0: there are none.
    blocks: usize,
    /// Whether these are rows.
    by_row: bool,
}

/// The product of rows and entries (at most as many as rows) from which on the rows are sorted. Below, all ids are read from L2
/// for each block, which takes a few microseconds: an estimate, not timed.
const SORTED_FROM: usize = 1 << 22;

/// Rows of an entry up to which a walk is short: an estimate, not timed.
const WALK_ROWS: usize = 64;

/// Octets of all entries that keep a GPU busy, however many rows each walk has: an estimate, not timed.
const WALK_ENOUGH: usize = 1 << 16;

impl Way {
    fn new(lookup: &Lookup<u64>, shape: Shape) -> Self {
        let (rows, none) = (shape.rows, Self { sorted: false, walks: 0, blocks: 0, by_row: false });
        let entries = lookup.entries.min(rows);
        match lookup.ids {
            Ids::Sequence(length) => {
                // Only the first entries are taken.
                let entries = entries.min(length);
                let octets = entries.saturating_mul(shape.cols.div_ceil(OCTET));
                match rows <= WALK_ROWS.saturating_mul(entries) || octets >= WALK_ENOUGH {
                    true => Self { walks: entries, ..none },
                    false => Self { blocks: entries, ..none },
                }
            }
            Ids::Given(_) if rows.saturating_mul(entries) >= SORTED_FROM => {
                Self { sorted: true, walks: rows, blocks: rows.div_ceil(PLACES), ..none }
            }
            Ids::Given(_) => Self { blocks: entries, by_row: rows < lookup.entries, ..none },
        }
    }
}

/// Warps of a block of the walk.
const WALKS_A_BLOCK: usize = THREADS as usize / 32;

/// Octets of columns that a warp of the walk takes.
const WALK_OCTETS: usize = 32;

/// `PLACES` in `kernels/embedding_dropout.cu`.
const PLACES: usize = 32;

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
