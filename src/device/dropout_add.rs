//! `dropout_add`: y = residual + D(x + bias), and its gradients.

use super::sum_rows::{BiasGrad, Held};
use super::{Call, Device, Readable, Writable, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add::{NAME, check_backward, check_forward};
use crate::ops::{Dropout, Shape};

/// y = residual + D(x + bias). `bias` has `shape.cols` elements, every other tensor
/// `shape.rows * shape.cols`.
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn forward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    x: &dyn Readable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
    residual: &dyn Readable<T, D>,
    y: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    let bias_len = bias.map(|bias| bias.elements());
    check_forward(dropout, shape, x.elements(), bias_len, residual.elements(), y.elements())?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, bias) = (x.read(call.device)?, call.optional(bias)?);
    let (residual, y) = (residual.read(call.device)?, y.write(call.device)?);
    let tensors = raw::Forward {
        x: x.pointer,
        bias: pointer(&bias),
        residual: residual.pointer,
        y: y.pointer,
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe { raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), tensors) }
}

/// residual = residual + D(x + bias).
///
/// # Errors
/// As [`forward`].
pub fn forward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    x: &dyn Readable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
    residual: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    let bias_len = bias.map(|bias| bias.elements());
    let residual_len = residual.elements();
    check_forward(dropout, shape, x.elements(), bias_len, residual_len, residual_len)?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, bias) = (x.read(call.device)?, call.optional(bias)?);
    let residual = residual.write(call.device)?;
    let tensors = raw::Forward {
        x: x.pointer,
        bias: pointer(&bias),
        residual: residual.pointer,
        y: residual.pointer,
    };
    // SAFETY: as in `forward`; the kernel allows that its output is the residual.
    unsafe { raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), tensors) }
}

/// dx = D(dy), and the bias gradient, where it is asked for: kept dy summed over rows in the fixed
/// order of [`sum_rows`](crate::ops::sum_rows), times the scale. The residual's gradient is dy.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    dy: &dyn Readable<T, D>,
    dx: &mut dyn Writable<T, D>,
    mut bias_grad: Option<BiasGrad<'_, D>>,
) -> Result<(), Error> {
    check_grads(dropout, shape, dy.elements(), dx.elements(), &bias_grad)?;
    let key = call.resident(NAME, shape.rows)?;
    let (dy, dx) = (dy.read(call.device)?, dx.write(call.device)?);
    let grad = bias_grad.as_mut().map(|grad| grad.write(call.device)).transpose()?;
    let grad = grad.as_ref().map(Held::addresses);
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        let key = key.addresses();
        raw::backward::<T, D>(call.device, dropout, shape, key, dy.pointer, dx.pointer, grad)
    }
}

/// dy = D(dy), and the bias gradient.
///
/// # Errors
/// As [`forward`].
pub fn backward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    dy: &mut dyn Writable<T, D>,
    mut bias_grad: Option<BiasGrad<'_, D>>,
) -> Result<(), Error> {
    check_grads(dropout, shape, dy.elements(), dy.elements(), &bias_grad)?;
    let key = call.resident(NAME, shape.rows)?;
    let dy = dy.write(call.device)?;
    let grad = bias_grad.as_mut().map(|grad| grad.write(call.device)).transpose()?;
    let grad = grad.as_ref().map(Held::addresses);
    // SAFETY: as in `backward`; the kernels allow that dx is dy.
    unsafe {
        let key = key.addresses();
        raw::backward::<T, D>(call.device, dropout, shape, key, dy.pointer, dy.pointer, grad)
    }
}

/// The bias gradient alone: `dy` is read and nothing else is written.
///
/// # Errors
/// As [`forward`].
pub fn bias_grad<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    dy: &dyn Readable<T, D>,
    bias_grad: BiasGrad<'_, D>,
) -> Result<(), Error> {
    let mut bias_grad = Some(bias_grad);
    check_grads(dropout, shape, dy.elements(), dy.elements(), &bias_grad)?;
    let key = call.resident(NAME, shape.rows)?;
    let dy = dy.read(call.device)?;
    let grad = bias_grad.as_mut().map(|grad| grad.write(call.device)).transpose()?;
    let grad = grad.as_ref().map(Held::addresses);
    // SAFETY: as in `backward`; where there is a bias gradient, the kernel writes no dx at 0.
    unsafe {
        let key = key.addresses();
        raw::backward::<T, D>(call.device, dropout, shape, key, dy.pointer, 0, grad)
    }
}

