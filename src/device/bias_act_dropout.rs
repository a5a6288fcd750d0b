//! `bias_act_dropout`: y = D(act(x + bias)), and its gradients.

use super::sum_rows::{BiasGrad, Held};
use super::{Call, Device, Readable, Writable, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::bias_act_dropout::{Activation, Lens, NAME, check};
use crate::ops::{Dropout, Shape};

/// y = D(act(x + bias)). `bias` has `shape.cols` elements, every other tensor
/// `shape.rows * shape.cols`.
///
/// # Errors
/// [`Error::Argument`] where the arguments do not fit each other; nothing is written then.
/// Otherwise what the device says.
pub fn forward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    activation: Activation,
    x: &dyn Readable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
    y: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    let bias_len = bias.map(|bias| bias.elements());
    let out = ("y", y.elements());
    check(dropout, shape, &Lens { x: x.elements(), bias: bias_len, dy: None, out, dbias: None })?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, bias, y) = (x.read(call.device)?, call.optional(bias)?, y.write(call.device)?);
    let tensors = raw::Forward { x: x.pointer, bias: pointer(&bias), y: y.pointer };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), activation, tensors)
    }
}

/// x = D(act(x + bias)). The backward pass needs x: keep it elsewhere.
///
/// # Errors
/// As [`forward`].
pub fn forward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    activation: Activation,
    x: &mut dyn Writable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
) -> Result<(), Error> {
    let bias_len = bias.map(|bias| bias.elements());
    let out = ("x", x.elements());
    check(dropout, shape, &Lens { x: x.elements(), bias: bias_len, dy: None, out, dbias: None })?;
    let key = call.resident(NAME, shape.rows)?;
    let (bias, x) = (call.optional(bias)?, x.write(call.device)?);
    let tensors = raw::Forward { x: x.pointer, bias: pointer(&bias), y: x.pointer };
    // SAFETY: as in `forward`; the kernel allows that y is x.
    unsafe {
        raw::forward::<T, D>(call.device, dropout, shape, key.addresses(), activation, tensors)
    }
}

/// dx = D(dy) * act'(x + bias), and the bias gradient, where it is asked for: dx before it is rounded,
/// summed over rows in the fixed order of [`sum_rows`](crate::ops::sum_rows).
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    activation: Activation,
    x: &dyn Readable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
    dy: &dyn Readable<T, D>,
    dx: &mut dyn Writable<T, D>,
    mut bias_grad: Option<BiasGrad<'_, D>>,
) -> Result<(), Error> {
    let lens = Lens {
        x: x.elements(),
        bias: bias.map(|bias| bias.elements()),
        dy: Some(dy.elements()),
        out: ("dx", dx.elements()),
        dbias: bias_grad.as_ref().map(|grad| grad.dbias.elements()),
    };
    check_grads(dropout, shape, &lens, &bias_grad)?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, bias) = (x.read(call.device)?, call.optional(bias)?);
    let (dy, dx) = (dy.read(call.device)?, dx.write(call.device)?);
    let grad = bias_grad.as_mut().map(|grad| grad.write(call.device)).transpose()?;
    let grad = grad.as_ref().map(Held::addresses);
    let (bias, dy, dx) = (pointer(&bias), dy.pointer, dx.pointer);
    let tensors = raw::Backward { x: x.pointer, bias, dy, dx };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        let key = key.addresses();
        raw::backward::<T, D>(call.device, dropout, shape, key, activation, tensors, grad)
    }
}

