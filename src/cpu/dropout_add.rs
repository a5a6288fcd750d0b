//! `dropout_add` on the CPU: y = residual + D(x + bias), and its gradients.

use super::stream::Stream;
use super::{Cpu, convert, dropout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add::{check_backward, check_forward};
use crate::ops::{Draw, Dropout, Shape};

/// y = residual + D(x + bias). `x`, `residual`, `y`: `[rows, cols]`; `bias`: `[cols]`.
///
/// Kept: `fma(x', scale, residual)`, rounded once, with x' = x or x + bias rounded to f32. Dropped:
/// the residual.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit; `y` is untouched then.
pub fn forward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    x: &[T],
    bias: Option<&[T]>,
    residual: &[T],
    y: &mut [T],
) -> Result<(), Error> {
    let bias_len = bias.map(<[T]>::len);
    let draw = check_forward(dropout, shape, x.len(), bias_len, residual.len(), y.len())?;
    add(*cpu, &draw, shape, x, bias, Some(residual), y);
    Ok(())
}

/// [`forward`] with the residual as its own output.
///
/// # Errors
/// As [`forward`]; `residual` is untouched then.
pub fn forward_in_place<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    x: &[T],
    bias: Option<&[T]>,
    residual: &mut [T],
) -> Result<(), Error> {
    let (bias_len, residual_len) = (bias.map(<[T]>::len), residual.len());
    let draw = check_forward(dropout, shape, x.len(), bias_len, residual_len, residual_len)?;
    add(*cpu, &draw, shape, x, bias, None, residual);
    Ok(())
}

/// dx = D(dy) and, where asked for, dbias: scale times the sum of kept dy over rows, in f32 and in the
/// order of [`sum_rows`](crate::ops::sum_rows). `dy`, `dx`: `[rows, cols]`; `dbias`: `[cols]`. The residual's gradient is dy.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit; the outputs are untouched then.
pub fn backward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    dy: &[T],
    dx: &mut [T],
    dbias: Option<&mut [f32]>,
) -> Result<(), Error> {
    let dbias_len = dbias.as_ref().map(|dbias| dbias.len());
    let draw = check_backward(dropout, shape, dy.len(), dx.len(), dbias_len)?;
    gradients(*cpu, &draw, shape, Some(dy), dx, dbias);
    Ok(())
}

/// [`backward`] with `dy` as its own output.
///
/// # Errors
/// As [`backward`]; the outputs are untouched then.
pub fn backward_in_place<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    dy: &mut [T],
    dbias: Option<&mut [f32]>,
) -> Result<(), Error> {
    let dbias_len = dbias.as_ref().map(|dbias| dbias.len());
    let draw = check_backward(dropout, shape, dy.len(), dy.len(), dbias_len)?;
    gradients(*cpu, &draw, shape, None, dy, dbias);
    Ok(())
}

/// y = residual + D(x + bias), residual = y where it is not given.
fn add<T: Dtype>(
    cpu: Cpu,
    draw: &Draw<'_>,
    shape: Shape,
    x: &[T],
    bias: Option<&[T]>,
    residual: Option<&[T]>,
    y: &mut [T],
) {
    let stream =
        Stream { cpu, draw, shape, inputs: [Some(x), residual], in_place: residual.is_none() };
    stream.run(
        y,
        #[inline(always)]
        |segment, lanes, y, sums| {
            let x = &x[segment.elements.clone()];
            let bias = bias.map(|bias| &bias[segment.col..segment.col + x.len()]);
            let residual = residual.map_or(y, |r| &r[segment.elements.clone()]);
            select_add(draw, lanes, x, bias, residual, sums);
        },
    );
}

/// `residual`, plus x + bias, scaled, where it is kept.
#[inline(always)]
pub(super) fn select_add<T: Dtype>(
    draw: &Draw<'_>,
    lanes: &[u16],
    x: &[T],
    bias: Option<&[T]>,
    residual: &[T],
    sums: &mut [f32],
) {
    if draw.threshold == 65536 {
        return convert::load(residual, sums);
    }
    // At threshold 0 the lanes mean nothing, and each of them is kept.
    let (scale, threshold) = (draw.scale, draw.threshold as u16);
    let rows = sums.iter_mut().zip(x).zip(residual).zip(lanes);
    let add = |(((sum, x), &residual), &lane): (((&mut f32, f32), &T), &u16)| {
        let residual = convert::widen(residual);
        let added = x.mul_add(scale, residual);
        *sum = if lane >= threshold { added } else { residual };
    };
    match bias {
        None => rows.for_each(|(((sum, &x), r), l)| add((((sum, convert::widen(x)), r), l))),
        Some(bias) => rows.zip(bias).for_each(|((((sum, &x), r), l), &b)| {
            add((((sum, convert::widen(x) + convert::widen(b)), r), l));
        }),
    }
}

/// dx = D(dy), dy = dx where it is not given, and dbias.
fn gradients<T: Dtype>(
    cpu: Cpu,
    draw: &Draw<'_>,
    shape: Shape,
    dy: Option<&[T]>,
    dx: &mut [T],
    dbias: Option<&mut [f32]>,
) {
    let Some(dbias) = dbias else {
        return dropout::apply(cpu, draw, shape, dy, dx);
    };
    let unscaled = Draw { scale: 1.0, ..*draw };
    let stream = Stream { cpu, draw, shape, inputs: [dy, None], in_place: dy.is_none() };
    stream.run_and_sum(
        dx,
        dbias,
        draw.scale,
        #[inline(always)]
        |segment, lanes, dx, values, sums| {
            convert::load(dy.map_or(dx, |dy| &dy[segment.elements.clone()]), values);
            dropout::select(&unscaled, lanes, values);
            // A dropped element adds +0, which changes no sum that started from +0.
            sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
            // +0 stays +0: the scale is finite and not negative.
            values.iter_mut().for_each(|value| *value *= draw.scale);
        },
    );
}
