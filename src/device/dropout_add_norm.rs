//! `dropout_add_norm`: s = residual + D(x + bias), y = norm(s), and its gradients; see
//! [`crate::ops::dropout_add_norm`].

use super::abi::{Factor, IndexDivisor, Mask, RowNorm};
use super::rows::{self, forms, launch_rows};
use super::sum_rows::Tree;
use super::{Address, Device, Launch, aligned, kernel, launch, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::dropout_add_norm::{Backward, Forward, NAME, Saved};
use crate::ops::sum_rows::TILE_ROWS;
use crate::tensor::{In, Sum, read, source, write};

/// `SumOf` in `kernels/dropout_add_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SumOf {
    x: u64,
    bias: u64,
    residual: u64,
}

/// `NormForwardParams` in `kernels/dropout_add_norm.cu`.
#[derive(Clone, Copy)]
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
const _: () = assert!(size_of::<ForwardParams>() == 280);

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
    factor: Factor,
    cols: u64,
    norm: RowNorm,
    rows: u32,
    tiles_a_row: IndexDivisor,
    padding: u32,
}
const _: () = assert!(size_of::<BackwardParams>() == 360);

/// s = residual + D(x + bias), y = norm(s).
pub(crate) fn forward<T: Dtype, D: Device>(
    pass: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    rows::check(NAME, shape)?;
    let (x, bias) = (pass.x.read(device)?, read(pass.bias, device)?);
    let (weight, norm_bias) = (pass.weight.read(device)?, read(pass.norm_bias, device)?);
    let (residual, s) = (source(pass.residual, device)?, write(pass.s, device)?);
    let (y, stats) = (pass.y.write(device)?, write(pass.stats, device)?);
    let residual = residual.as_ref().map_or(pointer(&s), |residual| residual.pointer);
    let sum = SumOf { x: x.pointer, bias: pointer(&bias), residual };
    let (weight, norm_bias) = (weight.pointer, pointer(&norm_bias));
    let (s, y, stats) = (pointer(&s), y.pointer, pointer(&stats));
    // Rows without columns still have statistics.
    if shape.cols == 0 && stats == 0 {
        return Ok(());
    }
    let params = |first, rows| ForwardParams {
        mask: mask.advanced(first, 0),
        sum,
        weight,
        norm_bias,
        s,
        y,
        stats,
        cols: shape.cols as u64,
        norm: RowNorm::new(&pass.norm, shape.cols),
        rows,
    };
    let forms = forms!(NAME, "dropout_add_norm_forward", T);
    let all = [sum.x, sum.bias, sum.residual, weight, norm_bias, s, y];
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernels allow that
    // s is the residual.
    unsafe { launch_rows(device, forms, shape, &all, params) }
}

/// dresidual, dx, and the gradients of the parameters.
pub(crate) fn backward<T: Dtype, D: Device>(
    pass: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    rows::check(NAME, shape)?;
    let saved = SavedAddresses::new(pass.saved, device)?;
    let (weight, stats) = (pass.weight.read(device)?, pass.stats.read(device)?);
    let (dy, ds) = (pass.dy.read(device)?, read(pass.ds, device)?);
    let (dresidual, dx) = (pass.dresidual.write(device)?, pass.dx.write(device)?);
    let params = BackwardParams {
        mask,
        sum: saved.sum(),
        weight: weight.pointer,
        stats: stats.pointer,
        dy: dy.pointer,
        ds: pointer(&ds),
        dresidual: dresidual.pointer,
        dx: dx.pointer,
        means_out: 0,
        means: 0,
        sums: [0; 3],
        factor: Factor::ONE,
        cols: shape.cols as u64,
        norm: RowNorm::new(&pass.norm, shape.cols),
        rows: shape.rows as u32,
        tiles_a_row: IndexDivisor::new(shape.cols.div_ceil(TILE_COLS).max(1) as u32),
        padding: 0,
    };
    let [dbias, dweight, dnorm_bias] = [pass.dbias, pass.dweight, pass.dnorm_bias]
        .map(|gradient| gradient.map(|gradient| Sum::of(gradient, device)).transpose());
    let grads = [dbias?, dweight?, dnorm_bias?];
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        match grads.iter().any(Option::is_some) {
            false => launch_backward::<T, D>(device, shape, params),
            true => with_sums::<T, D>(device, shape, params, &grads),
        }
    }
}

/// Where the backward pass finds s: x (absent where s is there), bias, and the residual or s.
struct SavedAddresses<'a, D: Device + 'a> {
    x: Option<Address<'a, D>>,
    bias: Option<Address<'a, D>>,
    residual: Address<'a, D>,
}

impl<'a, D: Device> SavedAddresses<'a, D> {
    fn new<T>(saved: Saved<In<'a, T, D>>, device: &'a D) -> Result<Self, Error> {
        Ok(match saved {
            Saved::Sum(s) => Self { x: None, bias: None, residual: s.read(device)? },
            Saved::Inputs { x, bias, residual } => Self {
                x: Some(x.read(device)?),
                bias: read(bias, device)?,
                residual: residual.read(device)?,
            },
        })
    }

    fn sum(&self) -> SumOf {
        let (x, bias) = (pointer(&self.x), pointer(&self.bias));
        SumOf { x, bias, residual: self.residual.pointer }
    }
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
    grads: &[Option<Sum<'_, D>>; 3],
) -> Result<(), Error> {
    // Three sums over the rows, and three means of each row.
    let a_sum = Tree::workspace(shape);
    let workspace = device.workspace(a_sum.saturating_add(shape.rows).saturating_mul(3))?;
    let part = |i: usize| workspace.pointer + (i * a_sum * size_of::<f32>()) as u64;
    let factors = [params.mask.factor(), Factor::ONE, Factor::ONE];
    let trees: [Option<Tree>; 3] = std::array::from_fn(|i| {
        grads[i].as_ref().map(|grad| Tree::new(shape, grad, part(i), factors[i]))
    });
    let means = part(3);
    // SAFETY: the caller's promise; the workspace's parts do not overlap.
    unsafe {
        let only_means = BackwardParams { dresidual: 0, dx: 0, ds: 0, means_out: means, ..params };
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
        factor: trees[0].as_ref().map_or(Factor::ONE, |dbias| dbias.first().1),
        ..params
    };
    let kernel =
        kernel!(NAME, "dropout_add_norm_tile", T, if aligned(shape.cols, &tensors(&params)));
    // SAFETY: the caller's promise.
    unsafe { launch(device, kernel, blocks, &params) }
}
