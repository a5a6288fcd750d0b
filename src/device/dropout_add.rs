//! `dropout_add`: y = residual + D(x + bias), and its gradients.

use super::abi::{Mask, Octets};
use super::stream::launch_stream;
use super::sum_rows::{Tiles, Tree};
use super::{Device, Launch, aligned, dropout, kernel, launch, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add::{Backward, Forward, NAME};
use crate::tensor::{Sum, read, source, write};

/// `DropoutAddParams` in `kernels/dropout_add.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    x: u64,
    bias: u64,
    residual: u64,
    y: u64,
}
const _: () = assert!(size_of::<ForwardParams>() == 248);

/// y = residual + D(x + bias).
pub(crate) fn forward<T: Dtype, D: Device>(
    pass: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    let (x, bias) = (pass.x.read(device)?, read(pass.bias, device)?);
    let (residual, y) = (source(pass.residual, device)?, pass.y.write(device)?);
    let residual = residual.as_ref().unwrap_or(&y).pointer;
    let (x, bias, y) = (x.pointer, pointer(&bias), y.pointer);
    let aligned = aligned(shape.cols, &[x, bias, residual, y]);
    let kernel = match bias {
        0 => kernel!(NAME, "dropout_add", T, if aligned),
        _ => kernel!(NAME, "dropout_add_bias", T, if aligned),
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is the residual.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| ForwardParams {
            mask,
            octets: part.octets,
            x: part.of_tensor::<T>(x),
            bias: part.of_row::<T>(bias),
            residual: part.of_tensor::<T>(residual),
            y: part.of_tensor::<T>(y),
        })
    }
}

/// `BiasGradParams` in `kernels/dropout_add.cu`.
#[repr(C)]
struct BiasGradParams {
    mask: Mask,
    tiles: Tiles,
    dy: u64,
    dx: u64,
}
const _: () = assert!(size_of::<BiasGradParams>() == 264);

/// dx = D(dy), and the bias gradient.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, dy, dx, dbias }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (dy, dx) = (source(dy, device)?, write(dx, device)?);
    // One of the two is there: the check refused a dy in place of no dx.
    let (dy, dx) = (dy.as_ref().or(dx.as_ref()).map_or(0, |dy| dy.pointer), pointer(&dx));
    let Some(dbias) = dbias else {
        if dx == 0 {
            return Ok(());
        }
        // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
        return unsafe { dropout::apply::<T, D>(device, &mask, shape, dy, dx) };
    };
    let dbias = Sum::of(dbias, device)?;
    let workspace = device.workspace(Tree::workspace(shape))?;
    let tree = Tree::new(shape, &dbias, workspace.pointer, mask.factor());
    let (tiles, blocks) = tree.by_tiles();
    let kernel = kernel!(NAME, "dropout_add_bias_grad", T, if aligned(shape.cols, &[dy, dx]));
    // SAFETY: as above; the kernel writes no dx at 0, and allows that dx is dy.
    unsafe {
        if blocks > 0 {
            launch(device, kernel, blocks, &BiasGradParams { mask, tiles, dy, dx })?;
        }
        Tree::finish(device, &[tree])
    }
}
