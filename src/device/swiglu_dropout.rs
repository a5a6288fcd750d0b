//! `swiglu_dropout`: y = D(silu(gate) · up), and its gradients.

use super::abi::{Mask, Octets};
use super::stream::launch_stream;
use super::{Device, Launch, aligned, kernel};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::swiglu_dropout::{Backward, Forward, NAME};
use crate::tensor::source;

/// `SwigluParams` in `kernels/swiglu_dropout.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    gate: u64,
    up: u64,
    y: u64,
}
const _: () = assert!(size_of::<ForwardParams>() == 240);

/// y = D(silu(gate) · up).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, gate, up, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (gate, up, y) = (source(gate, device)?, up.read(device)?, y.write(device)?);
    let (gate, up, y) = (gate.as_ref().unwrap_or(&y).pointer, up.pointer, y.pointer);
    let kernel = kernel!(NAME, "swiglu_dropout", T, if aligned(shape.cols, &[gate, up, y]));
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is gate.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| ForwardParams {
            mask,
            octets: part.octets,
            gate: part.of_tensor::<T>(gate),
            up: part.of_tensor::<T>(up),
            y: part.of_tensor::<T>(y),
        })
    }
}

/// `SwigluGradParams` in `kernels/swiglu_dropout.cu`.
#[repr(C)]
struct GradParams {
    mask: Mask,
    octets: Octets,
    gate: u64,
    up: u64,
    dy: u64,
    dgate: u64,
    dup: u64,
}
const _: () = assert!(size_of::<GradParams>() == 256);

/// dgate and dup.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, gate, up, dy, dgate, dup }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (gate, up, dy) = (gate.read(device)?, up.read(device)?, source(dy, device)?);
    let (dgate, dup) = (dgate.write(device)?, dup.write(device)?);
    let dy = dy.as_ref().unwrap_or(&dup).pointer;
    let (gate, up, dgate, dup) = (gate.pointer, up.pointer, dgate.pointer, dup.pointer);
    let kernel = kernel!(NAME, "swiglu_dropout_grad", T, if aligned(shape.cols, &[gate, up, dy, dgate, dup]));
    // SAFETY: as above; the kernel allows that dup is dy.
    unsafe {
        launch_stream(device, kernel, &mask, shape, |part, mask| GradParams {
            mask,
            octets: part.octets,
            gate: part.of_tensor::<T>(gate),
            up: part.of_tensor::<T>(up),
            dy: part.of_tensor::<T>(dy),
            dgate: part.of_tensor::<T>(dgate),
            dup: part.of_tensor::<T>(dup),
        })
    }
}
