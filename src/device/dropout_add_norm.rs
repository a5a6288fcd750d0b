//! `dropout_add_norm`: s = residual + D(x + bias), y = norm(s), and its gradients; see
//! [`crate::ops::dropout_add_norm`].

use super::{Call, Device, Readable, Writable, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add_norm::{
    BackwardLens, ForwardLens, NAME, check_backward, check_forward, workspace_len,
};
use crate::ops::norm::{Affine, Norm};
use crate::ops::{Dropout, Shape, check_len};

pub use crate::ops::dropout_add_norm::{Inputs, ParamGrads, Saved};

/// s = residual + D(x + bias), y = norm(s). `x`, `residual`, `s`, `y`: `[rows, cols]`; `bias` and the parts
/// of `affine`: `[cols]`; `stats`, for [`backward`]: `[rows, 2]`, the mean (0 for RMS) and the reciprocal
/// deviation of each row.
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn forward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    norm: &Norm,
    shape: Shape,
    inputs: &Inputs<&dyn Readable<T, D>>,
    affine: &Affine<&dyn Readable<T, D>>,
    s: Option<&mut dyn Writable<T, D>>,
    y: &mut dyn Writable<T, D>,
    stats: Option<&mut dyn Writable<f32, D>>,
) -> Result<(), Error> {
    let lens = ForwardLens {
        inputs: inputs.map(|tensor| tensor.elements()),
        affine: affine.map(|tensor| tensor.elements()),
        s: s.as_ref().map(|s| s.elements()),
        y: y.elements(),
        stats: stats.as_ref().map(|stats| stats.elements()),
    };
    check_forward(dropout, norm, shape, &lens)?;
    let key = call.resident(NAME, shape.rows)?;
    let inputs = inputs.try_map(|tensor| tensor.read(call.device))?;
    let affine = affine.try_map(|tensor| tensor.read(call.device))?;
    let (s, y) = (s.map(|s| s.write(call.device)).transpose()?, y.write(call.device)?);
    let stats = stats.map(|stats| stats.write(call.device)).transpose()?;
    let tensors = raw::Forward {
        x: inputs.x.pointer,
        bias: pointer(&inputs.bias),
        residual: inputs.residual.pointer,
        weight: affine.weight.pointer,
        norm_bias: pointer(&affine.bias),
        s: pointer(&s),
        y: y.pointer,
        stats: pointer(&stats),
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe { raw::forward::<T, D>(call.device, dropout, norm, shape, key.addresses(), tensors) }
}

/// [`forward`] with s in place of the residual.
///
/// # Errors
/// As [`forward`].
pub fn forward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    norm: &Norm,
    shape: Shape,
    x: &dyn Readable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
    residual: &mut dyn Writable<T, D>,
    affine: &Affine<&dyn Readable<T, D>>,
    y: &mut dyn Writable<T, D>,
    stats: Option<&mut dyn Writable<f32, D>>,
) -> Result<(), Error> {
    let bias_len = bias.map(|bias| bias.elements());
    let lens = ForwardLens {
        inputs: Inputs { x: x.elements(), bias: bias_len, residual: residual.elements() },
        affine: affine.map(|tensor| tensor.elements()),
        s: None,
        y: y.elements(),
        stats: stats.as_ref().map(|stats| stats.elements()),
    };
    check_forward(dropout, norm, shape, &lens)?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, bias) = (x.read(call.device)?, call.optional(bias)?);
    let affine = affine.try_map(|tensor| tensor.read(call.device))?;
    let (residual, y) = (residual.write(call.device)?, y.write(call.device)?);
    let stats = stats.map(|stats| stats.write(call.device)).transpose()?;
    let tensors = raw::Forward {
        x: x.pointer,
        bias: pointer(&bias),
        residual: residual.pointer,
        weight: affine.weight.pointer,
        norm_bias: pointer(&affine.bias),
        s: residual.pointer,
        y: y.pointer,
        stats: pointer(&stats),
    };
    // SAFETY: as in `forward`; the kernels allow that s is the residual.
    unsafe { raw::forward::<T, D>(call.device, dropout, norm, shape, key.addresses(), tensors) }
}

/// Where the gradients of the parameters go.
pub struct SumGrads<'a, D: Device> {
    /// The gradients that are asked for, `shape.cols` elements each.
    pub grads: ParamGrads<&'a mut dyn Writable<f32, D>>,
    /// Scratch memory, [`workspace_len`] elements; its contents do not matter.
    pub workspace: &'a mut dyn Writable<f32, D>,
}

