//! `softmax_dropout`: y = D(softmax(scale * x + mask)) along the keys, and its gradient; see
//! [`crate::ops::softmax_dropout`].

use super::abi::{self, Divisor, Matrix};
use super::rows::{self, Kernels, kernels, launch_rows};
use super::{Device, Launch, layout, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::softmax_dropout::{Backward, Forward, NAME, Scores};
use crate::tensor::{matrix, matrix_mut, read, source, write};

/// `SoftmaxParams` in `kernels/softmax_dropout.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    mask: abi::Mask,
    x: Matrix,
    dy: Matrix,
    out: Matrix,
    statistics: u64,
    statistics_out: u64,
    lengths: u64,
    additive: u64,
    cols: u64,
    causal: i64,
    rows: u32,
    scale: f32,
    multiplier: f32,
    unit: f32,
    queries: Divisor,
    heads: Divisor,
}
const _: () = assert!(size_of::<Params>() == 328);

/// Above any column, and its negative below any query: a causal offset beyond it changes no result.
const NO_LIMIT: i64 = 1 << 40;

impl Params {
    /// Whether some column may not be visible, or has something added.
    fn is_masked(&self) -> bool {
        self.causal != NO_LIMIT || self.lengths != 0 || self.additive != 0
    }

    /// What x is multiplied by, and the unit of what comes out. That is a scale which is a power of two, but for one with
    /// which a product with x overflows or vanishes, and beside an additive mask.
    fn multiplier_and_unit(&self) -> (f32, f32) {
        let is_power = self.scale.to_bits() << 9 == 0;
        let is_unit = is_power && (2f32.powi(-24)..=1.0).contains(&self.scale);
        if is_unit && self.additive == 0 { (1.0, self.scale) } else { (self.scale, 1.0) }
    }
}

/// y = D(softmax(scale * x + mask)).
pub(crate) fn forward<T: Dtype, D: Device>(
    Forward { scores, mask, x, y, statistics }: Forward<'_, T, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    let device = to.device;
    let (lengths, additive) = (read(mask.lengths, device)?, read(mask.additive, device)?);
    let shape = scores.shape()?;
    let (x, y) = (source(x, shape.cols, device)?, matrix_mut(y, shape.cols, device)?);
    let statistics = write(statistics, device)?;
    let params = Params {
        x: Matrix::of(x.as_ref().unwrap_or(&y)),
        out: Matrix::of(&y),
        statistics_out: pointer(&statistics),
        lengths: pointer(&lengths),
        additive: pointer(&additive),
        ..params(to.mask, &scores, mask.causal)?
    };
    let kernels = match params.is_masked() {
        true => kernels!(NAME, "softmax_dropout_forward_masked" or "softmax_dropout_forward", T),
        false => kernels!(NAME, "softmax_dropout_forward", T),
    };
    // SAFETY: the lengths were checked against the scores; the addresses are held until the end; the kernels allow
    // that y is x.
    unsafe { launch::<T, D>(device, kernels, shape, params) }
}

/// dx from x, dy, and the rows' statistics where they were saved.
pub(crate) fn backward<T: Dtype, D: Device>(
    Backward { scores, mask, x, statistics, dy, dx }: Backward<'_, T, D>,
    to: Launch<'_, D>,
) -> Result<(), Error> {
    let device = to.device;
    let (lengths, additive) = (read(mask.lengths, device)?, read(mask.additive, device)?);
    let shape = scores.shape()?;
    let (x, statistics) = (matrix(x, shape.cols, device)?, read(statistics, device)?);
    let (dy, dx) = (source(dy, shape.cols, device)?, matrix_mut(dx, shape.cols, device)?);
    let params = Params {
        x: Matrix::of(&x),
        dy: Matrix::of(dy.as_ref().unwrap_or(&dx)),
        out: Matrix::of(&dx),
        statistics: pointer(&statistics),
        lengths: pointer(&lengths),
        additive: pointer(&additive),
        ..params(to.mask, &scores, mask.causal)?
    };
    let kernels = match params.is_masked() {
        true => kernels!(NAME, "softmax_dropout_backward_masked" or "softmax_dropout_backward", T),
        false => kernels!(NAME, "softmax_dropout_backward", T),
    };
    // SAFETY: as above, for dx and dy.
    unsafe { launch::<T, D>(device, kernels, shape, params) }
}

/// What forward and backward passes share; the tensors are still to be filled in.
fn params(mask: abi::Mask, scores: &Scores, causal: Option<i64>) -> Result<Params, Error> {
    let shape = scores.shape()?;
    rows::check(NAME, shape)?;
    let causal = causal.map_or(NO_LIMIT, |offset| offset.clamp(-NO_LIMIT, NO_LIMIT));
    // Neither exceeds the rows, at most 2^32, where there is any row; 2^32 itself is one too many.
    let divisor = |n: usize| Divisor::new(n.clamp(1, u32::MAX as usize) as u32);
    Ok(Params {
        mask,
        x: Matrix::NONE,
        dy: Matrix::NONE,
        out: Matrix::NONE,
        statistics: 0,
        statistics_out: 0,
        lengths: 0,
        additive: 0,
        cols: shape.cols as u64,
        causal,
        rows: 0,
        scale: scores.scale,
        multiplier: 1.0,
        unit: 1.0,
        queries: divisor(scores.queries),
        heads: divisor(scores.heads),
    })
}

/// Launches the kernel for the shape.
unsafe fn launch<T: Dtype, D: Device>(
    device: &D,
    kernels: Kernels,
    shape: Shape,
    params: Params,
) -> Result<(), Error> {
    // Rows without columns still have their statistics.
    if shape.cols == 0 && params.statistics_out == 0 {
        return Ok(());
    }
    let layout = layout::<T>(shape, &[params.x, params.dy, params.out], &[params.additive]);
    let (multiplier, unit) = params.multiplier_and_unit();
    let params = Params { multiplier, unit, ..params };
    let part = |first, rows| Params { mask: params.mask.advanced(first, 0), rows, ..params };
    // SAFETY: the caller's promise.
    unsafe { launch_rows(device, kernels, shape, layout.is_aligned(), part) }
}
