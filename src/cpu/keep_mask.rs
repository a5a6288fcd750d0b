//! `keep_mask` on the CPU: the mask itself, as bits or bytes, 1 for kept.

use super::octets::{self, Segment};
use super::{Cpu, split};
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::keep_mask::{check_bits, check_bytes};
use crate::ops::{Draw, Dropout, Shape};
use std::ops::Range;

/// The mask as bits: `ceil(cols / 8)` bytes a row, column c in bit `c % 8` of byte `c / 8`; unused
/// bits are 0. `out`: [`bits_len`](crate::ops::keep_mask::bits_len) bytes.
///
/// # Errors
/// [`Error::Argument`] where the length or the place does not fit; `out` is untouched then.
pub fn bits(cpu: &Cpu, dropout: &Dropout<'_>, shape: Shape, out: &mut [u8]) -> Result<(), Error> {
    let draw = check_bits(dropout, shape, out.len())?;
    split::pieces(
        shape,
        out,
        |octet| octet,
        |range, out| {
            let mut out = out.iter_mut();
            walk(
                cpu,
                &draw,
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

/// The mask as bytes, 0 or 1. `out`: `[rows, cols]`.
///
/// # Errors
/// [`Error::Argument`] where the length or the place does not fit; `out` is untouched then.
pub fn bytes(cpu: &Cpu, dropout: &Dropout<'_>, shape: Shape, out: &mut [u8]) -> Result<(), Error> {
    let draw = check_bytes(dropout, shape, out.len())?;
    let before = |octet| octets::first_element(shape, octet);
    split::pieces(shape, out, before, |range, out| {
        let base = before(range.start);
        walk(
            cpu,
            &draw,
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

/// Gives the mask of every piece of a row to `each`, a byte an element.
fn walk(
    cpu: &Cpu,
    draw: &Draw<'_>,
    shape: Shape,
    range: Range<usize>,
    mut each: impl FnMut(Segment, &[u8]),
) {
    let mut keep = [0u8; octets::ELEMENTS];
    cpu.run(
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
                    each(segment, keep);
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
