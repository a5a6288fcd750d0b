//! The transformer's own kernels (`kernels/transformer/`) as launches, for every [`Device`].

use crate::device::rows::Team;
use crate::device::{Address, Device, Kernel, aligned, kernel, launch};
use crate::dtype::{Dtype, DtypeId};
use crate::error::Error;
use crate::ops::{Shape, check_len};
use crate::tensor::{Readable, Writable};
use crate::transformer::backend::ADAMW_NUMBERS;

/// Elements of a block that takes them one by one: `ELEMENTS_A_BLOCK` in `kernels/transformer/elements.cuh`.
const ELEMENTS_A_BLOCK: usize = 1024;

/// Elements of a block of the norm: `PART_ELEMENTS` in `kernels/transformer/gradient_norm.cu`.
const PART_ELEMENTS: usize = 1 << 14;

/// A tensor that is updated: `InOut` in `kernels/transformer/elements.cuh`.
type InOut = [u64; 2];

/// Columns up to which a warp takes a row of the cross-entropy: 32 lanes of four octets.
const WARP_COLS: usize = 1024;

/// `CrossEntropyParams` in `kernels/transformer/cross_entropy.cu`.
#[repr(C)]
struct CrossEntropyParams {
    logits: InOut,
    labels: u64,
    factor: u64,
    losses: u64,
    cols: u64,
    rows: u32,
    padding: u32,
}
const _: () = assert!(size_of::<CrossEntropyParams>() == 56);

/// `CrossEntropyLossParams` in the same file.
#[repr(C)]
struct CrossEntropyLossParams {
    losses: u64,
    factor: u64,
    loss: u64,
    rows: u64,
}
const _: () = assert!(size_of::<CrossEntropyLossParams>() == 32);

/// [`Backend::cross_entropy`](crate::transformer::Backend::cross_entropy).
pub(super) fn cross_entropy<T: Dtype, D: Device>(
    device: &D,
    shape: Shape,
    factor: &dyn Readable<f32, D>,
    labels: &dyn Readable<i32, D>,
    logits: &mut dyn Writable<T, D>,
    loss: &mut dyn Writable<f32, D>,
) -> Result<(), Error> {
    const NAME: &str = "cross_entropy";
    check_len(NAME, "logits", shape.elements(NAME)?, logits.elements())?;
    check_len(NAME, "factor", 1, factor.elements())?;
    check_len(NAME, "labels", shape.rows, labels.elements())?;
    check_len(NAME, "loss", 1, loss.elements())?;
    let rows = u32::try_from(shape.rows)
        .map_err(|_| Error::argument(NAME, "rows", "fewer than 2^32 rows", shape.rows))?;
    let (factor, labels) = (factor.read(device)?, labels.read(device)?);
    let (logits, loss) = (logits.write(device)?, loss.write(device)?);
    let losses = device.workspace(shape.rows)?;
    let aligned = aligned(shape.cols, [logits.pointer]);
    let (kernel, team) = match shape.cols <= WARP_COLS {
        true => (kernel!(NAME, "cross_entropy_warp", T, if aligned), Team::warp(WARP_COLS)),
        false => {
            (kernel!(NAME, "cross_entropy_block", T, if aligned), Team::block(256, usize::MAX))
        }
    };
    let params = CrossEntropyParams {
        logits: [logits.pointer; 2],
        labels: labels.pointer,
        factor: factor.pointer,
        losses: losses.pointer,
        cols: shape.cols as u64,
        rows,
        padding: 0,
    };
    let sum = CrossEntropyLossParams {
        losses: losses.pointer,
        factor: factor.pointer,
        loss: loss.pointer,
        rows: shape.rows as u64,
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        if shape.rows > 0 {
            team.launch(device, kernel, shape.rows, &params)?;
        }
        launch(device, Kernel { operator: NAME, name: "cross_entropy_loss_f32" }, 1, &sum)
    }
}

/// Tensors of a launch that takes several: `TENSORS` in `kernels/transformer/elements.cuh`.
const TENSORS: usize = 48;

/// `Blocks` in the same file.
#[repr(C)]
struct Blocks([u32; TENSORS]);

