//! `keep_mask`: the mask itself as bits or bytes, 1 for kept; see [`crate::ops::keep_mask`].

use super::abi::{Mask, Octets};
use super::stream::{Part, launch_stream};
use super::{Device, Kernel, Launch};
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
    let address = |part: &Part| part.of_tensor::<u8>(out.pointer);
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
const _: () = assert!(size_of::<Params>() == 224);

unsafe fn export<D: Device>(
    Launch { device, mask }: Launch<'_, D>,
    name: &'static str,
    shape: Shape,
    address: impl Fn(&Part) -> u64,
) -> Result<(), Error> {
    let kernel = Kernel { operator: NAME, name };
    let params = |part: &Part, mask| Params { mask, octets: part.octets, out: address(part) };
    // SAFETY: the caller's promise; the parts stay within the tensor.
    unsafe { launch_stream(device, kernel, &mask, shape, params) }
}
