//! `keep_mask` on the CPU: the mask itself, as bits or bytes, 1 for kept.

use super::Cpu;
use super::octets::{self, Segment};
use super::split::{self, Outputs, Part};
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::keep_mask::{Bits, Bytes};
use crate::ops::{MaskParams, Shape};
use crate::tensor::Matrix;
use std::ops::Range;

/// The mask as bits.
pub(crate) fn bits(
    Bits { shape, out }: Bits<'_, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let out = Octets { first: 0, bits: out.write(cpu)? };
    split::pieces(shape, out, |range, Octets { bits, .. }| {
        let mut out = bits.iter_mut();
        walk(
            cpu,
            params,
            shape,
            range,
            #[inline(always)]
            |_, keep| {
                let (octets, rest) = keep.as_chunks::<OCTET>();
                out.by_ref().zip(octets).for_each(|(bits, keep)| *bits = pack(*keep));
                if !rest.is_empty() {
                    let mut last = [0; OCTET];
                    last[..rest.len()].copy_from_slice(rest);
                    out.by_ref().take(1).for_each(|bits| *bits = pack(last));
                }
            },
        );
    });
    Ok(())
}

/// The masks of octets, from octet `first` on: a byte each.
struct Octets<'a> {
    first: usize,
    bits: &'a mut [u8],
}

impl Outputs for Octets<'_> {
    fn split(self, _: Shape, octet: usize) -> (Self, Self) {
        let (before, behind) = self.bits.split_at_mut(octet - self.first);
        (Self { first: self.first, bits: before }, Self { first: octet, bits: behind })
    }
}

/// The mask as bytes, 0 or 1.
pub(crate) fn bytes(
    Bytes { shape, out }: Bytes<'_, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let out = Matrix { data: out.write(cpu)?, stride: shape.cols };
    split::pieces(shape, Part::whole(out), |range, mut out| {
        walk(
            cpu,
            params,
            shape,
            range,
            #[inline(always)]
            |segment, keep| {
                out.up_to(&segment, keep.len()).copy_from_slice(keep);
            },
        );
    });
    Ok(())
}

/// Gives the mask of every piece of a row to `body`, a byte an element.
fn walk(
    cpu: &Cpu,
    params: &MaskParams<'_>,
    shape: Shape,
    range: Range<usize>,
    mut body: impl FnMut(Segment, &[u8]),
) {
    let mut keep = [0u8; octets::ELEMENTS];
    cpu.vectorised(
        #[inline(always)]
        || {
            octets::walk(
                params,
                shape,
                range,
                |_| {},
                #[inline(always)]
                |segment, lanes| {
                    let keep = &mut keep[..lanes.len()];
                    for (keep, &lane) in keep.iter_mut().zip(lanes) {
                        // At threshold 0 the lanes mean nothing, and each of them is kept.
                        *keep = u8::from(u32::from(lane) >= params.threshold);
                    }
                    body(segment, keep);
                },
            );
        },
    );
}

/// Eight bytes 0 or 1 as the bits of one, the first one lowest. The product adds byte i, shifted by
/// 7 - i bytes and i bits, into the highest byte; no two terms meet in a bit, so nothing is carried.
#[inline(always)]
fn pack(keep: [u8; OCTET]) -> u8 {
    (u64::from_le_bytes(keep).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}