/// dy = D(dy) * act'(x + bias), and the bias gradient.
///
/// # Errors
/// As [`forward`].
pub fn backward_in_place<T: Dtype, D: Device>(
    call: &Call<'_, D>,
    dropout: &Dropout,
    shape: Shape,
    activation: Activation,
    x: &dyn Readable<T, D>,
    bias: Option<&dyn Readable<T, D>>,
    dy: &mut dyn Writable<T, D>,
    mut bias_grad: Option<BiasGrad<'_, D>>,
) -> Result<(), Error> {
    let lens = Lens {
        x: x.elements(),
        bias: bias.map(|bias| bias.elements()),
        dy: None,
        out: ("dy", dy.elements()),
        dbias: bias_grad.as_ref().map(|grad| grad.dbias.elements()),
    };
    check_grads(dropout, shape, &lens, &bias_grad)?;
    let key = call.resident(NAME, shape.rows)?;
    let (x, bias) = (x.read(call.device)?, call.optional(bias)?);
    let dy = dy.write(call.device)?;
    let grad = bias_grad.as_mut().map(|grad| grad.write(call.device)).transpose()?;
    let grad = grad.as_ref().map(Held::addresses);
    let (bias, dy) = (pointer(&bias), dy.pointer);
    let tensors = raw::Backward { x: x.pointer, bias, dy, dx: dy };
    // SAFETY: as in `backward`; the kernels allow that dx is dy.
    unsafe {
        let key = key.addresses();
        raw::backward::<T, D>(call.device, dropout, shape, key, activation, tensors, grad)
    }
}

fn check_grads<D: Device>(
    dropout: &Dropout,
    shape: Shape,
    lens: &Lens,
    bias_grad: &Option<BiasGrad<'_, D>>,
) -> Result<(), Error> {
    check(dropout, shape, lens)?;
    bias_grad.as_ref().map_or(Ok(()), |grad| grad.check(NAME, shape))
}

/// The same on bare addresses.
pub mod raw {
    use super::NAME;
    use crate::device::abi::{Mask, Octets, parts};
    use crate::device::sum_rows::{BiasGradAddresses, Tiles, Tree};
    use crate::device::{Device, KeyAddresses, OCTETS_A_BLOCK, aligned, kernel, launch};
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::ops::bias_act_dropout::Activation;
    use crate::ops::{Dropout, Shape};

