//! `keep_mask` on the CPU: the mask itself, as bits or bytes, 1 for kept.

use super::octets::{self, Segment};
use super::{Cpu, split};
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::keep_mask::{Bits, Bytes};
use crate::ops::{MaskParams, Shape};
use std::ops::Range;

/// The mask as bits.
pub(crate) fn bits(
    Bits { shape, out }: Bits<'_, Cpu>,
    cpu: &Cpu,
    draw: &MaskParams<'_>,
) -> Result<(), Error> {
    split::pieces(
        shape,
        out.write(cpu)?,
        |octet| octet,
        |range, out| {
            let mut out = out.iter_mut();
            walk(
                cpu,
                draw,
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
        },
    );
    Ok(())
}

/// The mask as bytes, 0 or 1.
pub(crate) fn bytes(
    Bytes { shape, out }: Bytes<'_, Cpu>,
    cpu: &Cpu,
    draw: &MaskParams<'_>,
) -> Result<(), Error> {
    let before = |octet| octets::first_element(shape, octet);
    split::pieces(shape, out.write(cpu)?, before, |range, out| {
        let base = before(range.start);
        walk(
            cpu,
            draw,
            shape,
            range,
            #[inline(always)]
            |segment, keep| {
                out[segment.elements.start - base..segment.elements.end - base]
                    .copy_from_slice(keep);
            },
        );
    });
    Ok(())
}

/// Gives the mask of every piece of a row to `body`, a byte an element.
fn walk(
    cpu: &Cpu,
    draw: &MaskParams<'_>,
    shape: Shape,
    range: Range<usize>,
    mut body: impl FnMut(Segment, &[u8]),
) {
    let mut keep = [0u8; octets::ELEMENTS];
    cpu.vectorised(
        #[inline(always)]
        || {
            octets::walk(
                draw,
                shape,
                range,
                |_| {},
                #[inline(always)]
                |segment, lanes| {
                    let keep = &mut keep[..lanes.len()];
                    for (keep, &lane) in keep.iter_mut().zip(lanes) {
                        // At threshold 0 the lanes mean nothing, and each of them is kept.
                        *keep = u8::from(u32::from(lane) >= draw.threshold);
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
