//! `swiglu_dropout`: y = D(silu(gate) · up), and its gradients.

use super::abi::{Mask, Matrix, Octets};
use super::stream::launch_stream;
use super::{Device, Launch, kernel, layout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::swiglu_dropout::{Backward, Forward, NAME};
use crate::tensor::{matrix, matrix_mut, source};

/// `SwigluParams` in `kernels/swiglu_dropout.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    gate: Matrix,
    up: Matrix,
    y: Matrix,
}
const _: () = assert!(size_of::<ForwardParams>() == 264);

/// y = D(silu(gate) · up).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, gate, up, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (gate, up) = (source(gate, shape.cols, device)?, matrix(up, shape.cols, device)?);
    let y = matrix_mut(y, shape.cols, device)?;
    let matrices = [gate.as_ref().unwrap_or(&y), &up, &y].map(Matrix::of);
    let kernel = kernel!(NAME, "swiglu_dropout", T, in layout::<T>(shape, &matrices, &[]));
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is gate.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| {
            let [gate, up, y] = matrices.map(|matrix| part.of_matrix::<T>(matrix));
            ForwardParams { mask, octets: part.octets, gate, up, y }
        })
    }
}

/// `SwigluGradParams` in `kernels/swiglu_dropout.cu`.
#[repr(C)]
struct GradParams {
    mask: Mask,
    octets: Octets,
    gate: Matrix,
    up: Matrix,
    dy: Matrix,
    dgate: Matrix,
    dup: Matrix,
}
const _: () = assert!(size_of::<GradParams>() == 296);

/// dgate and dup.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, gate, up, dy, dgate, dup }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (gate, up) = (matrix(gate, shape.cols, device)?, matrix(up, shape.cols, device)?);
    let dy = source(dy, shape.cols, device)?;
    let (dgate, dup) =
        (matrix_mut(dgate, shape.cols, device)?, matrix_mut(dup, shape.cols, device)?);
    let dy = dy.as_ref().unwrap_or(&dup);
    let matrices = [&gate, &up, dy, &dgate, &dup].map(Matrix::of);
    let kernel = kernel!(NAME, "swiglu_dropout_grad", T, in layout::<T>(shape, &matrices, &[]));
    // SAFETY: as above; the kernel allows that dup is dy.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| {
            let matrices = matrices.map(|matrix| part.of_matrix::<T>(matrix));
            let [gate, up, dy, dgate, dup] = matrices;
            GradParams { mask, octets: part.octets, gate, up, dy, dgate, dup }
        })
    }
}
