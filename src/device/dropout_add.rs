//! `dropout_add`: y = residual + D(x + bias), and its gradients.

use super::abi::{Mask, Matrix, Octets};
use super::stream::launch_stream;
use super::sum_rows::{Tiles, Tree};
use super::{Device, Launch, dropout, kernel, layout, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add::{Backward, Forward, NAME};
use crate::tensor::{Sum, matrix, matrix_mut, read, source};

/// `DropoutAddParams` in `kernels/dropout_add.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    x: Matrix,
    bias: u64,
    residual: Matrix,
    y: Matrix,
}
const _: () = assert!(size_of::<ForwardParams>() == 272);

/// y = residual + D(x + bias).
pub(crate) fn forward<T: Dtype, D: Device>(
    pass: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    let (x, bias) = (matrix(pass.x, shape.cols, device)?, read(pass.bias, device)?);
    let y = matrix_mut(pass.y, shape.cols, device)?;
    let residual = source(pass.residual, shape.cols, device)?;
    let matrices = [&x, residual.as_ref().unwrap_or(&y), &y].map(Matrix::of);
    let bias = pointer(&bias);
    let layout = layout::<T>(shape, &matrices, &[bias]);
    let kernel = match bias {
        0 => kernel!(NAME, "dropout_add", T, in layout),
        _ => kernel!(NAME, "dropout_add_bias", T, in layout),
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is the residual.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| {
            let [x, residual, y] = matrices.map(|matrix| part.of_matrix::<T>(matrix));
            let bias = part.of_row::<T>(bias);
            ForwardParams { mask, octets: part.octets, x, bias, residual, y }
        })
    }
}

/// `BiasGradParams` in `kernels/dropout_add.cu`.
#[repr(C)]
struct BiasGradParams {
    mask: Mask,
    tiles: Tiles,
    dy: Matrix,
    dx: Matrix,
}
const _: () = assert!(size_of::<BiasGradParams>() == 280);

/// dx = D(dy), and the bias gradient.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, dy, dx, dbias }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let dy = source(dy, shape.cols, device)?;
    let dx = dx.map(|dx| matrix_mut(dx, shape.cols, device)).transpose()?;
    // One of the two is there: the check refused a dy in place of no dx.
    let matrices = [dy.as_ref().or(dx.as_ref()), dx.as_ref()];
    let [dy, dx] = matrices.map(|matrix| matrix.map_or(Matrix::NONE, Matrix::of));
    let Some(dbias) = dbias else {
        if dx == Matrix::NONE {
            return Ok(());
        }
        // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
        return unsafe { dropout::apply::<T, D>(device, &mask, shape, dy, dx) };
    };
    let dbias = Sum::of(dbias, device)?;
    let workspace = device.workspace(Tree::workspace(shape))?;
    let tree = Tree::new(shape, &dbias, workspace.pointer, mask.factor());
    let aligned = layout::<T>(shape, &[dy, dx], &[]).is_aligned();
    let kernel = kernel!(NAME, "dropout_add_bias_grad", T, if aligned);
    // SAFETY: as above; the kernel writes no dx at 0, and allows that dx is dy.
    unsafe { tree.sum(device, kernel, |tiles| BiasGradParams { mask, tiles, dy, dx }) }
}
