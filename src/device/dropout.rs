//! `dropout`: y = D(x), and its gradient dx = D(dy), by the same kernel.

use super::{Call, Device, Readable, Writable};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout::{NAME, check};
use crate::ops::{Dropout, Shape};

/// y = D(x). Each tensor has `shape.rows * shape.cols` elements.
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn forward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    x: &dyn Readable<T, D>,
    y: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    check(dropout, shape, [("x", x.elements()), ("y", y.elements())])?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, y) = (x.read(call.device)?, y.write(call.device)?);
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), x.pointer, y.pointer)
    }
}

/// x = D(x).
///
/// # Errors
/// As [`forward`].
pub fn forward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    x: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    check(dropout, shape, [("x", x.elements()), ("x", x.elements())])?;
    let key = call.resident(NAME, shape.rows)?;
    let x = x.write(call.device)?;
    // SAFETY: as in `forward`; the kernel allows that its output is its input.
    unsafe {
        raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), x.pointer, x.pointer)
    }
}

/// dx = D(dy), with the mask of the forward pass of the same `dropout`.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    dy: &dyn Readable<T, D>,
    dx: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    check(dropout, shape, [("dy", dy.elements()), ("dx", dx.elements())])?;
    forward(call, dropout, shape, dy, dx)
}

/// dy = D(dy), with the mask of the forward pass.
///
/// # Errors
/// As [`forward`].
pub fn backward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    dy: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    check(dropout, shape, [("dy", dy.elements()), ("dy", dy.elements())])?;
    forward_in_place(call, dropout, shape, dy)
}

/// The same on bare addresses.
pub mod raw {
    use super::NAME;
    use crate::device::abi::{Mask, Octets, parts};
    use crate::device::{Device, KeyAddresses, OCTETS_A_BLOCK, aligned, kernel, launch};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::ops::{Dropout, Shape};

    /// `DropoutParams` in `kernels/dropout.cu`.
    #[repr(C)]
    struct Params {
        mask: Mask,
        octets: Octets,
        x: u64,
        y: u64,
    }
    const _: () = assert!(size_of::<Params>() == 224);

    /// y = D(x); the backward pass is the same on dy and dx.
    ///
    /// # Safety
    /// On `device`, `x` and `y` are addresses of `shape.rows * shape.cols` elements of T, aligned to
    /// T, valid until the kernel has run; `y` is `x` or does not overlap it. The addresses in `key`
    /// are 0 or as [`KeyAddresses`] says.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        x: u64,
        y: u64,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        let kernel = if aligned(shape.cols, &[x, y]) {
            kernel!(NAME, "dropout", T)
        } else {
            kernel!(NAME, "dropout_any", T)
        };
        for part in parts(shape) {
            let bytes = part.first_element * size_of::<T>() as u64;
            let params = Params {
                mask: mask.advanced(part.row, part.octet),
                octets: part.octets,
                x: x + bytes,
                y: y + bytes,
            };
            let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
            // SAFETY: the caller's promise; the parts stay within the tensors.
            unsafe { launch(device, kernel, blocks, &params)? };
        }
        Ok(())
    }
}
