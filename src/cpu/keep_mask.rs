//! `keep_mask` on the CPU: the mask itself, as bits or bytes, 1 for kept.

use super::{Cpu, octets, split};
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::keep_mask::{check_bits, check_bytes};
use crate::ops::{Draw, Dropout, Shape};

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
            cpu.run(
                #[inline(always)]
                || {
                    octets::walk(
                        &draw,
                        shape,
                        range,
                        |_| {},
                        #[inline(always)]
                        |segment, lanes| {
                            let len = segment.elements.len();
                            for (start, byte) in (0..len).step_by(OCTET).zip(&mut out) {
                                let end = (start + OCTET).min(len);
                                *byte = (start..end).fold(0, |byte, i| {
                                    byte | u8::from(keeps(&draw, lanes[i])) << (i - start)
                                });
                            }
                        },
                    );
                },
            )
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
    split::pieces(
        shape,
        out,
        |octet| octets::first_element(shape, octet),
        |range, out| {
            let base = octets::first_element(shape, range.start);
            cpu.run(
                #[inline(always)]
                || {
                    octets::walk(
                        &draw,
                        shape,
                        range,
                        |_| {},
                        #[inline(always)]
                        |segment, lanes| {
                            let out = &mut out
                                [segment.elements.start - base..segment.elements.end - base];
                            for (byte, &lane) in out.iter_mut().zip(lanes) {
                                *byte = u8::from(keeps(&draw, lane));
                            }
                        },
                    );
                },
            )
        },
    );
    Ok(())
}

/// Whether a lane is kept. At threshold 0 the lanes mean nothing, and each of them is.
#[inline(always)]
fn keeps(draw: &Draw<'_>, lane: u16) -> bool {
    u32::from(lane) >= draw.threshold
}
