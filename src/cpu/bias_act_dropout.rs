//! `bias_act_dropout` on the CPU: y = D(act(x + bias)), and its gradients.

use super::octets::Segment;
use super::stream::{Block, Stream};
use super::{Cpu, convert, dropout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::bias_act_dropout::{Activation, Lens, check};
use crate::ops::{Draw, Dropout, Shape};

/// y = D(act(x + bias)). `x`, `y`: `[rows, cols]`; `bias`: `[cols]`.
///
/// Kept: act(x') * scale, rounded once, with x' = x or x + bias rounded to f32. Dropped: +0.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit; `y` is untouched then.
pub fn forward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    activation: Activation,
    x: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
) -> Result<(), Error> {
    let lens =
        Lens { x: x.len(), bias: bias.map(<[T]>::len), dy: None, out: ("y", y.len()), dbias: None };
    let draw = check(dropout, shape, &lens)?;
    let task = Task { cpu: *cpu, draw: &draw, shape, activation, bias };
    task.forward(Some(x), y);
    Ok(())
}

/// [`forward`] with `x` as its own output. The backward pass needs x: keep it elsewhere.
///
/// # Errors
/// As [`forward`]; `x` is untouched then.
pub fn forward_in_place<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    activation: Activation,
    x: &mut [T],
    bias: Option<&[T]>,
) -> Result<(), Error> {
    let lens =
        Lens { x: x.len(), bias: bias.map(<[T]>::len), dy: None, out: ("x", x.len()), dbias: None };
    let draw = check(dropout, shape, &lens)?;
    let task = Task { cpu: *cpu, draw: &draw, shape, activation, bias };
    task.forward(None, x);
    Ok(())
}

/// dx = D(dy) * act'(x + bias) and, where asked for, dbias: the sum over rows of dx before it is rounded
/// to T, in f32 and in the order of [`sum_rows`](crate::ops::sum_rows). `x`, `dy`, `dx`: `[rows, cols]`;
/// `bias`, `dbias`: `[cols]`.
///
/// Kept: (dy * scale) * act'(x'), the product's factors in f32. Dropped: +0.
///
/// # Errors
/// [`Error::Argument`] where a length or the place does not fit; the outputs are untouched then.
pub fn backward<T: Dtype>(
    cpu: &Cpu,
    dropout: &Dropout<'_>,
    shape: Shape,
    activation: Activation,
    x: &[T],
    bias: Option<&[T]>,
    dy: &[T],
    dx: &mut [T],
    dbias: Option<&mut [f32]>,
) -> Result<(), Error> {
    let lens = Lens {
        x: x.len(),
        bias: bias.map(<[T]>::len),
        dy: Some(dy.len()),
        out: ("dx", dx.len()),
        dbias: dbias.as_ref().map(|dbias| dbias.len()),
    };
    let draw = check(dropout, shape, &lens)?;
    let task = Task { cpu: *cpu, draw: &draw, shape, activation, bias };
    task.backward(x, Some(dy), dx, dbias);
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
    activation: Activation,
    x: &[T],
    bias: Option<&[T]>,
    dy: &mut [T],
    dbias: Option<&mut [f32]>,
) -> Result<(), Error> {
    let lens = Lens {
        x: x.len(),
        bias: bias.map(<[T]>::len),
        dy: None,
        out: ("dy", dy.len()),
        dbias: dbias.as_ref().map(|dbias| dbias.len()),
    };
    let draw = check(dropout, shape, &lens)?;
    let task = Task { cpu: *cpu, draw: &draw, shape, activation, bias };
    task.backward(x, None, dy, dbias);
    Ok(())
}

/// A checked call.
struct Task<'a, T> {
    cpu: Cpu,
    draw: &'a Draw<'a>,
    shape: Shape,
    activation: Activation,
    bias: Option<&'a [T]>,
}

impl<T: Dtype> Task<'_, T> {
    /// x = y where it is not given.
    fn forward(&self, x: Option<&[T]>, y: &mut [T]) {
        let Self { cpu, draw, shape, .. } = *self;
        let stream = Stream { cpu, draw, shape, inputs: [x, None], in_place: x.is_none() };
        stream.run(
            y,
            #[inline(always)]
            |segment, lanes, y, values| {
                self.biased(segment.col, x.map_or(y, |x| &x[segment.elements.clone()]), values);
                self.activation.select(draw, lanes, values);
            },
        );
    }

    /// dy = dx where it is not given.
    fn backward(&self, x: &[T], dy: Option<&[T]>, dx: &mut [T], dbias: Option<&mut [f32]>) {
        let Self { cpu, draw, shape, .. } = *self;
        let stream = Stream { cpu, draw, shape, inputs: [Some(x), dy], in_place: dy.is_none() };
        let Some(dbias) = dbias else {
            return stream.run(
                dx,
                #[inline(always)]
                |segment, lanes, dx, values| {
                    let dy = dy.map_or(dx, |dy| &dy[segment.elements.clone()]);
                    self.gradient(segment, lanes, x, dy, values);
                },
            );
        };
        stream.run_and_sum(
            dx,
            dbias,
            1.0,
            #[inline(always)]
            |segment, lanes, dx, values, sums| {
                let dy = dy.map_or(dx, |dy| &dy[segment.elements.clone()]);
                self.gradient(segment, lanes, x, dy, values);
                sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
            },
        );
    }

    /// dx of a segment in f32; `x` is the whole tensor, `dy` the segment's part.
    #[inline(always)]
    fn gradient(&self, segment: &Segment, lanes: &[u16], x: &[T], dy: &[T], dx: &mut [f32]) {
        let mut block = Block::new();
        let slope = &mut block.0[..dx.len()];
        self.biased(segment.col, &x[segment.elements.clone()], slope);
        self.activation.slope(slope);
        convert::load(dy, dx);
        for (dx, &slope) in dx.iter_mut().zip(&*slope) {
            *dx = (*dx * self.draw.scale) * slope;
        }
        // Selected last: a slope that is not finite does not revive a dropped element.
        dropout::select(&Draw { scale: 1.0, ..*self.draw }, lanes, dx);
    }

    /// x + bias in f32, from column `col` on.
    #[inline(always)]
    fn biased(&self, col: usize, x: &[T], sum: &mut [f32]) {
        let Some(bias) = self.bias else { return convert::load(x, sum) };
        for (sum, (&x, &bias)) in sum.iter_mut().zip(x.iter().zip(&bias[col..])) {
            *sum = convert::widen(x) + convert::widen(bias);
        }
    }
}
