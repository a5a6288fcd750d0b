//! `dropout_add_norm`: s = residual + D(x + bias), y = norm(s), and its gradients; see
//! [`crate::ops::dropout_add_norm`].

use super::abi::{Factor, IndexDivisor, Mask, Matrix, RowNorm};
use super::rows::{self, kernels, launch_rows};
use super::sum_rows::Tree;
use super::{Address, Device, Kernel, Launch, kernel, launch, launch_threads, layout, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::dropout_add_norm::{Backward, Forward, NAME, Saved};
use crate::ops::sum_rows::TILE_ROWS;
use crate::tensor::{self, In, Sum, matrix, matrix_mut, read, source, write};

/// `SumOf` in `kernels/dropout_add_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SumOf {
    x: Matrix,
    bias: u64,
    residual: Matrix,
}

/// `NormForwardParams` in `kernels/dropout_add_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    sum: SumOf,
    weight: u64,
    norm_bias: u64,
    s: Matrix,
    y: Matrix,
    stats: u64,
    cols: u64,
    norm: RowNorm,
    rows: u32,
}
const _: () = assert!(size_of::<ForwardParams>() == 312);

/// `NormBackwardParams` in `kernels/dropout_add_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BackwardParams {
    mask: Mask,
    sum: SumOf,
    weight: u64,
    stats: u64,
    dy: Matrix,
    ds: Matrix,
    dresidual: Matrix,
    dx: Matrix,
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
const _: () = assert!(size_of::<BackwardParams>() == 408);

/// s = residual + D(x + bias), y = norm(s).
pub(crate) fn forward<T: Dtype, D: Device>(
    pass: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    rows::check(NAME, shape)?;
    let (x, bias) = (matrix(pass.x, shape.cols, device)?, read(pass.bias, device)?);
    let (weight, norm_bias) = (pass.weight.read(device)?, read(pass.norm_bias, device)?);
    let residual = source(pass.residual, shape.cols, device)?;
    let s = pass.s.map(|s| matrix_mut(s, shape.cols, device)).transpose()?;
    let (y, stats) = (matrix_mut(pass.y, shape.cols, device)?, write(pass.stats, device)?);
    let residual = residual.as_ref().or(s.as_ref()).map_or(Matrix::NONE, Matrix::of);
    let sum = SumOf { x: Matrix::of(&x), bias: pointer(&bias), residual };
    let (weight, norm_bias) = (weight.pointer, pointer(&norm_bias));
    let (s, y, stats) = (Matrix::of_optional(&s), Matrix::of(&y), pointer(&stats));
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
    let kernels = kernels!(NAME, "dropout_add_norm_forward", T);
    let layout = layout::<T>(shape, &[sum.x, sum.residual, s, y], &[sum.bias, weight, norm_bias]);
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernels allow that
    // s is the residual.
    unsafe { launch_rows(device, kernels, shape, layout.is_aligned(), params) }
}

