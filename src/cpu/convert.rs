//! Storage types to f32 and back, a slice at a time, as loops that the compiler vectorises.

use crate::dtype::{Dtype, DtypeId};

/// The exact value.
#[inline(always)]
pub(super) fn widen<T: Dtype>(value: T) -> f32 {
    match T::ID {
        DtypeId::F32 => bytemuck::cast(value),
        DtypeId::F16 => f16_to_f32(bytemuck::cast(value)),
        DtypeId::Bf16 => f32::from_bits(u32::from(bytemuck::cast::<T, u16>(value)) << 16),
    }
}

/// The exact values of `from`.
#[inline(always)]
pub(super) fn load<T: Dtype>(from: &[T], to: &mut [f32]) {
    from.iter().zip(to).for_each(|(&from, to)| *to = widen(from));
}

/// The exact values of `from`, on the heap: a parameter that every row takes.
pub(super) fn widened<T: Dtype>(from: &[T]) -> Vec<f32> {
    from.iter().map(|&value| widen(value)).collect()
}

/// The nearest values of the storage type, ties to even.
#[inline(always)]
pub(super) fn store<T: Dtype>(from: &[f32], to: &mut [T]) {
    match T::ID {
        DtypeId::F32 => bytemuck::cast_slice_mut(to).copy_from_slice(from),
        DtypeId::F16 => {
            let to: &mut [u16] = bytemuck::cast_slice_mut(to);
            to.iter_mut().zip(from).for_each(|(h, &f)| *h = f32_to_f16(f));
        }
        DtypeId::Bf16 => {
            let to: &mut [u16] = bytemuck::cast_slice_mut(to);
            to.iter_mut().zip(from).for_each(|(h, &f)| *h = f32_to_bf16(f));
        }
    }
}

/// Replaces values by the nearest ones of the storage type.
#[inline(always)]
pub(super) fn round<T: Dtype>(values: &mut [f32]) {
    match T::ID {
        DtypeId::F32 => {}
        DtypeId::F16 => values.iter_mut().for_each(|f| *f = f16_to_f32(f32_to_f16(*f))),
        DtypeId::Bf16 => {
            values.iter_mut().for_each(|f| *f = f32::from_bits(u32::from(f32_to_bf16(*f)) << 16))
        }
    }
}

/// Exponent and mantissa moved into place and scaled by 2^112, which also normalises subnormals.
#[inline(always)]
fn f16_to_f32(h: u16) -> f32 {
    let h = u32::from(h);
    let magnitude = (h & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    // Infinities and NaNs: the exponent is all ones.
    let special = magnitude | 0x7f80_0000;
    let value = if magnitude >= 0x0f80_0000 { special } else { scaled.to_bits() };
    f32::from_bits(value | (h & 0x8000) << 16)
}

/// Rounds to nearest, ties to even; subnormals by adding a number whose last place is an f16
/// subnormal's.
#[inline(always)]
fn f32_to_f16(f: f32) -> u16 {
    let sign = (f.to_bits() >> 16) & 0x8000;
    let magnitude = f.to_bits() & 0x7fff_ffff;
    // 0.5 has its last place at 2^-24, the smallest f16.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_add(0xc800_0fff).wrapping_add(odd) >> 13;
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    // From 65520 on the nearest f16 is infinite.
    let infinite = if magnitude >= 0x477f_f000 { 0x7c00 } else { finite };
    let value = if magnitude > 0x7f80_0000 { 0x7e00 } else { infinite };
    (value | sign) as u16
}

#[inline(always)]
fn f32_to_bf16(f: f32) -> u16 {
    let bits = f.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN could round to an infinity: keep its upper half, and make it quiet.
    let value = if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) | 0x40 } else { rounded };
    value as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_half_is_loaded_exactly() {
        for h in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(h), f16::from_bits(h).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{h:#x}"
            );
        }
    }

    #[test]
    fn halves_and_their_midpoints_are_rounded_to_even() {
        // Every value, the point halfway to the next one, and the f32 on both sides of each.
        for h in 0..=u16::MAX {
            let (a, b) = (f16_to_f32(h), f16_to_f32(h.wrapping_add(1)));
            let (c, d) = (f32::from_bits(u32::from(h) << 16), u32::from(h) << 16 | 0x8000);
            for f in [a, (a + b) / 2.0, c, f32::from_bits(d)] {
                for f in [f, f.next_up(), f.next_down()] {
                    let (ours, theirs) = (f16::from_bits(f32_to_f16(f)), f16::from_f32(f));
                    assert!(
                        ours.to_bits() == theirs.to_bits() || f.is_nan() && ours.is_nan(),
                        "{f:e}"
                    );
                    let (ours, theirs) = (bf16::from_bits(f32_to_bf16(f)), bf16::from_f32(f));
                    assert!(
                        ours.to_bits() == theirs.to_bits() || f.is_nan() && ours.is_nan(),
                        "{f:e}"
                    );
                }
            }
        }
    }
}
