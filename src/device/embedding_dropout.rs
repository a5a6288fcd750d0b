//! `embedding_dropout`: y = D(token + position + segment), and the tables' gradients; see
//! [`crate::ops::embedding_dropout`].

use super::{Address, Call, Device, Readable, Writable};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::embedding_dropout::{Gradients, Lens, Lookups, NAME, TABLES, Tables, check};
use crate::ops::{Dropout, Shape, check_len};

/// What each row looks up, with the ids in device memory.
pub type DeviceLookups<'a, D> = Lookups<&'a dyn Readable<u32, D>>;

/// The tables in device memory.
pub type DeviceTables<'a, T, D> = Tables<&'a dyn Readable<T, D>>;

/// The tables' gradients in device memory.
pub type DeviceGradients<'a, D> = Gradients<&'a mut dyn Writable<f32, D>>;

/// y = D(token\[id\] + position\[pos\] + segment\[seg\]). Tables: `[entries, cols]`; ids: `[rows]`; `y`: `[rows, cols]`.
///
/// The host does not see the ids. A row with an id that is in no table is zeros, and the smallest such
/// local row is left in `report`, one u32 that holds `u32::MAX` before the call; read it back and give it to
/// [`check_report`](crate::ops::embedding_dropout::check_report).
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn forward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    lookups: &DeviceLookups<'_, D>,
    tables: &DeviceTables<'_, T, D>,
    y: &mut dyn Writable<T, D>,
    report: &mut dyn Writable<u32, D>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.elements()))?,
        tables: Some(tables.try_map(|table| Ok(table.elements()))?),
        gradients: [None; TABLES],
        values: ("y", y.elements()),
    };
    check(dropout, shape, &lens)?;
    check_len(NAME, "report", 1, report.elements())?;
    let key = call.resident(NAME, shape.rows)?;
    let mut held = Held(Vec::new());
    let tensors = raw::Forward {
        lookups: lookups.try_map(|ids| held.hold(ids.read(call.device)))?,
        tables: tables.try_map(|table| held.hold(table.read(call.device)))?,
        y: held.hold(y.write(call.device))?,
        report: held.hold(report.write(call.device))?,
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe { raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), tensors) }
}

/// Adds the gradients of the tables to `gradients`: g = D(dy), in f32, summed over the rows that took an
/// entry in the order of [`sum_rows`](crate::ops::sum_rows), then one addition: the same bits in every run
/// and on every backend. Gradients: `[entries, cols]`; `dy`: `[rows, cols]`. At most 2^24 rows.
///
/// A row with an id that is in no table adds nothing: what [`forward`] reported is not reported again.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    lookups: &DeviceLookups<'_, D>,
    dy: &dyn Readable<T, D>,
    gradients: DeviceGradients<'_, D>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.elements()))?,
        tables: None,
        gradients: gradients.lens(|gradient| gradient.elements()),
        values: ("dy", dy.elements()),
    };
    check(dropout, shape, &lens)?;
    let key = call.resident(NAME, shape.rows)?;
    let mut held = Held(Vec::new());
    let tensors = raw::Backward {
        lookups: lookups.try_map(|ids| held.hold(ids.read(call.device)))?,
        dy: held.hold(dy.read(call.device))?,
        gradients: gradients.try_map(|gradient| held.hold(gradient.write(call.device)))?,
    };
    // SAFETY: as in `forward`.
    unsafe { raw::backward::<T, D>(call.device, dropout, shape, key.addresses(), tensors) }
}

/// Tensors that are held until the call has been submitted.
struct Held<'a, D: Device>(Vec<Address<'a, D>>);

impl<'a, D: Device> Held<'a, D> {
    fn hold(&mut self, tensor: Result<Address<'a, D>, Error>) -> Result<u64, Error> {
        let address = tensor?;
        let pointer = address.pointer;
        self.0.push(address);
        Ok(pointer)
    }
}