impl Blocks {
    /// Of tensors of so many elements, of which a block takes `a_block`; and the number of all blocks.
    fn new(
        operator: &'static str,
        elements: impl Iterator<Item = usize>,
        a_block: usize,
    ) -> Result<(Self, usize), Error> {
        let mut first = [u32::MAX; TENSORS];
        let mut blocks = 0usize;
        for (first, elements) in first.iter_mut().zip(elements) {
            *first = u32::try_from(blocks)
                .map_err(|_| Error::argument(operator, "tensors", "fewer elements", blocks))?;
            blocks += elements.div_ceil(a_block);
        }
        Ok((Self(first), blocks))
    }
}

/// `SquaresParams` in `kernels/transformer/gradient_norm.cu`.
#[repr(C)]
struct SquaresParams {
    parts: u64,
    blocks: Blocks,
    values: [u64; TENSORS],
    counts: [u64; TENSORS],
}
const _: () = assert!(size_of::<SquaresParams>() == 968);

/// `NormParams` in the same file.
#[repr(C)]
struct NormParams {
    parts: u64,
    norm: u64,
    count: u64,
    max_norm: f32,
    padding: u32,
}
const _: () = assert!(size_of::<NormParams>() == 32);

/// Blocks of the first kernel, each of which leaves a part of the sum.
fn norm_parts<D: Device>(grads: &[impl Readable<f32, D>]) -> usize {
    grads.iter().map(|grad| grad.elements().div_ceil(PART_ELEMENTS)).sum()
}

/// [`Backend::gradient_norm`](crate::transformer::Backend::gradient_norm).
pub(super) fn gradient_norm<D: Device>(
    device: &D,
    grads: &[impl Readable<f32, D>],
    max_norm: f32,
    norm: &mut dyn Writable<f32, D>,
) -> Result<(), Error> {
    const NAME: &str = "gradient_norm";
    let count = norm_parts(grads);
    check_len(NAME, "norm", 2, norm.elements())?;
    let (parts, norm) = (device.workspace(count)?, norm.write(device)?);
    let mut next = parts.pointer;
    for grads in grads.chunks(TENSORS) {
        let elements = grads.iter().map(|grad| grad.elements());
        let (blocks, count) = Blocks::new(NAME, elements, PART_ELEMENTS)?;
        if count == 0 {
            continue;
        }
        let held = grads.iter().map(|grad| grad.read(device)).collect::<Result<Vec<_>, _>>()?;
        let params = SquaresParams {
            parts: next,
            blocks,
            values: std::array::from_fn(|i| held.get(i).map_or(0, |values| values.pointer)),
            counts: std::array::from_fn(|i| grads.get(i).map_or(0, |grad| grad.elements() as u64)),
        };
        let kernel = Kernel { operator: NAME, name: "gradient_norm_squares_f32" };
        // SAFETY: a block writes one of the parts, whose number was checked; the addresses are held.
        unsafe { launch(device, kernel, count, &params)? };
        next += (count * size_of::<f32>()) as u64;
    }
    let params = NormParams {
        parts: parts.pointer,
        norm: norm.pointer,
        count: count as u64,
        max_norm,
        padding: 0,
    };
    // SAFETY: as above; `norm` has two elements.
    unsafe { launch(device, Kernel { operator: NAME, name: "gradient_norm_f32" }, 1, &params) }
}

/// `AdamwWeight` in `kernels/transformer/adamw.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct AdamwWeight {
    grad: u64,
    m: InOut,
    v: InOut,
    master: InOut,
    weight: u64,
    count: u64,
    decay: f32,
    padding: u32,
}

/// `AdamwParams` in the same file.
#[repr(C)]
struct AdamwParams {
    numbers: u64,
    norm: u64,
    blocks: Blocks,
    weights: [AdamwWeight; TENSORS],
}
const _: () = assert!(size_of::<AdamwParams>() == 4048);

/// A weight and what AdamW keeps of it: [`Weight`](crate::transformer::backend::Weight) with a device's tensors.
pub(super) struct DeviceWeight<'a, T, D: Device> {
    pub weight: &'a mut dyn Writable<T, D>,
    pub master: Option<&'a mut dyn Writable<f32, D>>,
    pub grad: &'a dyn Readable<f32, D>,
    pub m: &'a mut dyn Writable<f32, D>,
    pub v: &'a mut dyn Writable<f32, D>,
    pub decay: f32,
}

