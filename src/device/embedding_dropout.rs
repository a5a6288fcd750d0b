//! `embedding_dropout`: y = D(token + position + segment), and the tables' gradients; see
//! [`crate::ops::embedding_dropout`].

use super::{Address, Call, Device, Readable, Writable};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::embedding_dropout::{
    Gradients, Lens, Lookups, NAME, NormGradients, TABLES, Tables, check, check_norm, workspace_len,
};
use crate::ops::norm::{Affine, Norm};
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

/// y = D(norm(token + position + segment)), the sum in f32, as BERT has it. Beside what [`forward`] takes, the
/// parts of `affine`: `[cols]`; `stats`, for [`backward_norm`]: `[rows, 2]`, the mean (0 for RMS) and the
/// reciprocal deviation of each row. Of a row with an id that is in no table they are 0.
///
/// # Errors
/// As [`forward`], and where epsilon is negative or not finite.
pub fn forward_norm<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    norm: &Norm,
    shape: Shape,
    lookups: &DeviceLookups<'_, D>,
    tables: &DeviceTables<'_, T, D>,
    affine: &Affine<&dyn Readable<T, D>>,
    y: &mut dyn Writable<T, D>,
    stats: Option<&mut dyn Writable<f32, D>>,
    report: &mut dyn Writable<u32, D>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.elements()))?,
        tables: Some(tables.try_map(|table| Ok(table.elements()))?),
        gradients: [None; TABLES],
        values: ("y", y.elements()),
    };
    check(dropout, shape, &lens)?;
    let stats_len = stats.as_ref().map(|stats| stats.elements());
    let affine_len = affine.map(|values| values.elements());
    check_norm(norm, shape, &affine_len, stats_len, &NormGradients::NONE)?;
    check_len(NAME, "report", 1, report.elements())?;
    let key = call.resident(NAME, shape.rows)?;
    let mut held = Held(Vec::new());
    let tensors = raw::ForwardNorm {
        lookups: lookups.try_map(|ids| held.hold(ids.read(call.device)))?,
        tables: tables.try_map(|table| held.hold(table.read(call.device)))?,
        affine: affine.try_map(|values| held.hold(values.read(call.device)))?,
        y: held.hold(y.write(call.device))?,
        stats: stats.map(|stats| held.hold(stats.write(call.device))).transpose()?,
        report: held.hold(report.write(call.device))?,
    };
    // SAFETY: as in `forward`.
    unsafe {
        raw::forward_norm::<T, D>(call.device, dropout, norm, shape, key.addresses(), tensors)
    }
}

