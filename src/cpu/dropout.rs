//! `dropout` on the CPU: y = D(x), and dx = D(dy) with the same mask.

use super::stream::Stream;
use super::{Cpu, convert};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout::{Backward, Forward};
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Matrix, matrix_mut, source};

/// y = D(x).
pub(crate) fn forward<T: Dtype>(
    Forward { shape, x, y }: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let x = source(x, shape.cols, cpu)?;
    apply(*cpu, params, shape, x, matrix_mut(y, shape.cols, cpu)?);
    Ok(())
}

/// dx = D(dy).
pub(crate) fn backward<T: Dtype>(
    Backward { shape, dy, dx }: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    forward(Forward { shape, x: dy, y: dx }, cpu, params)
}

/// y = D(x), x = y where it is not given.
pub(super) fn apply<T: Dtype>(
    cpu: Cpu,
    params: &MaskParams<'_>,
    shape: Shape,
    x: Option<Matrix<&[T]>>,
    y: Matrix<&mut [T]>,
) {
    let stream = Stream { cpu, params, shape, inputs: [x, None], in_place: x.is_none() };
    stream.run(
        y,
        #[inline(always)]
        |segment, lanes, y, values| {
            convert::load(x.map_or(y, |x| x.at(segment)), values);
            select(params, lanes, values);
        },
    );
}

/// Scales what is kept, and makes +0 of the rest.
#[inline(always)]
pub(super) fn select(params: &MaskParams<'_>, lanes: &[u16], values: &mut [f32]) {
    select_of(
        params,
        lanes,
        values,
        #[inline(always)]
        |value| value,
    );
}

/// Scales `function` of what is kept, and makes +0 of the rest.
#[inline(always)]
pub(super) fn select_of(
    params: &MaskParams<'_>,
    lanes: &[u16],
    values: &mut [f32],
    function: impl Fn(f32) -> f32,
) {
    if params.threshold == 65536 {
        return values.fill(0.0);
    }
    // At threshold 0 the lanes mean nothing, and each of them is kept.
    let (scale, threshold) = (params.scale, params.threshold as u16);
    for (value, &lane) in values.iter_mut().zip(lanes) {
        *value = if lane >= threshold { function(*value) * scale } else { 0.0 };
    }
}