    /// Addresses of a forward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Forward {
        /// `shape.rows * shape.cols` elements, read.
        pub x: u64,
        /// `shape.cols` elements, read; 0: no bias.
        pub bias: u64,
        /// `shape.rows * shape.cols` elements, written; may be x.
        pub y: u64,
    }

    /// `BiasActParams` in `kernels/bias_act_dropout.cu`.
    #[repr(C)]
    struct ForwardParams {
        mask: Mask,
        octets: Octets,
        x: u64,
        bias: u64,
        y: u64,
        activation: u32,
        padding: u32,
    }
    const _: () = assert!(size_of::<ForwardParams>() == 240);

    /// y = D(act(x + bias)).
    ///
    /// # Safety
    /// On `device`, the addresses in `tensors` and `key` are valid as [`Forward`] and [`KeyAddresses`]
    /// say until the kernel has run, and aligned to their element; no tensor overlaps `y`, but `y` may
    /// be `x`.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn forward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        activation: Activation,
        tensors: Forward,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let Forward { x, bias, y } = tensors;
        let draw = dropout.draw(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        let kernel = if aligned(shape.cols, &[x, bias, y]) {
            kernel!(NAME, "bias_act_dropout", T)
        } else {
            kernel!(NAME, "bias_act_dropout_any", T)
        };
        let size = size_of::<T>() as u64;
        for part in parts(shape) {
            let bytes = part.first_element * size;
            let params = ForwardParams {
                mask: mask.advanced(part.row, part.octet),
                octets: part.octets,
                x: x + bytes,
                bias: if bias == 0 { 0 } else { bias + 8 * u64::from(part.octet) * size },
                y: y + bytes,
                activation: activation as u32,
                padding: 0,
            };
            let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
            // SAFETY: the caller's promise; the parts stay within the tensors.
            unsafe { launch(device, kernel, blocks, &params)? };
        }
        Ok(())
    }

    /// Addresses of a backward call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Backward {
        /// `shape.rows * shape.cols` elements, read.
        pub x: u64,
        /// `shape.cols` elements, read; 0: no bias.
        pub bias: u64,
        /// `shape.rows * shape.cols` elements, read.
        pub dy: u64,
        /// `shape.rows * shape.cols` elements, written; may be dy, or x.
        pub dx: u64,
    }

    /// `BiasActGrad` in `kernels/bias_act_dropout.cu`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Grad {
        tensors: [u64; 4],
        activation: u32,
        padding: u32,
    }

    /// `BiasActGradParams` in `kernels/bias_act_dropout.cu`.
    #[repr(C)]
    struct GradParams {
        mask: Mask,
        octets: Octets,
        grad: Grad,
    }
    const _: () = assert!(size_of::<GradParams>() == 248);

    /// `BiasActBiasGradParams` in `kernels/bias_act_dropout.cu`.
    #[repr(C)]
    struct BiasGradParams {
        mask: Mask,
        tiles: Tiles,
        grad: Grad,
    }
    const _: () = assert!(size_of::<BiasGradParams>() == 264);

    /// dx = D(dy) * act'(x + bias), and the bias gradient.
    ///
    /// # Safety
    /// On `device`, the addresses in `tensors`, `bias_grad` and `key` are valid as [`Backward`],
    /// [`BiasGradAddresses`] and [`KeyAddresses`] say until the kernels have run, and aligned to their
    /// element. No two overlap, but `dx` may be `dy` or `x`.
    ///
    /// # Errors
    /// [`Error::Argument`] where `shape` or `dropout` is refused; otherwise what the device says.
    pub unsafe fn backward<T: Dtype, D: Device>(
        device: &D,
        dropout: &Dropout,
        shape: Shape,
        key: KeyAddresses,
        activation: Activation,
        tensors: Backward,
        bias_grad: Option<BiasGradAddresses>,
    ) -> Result<(), Error> {
        shape.elements(NAME)?;
        let Backward { x, bias, dy, dx } = tensors;
        let draw = dropout.draw(NAME, shape)?;
        let mask = Mask::new(NAME, &draw, key.stream_number, key.row_list)?;
        let aligned = aligned(shape.cols, &[x, bias, dy, dx]);
        let grad = Grad { tensors: [x, bias, dy, dx], activation: activation as u32, padding: 0 };
        let Some(sums) = bias_grad else {
            // SAFETY: the caller's promise.
            return unsafe { without_sums::<T, D>(device, &mask, shape, aligned, grad) };
        };
        let kernel = match aligned {
            true => kernel!(NAME, "bias_act_dropout_bias_grad", T),
            false => kernel!(NAME, "bias_act_dropout_bias_grad_any", T),
        };
        let tree = Tree::new(shape, sums.dbias, sums.workspace, 1.0);
        let (tiles, blocks) = tree.by_tiles();
        // SAFETY: the caller's promise; the tree's addresses are those of `bias_grad`.
        unsafe {
            if blocks > 0 {
                launch(device, kernel, blocks, &BiasGradParams { mask, tiles, grad })?;
            }
            Tree::finish(device, &[tree])
        }
    }

    unsafe fn without_sums<T: Dtype, D: Device>(
        device: &D,
        mask: &Mask,
        shape: Shape,
        aligned: bool,
        grad: Grad,
    ) -> Result<(), Error> {
        let kernel = match aligned {
            true => kernel!(NAME, "bias_act_dropout_grad", T),
            false => kernel!(NAME, "bias_act_dropout_grad_any", T),
        };
        let size = size_of::<T>() as u64;
        for part in parts(shape) {
            let bytes = part.first_element * size;
            let [x, bias, dy, dx] = grad.tensors;
            let bias = if bias == 0 { 0 } else { bias + 8 * u64::from(part.octet) * size };
            let params = GradParams {
                mask: mask.advanced(part.row, part.octet),
                octets: part.octets,
                grad: Grad { tensors: [x + bytes, bias, dy + bytes, dx + bytes], ..grad },
            };
            let blocks = part.octets.count.div_ceil(OCTETS_A_BLOCK) as usize;
            // SAFETY: the caller's promise; the parts stay within the tensors.
            unsafe { launch(device, kernel, blocks, &params)? };
        }
        Ok(())
    }
}
