//! `swiglu_dropout` on the CPU: y = D(silu(gate) · up), and its gradients.

use super::math::silu_and_slope;
use super::stream::{Block, Stream};
use super::{Cpu, convert, dropout, octets, split};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::MaskParams;
use crate::ops::swiglu_dropout::{Backward, Forward};
use crate::tensor::source;

/// y = D(silu(gate) · up).
pub(crate) fn forward<T: Dtype>(
    Forward { shape, gate, up, y }: Forward<'_, T, Cpu>,
    cpu: &Cpu,
    draw: &MaskParams<'_>,
) -> Result<(), Error> {
    let gate = source(gate, cpu)?;
    let up = up.read(cpu)?;
    let inputs = [Some(up), gate];
    let stream = Stream { cpu: *cpu, draw, shape, inputs, in_place: gate.is_none() };
    stream.run(
        y.write(cpu)?,
        #[inline(always)]
        |segment, lanes, y, values| {
            let elements = segment.elements.clone();
            convert::load(gate.map_or(y, |gate| &gate[elements.clone()]), values);
            for (value, &up) in values.iter_mut().zip(&up[elements]) {
                *value = silu_and_slope(*value).0 * convert::widen(up);
            }
            dropout::select(draw, lanes, values);
        },
    );
    Ok(())
}

/// dgate = (g · up) · silu'(gate), dup = g · silu(gate), g = D(dy).
pub(crate) fn backward<T: Dtype>(
    Backward { shape, gate, up, dy, dgate, dup }: Backward<'_, T, Cpu>,
    cpu: &Cpu,
    draw: &MaskParams<'_>,
) -> Result<(), Error> {
    let (gate, up) = (gate.read(cpu)?, up.read(cpu)?);
    let dy = source(dy, cpu)?;
    let (dgate, dup) = (dgate.write(cpu)?, dup.write(cpu)?);
    let streaming = split::streaming(*cpu, dgate).filter(|_| dy.is_some());
    let before = |octet| octets::first_element(shape, octet);
    split::pieces(shape, [dgate, dup], before, |range, [dgate, dup]| {
        let base = before(range.start);
        cpu.vectorised(
            #[inline(always)]
            || {
                let (mut of_gate, mut of_up) = (Block::new(), Block::new());
                octets::walk(
                    draw,
                    shape,
                    range,
                    #[inline(always)]
                    |elements| {
                        let inputs = [Some(gate), Some(up), dy].into_iter().flatten();
                        inputs.for_each(|input| split::prefetch(input, elements.clone()));
                    },
                    #[inline(always)]
                    |segment, lanes| {
                        let local = segment.elements.start - base..segment.elements.end - base;
                        let (of_gate, g) =
                            (&mut of_gate.0[..lanes.len()], &mut of_up.0[..lanes.len()]);
                        let dy = dy.map_or(&dup[local.clone()], |dy| &dy[segment.elements.clone()]);
                        convert::load(&gate[segment.elements.clone()], of_gate);
                        convert::load(dy, g);
                        let values = of_gate.iter_mut().zip(&mut *g);
                        for ((gate, g), &up) in values.zip(&up[segment.elements]) {
                            let (silu, slope) = silu_and_slope(*gate);
                            let scaled = *g * draw.scale;
                            (*gate, *g) = ((scaled * convert::widen(up)) * slope, scaled * silu);
                        }
                        // Selected last: a factor that is not finite does not revive a dropped element.
                        let unscaled = MaskParams { scale: 1.0, ..*draw };
                        dropout::select(&unscaled, lanes, of_gate);
                        dropout::select(&unscaled, lanes, g);
                        split::emit(of_gate, &mut dgate[local.clone()], streaming);
                        split::emit(g, &mut dup[local], streaming);
                    },
                );
                split::fence();
            },
        );
    });
    Ok(())
}
