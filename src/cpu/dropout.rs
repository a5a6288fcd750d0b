//! `dropout` on the CPU: y = D(x), and dx = D(dy) with the same mask.

use super::{Cpu, convert, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout::check;
use crate::ops::{Draw, Dropout, Shape};

/// y = D(x): `x * scale`, rounded once, where kept; +0 where dropped. `x` and `y`: `[rows, cols]`.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit; `y` is untouched then.
pub fn forward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    x: &[T],
    y: &mut [T],
) -> Result<(), Error> {
    let draw = check(dropout, shape, [("x", x.len()), ("y", y.len())])?;
    apply(*cpu, &draw, shape, Some(x), y);
    Ok(())
}

/// [`forward`] with `x` as its own output.
///
/// # Errors
/// As [`forward`].
pub fn forward_in_place<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    x: &mut [T],
) -> Result<(), Error> {
    let draw = check(dropout, shape, [("x", x.len()), ("x", x.len())])?;
    apply(*cpu, &draw, shape, None, x);
    Ok(())
}

/// dx = D(dy), with the mask of the forward call of the same `dropout`. `dy` and `dx`: `[rows, cols]`.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit; `dx` is untouched then.
pub fn backward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    dy: &[T],
    dx: &mut [T],
) -> Result<(), Error> {
    let draw = check(dropout, shape, [("dy", dy.len()), ("dx", dx.len())])?;
    apply(*cpu, &draw, shape, Some(dy), dx);
    Ok(())
}

/// [`backward`] with `dy` as its own output.
///
/// # Errors
/// As [`backward`].
pub fn backward_in_place<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    dy: &mut [T],
) -> Result<(), Error> {
    let draw = check(dropout, shape, [("dy", dy.len()), ("dy", dy.len())])?;
    apply(*cpu, &draw, shape, None, dy);
    Ok(())
}

/// y = D(x), x = y where it is not given.
pub(super) fn apply<T: Dtype>(
    cpu: Cpu,
    draw: &Draw<'_>,
    shape: Shape,
    x: Option<&[T]>,
    y: &mut [T],
) {
    let streaming = x.and_then(|_| split::streaming(cpu, y));
    split::pieces(
        shape,
        y,
        |octet| octets::first_element(shape, octet),
        |range, y| {
            let base = octets::first_element(shape, range.start);
            cpu.run(
                #[inline(always)]
                || {
                    let mut values = [0.0; octets::ELEMENTS];
                    octets::walk(
                        draw,
                        shape,
                        range,
                        #[inline(always)]
                        |block| x.into_iter().for_each(|x| split::prefetch(x, block.clone())),
                        #[inline(always)]
                        |segment, lanes| {
                            let values = &mut values[..segment.elements.len()];
                            let y =
                                &mut y[segment.elements.start - base..segment.elements.end - base];
                            let x = x.map_or(&*y, |x| &x[segment.elements]);
                            select(draw, lanes, x, values);
                            split::emit(values, y, streaming);
                        },
                    );
                    split::fence();
                },
            )
        },
    );
}

/// Scales what is kept of `x`, and makes +0 of the rest.
#[inline(always)]
fn select<T: Dtype>(draw: &Draw<'_>, lanes: &[u16], x: &[T], y: &mut [f32]) {
    if draw.threshold == 65536 {
        return y.fill(0.0);
    }
    // At threshold 0 the lanes mean nothing, and each of them is kept.
    let (scale, threshold) = (draw.scale, draw.threshold as u16);
    for ((y, &x), &lane) in y.iter_mut().zip(x).zip(lanes) {
        let scaled = convert::widen(x) * scale;
        *y = if lane >= threshold { scaled } else { 0.0 };
    }
}

/// [`select`] with `values` as its own output.
#[inline(always)]
pub(super) fn select_in_place(draw: &Draw<'_>, lanes: &[u16], values: &mut [f32]) {
    if draw.threshold == 65536 {
        return values.fill(0.0);
    }
    let (scale, threshold) = (draw.scale, draw.threshold as u16);
    for (value, &lane) in values.iter_mut().zip(lanes) {
        *value = if lane >= threshold { *value * scale } else { 0.0 };
    }
}
