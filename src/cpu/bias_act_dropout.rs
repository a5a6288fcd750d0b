//! `bias_act_dropout` on the CPU: y = D(act(x + bias)), and its gradients.

use super::octets::Segment;
use super::stream::{Block, Stream};
use super::{Cpu, convert, dropout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::bias_act_dropout::{Activation, Backward, Forward};
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Matrix, Sum, matrix, matrix_mut, read, source};

/// y = D(act(x + bias)).
pub(crate) fn forward<T: Dtype>(
    Forward { shape, activation, x, bias, y }: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let x = source(x, shape.cols, cpu)?;
    let bias = read(bias, cpu)?;
    Task { cpu: *cpu, params, shape, activation, bias }.forward(x, matrix_mut(y, shape.cols, cpu)?);
    Ok(())
}

/// dx = D(dy) · act'(x + bias), and dbias.
pub(crate) fn backward<T: Dtype>(
    Backward { shape, activation, x, bias, dy, dx, dbias }: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let bias = read(bias, cpu)?;
    let dy = source(dy, shape.cols, cpu)?;
    let dbias = dbias.map(|dbias| Sum::of(dbias, cpu)).transpose()?;
    let task = Task { cpu: *cpu, params, shape, activation, bias };
    task.backward(matrix(x, shape.cols, cpu)?, dy, matrix_mut(dx, shape.cols, cpu)?, dbias);
    Ok(())
}

/// A checked call.
struct Task<'a, T> {
    cpu: Cpu,
    params: &'a MaskParams<'a>,
    shape: Shape,
    activation: Activation,
    bias: Option<&'a [T]>,
}

impl<T: Dtype> Task<'_, T> {
    /// x = y where it is not given.
    fn forward(&self, x: Option<Matrix<&[T]>>, y: Matrix<&mut [T]>) {
        let Self { cpu, params, shape, .. } = *self;
        let stream = Stream { cpu, params, shape, inputs: [x, None], in_place: x.is_none() };
        stream.run(
            y,
            #[inline(always)]
            |segment, lanes, y, values| {
                self.biased(segment, x.map_or(y, |x| x.at(segment)), values);
                self.activation.select(params, lanes, values);
            },
        );
    }

    /// dy = dx where it is not given.
    fn backward(
        &self,
        x: Matrix<&[T]>,
        dy: Option<Matrix<&[T]>>,
        dx: Matrix<&mut [T]>,
        dbias: Option<Sum<'_, Cpu>>,
    ) {
        let Self { cpu, params, shape, .. } = *self;
        let stream = Stream { cpu, params, shape, inputs: [Some(x), dy], in_place: dy.is_none() };
        let Some(dbias) = dbias else {
            return stream.run(
                dx,
                #[inline(always)]
                |segment, lanes, dx, values| {
                    let dy = dy.map_or(dx, |dy| dy.at(segment));
                    self.gradient(segment, lanes, x.at(segment), dy, values);
                },
            );
        };
        stream.run_and_sum(
            Some(dx),
            dbias,
            1.0,
            #[inline(always)]
            |segment, lanes, dx, values, sums| {
                let dy = dy.map_or(dx, |dy| dy.at(segment));
                self.gradient(segment, lanes, x.at(segment), dy, values);
                sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
            },
        );
    }

    /// dx of a segment in f32.
    #[inline(always)]
    fn gradient(&self, segment: &Segment, lanes: &[u16], x: &[T], dy: &[T], dx: &mut [f32]) {
        let mut block = Block::new();
        let slope = &mut block.0[..dx.len()];
        self.biased(segment, x, slope);
        self.activation.slope(slope);
        convert::load(dy, dx);
        for (dx, &slope) in dx.iter_mut().zip(&*slope) {
            *dx = (*dx * self.params.scale) * slope;
        }
        // Selected last: a slope that is not finite does not revive a dropped element.
        dropout::select(&MaskParams { scale: 1.0, ..*self.params }, lanes, dx);
    }

    /// x + bias of a segment in f32.
    #[inline(always)]
    fn biased(&self, segment: &Segment, x: &[T], sum: &mut [f32]) {
        let Some(bias) = self.bias else { return convert::load(x, sum) };
        for (sum, (&x, &bias)) in sum.iter_mut().zip(x.iter().zip(&bias[segment.cols.clone()])) {
            *sum = convert::widen(x) + convert::widen(bias);
        }
    }
}
