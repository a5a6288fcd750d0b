//! `softmax_dropout`: y = D(softmax(scale * x + mask)) along the keys, and its gradient; see
//! [`crate::ops::softmax_dropout`].

use super::abi::{self, Divisor};
use super::rows::{self, Forms, forms, launch_rows};
use super::{Device, Launch, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::softmax_dropout::{Backward, Forward, NAME, Scores};
use crate::tensor::{read, source, write};

/// `SoftmaxParams` in `kernels/softmax_dropout.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    mask: abi::Mask,
    x: u64,
    dy: u64,
    out: u64,
    statistics: u64,
    statistics_out: u64,
    lengths: u64,
    additive: u64,
    cols: u64,
    causal: i64,
    rows: u32,
    scale: f32,
    queries: Divisor,
    heads: Divisor,
}
const _: () = assert!(size_of::<Params>() == 296);

/// y = D(softmax(scale * x + mask)).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { scores, mask, x, y, statistics }: Forward<'_, T, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    let device = to.device;
    let (lengths, additive) = (read(mask.lengths, device)?, read(mask.additive, device)?);
    let (x, y) = (source(x, device)?, y.write(device)?);
    let statistics = write(statistics, device)?;
    let params = Params {
        x: x.as_ref().unwrap_or(&y).pointer,
        out: y.pointer,
        statistics_out: pointer(&statistics),
        lengths: pointer(&lengths),
        additive: pointer(&additive),
        ..params(to.mask, &scores, mask.causal)?
    };
    let forms = forms!(NAME, "softmax_dropout_forward", T);
    // SAFETY: the lengths were checked against the scores; the addresses are held until the end; the kernels allow
    // that y is x.
    unsafe { launch(device, forms, scores.shape()?, params) }
}

/// dx from x, dy, and the rows' statistics where they were saved.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { scores, mask, x, statistics, dy, dx }: Backward<'_, T, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    let device = to.device;
    let (lengths, additive) = (read(mask.lengths, device)?, read(mask.additive, device)?);
    let (x, statistics) = (x.read(device)?, read(statistics, device)?);
    let (dy, dx) = (source(dy, device)?, dx.write(device)?);
    let params = Params {
        x: x.pointer,
        dy: dy.as_ref().unwrap_or(&dx).pointer,
        out: dx.pointer,
        statistics: pointer(&statistics),
        lengths: pointer(&lengths),
        additive: pointer(&additive),
        ..params(to.mask, &scores, mask.causal)?
    };
    let forms = forms!(NAME, "softmax_dropout_backward", T);
    // SAFETY: as above, for dx and dy.
    unsafe { launch(device, forms, scores.shape()?, params) }
}

/// What forward and backward passes share; the tensors are still to be filled in.
fn params(mask: abi::Mask, scores: &Scores, causal: Option<i64>) -> Result<Params, Error> {
    let shape = scores.shape()?;
    rows::check(NAME, shape)?;
    // Above any column, and its negative below any query: it clamps without changing a result.
    let no_limit = 1i64 << 40;
    // Neither exceeds the rows, at most 2^32, where there is any row; 2^32 itself is one too many.
    let divisor = |n: usize| Divisor::new(n.clamp(1, u32::MAX as usize) as u32);
    Ok(Params {
        mask,
        x: 0,
        dy: 0,
        out: 0,
        statistics: 0,
        statistics_out: 0,
        lengths: 0,
        additive: 0,
        cols: shape.cols as u64,
        causal: causal.map_or(no_limit, |offset| offset.clamp(-no_limit, no_limit)),
        rows: 0,
        scale: scores.scale,
        queries: divisor(scores.queries),
        heads: divisor(scores.heads),
    })
}

/// Launches the form for the shape.
unsafe fn launch<D: Device>(
    device: &D,
    forms: Forms,
    shape: Shape,
    params: Params,
) -> Result<(), Error> {
    // Rows without columns still have their statistics.
    if shape.cols == 0 && params.statistics_out == 0 {
        return Ok(());
    }
    let tensors = [params.x, params.dy, params.out, params.additive];
    let part = |first, rows| Params { mask: params.mask.advanced(first, 0), rows, ..params };
    // SAFETY: the caller's promise.
    unsafe { launch_rows(device, forms, shape, &tensors, part) }
}
