//! `softmax_dropout`: y = D(softmax(scale * x + mask)) along the keys, and its gradient; see
//! [`crate::ops::softmax_dropout`].

use super::{Address, Call, Device, Readable, Writable, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Dropout;
use crate::ops::softmax_dropout::{AttentionMask, Lens, NAME, Scores, check};

/// The attention mask as a device takes it: both tensors in device memory.
pub type DeviceMask<'a, T, D> = AttentionMask<&'a dyn Readable<u32, D>, &'a dyn Readable<T, D>>;

/// y = D(softmax(scale * x + mask)). `x` and `y` have as many elements as the scores; `statistics`, where it
/// is given, two f32 a row, `[rows, 2]`: the row's largest z and the reciprocal of its sum, for [`backward`].
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn forward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    scores: &Scores,
    mask: &DeviceMask<'_, T, D>,
    x: &dyn Readable<T, D>,
    y: &mut dyn Writable<T, D>,
    statistics: Option<&mut dyn Writable<f32, D>>,
) -> Result<(), Error> {
    let out = ("y", y.elements());
    let rows = check_call(dropout, scores, mask, x.elements(), None, out, elements(&statistics))?;
    let key = call.resident(NAME, rows)?;
    let mask = Held::new(call, mask)?;
    let (x, y) = (x.read(call.device)?, y.write(call.device)?);
    let statistics = statistics.map(|statistics| statistics.write(call.device)).transpose()?;
    let tensors = raw::Forward { x: x.pointer, y: y.pointer, statistics: pointer(&statistics) };
    // SAFETY: the lengths were checked against the scores; the addresses are held until the end.
    unsafe {
        let (key, mask) = (key.addresses(), mask.addresses());
        raw::forward::<T, D>(call.device, dropout, scores, mask, key, tensors)
    }
}

/// x = D(softmax(scale * x + mask)).
///
/// # Errors
/// As [`forward`].
pub fn forward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    scores: &Scores,
    mask: &DeviceMask<'_, T, D>,
    x: &mut dyn Writable<T, D>,
    statistics: Option<&mut dyn Writable<f32, D>>,
) -> Result<(), Error> {
    let out = ("x", x.elements());
    let rows = check_call(dropout, scores, mask, x.elements(), None, out, elements(&statistics))?;
    let key = call.resident(NAME, rows)?;
    let mask = Held::new(call, mask)?;
    let x = x.write(call.device)?;
    let statistics = statistics.map(|statistics| statistics.write(call.device)).transpose()?;
    let tensors = raw::Forward { x: x.pointer, y: x.pointer, statistics: pointer(&statistics) };
    // SAFETY: as in `forward`; the kernels allow that y is x.
    unsafe {
        let (key, mask) = (key.addresses(), mask.addresses());
        raw::forward::<T, D>(call.device, dropout, scores, mask, key, tensors)
    }
}

/// dx from the forward pass's input `x`, the gradient `dy` of its output, and the
/// `statistics` that it gave (without them they are computed again).
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    scores: &Scores,
    mask: &DeviceMask<'_, T, D>,
    x: &dyn Readable<T, D>,
    statistics: Option<&dyn Readable<f32, D>>,
    dy: &dyn Readable<T, D>,
    dx: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    let (dy_len, out) = (Some(dy.elements()), ("dx", dx.elements()));
    let statistics_len = statistics.map(|statistics| statistics.elements());
    let rows = check_call(dropout, scores, mask, x.elements(), dy_len, out, statistics_len)?;
    let key = call.resident(NAME, rows)?;
    let mask = Held::new(call, mask)?;
    let (x, statistics) = (x.read(call.device)?, call.optional(statistics)?);
    let (dy, dx) = (dy.read(call.device)?, dx.write(call.device)?);
    let tensors = raw::Backward {
        x: x.pointer,
        statistics: pointer(&statistics),
        dy: dy.pointer,
        dx: dx.pointer,
    };
    // SAFETY: the lengths were checked against the scores; the addresses are held until the end.
    unsafe {
        let (key, mask) = (key.addresses(), mask.addresses());
        raw::backward::<T, D>(call.device, dropout, scores, mask, key, tensors)
    }
}

/// [`backward`] with dx in place of dy.
///
/// # Errors
/// As [`forward`].
pub fn backward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    scores: &Scores,
    mask: &DeviceMask<'_, T, D>,
    x: &dyn Readable<T, D>,
    statistics: Option<&dyn Readable<f32, D>>,
    dy: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    let (dy_len, out) = (Some(dy.elements()), ("dy", dy.elements()));
    let statistics_len = statistics.map(|statistics| statistics.elements());
    let rows = check_call(dropout, scores, mask, x.elements(), dy_len, out, statistics_len)?;
    let key = call.resident(NAME, rows)?;
    let mask = Held::new(call, mask)?;
    let (x, statistics) = (x.read(call.device)?, call.optional(statistics)?);
    let dy = dy.write(call.device)?;
    let tensors = raw::Backward {
        x: x.pointer,
        statistics: pointer(&statistics),
        dy: dy.pointer,
        dx: dy.pointer,
    };
    // SAFETY: as in `backward`; the kernels allow that dx is dy.
    unsafe {
        let (key, mask) = (key.addresses(), mask.addresses());
        raw::backward::<T, D>(call.device, dropout, scores, mask, key, tensors)
    }
}

fn elements<D: Device>(tensor: &Option<&mut dyn Writable<f32, D>>) -> Option<usize> {
    tensor.as_ref().map(|tensor| tensor.elements())
}