fn check_grads<D: Device>(
    dropout: &Dropout,
    shape: Shape,
    dy: usize,
    dx: usize,
    bias_grad: &Option<BiasGrad<'_, D>>,
) -> Result<(), Error> {
    let dbias = bias_grad.as_ref().map(|grad| grad.dbias.elements());
    check_backward(dropout, shape, dy, dx, dbias)?;
    bias_grad.as_ref().map_or(Ok(()), |grad| grad.check(NAME, shape))
}

/// The same on bare addresses.
pub mod raw {
    use super::NAME;
    use crate::device::abi::{Mask, Octets, parts};
    use crate::device::sum_rows::{BiasGradAddresses, Tiles, Tree};
    use crate::device::{self, Device, KeyAddresses, OCTETS_A_BLOCK, aligned, kernel, launch};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::ops::{Dropout, Shape};

    /// Addresses of a forward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Forward {
        /// `shape.rows * shape.cols` elements, read.
        pub x: u64,
        /// `shape.cols` elements, read; 0: no bias.
        pub bias: u64,
        /// `shape.rows * shape.cols` elements, read.
        pub residual: u64,
        /// `shape.rows * shape.cols` elements, written; may be the residual.
        pub y: u64,
    }

    /// `DropoutAddParams` in `kernels/dropout_add.cu`.
    #[repr(C)]
    struct ForwardParams {
        mask: Mask,
        octets: Octets,
        x: u64,
        bias: u64,
        residual: u64,
        y: u64,
    }
    const _: () = assert!(size_of::<ForwardParams>() == 240);

    /// y = residual + D(x + bias).
    ///
    /// # Safety
    /// On `device`, the addresses in `tensors` and `key` are valid as [`Forward`] and
    /// [`KeyAddresses`] say until the kernel has run, and aligned to their element; no tensor
    /// overlaps `y`, but `y` may be the residual.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        tensors: Forward,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let Forward { x, bias, residual, y } = tensors;
        let draw = dropout.draw(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        let kernel = match (bias != 0, aligned(shape.cols, &[x, bias, residual, y])) {
            (false, true) => kernel!(NAME, "dropout_add", T),
            (false, false) => kernel!(NAME, "dropout_add_any", T),
            (true, true) => kernel!(NAME, "dropout_add_bias", T),
            (true, false) => kernel!(NAME, "dropout_add_bias_any", T),
        };
        let size = size_of::<T>() as u64;
        for part in parts(shape) {
            let bytes = part.first_element * size;
            let params = ForwardParams {
                mask: mask.advanced(part.row, part.octet),
                octets: part.octets,
                x: x + bytes,
                bias: if bias == 0 { 0 } else { bias + 8 * u64::from(part.octet) * size },
                residual: residual + bytes,
                y: y + bytes,
            };
            let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
            // SAFETY: the caller's promise; the parts stay within the tensors.
            unsafe { launch(device, kernel, blocks, &params)? };
        }
        Ok(())
    }

    /// dx = D(dy), and the bias gradient.
    ///
    /// # Safety
    /// On `device`, `dy` and `dx` are addresses of `shape.rows * shape.cols` elements of T, aligned
    /// to T, and those in `bias_grad` and `key` are as [`BiasGradAddresses`] and [`KeyAddresses`] say; all are
    /// valid until the kernels have run. No two overlap, but `dx` may be `dy`. With a `bias_grad`, `dx` may be 0: not
    /// asked for.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn backward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        dy: u64,
        dx: u64,
        bias_grad: Option<BiasGradAddresses>,
    ) -> Result<(), Error> {
        let Some(grad) = bias_grad else {
            // SAFETY: the caller's promise is the one asked for here.
            return unsafe {
                device::dropout::raw::forward::<T, D>(device, dropout, shape, key, dy, dx)
            };
        };
        shape.elements(NAME)?;
        let draw = dropout.draw(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        let tree = Tree::new(shape, grad.dbias, grad.workspace, draw.scale);
        let (tiles, blocks) = tree.by_tiles();
        let kernel = if aligned(shape.cols, &[dy, dx]) {
            kernel!(NAME, "dropout_add_bias_grad", T)
        } else {
            kernel!(NAME, "dropout_add_bias_grad_any", T)
        };
        // SAFETY: the caller's promise; the tree's addresses are those of `grad`.
        unsafe {
            if blocks > 0 {
                launch(device, kernel, blocks, &BiasGradParams { mask, tiles, dy, dx })?;
            }
            Tree::finish(device, &[tree])
        }
    }

    /// `BiasGradParams` in `kernels/dropout_add.cu`.
    #[repr(C)]
    struct BiasGradParams {
        mask: Mask,
        tiles: Tiles,
        dy: u64,
        dx: u64,
    }
    const _: () = assert!(size_of::<BiasGradParams>() == 240);
}
