//! `swiglu_dropout`: y = D(silu(gate) · up), and its gradients.

use super::abi::{Mask, Octets, parts};
use super::{Device, Launch, OCTETS_A_BLOCK, aligned, kernel, launch, source};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::swiglu_dropout::{Backward, Forward, NAME};

/// `SwigluParams` in `kernels/swiglu_dropout.cu`.
#[repr(C)]
struct ForwardParams {
    mask: Mask,
    octets: Octets,
    gate: u64,
    up: u64,
    y: u64,
}
const _: () = assert!(size_of::<ForwardParams>() == 232);

/// y = D(silu(gate) · up).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, gate, up, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (gate, up, y) = (source(gate, device)?, up.read(device)?, y.write(device)?);
    let (gate, up, y) = (gate.as_ref().unwrap_or(&y).pointer, up.pointer, y.pointer);
    let kernel = match aligned(shape.cols, &[gate, up, y]) {
        true => kernel!(NAME, "swiglu_dropout", T),
        false => kernel!(NAME, "swiglu_dropout_unaligned", T),
    };
    for part in parts(shape) {
        let bytes = part.first_element * size_of::<T>() as u64;
        let params = ForwardParams {
            mask: mask.advanced(part.row, part.octet),
            octets: part.octets,
            gate: gate + bytes,
            up: up + bytes,
            y: y + bytes,
        };
        let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
        // SAFETY: the lengths were checked against the shape, of which a part is a part; the addresses are held until
        // the end; the kernel allows that y is gate.
        unsafe { launch(device, kernel, blocks, &params)? };
    }
    Ok(())
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
const _: () = assert!(size_of::<GradParams>() == 248);

/// dgate and dup.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, gate, up, dy, dgate, dup }: Backward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (gate, up, dy) = (gate.read(device)?, up.read(device)?, source(dy, device)?);
    let (dgate, dup) = (dgate.write(device)?, dup.write(device)?);
    let dy = dy.as_ref().unwrap_or(&dup).pointer;
    let (gate, up, dgate, dup) = (gate.pointer, up.pointer, dgate.pointer, dup.pointer);
    let kernel = match aligned(shape.cols, &[gate, up, dy, dgate, dup]) {
        true => kernel!(NAME, "swiglu_dropout_grad", T),
        false => kernel!(NAME, "swiglu_dropout_grad_unaligned", T),
    };
    for part in parts(shape) {
        let bytes = part.first_element * size_of::<T>() as u64;
        let params = GradParams {
            mask: mask.advanced(part.row, part.octet),
            octets: part.octets,
            gate: gate + bytes,
            up: up + bytes,
            dy: dy + bytes,
            dgate: dgate + bytes,
            dup: dup + bytes,
        };
        let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
        // SAFETY: as above; the kernel allows that dup is dy.
        unsafe { launch(device, kernel, blocks, &params)? };
    }
    Ok(())
}