/// dresidual, dx, and the gradients of the parameters.
pub(crate) fn backward<T: Dtype, D: Device>(
    pass: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    rows::check(NAME, shape)?;
    let saved = SavedMatrices::new(pass.saved, shape, device)?;
    let (weight, stats) = (pass.weight.read(device)?, pass.stats.read(device)?);
    let dy = matrix(pass.dy, shape.cols, device)?;
    let ds = pass.ds.map(|ds| matrix(ds, shape.cols, device)).transpose()?;
    let dresidual = matrix_mut(pass.dresidual, shape.cols, device)?;
    let dx = matrix_mut(pass.dx, shape.cols, device)?;
    let params = BackwardParams {
        mask,
        sum: saved.sum(),
        weight: weight.pointer,
        stats: stats.pointer,
        dy: Matrix::of(&dy),
        ds: Matrix::of_optional(&ds),
        dresidual: Matrix::of(&dresidual),
        dx: Matrix::of(&dx),
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
struct SavedMatrices<'a, D: Device + 'a> {
    x: Option<tensor::Matrix<Address<'a, D>>>,
    bias: Option<Address<'a, D>>,
    residual: tensor::Matrix<Address<'a, D>>,
}

impl<'a, D: Device> SavedMatrices<'a, D> {
    fn new<T>(saved: Saved<In<'a, T, D>>, shape: Shape, device: &'a D) -> Result<Self, Error> {
        Ok(match saved {
            Saved::Sum(s) => Self { x: None, bias: None, residual: matrix(s, shape.cols, device)? },
            Saved::Inputs { x, bias, residual } => Self {
                x: Some(matrix(x, shape.cols, device)?),
                bias: read(bias, device)?,
                residual: matrix(residual, shape.cols, device)?,
            },
        })
    }

    fn sum(&self) -> SumOf {
        let (x, residual) = (Matrix::of_optional(&self.x), Matrix::of(&self.residual));
        SumOf { x, bias: pointer(&self.bias), residual }
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
    let kernels = kernels!(NAME, "dropout_add_norm_backward", T);
    let part =
        |first, rows| BackwardParams { mask: params.mask.advanced(first, 0), rows, ..params };
    // SAFETY: the caller's promise.
    unsafe { launch_rows(device, kernels, shape, aligned::<T>(shape, &params), part) }
}

/// Whether the kernels can take whole octets of the tensors of T.
fn aligned<T: Dtype>(shape: Shape, params: &BackwardParams) -> bool {
    let SumOf { x, bias, residual } = params.sum;
    let matrices = [x, residual, params.dy, params.ds, params.dresidual, params.dx];
    layout::<T>(shape, &matrices, &[bias, params.weight]).is_aligned()
}

/// Columns of a tile: `NORM_TILE_COLS` in `kernels/dropout_add_norm.cu`.
const TILE_COLS: usize = 32;

/// Rows from which on sums take one pass. A block then takes 64 rows, a row after the other in 16 steps: fewer rows leave
/// multiprocessors idle. An estimate: on an H200 the two passes took 12 us at 1024 rows of 1024 bf16 and 91 us at 16384, and
/// 16 steps are about as many microseconds.
const ONE_PASS_ROWS: usize = 2048;

/// The kernel that sums over the rows in one pass, and its threads, where it has registers for a row.
fn one_pass<T: Dtype>(Shape { rows, cols }: Shape) -> Option<(Kernel, u32)> {
    if rows < ONE_PASS_ROWS {
        return None;
    }
    // Teams of so many threads, four of which are a block. A thread has two octets.
    match cols {
        0..=512 => Some((kernel!(NAME, "dropout_add_norm_sums" "_32x2", T), 4 * 32)),
        513..=1024 => Some((kernel!(NAME, "dropout_add_norm_sums" "_64x2", T), 4 * 64)),
        1025..=2048 if size_of::<T>() == 2 => {
            Some((kernel!(NAME, "dropout_add_norm_sums" "_128x2", T), 4 * 128))
        }
        _ => None,
    }
}

/// The rows, and the sums over them.
unsafe fn with_sums<T: Dtype, D: Device>(
    device: &D,
    shape: Shape,
    params: BackwardParams,
    grads: &[Option<Sum<'_, D>>; 3],
) -> Result<(), Error> {
    let one_pass = one_pass::<T>(shape).filter(|_| aligned::<T>(shape, &params));
    // Three sums over the rows, and of two passes three means of each row.
    let a_sum = Tree::workspace(shape);
    let rows_with_means = if one_pass.is_some() { 0 } else { shape.rows };
    let workspace = device.workspace(a_sum.saturating_add(rows_with_means).saturating_mul(3))?;
    let part = |i: usize| workspace.pointer + (i * a_sum * size_of::<f32>()) as u64;
    let factors = [params.mask.factor(), Factor::ONE, Factor::ONE];
    let trees: [Option<Tree>; 3] = std::array::from_fn(|i| {
        grads[i].as_ref().map(|grad| Tree::new(shape, grad, part(i), factors[i]))
    });
    let means = part(3);
    // SAFETY: the caller's promise; the workspace's parts do not overlap.
    unsafe {
        let params = BackwardParams {
            sums: trees.each_ref().map(|tree| tree.as_ref().map_or(0, |tree| tree.first().0)),
            factor: trees[0].as_ref().map_or(Factor::ONE, |dbias| dbias.first().1),
            ..params
        };
        match one_pass {
            Some((kernel, threads)) => {
                launch_threads(device, kernel, shape.rows.div_ceil(TILE_ROWS), threads, &params)?;
            }
            None => two_passes::<T, D>(device, shape, BackwardParams { means, ..params })?,
        }
        let wanted: Vec<Tree> = trees.into_iter().flatten().collect();
        Tree::finish(device, &wanted)
    }
}

/// The means of the rows, and then the tiles.
unsafe fn two_passes<T: Dtype, D: Device>(
    device: &D,
    shape: Shape,
    params: BackwardParams,
) -> Result<(), Error> {
    let Shape { rows, cols } = shape;
    let blocks = rows.div_ceil(TILE_ROWS).saturating_mul(cols.div_ceil(TILE_COLS));
    if blocks == 0 {
        return Ok(());
    }
    let none = Matrix::NONE;
    let only_means = BackwardParams {
        dresidual: none,
        dx: none,
        ds: none,
        means_out: params.means,
        sums: [0; 3],
        ..params
    };
    let kernel = kernel!(NAME, "dropout_add_norm_tile", T, if aligned::<T>(shape, &params));
    // SAFETY: the caller's promise.
    unsafe {
        launch_backward::<T, D>(device, shape, only_means)?;
        launch(device, kernel, blocks, &params)
    }
}