/// dresidual = ds + dnorm and dx = D(dresidual), from the gradient `dy` of y, where there is one `ds` of s,
/// and `stats` of the forward pass; and the gradients of the parameters that are asked for, in the order of
/// [`sum_rows`](crate::ops::sum_rows). `dy`, `ds`, `dresidual`, `dx`: `[rows, cols]`.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    norm: &Norm,
    shape: Shape,
    saved: &Saved<&dyn Readable<T, D>>,
    weight: &dyn Readable<T, D>,
    stats: &dyn Readable<f32, D>,
    dy: &dyn Readable<T, D>,
    ds: Option<&dyn Readable<T, D>>,
    dresidual: &mut dyn Writable<T, D>,
    dx: &mut dyn Writable<T, D>,
    sums: Option<SumGrads<'_, D>>,
) -> Result<(), Error> {
    let grads = sums.as_ref().map(|sums| sums.grads.as_ref().map(|grad| grad.elements()));
    let lens = BackwardLens {
        saved: saved.map(|tensor| tensor.elements()),
        weight: weight.elements(),
        stats: stats.elements(),
        dy: dy.elements(),
        ds: ds.map(|ds| ds.elements()),
        dresidual: dresidual.elements(),
        dx: dx.elements(),
        grads: grads.unwrap_or_default(),
    };
    check_backward(dropout, norm, shape, &lens)?;
    if let Some(sums) = &sums {
        check_len(NAME, "workspace", workspace_len(shape), sums.workspace.elements())?;
    }
    let key = call.resident(NAME, shape.rows)?;
    let saved = saved.try_map(|tensor| tensor.read(call.device))?;
    let (weight, stats) = (weight.read(call.device)?, stats.read(call.device)?);
    let (dy, ds) = (dy.read(call.device)?, call.optional(ds)?);
    let (dresidual, dx) = (dresidual.write(call.device)?, dx.write(call.device)?);
    let tensors = raw::Backward {
        saved: saved.as_ref().map(|address| address.pointer),
        weight: weight.pointer,
        stats: stats.pointer,
        dy: dy.pointer,
        ds: pointer(&ds),
        dresidual: dresidual.pointer,
        dx: dx.pointer,
    };
    let (device, key) = (call.device, key.addresses());
    let Some(SumGrads { grads, workspace }) = sums else {
        // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
        return unsafe { raw::backward::<T, D>(device, dropout, norm, shape, key, tensors, None) };
    };
    let grads = grads.try_map(|grad| grad.write(device))?;
    let workspace = workspace.write(device)?;
    let sums = raw::SumGrads {
        grads: grads.as_ref().map(|address| address.pointer),
        workspace: workspace.pointer,
    };
    // SAFETY: as above.
    unsafe { raw::backward::<T, D>(device, dropout, norm, shape, key, tensors, Some(sums)) }
}

/// The same on bare addresses.
pub mod raw {
    use super::{Inputs, NAME, ParamGrads, Saved};
    use crate::device::abi::{IndexDivisor, Mask, RowNorm};
    use crate::device::rows::{self, forms, launch_rows};
    use crate::device::sum_rows::Tree;
    use crate::device::{Device, KeyAddresses, aligned, kernel, launch};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::ops::norm::Norm;
    use crate::ops::sum_rows::{TILE_ROWS, workspace_len};
    use crate::ops::{Dropout, Shape};

