//! `dropout_add` on the CPU: y = residual + D(x + bias), and its gradients.

use super::{Cpu, convert, dropout, octets, split, sum_rows};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::dropout_add::{check_backward, check_forward};
use crate::ops::sum_rows::TILE_ROWS;
use crate::ops::{Draw, Dropout, Shape};
use rayon::prelude::*;

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
    let streaming = residual.and_then(|_| split::streaming(cpu, y));
    split::pieces(
        shape,
        y,
        |octet| octets::first_element(shape, octet),
        |range, y| {
            let base = octets::first_element(shape, range.start);
            cpu.run(
                #[inline(always)]
                || {
                    let mut sums = [0.0; octets::ELEMENTS];
                    octets::walk(
                        draw,
                        shape,
                        range,
                        #[inline(always)]
                        |block| {
                            split::prefetch(x, block.clone());
                            residual.into_iter().for_each(|r| split::prefetch(r, block.clone()));
                        },
                        #[inline(always)]
                        |segment, lanes| {
                            let sums = &mut sums[..segment.elements.len()];
                            let y =
                                &mut y[segment.elements.start - base..segment.elements.end - base];
                            let residual = residual.map_or(&*y, |r| &r[segment.elements.clone()]);
                            let x = &x[segment.elements];
                            let bias = bias.map(|bias| &bias[segment.col..segment.col + x.len()]);
                            select_add(draw, lanes, x, bias, residual, sums);
                            split::emit(sums, y, streaming);
                        },
                    );
                    split::fence();
                },
            )
        },
    );
}

/// `residual`, plus x + bias, scaled, where it is kept.
#[inline(always)]
fn select_add<T: Dtype>(
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
    if shape.cols == 0 {
        return;
    }
    let tiles = shape.rows.div_ceil(TILE_ROWS);
    let mut sums = vec![0.0f32; tiles * shape.cols];
    let streaming = dy.and_then(|_| split::streaming(cpu, dx));
    let octets_a_tile = TILE_ROWS * shape.cols.div_ceil(OCTET);
    let parts = dx.par_chunks_mut(TILE_ROWS * shape.cols).zip(sums.par_chunks_mut(shape.cols));
    parts.enumerate().for_each(|(tile, (dx, sums))| {
        let first = tile * octets_a_tile;
        let range = first..(first + octets_a_tile).min(octets::count(shape));
        let base = tile * TILE_ROWS * shape.cols;
        cpu.run(
            #[inline(always)]
            || {
                let unscaled = Draw { scale: 1.0, ..*draw };
                let mut values = [0.0; octets::ELEMENTS];
                octets::walk(
                    draw,
                    shape,
                    range,
                    #[inline(always)]
                    |block| dy.into_iter().for_each(|dy| split::prefetch(dy, block.clone())),
                    #[inline(always)]
                    |segment, lanes| {
                        let values = &mut values[..segment.elements.len()];
                        let dx =
                            &mut dx[segment.elements.start - base..segment.elements.end - base];
                        convert::load(dy.map_or(&*dx, |dy| &dy[segment.elements]), values);
                        dropout::select_in_place(&unscaled, lanes, values);
                        let sums = &mut sums[segment.col..segment.col + values.len()];
                        // A dropped element adds +0, which changes no sum that started from +0.
                        sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
                        // +0 stays +0: the scale is finite and not negative.
                        values.iter_mut().for_each(|value| *value *= draw.scale);
                        split::emit(values, dx, streaming);
                    },
                );
                split::fence();
            },
        )
    });
    let total = sum_rows::tree(sums, shape.cols);
    dbias.iter_mut().zip(&total).for_each(|(dbias, sum)| *dbias = sum * draw.scale);
}
