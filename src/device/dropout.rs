//! `dropout`: y = D(x), and its gradient dx = D(dy), by the same kernel.

use super::abi::{Mask, Matrix, Octets};
use super::stream::launch_stream;
use super::{Device, Launch, kernel, layout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::dropout::{Backward, Forward, NAME};
use crate::tensor::{matrix_mut, source};

/// y = D(x).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { shape, x, y }: Forward<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let (x, y) = (source(x, shape.cols, device)?, matrix_mut(y, shape.cols, device)?);
    let (x, y) = (Matrix::of(x.as_ref().unwrap_or(&y)), y);
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end; the kernel allows that
    // y is x.
    unsafe { apply::<T, D>(device, &mask, shape, x, Matrix::of(&y)) }
}

/// dx = D(dy).
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { shape, dy, dx }: Backward<'_, T, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    forward(Forward { shape, x: dy, y: dx }, to)
}

/// `DropoutParams` in `kernels/dropout.cu`.
#[repr(C)]
struct Params {
    mask: Mask,
    octets: Octets,
    x: Matrix,
    y: Matrix,
}
const _: () = assert!(size_of::<Params>() == 248);

/// y = D(x).
///
/// # Safety
/// On `device`, `x` and `y` are matrices of `shape` of T, aligned to T, valid until the kernel has run; `y` is `x` or does
/// not overlap it. The addresses in `mask` are valid too.
pub(super) unsafe fn apply<T: Dtype, D: Device>(
    device: &D,
    mask: &Mask,
    shape: Shape,
    x: Matrix,
    y: Matrix,
) -> Result<(), Error> {
    let kernel = kernel!(NAME, "dropout", T, in layout::<T>(shape, &[x, y], &[]));
    // SAFETY: the caller's promise; the parts stay within the tensors.
    unsafe {
        launch_stream(device, kernel, mask, shape, |part, mask| Params {
            mask,
            octets: part.octets,
            x: part.of_matrix::<T>(x),
            y: part.of_matrix::<T>(y),
        })
    }
}

/// Fills `elements` f32 with zeros: a dropout of all of them.
///
/// # Safety
/// On `device`, `y` is the address of so many f32, valid until the kernel has run.
pub(super) unsafe fn zeros<D: Device>(
    device: &D,
    mask: &Mask,
    elements: usize,
    y: u64,
) -> Result<(), Error> {
    let y = Matrix { pointer: y, stride: elements as u64 };
    // SAFETY: the caller's promise.
    unsafe { apply::<f32, D>(device, &mask.all_dropped(), Shape::new(1, elements), y, y) }
}
