//! `dropout_add` on the CPU: y = residual + D(x + bias), and its gradients.

use super::stream::Stream;
use super::{Cpu, convert, dropout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add::{Backward, Forward};
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Matrix, Sum, matrix, matrix_mut, read, source};

/// y = residual + D(x + bias).
pub(crate) fn forward<T: Dtype>(
    Forward { shape, x, bias, residual, y }: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let bias = read(bias, cpu)?;
    let residual = source(residual, shape.cols, cpu)?;
    let (x, y) = (matrix(x, shape.cols, cpu)?, matrix_mut(y, shape.cols, cpu)?);
    add(*cpu, params, shape, x, bias, residual, y);
    Ok(())
}

/// dx = D(dy), and dbias.
pub(crate) fn backward<T: Dtype>(
    Backward { shape, dy, dx, dbias }: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let dy = source(dy, shape.cols, cpu)?;
    let dx = dx.map(|dx| matrix_mut(dx, shape.cols, cpu)).transpose()?;
    let Some(dbias) = dbias else {
        if let Some(dx) = dx {
            dropout::apply(*cpu, params, shape, dy, dx);
        }
        return Ok(());
    };
    gradients(*cpu, params, shape, dy, dx, Sum::of(dbias, cpu)?);
    Ok(())
}

/// y = residual + D(x + bias), residual = y where it is not given.
fn add<T: Dtype>(
    cpu: Cpu,
    params: &MaskParams<'_>,
    shape: Shape,
    x: Matrix<&[T]>,
    bias: Option<&[T]>,
    residual: Option<Matrix<&[T]>>,
    y: Matrix<&mut [T]>,
) {
    let stream =
        Stream { cpu, params, shape, inputs: [Some(x), residual], in_place: residual.is_none() };
    stream.run(
        y,
        #[inline(always)]
        |segment, lanes, y, sums| {
            let bias = bias.map(|bias| &bias[segment.cols.clone()]);
            let residual = residual.map_or(y, |residual| residual.at(segment));
            select_add(params, lanes, x.at(segment), bias, residual, sums);
        },
    );
}

/// `residual`, plus x + bias, scaled, where it is kept.
#[inline(always)]
pub(super) fn select_add<T: Dtype>(
    params: &MaskParams<'_>,
    lanes: &[u16],
    x: &[T],
    bias: Option<&[T]>,
    residual: &[T],
    sums: &mut [f32],
) {
    if params.threshold == 65536 {
        return convert::load(residual, sums);
    }
    // At threshold 0 the lanes mean nothing, and each of them is kept.
    let (scale, threshold) = (params.scale, params.threshold as u16);
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
    params: &MaskParams<'_>,
    shape: Shape,
    dy: Option<Matrix<&[T]>>,
    dx: Option<Matrix<&mut [T]>>,
    dbias: Sum<'_, Cpu>,
) {
    let unscaled = MaskParams { scale: 1.0, ..*params };
    let stream = Stream { cpu, params, shape, inputs: [dy, None], in_place: dy.is_none() };
    stream.run_and_sum(
        dx,
        dbias,
        params.scale,
        #[inline(always)]
        |segment, lanes, dx, values, sums| {
            convert::load(dy.map_or(dx, |dy| dy.at(segment)), values);
            dropout::select(&unscaled, lanes, values);
            // A dropped element adds +0, which changes no sum that started from +0.
            sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
            // +0 stays +0: the scale is finite and not negative.
            values.iter_mut().for_each(|value| *value *= params.scale);
        },
    );
}