/// The same on bare addresses.
pub mod raw {
    use super::NAME;
    use crate::device::abi::{Divisor, IndexDivisor, Mask, Octets, parts};
    use crate::device::{Device, KeyAddresses, OCTETS_A_BLOCK, THREADS, aligned, kernel, launch};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::mask::OCTET;
    use crate::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, TABLES, Tables};
    use crate::ops::{Dropout, Shape};

    /// Addresses of a forward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Forward {
        /// `shape.rows` u32 each, read.
        pub lookups: Lookups<u64>,
        /// `entries * shape.cols` elements each, read: a table for each lookup.
        pub tables: Tables<u64>,
        /// `shape.rows * shape.cols` elements, written.
        pub y: u64,
        /// One u32, lowered to the smallest local row with an id that is in no table.
        pub report: u64,
    }

    /// Addresses of a backward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Backward {
        /// `shape.rows` u32 each, read.
        pub lookups: Lookups<u64>,
        /// The gradient of the result, `shape.rows * shape.cols` elements, read.
        pub dy: u64,
        /// `entries * shape.cols` f32 each, read and written; each has its lookup.
        pub gradients: Gradients<u64>,
    }

    /// `Lookup` in `kernels/embedding_dropout.cu`.
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

    /// `Embeddings` in `kernels/embedding_dropout.cu`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Embeddings {
        lookups: [LookupParams; TABLES],
        tables: [u64; TABLES],
        cols: u64,
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
    const _: () = assert!(size_of::<ForwardParams>() == 312);

    /// y = D(token + position + segment).
    ///
    /// # Safety
    /// On `device`, the addresses in `tensors` and `key` are valid as [`Forward`] and [`KeyAddresses`] say
    /// until the kernel has run, and aligned to their element; none that is written overlaps another.
    /// The ids may be any numbers.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        tensors: Forward,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        check_rows(shape, u32::MAX as usize)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        let tables = tensors.tables.all().map(|table| table.unwrap_or(0));
        let [token, position, segment] = tables;
        let kernel = if aligned(shape.cols, &[token, position, segment, tensors.y]) {
            kernel!(NAME, "embedding_dropout", T)
        } else {
            kernel!(NAME, "embedding_dropout_any", T)
        };
        let size = size_of::<T>() as u64;
        for part in parts(shape) {
            // The rows of a part are known to its mask.
            let columns = 8 * u64::from(part.octet) * size;
            let embeddings = Embeddings {
                lookups: LookupParams::all(tensors.lookups),
                tables: tables.map(|table| if table == 0 { 0 } else { table + columns }),
                cols: shape.cols as u64,
            };
            let params = ForwardParams {
                mask: mask.advanced(part.row, part.octet),
                octets: part.octets,
                embeddings,
                y: tensors.y + part.first_element * size,
                report: tensors.report,
            };
            let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
            // SAFETY: the caller's promise; the parts stay within the tensors, and the kernel reads no
            // entry that is not in its table.
            unsafe { launch(device, kernel, blocks, &params)? };
        }
        Ok(())
    }

    fn check_rows(shape: Shape, most: usize) -> Result<(), Error> {
        if shape.rows <= most {
            return Ok(());
        }
        Err(Error::argument(NAME, "shape", format!("at most {most} rows"), shape.rows))
    }

    /// Adds the gradients of the tables.
    ///
    /// # Safety
    /// As [`forward`], with [`Backward`] in place of [`Forward`].
    ///
    /// # Errors
    /// As [`forward`].
    pub unsafe fn backward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        tensors: Backward,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        check_rows(shape, TABLE_GRAD_ROWS)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        // SAFETY: the caller's promise.
        unsafe { table_gradients::<T, D>(device, &mask, shape, tensors) }
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
        lookups: [LookupParams; TABLES],
        cols: u64,
        rows: u32,
        table: u32,
        by_row: u32,
        log_width: u32,
        blocks: IndexDivisor,
        unused: u32,
    }
    const _: () = assert!(size_of::<TableGradParams>() == 304);

    /// Adds the gradients of the tables, with the mask `mask`.
    unsafe fn table_gradients<T: Dtype, D: Device>(
        device: &D,
        mask: &Mask,
        shape: Shape,
        tensors: Backward,
    ) -> Result<(), Error> {
        let lookups = tensors.lookups.all();
        for (table, gradient) in tensors.gradients.all().into_iter().enumerate() {
            let (Some(lookup), Some(gradient)) = (lookups[table], gradient) else { continue };
            let candidates = Candidates::new(&lookup, shape.rows);
            let width = width(shape.cols.div_ceil(OCTET), candidates.count);
            let blocks = shape.cols.div_ceil(OCTET).div_ceil(width);
            if blocks * shape.rows == 0 {
                continue;
            }
            let kernel = if aligned(shape.cols, &[tensors.dy, gradient]) {
                kernel!(NAME, "embedding_dropout_table_grad", T)
            } else {
                kernel!(NAME, "embedding_dropout_table_grad_any", T)
            };
            let params = TableGradParams {
                mask: *mask,
                dy: tensors.dy,
                before: gradient,
                after: gradient,
                lookups: LookupParams::all(tensors.lookups),
                cols: shape.cols as u64,
                rows: shape.rows as u32,
                table: table as u32,
                by_row: u32::from(candidates.by_row),
                log_width: width.ilog2(),
                blocks: IndexDivisor::new(blocks as u32),
                unused: 0,
            };
            // SAFETY: the caller's promise; the kernel reads no row beyond the last and writes no entry
            // that is not in its table.
            unsafe { launch(device, kernel, candidates.count.saturating_mul(blocks), &params)? };
        }
        Ok(())
    }

    /// What there are blocks for: the entries of a table or, where these are more, the rows.
    struct Candidates {
        by_row: bool,
        count: usize,
    }

    impl Candidates {
        fn new(lookup: &Lookup<u64>, rows: usize) -> Self {
            // Of a table of positions only the first entries are taken.
            let entries = match lookup.ids {
                Ids::Given(_) => lookup.entries,
                Ids::Sequence(length) => lookup.entries.min(length),
            };
            Self { by_row: rows < entries, count: rows.min(entries) }
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
}