/// The addresses of a weight, held for one launch.
struct HeldWeight<'a, D: Device> {
    params: AdamwWeight,
    _held: [Option<Address<'a, D>>; 5],
}

impl<T: Dtype, D: Device> DeviceWeight<'_, T, D> {
    fn check(&self, operator: &'static str) -> Result<(), Error> {
        let count = self.weight.elements();
        check_len(operator, "grad", count, self.grad.elements())?;
        check_len(operator, "m", count, self.m.elements())?;
        check_len(operator, "v", count, self.v.elements())?;
        match &self.master {
            Some(master) => check_len(operator, "master", count, master.elements()),
            None if T::ID == DtypeId::F32 => Ok(()),
            None => Err(Error::argument(operator, "master", "the weight in f32", "none")),
        }
    }

    fn hold<'h>(&'h mut self, device: &'h D) -> Result<HeldWeight<'h, D>, Error> {
        let count = self.weight.elements() as u64;
        let (grad, m, v) = (self.grad.read(device)?, self.m.write(device)?, self.v.write(device)?);
        let weight = self.weight.write(device)?;
        let master = self.master.as_mut().map(|master| master.write(device)).transpose()?;
        let (master_at, rounded) = match &master {
            Some(master) => (master.pointer, weight.pointer),
            None => (weight.pointer, 0),
        };
        let params = AdamwWeight {
            grad: grad.pointer,
            m: [m.pointer; 2],
            v: [v.pointer; 2],
            master: [master_at; 2],
            weight: rounded,
            count,
            decay: self.decay,
            padding: 0,
        };
        Ok(HeldWeight { params, _held: [Some(grad), Some(m), Some(v), Some(weight), master] })
    }
}

/// [`Backend::adamw`](crate::transformer::Backend::adamw).
pub(super) fn adamw<T: Dtype, D: Device>(
    device: &D,
    numbers: &dyn Readable<f32, D>,
    norm: &dyn Readable<f32, D>,
    weights: &mut [DeviceWeight<'_, T, D>],
) -> Result<(), Error> {
    const NAME: &str = "adamw";
    check_len(NAME, "numbers", ADAMW_NUMBERS, numbers.elements())?;
    check_len(NAME, "norm", 2, norm.elements())?;
    weights.iter().try_for_each(|weight| weight.check(NAME))?;
    let (numbers, norm) = (numbers.read(device)?, norm.read(device)?);
    for weights in weights.chunks_mut(TENSORS) {
        let elements = weights.iter().map(|weight| weight.weight.elements());
        let (blocks, count) = Blocks::new(NAME, elements, ELEMENTS_A_BLOCK)?;
        if count == 0 {
            continue;
        }
        let held = weights.iter_mut().map(|weight| weight.hold(device));
        let held = held.collect::<Result<Vec<_>, _>>()?;
        let params = AdamwParams {
            numbers: numbers.pointer,
            norm: norm.pointer,
            blocks,
            weights: std::array::from_fn(|i| {
                held.get(i).map_or(AdamwWeight::default(), |w| w.params)
            }),
        };
        // SAFETY: the lengths were checked; the addresses are held until the end.
        unsafe { launch(device, kernel!(NAME, "adamw", T), count, &params)? };
    }
    Ok(())
}

/// `AccumulateParams` in `kernels/transformer/accumulate.cu`.
#[repr(C)]
struct AccumulateParams {
    from: u64,
    to: InOut,
    count: u64,
}
const _: () = assert!(size_of::<AccumulateParams>() == 32);

/// [`Backend::accumulate`](crate::transformer::Backend::accumulate).
pub(super) fn accumulate<T: Dtype, D: Device>(
    device: &D,
    from: &dyn Readable<f32, D>,
    to: &mut dyn Writable<T, D>,
) -> Result<(), Error> {
    const NAME: &str = "accumulate";
    let count = to.elements();
    check_len(NAME, "from", count, from.elements())?;
    let blocks = count.div_ceil(ELEMENTS_A_BLOCK);
    if blocks == 0 {
        return Ok(());
    }
    let (from, to) = (from.read(device)?, to.write(device)?);
    let params = AccumulateParams { from: from.pointer, to: [to.pointer; 2], count: count as u64 };
    // SAFETY: the lengths were checked; the addresses are held until the end.
    unsafe { launch(device, kernel!(NAME, "accumulate", T), blocks, &params) }
}
