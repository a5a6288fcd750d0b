//! `dropout_add`: y = residual + D(x + bias), and its gradients.

use super::abi::{Mask, Octets, parts};
use super::sum_rows::{Tiles, Tree};
use super::{
    Device, Launch, OCTETS_A_BLOCK, Sum, aligned, dropout, kernel, launch, pointer, read, source,
    write,
};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add::{Backward, Forward, NAME};

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
const _: () = assert!(size_of::<ForwardParams>() == 240);

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
    let kernel = match (bias != 0, aligned(shape.cols, &[x, bias, residual, y])) {
        (false, true) => kernel!(NAME, "dropout_add", T),
        (false, false) => kernel!(NAME, "dropout_add_unaligned", T),
        (true, true) => kernel!(NAME, "dropout_add_bias", T),
        (true, false) => kernel!(NAME, "dropout_add_bias_unaligned", T),
    };
    let size = size_of::<T>() as u64;
    for part in parts(shape) {
        let bytes = part.first_element * size;
        let params = ForwardParams {
            mask: mask.advanced(part.row, part.octet),
            octets: part.octets,
            x: x + bytes,
            bias: if bias == 0 { 0 } else { bias + 8 * u64::from(part.octet) * size },
            residual: residual + bytes,
            y: y + bytes,
        };
        let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
        // SAFETY: the lengths were checked against the shape, of which a part is a part; the addresses are held until
        // the end; the kernel allows that y is the residual.
        unsafe { launch(device, kernel, blocks, &params)? };
    }
    Ok(())
}

/// `BiasGradParams` in `kernels/dropout_add.cu`.
#[repr(C)]
struct BiasGradParams {
    mask: Mask,
    tiles: Tiles,
    dy: u64,
    dx: u64,
}
const _: () = assert!(size_of::<BiasGradParams>() == 240);

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
    let tree = Tree::new(shape, &dbias, workspace.pointer, mask.scale);
    let (tiles, blocks) = tree.by_tiles();
    let kernel = match aligned(shape.cols, &[dy, dx]) {
        true => kernel!(NAME, "dropout_add_bias_grad", T),
        false => kernel!(NAME, "dropout_add_bias_grad_unaligned", T),
    };
    // SAFETY: as above; the kernel writes no dx at 0, and allows that dx is dy.
    unsafe {
        if blocks > 0 {
            launch(device, kernel, blocks, &BiasGradParams { mask, tiles, dy, dx })?;
        }
        Tree::finish(device, &[tree])
    }
}
