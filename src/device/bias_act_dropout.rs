//! `bias_act_dropout`: y = D(act(x + bias)), and its gradients.

use super::abi::{Factor, Mask, Matrix, Octets};
use super::stream::launch_stream;
use super::sum_rows::{Tiles, Tree};
use super::{Device, Launch, Layout, kernel, layout, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::bias_act_dropout::{Backward, Forward, NAME};
use crate::tensor::{Sum, matrix, matrix_mut, read, source};

/// `BiasActParams` in `kernels/bias_act_dropout.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    x: Matrix,
    bias: u64,
    y: Matrix,
    activation: u32,
    padding: u32,
}
const _: () = assert!(size_of::<ForwardParams>() == 264);

/// y = D(act(x + bias)).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, activation, x, bias, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (x, bias) = (source(x, shape.cols, device)?, read(bias, device)?);
    let y = matrix_mut(y, shape.cols, device)?;
    let matrices = [x.as_ref().unwrap_or(&y), &y].map(Matrix::of);
    let bias = pointer(&bias);
    let kernel = kernel!(NAME, "bias_act_dropout", T, in layout::<T>(shape, &matrices, &[bias]));
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is x.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| {
            let [x, y] = matrices.map(|matrix| part.of_matrix::<T>(matrix));
            let (bias, activation) = (part.of_row::<T>(bias), activation as u32);
            ForwardParams { mask, octets: part.octets, x, bias, y, activation, padding: 0 }
        })
    }
}

/// `BiasActGrad` in `kernels/bias_act_dropout.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Grad {
    /// x, dy and dx.
    matrices: [Matrix; 3],
    bias: u64,
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
const _: () = assert!(size_of::<GradParams>() == 280);

/// `BiasActBiasGradParams` in `kernels/bias_act_dropout.cu`.
#[repr(C)]
struct BiasGradParams {
    mask: Mask,
    tiles: Tiles,
    grad: Grad,
}
const _: () = assert!(size_of::<BiasGradParams>() == 312);

/// dx = D(dy) · act'(x + bias), and the bias gradient.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, activation, x, bias, dy, dx, dbias }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (x, bias) = (matrix(x, shape.cols, device)?, read(bias, device)?);
    let (dy, dx) = (source(dy, shape.cols, device)?, matrix_mut(dx, shape.cols, device)?);
    let matrices = [&x, dy.as_ref().unwrap_or(&dx), &dx].map(Matrix::of);
    let bias = pointer(&bias);
    let grad = Grad { matrices, bias, activation: activation as u32, padding: 0 };
    let layout = layout::<T>(shape, &matrices, &[bias]);
    let Some(dbias) = dbias else {
        // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernels allow
        // that dx is dy.
        return unsafe { without_sums::<T, D>(device, &mask, shape, layout, grad) };
    };
    let aligned = layout.is_aligned();
    let kernel = kernel!(NAME, "bias_act_dropout_bias_grad", T, if aligned);
    let dbias = Sum::of(dbias, device)?;
    let workspace = device.workspace(Tree::workspace(shape))?;
    let tree = Tree::new(shape, &dbias, workspace.pointer, Factor::ONE);
    // SAFETY: as above.
    unsafe { tree.sum(device, kernel, |tiles| BiasGradParams { mask, tiles, grad }) }
}

unsafe fn without_sums<T: Dtype, D: Device>(
    device: &D,
    mask: &Mask,
    shape: Shape,
    layout: Layout,
    grad: Grad,
) -> Result<(), Error> {
    let kernel = kernel!(NAME, "bias_act_dropout_grad", T, in layout);
    // SAFETY: the caller's promise; the parts stay within the tensors.
    unsafe {
        launch_stream(device, kernel, mask, shape, |part, mask| {
            let matrices = grad.matrices.map(|matrix| part.of_matrix::<T>(matrix));
            let bias = part.of_row::<T>(grad.bias);
            GradParams { mask, octets: part.octets, grad: Grad { matrices, bias, ..grad } }
        })
    }
}
