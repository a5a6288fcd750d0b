//! `dropout` on the CPU: y = D(x), and dx = D(dy) with the same mask.

use super::stream::Stream;
use super::{Cpu, convert};
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
    let stream = Stream { cpu, draw, shape, inputs: [x, None], in_place: x.is_none() };
    stream.run(
        y,
        #[inline(always)]
        |segment, lanes, y, values| {
            convert::load(x.map_or(y, |x| &x[segment.elements.clone()]), values);
            select(draw, lanes, values);
        },
    );
}

/// Scales what is kept, and makes +0 of the rest.
#[inline(always)]
pub(super) fn select(draw: &Draw<'_>, lanes: &[u16], values: &mut [f32]) {
    select_of(
        draw,
        lanes,
        values,
        #[inline(always)]
        |value| value,
    );
}

/// Scales `function` of what is kept, and makes +0 of the rest.
#[inline(always)]
pub(super) fn select_of(
    draw: &Draw<'_>,
    lanes: &[u16],
    values: &mut [f32],
    function: impl Fn(f32) -> f32,
) {
    if draw.threshold == 65536 {
        return values.fill(0.0);
    }
    // At threshold 0 the lanes mean nothing, and each of them is kept.
    let (scale, threshold) = (draw.scale, draw.threshold as u16);
    for (value, &lane) in values.iter_mut().zip(lanes) {
        *value = if lane >= threshold { function(*value) * scale } else { 0.0 };
    }
}