/// Checks a call, and answers the number of rows.
fn check_call<T: Dtype, D: Device>(
    dropout: &Dropout,
    scores: &Scores,
    mask: &DeviceMask<'_, T, D>,
    x: usize,
    dy: Option<usize>,
    out: (&'static str, usize),
    statistics: Option<usize>,
) -> Result<usize, Error> {
    let lengths = mask.lengths.map(|lengths| lengths.elements());
    let additive = mask.additive.map(|additive| additive.elements());
    let (shape, _) = check(dropout, scores, &Lens { x, dy, out, statistics, lengths, additive })?;
    Ok(shape.rows)
}

/// An attention mask whose tensors are held for a launch.
struct Held<'a, D: Device> {
    causal: Option<i64>,
    lengths: Option<Address<'a, D>>,
    additive: Option<Address<'a, D>>,
}

impl<'a, D: Device> Held<'a, D> {
    fn new<T>(
        call: &Call<'a, D>,
        mask: &AttentionMask<&'a dyn Readable<u32, D>, &'a dyn Readable<T, D>>,
    ) -> Result<Self, Error> {
        Ok(Self {
            causal: mask.causal,
            lengths: call.optional(mask.lengths)?,
            additive: call.optional(mask.additive)?,
        })
    }

    fn addresses(&self) -> AttentionMask<u64, u64> {
        AttentionMask {
            causal: self.causal,
            lengths: self.lengths.as_ref().map(|address| address.pointer),
            additive: self.additive.as_ref().map(|address| address.pointer),
        }
    }
}

/// The same on bare addresses.
pub mod raw {
    use super::NAME;
    use crate::device::abi::{Divisor, Mask};
    use crate::device::rows::{self, Forms, forms, launch_rows};
    use crate::device::{Device, KeyAddresses};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::ops::softmax_dropout::{AttentionMask, Scores};
    use crate::ops::{Dropout, Shape};

    /// Addresses of a forward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Forward {
        /// The scores, read.
        pub x: u64,
        /// The result, written; may be `x`.
        pub y: u64,
        /// Two f32 a row, written; 0: not asked for.
        pub statistics: u64,
    }

    /// Addresses of a backward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Backward {
        /// The scores, read.
        pub x: u64,
        /// Two f32 a row, read; 0: computed again.
        pub statistics: u64,
        /// The gradient of the result, read.
        pub dy: u64,
        /// The gradient of the scores, written; may be `dy`.
        pub dx: u64,
    }

    /// `SoftmaxParams` in `kernels/softmax_dropout.cu`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Params {
        mask: Mask,
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
    const _: () = assert!(size_of::<Params>() == 288);

    /// y = D(softmax(scale * x + mask)).
    ///
    /// # Safety
    /// On `device`, the addresses in `tensors` and `key` are valid as [`Forward`] and
    /// [`KeyAddresses`] say until the kernel has run, aligned to their element and of the lengths
    /// that `scores` gives; so are those of `mask`, as [`AttentionMask`] says. No tensor overlaps one
    /// that is written, but `y` may be `x`.
    ///
    /// # Errors
    /// [`Error::Argument`] where `scores` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        scores: &Scores,
        mask: AttentionMask<u64, u64>,
        key: KeyAddresses,
        tensors: Forward,
    ) -> Result<(), Error> {
        let Forward { x, y, statistics } = tensors;
        let (shape, params) = params(dropout, scores, mask, key)?;
        let params = Params { x, out: y, statistics_out: statistics, ..params };
        let forms = forms!(NAME, "softmax_dropout_forward", T);
        // SAFETY: the caller's promise.
        unsafe { launch(device, forms, shape, params) }
    }

    /// dx from x, dy, and the rows' statistics where they were saved.
    ///
    /// # Safety
    /// As [`forward`], with [`Backward`] in place of [`Forward`]; `dx` may be `dy`.
    ///
    /// # Errors
    /// As [`forward`].
    pub unsafe fn backward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        scores: &Scores,
        mask: AttentionMask<u64, u64>,
        key: KeyAddresses,
        tensors: Backward,
    ) -> Result<(), Error> {
        let Backward { x, statistics, dy, dx } = tensors;
        let (shape, params) = params(dropout, scores, mask, key)?;
        let params = Params { x, statistics, dy, out: dx, ..params };
        let forms = forms!(NAME, "softmax_dropout_backward", T);
        // SAFETY: the caller's promise.
        unsafe { launch(device, forms, shape, params) }
    }

    /// What forward and backward calls share; the tensors are still to be filled in.
    fn params(
        dropout: &Dropout,
        scores: &Scores,
        mask: AttentionMask<u64, u64>,
        key: KeyAddresses,
    ) -> Result<(Shape, Params), Error> {
        let shape = scores.shape()?;
        if !scores.scale.is_finite() {
            return Err(Error::argument(NAME, "scale", "a finite factor", scores.scale));
        }
        let draw = dropout.draw(NAME, shape)?;
        rows::check(NAME, shape)?;
        // Above any column, and its negative below any query: it clamps without changing a result.
        let no_limit = 1i64 << 40;
        // Neither exceeds the rows, at most 2^32, where there is any row; 2^32 itself is one too many.
        let divisor = |n: usize| Divisor::new(n.clamp(1, u32::MAX as usize) as u32);
        let params = Params {
            mask: Mask::new(NAME, &draw, key.stream_number, key.row_list)?,
            x: 0,
            dy: 0,
            out: 0,
            statistics: 0,
            statistics_out: 0,
            lengths: mask.lengths.unwrap_or(0),
            additive: mask.additive.unwrap_or(0),
            cols: shape.cols as u64,
            causal: mask.causal.map_or(no_limit, |offset| offset.clamp(-no_limit, no_limit)),
            rows: 0,
            scale: scores.scale,
            queries: divisor(scores.queries),
            heads: divisor(scores.heads),
        };
        Ok((shape, params))
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
}