/// Adds the gradients of the tables and of the norm's parameters, in f32, each in the order of
/// [`sum_rows`](crate::ops::sum_rows), then one addition. `lookups`, `tables` and `weight` are those of
/// [`forward_norm`], which gave `stats`. `dy`: `[rows, cols]`; `workspace`:
/// [`workspace_len`] elements, whose contents do not matter. At most 2^24 rows.
///
/// # Errors
/// As [`forward_norm`].
pub fn backward_norm<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    norm: &Norm,
    shape: Shape,
    lookups: &DeviceLookups<'_, D>,
    tables: &DeviceTables<'_, T, D>,
    weight: &dyn Readable<T, D>,
    stats: &dyn Readable<f32, D>,
    dy: &dyn Readable<T, D>,
    gradients: DeviceGradients<'_, D>,
    norm_gradients: NormGradients<&mut dyn Writable<f32, D>>,
    workspace: &mut dyn Writable<f32, D>,
) -> Result<(), Error> {
    let lens = Lens {
        lookups: lookups.try_map(|ids| Ok(ids.elements()))?,
        tables: Some(tables.try_map(|table| Ok(table.elements()))?),
        gradients: gradients.lens(|gradient| gradient.elements()),
        values: ("dy", dy.elements()),
    };
    check(dropout, shape, &lens)?;
    let affine = Affine { weight: weight.elements(), bias: None };
    let gradient_lens = norm_gradients.lens(|gradient| gradient.elements());
    check_norm(norm, shape, &affine, Some(stats.elements()), &gradient_lens)?;
    check_len(NAME, "workspace", workspace_len(shape), workspace.elements())?;
    let key = call.resident(NAME, shape.rows)?;
    let mut held = Held(Vec::new());
    let tensors = raw::BackwardNorm {
        lookups: lookups.try_map(|ids| held.hold(ids.read(call.device)))?,
        tables: tables.try_map(|table| held.hold(table.read(call.device)))?,
        weight: held.hold(weight.read(call.device))?,
        stats: held.hold(stats.read(call.device))?,
        dy: held.hold(dy.read(call.device))?,
        gradients: gradients.try_map(|gradient| held.hold(gradient.write(call.device)))?,
        norm_gradients: norm_gradients
            .try_map(|gradient| held.hold(gradient.write(call.device)))?,
        workspace: held.hold(workspace.write(call.device))?,
    };
    // SAFETY: as in `forward`.
    unsafe {
        raw::backward_norm::<T, D>(call.device, dropout, norm, shape, key.addresses(), tensors)
    }
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
    use crate::device::abi::{Divisor, IndexDivisor, Mask, Octets, RowNorm, parts};
    use crate::device::rows::{Forms, forms, launch_rows};
    use crate::device::{Device, KeyAddresses, OCTETS_A_BLOCK, THREADS, aligned, kernel, launch};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::mask::OCTET;
    use crate::ops::embedding_dropout::{
        Gradients, Ids, Lookup, Lookups, NormGradients, TABLES, Tables,
    };
    use crate::ops::norm::{Affine, Norm};
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
    const _: () = assert!(size_of::<ForwardParams>() == 328);

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
        if shape.rows <= most || shape.cols == 0 {
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
        let Backward { lookups, dy, gradients } = tensors;
        // SAFETY: the caller's promise.
        unsafe { table_gradients::<T, D>(device, &mask, shape, lookups, dy, gradients) }
    }

    /// Addresses of a forward call of the normalised form.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct ForwardNorm {
        /// As in [`Forward`].
        pub lookups: Lookups<u64>,
        /// As in [`Forward`].
        pub tables: Tables<u64>,
        /// `shape.cols` elements each, read.
        pub affine: Affine<u64>,
        /// As in [`Forward`].
        pub y: u64,
        /// Two f32 a row, written.
        pub stats: Option<u64>,
        /// As in [`Forward`].
        pub report: u64,
    }

    /// Addresses of a backward call of the normalised form.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct BackwardNorm {
        /// As in [`Backward`].
        pub lookups: Lookups<u64>,
        /// As in [`Forward`].
        pub tables: Tables<u64>,
        /// `shape.cols` elements, read.
        pub weight: u64,
        /// Two f32 a row, read.
        pub stats: u64,
        /// As in [`Backward`].
        pub dy: u64,
        /// As in [`Backward`].
        pub gradients: Gradients<u64>,
        /// `shape.cols` f32 each, read and written.
        pub norm_gradients: NormGradients<u64>,
        /// [`workspace_len`](crate::ops::embedding_dropout::workspace_len) f32, written and read.
        pub workspace: u64,
    }

    /// `EmbeddingNormParams` in `kernels/embedding_dropout.cu`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct NormParams {
        mask: Mask,
        embeddings: Embeddings,
        weight: u64,
        norm_bias: u64,
        y: u64,
        stats_out: u64,
        report: u64,
        stats: u64,
        dy: u64,
        ds: u64,
        slopes: u64,
        norm: RowNorm,
        rows: u32,
    }
    const _: () = assert!(size_of::<NormParams>() == 376);

    /// y = D(norm(token + position + segment)).
    ///
    /// # Safety
    /// As [`forward`], with [`ForwardNorm`] in place of [`Forward`].
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape`, `norm` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward_norm<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        norm: &Norm,
        shape: Shape,
        key: KeyAddresses,
        tensors: ForwardNorm,
    ) -> Result<(), Error> {
        check_rows(shape, u32::MAX as usize)?;
        let ForwardNorm { lookups, tables, affine, y, stats, report } = tensors;
        let params = NormParams {
            weight: affine.weight,
            norm_bias: affine.bias.unwrap_or(0),
            y,
            stats_out: stats.unwrap_or(0),
            report,
            ..norm_params(dropout, norm, shape, key, lookups, tables)?
        };
        let forms = forms!(NAME, "embedding_dropout_norm_forward", T);
        // SAFETY: the caller's promise.
        unsafe { launch_norm(device, forms, shape, params) }
    }

    /// Adds the gradients of the tables and of the norm's parameters.
    ///
    /// # Safety
    /// As [`forward`], with [`BackwardNorm`] in place of [`Forward`].
    ///
    /// # Errors
    /// As [`forward_norm`].
    pub unsafe fn backward_norm<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        norm: &Norm,
        shape: Shape,
        key: KeyAddresses,
        tensors: BackwardNorm,
    ) -> Result<(), Error> {
        check_rows(shape, TABLE_GRAD_ROWS)?;
        let BackwardNorm { lookups, tables, weight, stats, dy, workspace, .. } = tensors;
        let BackwardNorm { gradients, norm_gradients, .. } = tensors;
        let slopes = workspace + (shape.elements(NAME)? * size_of::<f32>()) as u64;
        let params = NormParams {
            weight,
            stats,
            dy,
            ds: workspace,
            slopes: if norm_gradients.weight.is_some() { slopes } else { 0 },
            ..norm_params(dropout, norm, shape, key, lookups, tables)?
        };
        let forms = forms!(NAME, "embedding_dropout_norm_backward", T);
        // Everything is kept of what is a gradient already.
        let kept = params.mask.all_kept();
        // SAFETY: the caller's promise; the kernels that read the workspace run behind the one that
        // writes it, and read no row that it left out.
        unsafe {
            launch_norm(device, forms, shape, params)?;
            table_gradients::<f32, D>(device, &kept, shape, lookups, workspace, gradients)?;
            if let Some(gradient) = norm_gradients.weight {
                let all = Gradient { taken: EVERY_ROW, source: slopes, gradient };
                table_gradient::<f32, D>(device, &kept, shape, lookups, all)?;
            }
            if let Some(gradient) = norm_gradients.bias {
                let all = Gradient { taken: EVERY_ROW, source: dy, gradient };
                table_gradient::<T, D>(device, &params.mask, shape, lookups, all)?;
            }
        }
        Ok(())
    }

    /// A parameter is an entry that every row takes.
    const EVERY_ROW: Lookup<u64> = Lookup { entries: 1, ids: Ids::Sequence(1) };

    /// What both passes of the normalised form have; its tensors are still to be filled in.
    fn norm_params(
        dropout: &Dropout,
        norm: &Norm,
        shape: Shape,
        key: KeyAddresses,
        lookups: Lookups<u64>,
        tables: Tables<u64>,
    ) -> Result<NormParams, Error> {
        shape.elements(NAME)?;
        norm.check(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        Ok(NormParams {
            mask: Mask::new(NAME, &draw, key.stream_number, key.row_list)?,
            embeddings: Embeddings {
                lookups: LookupParams::all(lookups),
                tables: tables.all().map(|table| table.unwrap_or(0)),
                cols: shape.cols as u64,
            },
            weight: 0,
            norm_bias: 0,
            y: 0,
            stats_out: 0,
            report: 0,
            stats: 0,
            dy: 0,
            ds: 0,
            slopes: 0,
            norm: RowNorm::new(norm, shape.cols),
            rows: 0,
        })
    }

    unsafe fn launch_norm<D: Device>(
        device: &D,
        forms: Forms,
        shape: Shape,
        params: NormParams,
    ) -> Result<(), Error> {
        // Rows without columns still have statistics.
        if shape.cols == 0 && params.stats_out == 0 {
            return Ok(());
        }
        let [token, position, segment] = params.embeddings.tables;
        let NormParams { weight, norm_bias, y, dy, ds, slopes, .. } = params;
        let tensors = [token, position, segment, weight, norm_bias, y, dy, ds, slopes];
        let part =
            |first, rows| NormParams { mask: params.mask.advanced(first, 0), rows, ..params };
        // SAFETY: the caller's promise.
        unsafe { launch_rows(device, forms, shape, &tensors, part) }
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
        rows: u32,
        by_row: u32,
        log_width: u32,
        blocks: IndexDivisor,
    }
    const _: () = assert!(size_of::<TableGradParams>() == 336);

    /// Adds D(`dy`), with the mask `mask`, to the gradients of the tables.
    unsafe fn table_gradients<T: Dtype, D: Device>(
        device: &D,
        mask: &Mask,
        shape: Shape,
        lookups: Lookups<u64>,
        dy: u64,
        gradients: Gradients<u64>,
    ) -> Result<(), Error> {
        for (taken, gradient) in lookups.all().into_iter().zip(gradients.all()) {
            let (Some(taken), Some(gradient)) = (taken, gradient) else { continue };
            let gradient = Gradient { taken, source: dy, gradient };
            // SAFETY: the caller's promise.
            unsafe { table_gradient::<T, D>(device, mask, shape, lookups, gradient)? };
        }
        Ok(())
    }

    /// A gradient of entries, and the tensor that it is added up from.
    struct Gradient {
        taken: Lookup<u64>,
        source: u64,
        gradient: u64,
    }

    unsafe fn table_gradient<T: Dtype, D: Device>(
        device: &D,
        mask: &Mask,
        shape: Shape,
        lookups: Lookups<u64>,
        Gradient { taken, source, gradient }: Gradient,
    ) -> Result<(), Error> {
        let candidates = Candidates::new(&taken, shape.rows);
        let octets = shape.cols.div_ceil(OCTET);
        let width = width(octets, candidates.count);
        let blocks = octets.div_ceil(width);
        if blocks == 0 || candidates.count == 0 {
            return Ok(());
        }
        let kernel = if aligned(shape.cols, &[source, gradient]) {
            kernel!(NAME, "embedding_dropout_table_grad", T)
        } else {
            kernel!(NAME, "embedding_dropout_table_grad_any", T)
        };
        let params = TableGradParams {
            mask: *mask,
            dy: source,
            before: gradient,
            after: gradient,
            taken: LookupParams::new(Some(taken)),
            lookups: LookupParams::all(lookups),
            cols: shape.cols as u64,
            rows: shape.rows as u32,
            by_row: u32::from(candidates.by_row),
            log_width: width.ilog2(),
            blocks: IndexDivisor::new(blocks as u32),
        };
        // SAFETY: the caller's promise; the kernel reads no row beyond the last and writes no entry that is
        // not in its table.
        unsafe { launch(device, kernel, candidates.count.saturating_mul(blocks), &params) }
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