    /// Addresses of a forward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Forward {
        /// `shape.rows * shape.cols` elements, read.
        pub x: u64,
        /// `shape.cols` elements, read; 0: no bias.
        pub bias: u64,
        /// `shape.rows * shape.cols` elements, read.
        pub residual: u64,
        /// `shape.cols` elements, read.
        pub weight: u64,
        /// `shape.cols` elements, read; 0: no bias of the norm.
        pub norm_bias: u64,
        /// `shape.rows * shape.cols` elements, written; may be the residual; 0: not asked for.
        pub s: u64,
        /// `shape.rows * shape.cols` elements, written; may be `x`, or the residual where that is not `s`.
        pub y: u64,
        /// Two f32 a row, written; 0: not asked for.
        pub stats: u64,
    }

    /// Addresses of a backward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Backward {
        /// As in [`Forward`], read.
        pub saved: Saved<u64>,
        /// `shape.cols` elements, read.
        pub weight: u64,
        /// Two f32 a row, read.
        pub stats: u64,
        /// `shape.rows * shape.cols` elements, read.
        pub dy: u64,
        /// `shape.rows * shape.cols` elements, read; 0: there is none.
        pub ds: u64,
        /// `shape.rows * shape.cols` elements, written.
        pub dresidual: u64,
        /// `shape.rows * shape.cols` elements, written.
        pub dx: u64,
    }

    /// Addresses of the gradients of the parameters.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SumGrads {
        /// `shape.cols` f32 each, written.
        pub grads: ParamGrads<u64>,
        /// [`workspace_len`](crate::ops::dropout_add_norm::workspace_len) f32, written and read.
        pub workspace: u64,
    }

    /// `SumOf` in `kernels/dropout_add_norm.cu`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct SumOf {
        x: u64,
        bias: u64,
        residual: u64,
    }

    /// `NormForwardParams` in `kernels/dropout_add_norm.cu`.
    #[repr(C)]
    struct ForwardParams {
        mask: Mask,
        sum: SumOf,
        weight: u64,
        norm_bias: u64,
        s: u64,
        y: u64,
        stats: u64,
        cols: u64,
        norm: RowNorm,
        rows: u32,
    }
    const _: () = assert!(size_of::<ForwardParams>() == 272);

    /// `NormBackwardParams` in `kernels/dropout_add_norm.cu`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct BackwardParams {
        mask: Mask,
        sum: SumOf,
        weight: u64,
        stats: u64,
        dy: u64,
        ds: u64,
        dresidual: u64,
        dx: u64,
        means_out: u64,
        means: u64,
        sums: [u64; 3],
        cols: u64,
        norm: RowNorm,
        rows: u32,
        tiles_a_row: IndexDivisor,
        factor: f32,
    }
    const _: () = assert!(size_of::<BackwardParams>() == 336);

    /// s = residual + D(x + bias), y = norm(s).
    ///
    /// # Safety
    /// On `device`, the addresses in `tensors` and `key` are valid as [`Forward`] and
    /// [`KeyAddresses`] say until the kernel has run, and aligned to their element; no tensor
    /// overlaps one that is written, but for what [`Forward`] allows.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape`, `norm` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        norm: &Norm,
        shape: Shape,
        key: KeyAddresses,
        tensors: Forward,
    ) -> Result<(), Error> {
        let Forward { x, bias, residual, weight, norm_bias, s, y, stats } = tensors;
        let (mask, row_norm) = checked(dropout, norm, shape, key)?;
        // Rows without columns still have statistics.
        if shape.cols == 0 && stats == 0 {
            return Ok(());
        }
        let params = |first, rows| ForwardParams {
            mask: mask.advanced(first, 0),
            sum: SumOf { x, bias, residual },
            weight,
            norm_bias,
            s,
            y,
            stats,
            cols: shape.cols as u64,
            norm: row_norm,
            rows,
        };
        let forms = forms!(NAME, "dropout_add_norm_forward", T);
        let all = [x, bias, residual, weight, norm_bias, s, y];
        // SAFETY: the caller's promise.
        unsafe { launch_rows(device, forms, shape, &all, params) }
    }

    /// dresidual, dx, and the gradients of the parameters.
    ///
    /// # Safety
    /// As [`forward`], with [`Backward`] and [`SumGrads`] in place of [`Forward`]; no two tensors overlap of
    /// which one is written.
    ///
    /// # Errors
    /// As [`forward`].
    pub unsafe fn backward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        norm: &Norm,
        shape: Shape,
        key: KeyAddresses,
        tensors: Backward,
        sums: Option<SumGrads>,
    ) -> Result<(), Error> {
        let Backward { saved, weight, stats, dy, ds, dresidual, dx } = tensors;
        let (mask, row_norm) = checked(dropout, norm, shape, key)?;
        let sum = match saved {
            Saved::Sum(s) => SumOf { x: 0, bias: 0, residual: s },
            Saved::Inputs(Inputs { x, bias, residual }) => {
                SumOf { x, bias: bias.unwrap_or(0), residual }
            }
        };
        let params = BackwardParams {
            mask,
            sum,
            weight,
            stats,
            dy,
            ds,
            dresidual,
            dx,
            means_out: 0,
            means: 0,
            sums: [0; 3],
            cols: shape.cols as u64,
            norm: row_norm,
            rows: shape.rows as u32,
            tiles_a_row: IndexDivisor::new(shape.cols.div_ceil(TILE_COLS).max(1) as u32),
            factor: 1.0,
        };
        match sums.filter(|sums| sums.grads.any()) {
            // SAFETY: the caller's promise.
            None => unsafe { launch_backward::<T, D>(device, shape, params) },
            // SAFETY: the caller's promise.
            Some(sums) => unsafe { with_sums::<T, D>(device, shape, params, sums) },
        }
    }

    /// What both passes check, and their mask and norm.
    fn checked(
        dropout: &Dropout,
        norm: &Norm,
        shape: Shape,
        key: KeyAddresses,
    ) -> Result<(Mask, RowNorm), Error> {
        shape.elements(NAME)?;
        norm.check(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        rows::check(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        Ok((mask, RowNorm::new(norm, shape.cols)))
    }

    /// The kernel with a row in registers: dresidual and dx, or where they are not asked for the means.
    unsafe fn launch_backward<T: Dtype, D: Device>(
        device: &D,
        shape: Shape,
        params: BackwardParams,
    ) -> Result<(), Error> {
        if shape.cols == 0 {
            return Ok(());
        }
        let forms = forms!(NAME, "dropout_add_norm_backward", T);
        let part =
            |first, rows| BackwardParams { mask: params.mask.advanced(first, 0), rows, ..params };
        // SAFETY: the caller's promise.
        unsafe { launch_rows(device, forms, shape, &tensors(&params), part) }
    }

    /// The tensors of T.
    fn tensors(params: &BackwardParams) -> [u64; 8] {
        let SumOf { x, bias, residual } = params.sum;
        [x, bias, residual, params.weight, params.dy, params.ds, params.dresidual, params.dx]
    }

    /// Columns of a tile: `NORM_TILE_COLS` in `kernels/dropout_add_norm.cu`.
    const TILE_COLS: usize = 32;

    /// The means of the rows, then the tiles, then the sums over them.
    unsafe fn with_sums<T: Dtype, D: Device>(
        device: &D,
        shape: Shape,
        params: BackwardParams,
        sums: SumGrads,
    ) -> Result<(), Error> {
        let ParamGrads { dbias, dweight, dnorm_bias } = sums.grads;
        let scales = [params.mask.scale, 1.0, 1.0];
        let bytes = 4 * workspace_len(shape) as u64;
        let tree = |(i, grad): (usize, Option<u64>)| {
            grad.map(|grad| Tree::new(shape, grad, sums.workspace + i as u64 * bytes, scales[i]))
        };
        let mut wanted = [dbias, dweight, dnorm_bias].into_iter().enumerate().map(tree);
        let trees: [Option<Tree>; 3] = std::array::from_fn(|_| wanted.next().flatten());
        let means = sums.workspace + 3 * bytes;
        // SAFETY: the caller's promise; the workspace's parts do not overlap.
        unsafe {
            let only_means =
                BackwardParams { dresidual: 0, dx: 0, ds: 0, means_out: means, ..params };
            launch_backward::<T, D>(device, shape, only_means)?;
            launch_tiles::<T, D>(device, shape, BackwardParams { means, ..params }, &trees)?;
            let wanted: Vec<Tree> = trees.into_iter().flatten().collect();
            Tree::finish(device, &wanted)
        }
    }

    unsafe fn launch_tiles<T: Dtype, D: Device>(
        device: &D,
        shape: Shape,
        params: BackwardParams,
        trees: &[Option<Tree>; 3],
    ) -> Result<(), Error> {
        let tiles_a_row = shape.cols.div_ceil(TILE_COLS);
        let blocks = shape.rows.div_ceil(TILE_ROWS).saturating_mul(tiles_a_row);
        if blocks == 0 {
            return Ok(());
        }
        let params = BackwardParams {
            sums: trees.each_ref().map(|tree| tree.as_ref().map_or(0, |tree| tree.first().0)),
            factor: trees[0].as_ref().map_or(1.0, |dbias| dbias.first().1),
            ..params
        };
        let kernel = match aligned(shape.cols, &tensors(&params)) {
            true => kernel!(NAME, "dropout_add_norm_tile", T),
            false => kernel!(NAME, "dropout_add_norm_tile_any", T),
        };
        // SAFETY: the caller's promise.
        unsafe { launch(device, kernel, blocks, &params) }
    }
}
