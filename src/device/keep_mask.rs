//! `keep_mask`: the mask itself as bits or bytes, 1 for kept; see [`crate::ops::keep_mask`].

use super::abi::{Mask, Octets, Part, parts};
use super::{Device, Kernel, Launch, OCTETS_A_BLOCK, launch};
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::keep_mask::{Bits, Bytes, NAME};

/// The mask as bits.
pub(crate) fn bits<D: Device>(
    Bits { shape, out }: Bits<'_, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    let out = out.write(to.device)?;
    // An octet is a byte.
    let address = |part: &Part| out.pointer + part.first_octet;
    // SAFETY: the length was checked against the shape; the address is held until the end.
    unsafe { export(to, "keep_mask_bits", shape, address) }
}

/// The mask as bytes.
pub(crate) fn bytes<D: Device>(
    Bytes { shape, out }: Bytes<'_, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    let out = out.write(to.device)?;
    let address = |part: &Part| out.pointer + part.first_element;
    // SAFETY: as above.
    unsafe { export(to, "keep_mask_bytes", shape, address) }
}

/// `KeepMaskParams` in `kernels/keep_mask.cu`.
#[repr(C)]
struct Params {
    mask: Mask,
    octets: Octets,
    out: u64,
}
const _: () = assert!(size_of::<Params>() == 216);

unsafe fn export<D: Device>(
    Launch { device, mask }: Launch<'_, D>,
    name: &'static str,
    shape: Shape,
    address: impl Fn(&Part) -> u64,
) -> Result<(), Error> {
    for part in parts(shape) {
        let mask = mask.advanced(part.row, part.octet);
        let params = Params { mask, octets: part.octets, out: address(&part) };
        let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
        // SAFETY: the caller's promise; the parts stay within the tensor.
        unsafe { launch(device, Kernel { operator: NAME, name }, blocks, &params)? };
    }
    Ok(())
}
