//! `bias_act_dropout`: y = D(act(x + bias)), and its gradients.

use super::abi::{Mask, Octets, parts};
use super::sum_rows::{Tiles, Tree};
use super::{Device, Launch, OCTETS_A_BLOCK, Sum, aligned, kernel, launch, pointer, read, source};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::bias_act_dropout::{Backward, Forward, NAME};

/// `BiasActParams` in `kernels/bias_act_dropout.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    x: u64,
    bias: u64,
    y: u64,
    activation: u32,
    padding: u32,
}
const _: () = assert!(size_of::<ForwardParams>() == 240);

/// y = D(act(x + bias)).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, activation, x, bias, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (x, bias, y) = (source(x, device)?, read(bias, device)?, y.write(device)?);
    let (x, bias, y) = (x.as_ref().unwrap_or(&y).pointer, pointer(&bias), y.pointer);
    let kernel = match aligned(shape.cols, &[x, bias, y]) {
        true => kernel!(NAME, "bias_act_dropout", T),
        false => kernel!(NAME, "bias_act_dropout_unaligned", T),
    };
    let size = size_of::<T>() as u64;
    for part in parts(shape) {
        let bytes = part.first_element * size;
        let params = ForwardParams {
            mask: mask.advanced(part.row, part.octet),
            octets: part.octets,
            x: x + bytes,
            bias: if bias == 0 { 0 } else { bias + 8 * u64::from(part.octet) * size },
            y: y + bytes,
            activation: activation as u32,
            padding: 0,
        };
        let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
        // SAFETY: the lengths were checked against the shape, of which a part is a part; the addresses are held until
        // the end; the kernel allows that y is x.
        unsafe { launch(device, kernel, blocks, &params)? };
    }
    Ok(())
}

/// `BiasActGrad` in `kernels/bias_act_dropout.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Grad {
    tensors: [u64; 4],
    activation: u32,
    padding: u32,
}

/// `BiasActGradParams` in `kernels/bias_act_dropout.cu`.
#[repr(C)]
struct GradParams {
    mask: Mask,
    octets: Octets,
    grad: Grad,
}
const _: () = assert!(size_of::<GradParams>() == 248);

/// `BiasActBiasGradParams` in `kernels/bias_act_dropout.cu`.
#[repr(C)]
struct BiasGradParams {
    mask: Mask,
    tiles: Tiles,
    grad: Grad,
}
const _: () = assert!(size_of::<BiasGradParams>() == 264);

/// dx = D(dy) · act'(x + bias), and the bias gradient.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, activation, x, bias, dy, dx, dbias }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (x, bias) = (x.read(device)?, read(bias, device)?);
    let (dy, dx) = (source(dy, device)?, dx.write(device)?);
    let dy = dy.as_ref().unwrap_or(&dx).pointer;
    let tensors = [x.pointer, pointer(&bias), dy, dx.pointer];
    let grad = Grad { tensors, activation: activation as u32, padding: 0 };
    let Some(dbias) = dbias else {
        // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernels allow
        // that dx is dy.
        return unsafe { without_sums::<T, D>(device, &mask, shape, grad) };
    };
    let kernel = match aligned(shape.cols, &tensors) {
        true => kernel!(NAME, "bias_act_dropout_bias_grad", T),
        false => kernel!(NAME, "bias_act_dropout_bias_grad_unaligned", T),
    };
    let dbias = Sum::of(dbias, device)?;
    let workspace = device.workspace(Tree::workspace(shape))?;
    let tree = Tree::new(shape, &dbias, workspace.pointer, 1.0);
    let (tiles, blocks) = tree.by_tiles();
    // SAFETY: as above.
    unsafe {
        if blocks > 0 {
            launch(device, kernel, blocks, &BiasGradParams { mask, tiles, grad })?;
        }
        Tree::finish(device, &[tree])
    }
}

unsafe fn without_sums<T: Dtype, D: Device>(
    device: &D,
    mask: &Mask,
    shape: Shape,
    grad: Grad,
) -> Result<(), Error> {
    let kernel = match aligned(shape.cols, &grad.tensors) {
        true => kernel!(NAME, "bias_act_dropout_grad", T),
        false => kernel!(NAME, "bias_act_dropout_grad_unaligned", T),
    };
    let size = size_of::<T>() as u64;
    for part in parts(shape) {
        let bytes = part.first_element * size;
        let [x, bias, dy, dx] = grad.tensors;
        let bias = if bias == 0 { 0 } else { bias + 8 * u64::from(part.octet) * size };
        let params = GradParams {
            mask: mask.advanced(part.row, part.octet),
            octets: part.octets,
            grad: Grad { tensors: [x + bytes, bias, dy + bytes, dx + bytes], ..grad },
        };
        let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
        // SAFETY: the caller's promise; the parts stay within the tensors.
        unsafe { launch(device, kernel, blocks, &params)? };
    }
    Ok(())
}
