//! `bias_act_dropout`: y = D(act(x + bias)), and its gradients.

use super::abi::{Factor, Mask, Octets};
use super::stream::launch_stream;
use super::sum_rows::{Tiles, Tree};
use super::{Device, Launch, aligned, kernel, launch, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::bias_act_dropout::{Backward, Forward, NAME};
use crate::tensor::{Sum, read, source};

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
const _: () = assert!(size_of::<ForwardParams>() == 248);

/// y = D(act(x + bias)).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, activation, x, bias, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (x, bias, y) = (source(x, device)?, read(bias, device)?, y.write(device)?);
    let (x, bias, y) = (x.as_ref().unwrap_or(&y).pointer, pointer(&bias), y.pointer);
    let kernel = kernel!(NAME, "bias_act_dropout", T, if aligned(shape.cols, &[x, bias, y]));
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is x.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| ForwardParams {
            mask,
            octets: part.octets,
            x: part.of_tensor::<T>(x),
            bias: part.of_row::<T>(bias),
            y: part.of_tensor::<T>(y),
            activation: activation as u32,
            padding: 0,
        })
    }
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
const _: () = assert!(size_of::<GradParams>() == 256);

/// `BiasActBiasGradParams` in `kernels/bias_act_dropout.cu`.
#[repr(C)]
struct BiasGradParams {
    mask: Mask,
    tiles: Tiles,
    grad: Grad,
}
const _: () = assert!(size_of::<BiasGradParams>() == 288);

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
    let kernel = kernel!(NAME, "bias_act_dropout_bias_grad", T, if aligned(shape.cols, &tensors));
    let dbias = Sum::of(dbias, device)?;
    let workspace = device.workspace(Tree::workspace(shape))?;
    let tree = Tree::new(shape, &dbias, workspace.pointer, Factor::ONE);
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
    let kernel = kernel!(NAME, "bias_act_dropout_grad", T, if aligned(shape.cols, &grad.tensors));
    let [x, bias, dy, dx] = grad.tensors;
    // SAFETY: the caller's promise; the parts stay within the tensors.
    unsafe {
        launch_stream(device, kernel, mask, shape, |part, mask| {
            let [x, dy, dx] = [x, dy, dx].map(|tensor| part.of_tensor::<T>(tensor));
            let tensors = [x, part.of_row::<T>(bias), dy, dx];
            GradParams { mask, octets: part.octets, grad: Grad { tensors, ..grad } }
        })
    }
}
