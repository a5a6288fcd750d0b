//! `keep_mask`: the mask itself as bits or bytes, 1 for kept; see [`crate::ops::keep_mask`].

use super::{Call, Device, Writable};
use crate::error::Error;
use crate::ops::keep_mask::{NAME, check_bits, check_bytes};
use crate::ops::{Dropout, Shape};

/// Writes the mask as bits: [`bits_len`](crate::ops::keep_mask::bits_len) bytes.
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn bits<D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    out: &mut dyn Writable<u8, D>,
) -> Result<(), Error> {
    check_bits(dropout, shape, out.elements())?;
    let key = call.resident(NAME, shape.rows)?;
    let out = out.write(call.device)?;
    // SAFETY: the length was checked against the shape; the addresses are held until the end.
    unsafe { raw::bits(call.device, dropout, shape, key.addresses(), out.pointer) }
}

/// Writes the mask as bytes: one an element, 0 or 1.
///
/// # Errors
/// As [`bits`].
pub fn bytes<D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    out: &mut dyn Writable<u8, D>,
) -> Result<(), Error> {
    check_bytes(dropout, shape, out.elements())?;
    let key = call.resident(NAME, shape.rows)?;
    let out = out.write(call.device)?;
    // SAFETY: the length was checked against the shape; the addresses are held until the end.
    unsafe { raw::bytes(call.device, dropout, shape, key.addresses(), out.pointer) }
}

/// The same on bare addresses.
pub mod raw {
    use super::NAME;
    use crate::device::abi::{Mask, Octets, Part, parts};
    use crate::device::{Device, Kernel, KeyAddresses, OCTETS_A_BLOCK, launch};
    use crate::error::Error;
    use crate::ops::{Dropout, Shape};

    /// `KeepMaskParams` in `kernels/keep_mask.cu`.
    #[repr(C)]
    struct Params {
        mask: Mask,
        octets: Octets,
        out: u64,
    }
    const _: () = assert!(size_of::<Params>() == 216);

    /// Writes the mask as bits.
    ///
    /// # Safety
    /// On `device`, `out` is the address of [`bits_len`](crate::ops::keep_mask::bits_len) bytes and
    /// those in `key` are 0 or as [`KeyAddresses`] says; all are valid until the kernel has run.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn bits<D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        out: u64,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise; an octet is a byte.
        unsafe { export(device, "keep_mask_bits", dropout, shape, key, |p| out + p.first_octet) }
    }

    /// Writes the mask as bytes.
    ///
    /// # Safety
    /// On `device`, `out` is the address of `shape.rows * shape.cols` bytes and those in `key` are 0
    /// or as [`KeyAddresses`] says; all are valid until the kernel has run.
    ///
    /// # Errors
    /// As [`bits`].
    pub unsafe fn bytes<D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        out: u64,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { export(device, "keep_mask_bytes", dropout, shape, key, |p| out + p.first_element) }
    }

    unsafe fn export<D: Device>(
        device: &D,
        name: &'static str,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        address: impl Fn(&Part) -> u64,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        for part in parts(shape) {
            let mask = mask.advanced(part.row, part.octet);
            let params = Params { mask, octets: part.octets, out: address(&part) };
            let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
            // SAFETY: the caller's promise; the parts stay within the tensor.
            unsafe { launch(device, Kernel { operator: NAME, name }, blocks, &params)? };
        }
        Ok(())
    }
}
