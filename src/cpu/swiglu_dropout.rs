//! `swiglu_dropout` on the CPU: y = D(silu(gate) · up), and its gradients.

use super::math::silu_and_slope;
use super::split::Part;
use super::stream::{Block, Stream};
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::MaskParams;
use crate::ops::swiglu_dropout::{Backward, Forward};
use crate::tensor::{matrix, matrix_mut, source};

/// y = D(silu(gate) · up).
pub(crate) fn forward<T: Dtype>(
    Forward { shape, gate, up, y }: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let gate = source(gate, shape.cols, cpu)?;
    let up = matrix(up, shape.cols, cpu)?;
    let inputs = [Some(up), gate];
    let stream = Stream { cpu: *cpu, params, shape, inputs, in_place: gate.is_none() };
    stream.run(
        matrix_mut(y, shape.cols, cpu)?,
        #[inline(always)]
        |segment, lanes, y, values| {
            convert::load(gate.map_or(y, |gate| gate.at(segment)), values);
            for (value, &up) in values.iter_mut().zip(up.at(segment)) {
                *value = silu_and_slope(*value).0 * convert::widen(up);
            }
            dropout::select(params, lanes, values);
        },
    );
    Ok(())
}

/// dgate = (g · up) · silu'(gate), dup = g · silu(gate), g = D(dy).
pub(crate) fn backward<T: Dtype>(
    Backward { shape, gate, up, dy, dgate, dup }: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    params: &MaskParams<'_>,
) -> Result<(), Error> {
    let (gate, up) = (matrix(gate, shape.cols, cpu)?, matrix(up, shape.cols, cpu)?);
    let dy = source(dy, shape.cols, cpu)?;
    let (dgate, dup) = (matrix_mut(dgate, shape.cols, cpu)?, matrix_mut(dup, shape.cols, cpu)?);
    let streaming = split::streaming::<T>(*cpu, shape).filter(|_| dy.is_some());
    split::pieces(shape, [dgate, dup].map(Part::whole), |range, [mut dgate, mut dup]| {
        cpu.vectorised(
            #[inline(always)]
            || {
                let (mut of_gate, mut of_up) = (Block::new(), Block::new());
                octets::walk(
                    params,
                    shape,
                    range,
                    #[inline(always)]
                    |block| {
                        let inputs = [Some(gate), Some(up), dy].into_iter().flatten();
                        inputs.for_each(|input| input.prefetch(&block));
                    },
                    #[inline(always)]
                    |segment, lanes| {
                        let (of_gate, g) =
                            (&mut of_gate.0[..lanes.len()], &mut of_up.0[..lanes.len()]);
                        convert::load(gate.at(&segment), of_gate);
                        convert::load(dy.map_or(dup.at(&segment), |dy| dy.at(&segment)), g);
                        let values = of_gate.iter_mut().zip(&mut *g);
                        for ((gate, g), &up) in values.zip(up.at(&segment)) {
                            let (silu, slope) = silu_and_slope(*gate);
                            let scaled = *g * params.scale;
                            (*gate, *g) = ((scaled * convert::widen(up)) * slope, scaled * silu);
                        }
                        // Selected last: a factor that is not finite does not revive a dropped element.
                        let unscaled = MaskParams { scale: 1.0, ..*params };
                        dropout::select(&unscaled, lanes, of_gate);
                        dropout::select(&unscaled, lanes, g);
                        split::emit(of_gate, dgate.up_to(&segment, lanes.len()), streaming);
                        split::emit(g, dup.up_to(&segment, lanes.len()), streaming);
                    },
                );
                split::fence();
            },
        );
    });
    Ok(())
}
