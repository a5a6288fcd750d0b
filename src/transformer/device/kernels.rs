//! The transformer's own kernels (`kernels/transformer/`) as launches, for every [`Device`].

#[cfg(any(feature = "cuda", test))]
use crate::device::abi::IndexDivisor;
use crate::device::{Device, Kernel, Readable, Writable, aligned, kernel, launch};
use crate::dtype::{Dtype, DtypeId};
use crate::error::Error;
use crate::ops::{Shape, check_len};
use crate::transformer::backend::ADAMW_NUMBERS;
#[cfg(any(feature = "cuda", test))]
use crate::transformer::backend::MatMul;

/// Elements of a block that takes them one by one: `ELEMENTS_A_BLOCK` in `kernels/transformer/elements.cuh`.
const ELEMENTS_A_BLOCK: usize = 1024;

/// Elements of a block of the norm: `PART_ELEMENTS` in `kernels/transformer/gradient_norm.cu`.
const PART_ELEMENTS: usize = 1 << 14;

/// A tensor that is updated: `InOut` in `kernels/transformer/elements.cuh`.
type InOut = [u64; 2];

/// `CrossEntropyParams` in `kernels/transformer/cross_entropy.cu`.
#[repr(C)]
struct CrossEntropyParams {
    logits: InOut,
    labels: u64,
    losses: u64,
    cols: u64,
    factor: f32,
    padding: u32,
}
const _: () = assert!(size_of::<CrossEntropyParams>() == 48);

/// `CrossEntropyLossParams` in the same file.
#[repr(C)]
struct CrossEntropyLossParams {
    losses: u64,
    loss: u64,
    rows: u64,
    factor: f32,
    padding: u32,
}
const _: () = assert!(size_of::<CrossEntropyLossParams>() == 32);

/// [`Backend::cross_entropy`](crate::transformer::Backend::cross_entropy) with `losses`, scratch memory of one
/// f32 a row.
pub(super) fn cross_entropy<T: Dtype, D: Device>(
    device: &D,
    shape: Shape,
    factor: f32,
    labels: &dyn Readable<i32, D>,
    logits: &mut dyn Writable<T, D>,
    losses: &mut dyn Writable<f32, D>,
    loss: &mut dyn Writable<f32, D>,
) -> Result<(), Error> {
    const NAME: &str = "cross_entropy";
    check_len(NAME, "logits", shape.elements(NAME)?, logits.elements())?;
    check_len(NAME, "labels", shape.rows, labels.elements())?;
    check_len(NAME, "losses", shape.rows, losses.elements())?;
    check_len(NAME, "loss", 1, loss.elements())?;
    let (labels, logits) = (labels.read(device)?, logits.write(device)?);
    let (losses, loss) = (losses.write(device)?, loss.write(device)?);
    let kernel = match aligned(shape.cols, &[logits.pointer]) {
        true => kernel!(NAME, "cross_entropy", T),
        false => kernel!(NAME, "cross_entropy_any", T),
    };
    let params = CrossEntropyParams {
        logits: [logits.pointer; 2],
        labels: labels.pointer,
        losses: losses.pointer,
        cols: shape.cols as u64,
        factor,
        padding: 0,
    };
    let sum = CrossEntropyLossParams {
        losses: losses.pointer,
        loss: loss.pointer,
        rows: shape.rows as u64,
        factor,
        padding: 0,
    };
    // SAFETY: the lengths were checked against the shape; the addresses are held until the end.
    unsafe {
        if shape.rows > 0 {
            launch(device, kernel, shape.rows, &params)?;
        }
        launch(device, Kernel { operator: NAME, name: "cross_entropy_loss_f32" }, 1, &sum)
    }
}

/// `SquaresParams` in `kernels/transformer/gradient_norm.cu`.
#[repr(C)]
struct SquaresParams {
    values: u64,
    parts: u64,
    count: u64,
}
const _: () = assert!(size_of::<SquaresParams>() == 24);

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

/// f32 elements of scratch memory that [`gradient_norm`] needs.
pub(super) fn norm_parts<D: Device>(grads: &[impl Readable<f32, D>]) -> usize {
    grads.iter().map(|grad| grad.elements().div_ceil(PART_ELEMENTS)).sum()
}

/// [`Backend::gradient_norm`](crate::transformer::Backend::gradient_norm) with `parts`, scratch memory of
/// [`norm_parts`] f32.
pub(super) fn gradient_norm<D: Device>(
    device: &D,
    grads: &[impl Readable<f32, D>],
    max_norm: f32,
    parts: &mut dyn Writable<f32, D>,
    norm: &mut dyn Writable<f32, D>,
) -> Result<(), Error> {
    const NAME: &str = "gradient_norm";
    let count = norm_parts(grads);
    check_len(NAME, "parts", count, parts.elements())?;
    check_len(NAME, "norm", 2, norm.elements())?;
    let (parts, norm) = (parts.write(device)?, norm.write(device)?);
    let mut next = parts.pointer;
    for grad in grads {
        let blocks = grad.elements().div_ceil(PART_ELEMENTS);
        if blocks == 0 {
            continue;
        }
        let values = grad.read(device)?;
        let params =
            SquaresParams { values: values.pointer, parts: next, count: grad.elements() as u64 };
        let kernel = Kernel { operator: NAME, name: "gradient_norm_squares_f32" };
        // SAFETY: a block writes one of the parts, whose number was checked; the addresses are held.
        unsafe { launch(device, kernel, blocks, &params)? };
        next += (blocks * size_of::<f32>()) as u64;
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

/// `AdamwParams` in `kernels/transformer/adamw.cu`.
#[repr(C)]
struct AdamwParams {
    numbers: u64,
    norm: u64,
    grad: u64,
    m: InOut,
    v: InOut,
    master: InOut,
    weight: u64,
    count: u64,
    decay: f32,
    padding: u32,
}
const _: () = assert!(size_of::<AdamwParams>() == 96);

/// [`Backend::adamw`](crate::transformer::Backend::adamw).
pub(super) fn adamw<T: Dtype, D: Device>(
    device: &D,
    numbers: &dyn Readable<f32, D>,
    norm: &dyn Readable<f32, D>,
    weight: &mut dyn Writable<T, D>,
    master: Option<&mut dyn Writable<f32, D>>,
    grad: &dyn Readable<f32, D>,
    m: &mut dyn Writable<f32, D>,
    v: &mut dyn Writable<f32, D>,
    decay: f32,
) -> Result<(), Error> {
    const NAME: &str = "adamw";
    let count = weight.elements();
    check_len(NAME, "numbers", ADAMW_NUMBERS, numbers.elements())?;
    check_len(NAME, "norm", 2, norm.elements())?;
    check_len(NAME, "grad", count, grad.elements())?;
    check_len(NAME, "m", count, m.elements())?;
    check_len(NAME, "v", count, v.elements())?;
    match &master {
        Some(master) => check_len(NAME, "master", count, master.elements())?,
        None if T::ID == DtypeId::F32 => {}
        None => return Err(Error::argument(NAME, "master", "the weight in f32", "none")),
    }
    let (numbers, norm, grad) = (numbers.read(device)?, norm.read(device)?, grad.read(device)?);
    let (m, v, weight) = (m.write(device)?, v.write(device)?, weight.write(device)?);
    let master = master.map(|master| master.write(device)).transpose()?;
    let (master, rounded) = match &master {
        Some(master) => (master.pointer, weight.pointer),
        None => (weight.pointer, 0),
    };
    let params = AdamwParams {
        numbers: numbers.pointer,
        norm: norm.pointer,
        grad: grad.pointer,
        m: [m.pointer; 2],
        v: [v.pointer; 2],
        master: [master; 2],
        weight: rounded,
        count: count as u64,
        decay,
        padding: 0,
    };
    let blocks = count.div_ceil(ELEMENTS_A_BLOCK);
    if blocks == 0 {
        return Ok(());
    }
    // SAFETY: the lengths were checked; the addresses are held until the end.
    unsafe { launch(device, kernel!(NAME, "adamw", T), blocks, &params) }
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

/// `PointersParams` in `kernels/transformer/matmul_pointers.cu`.
#[cfg(any(feature = "cuda", test))]
#[repr(C)]
struct PointersParams {
    pointers: u64,
    base: [u64; 3],
    stride: [[u64; 2]; 3],
    count: u32,
    inner: IndexDivisor,
}
#[cfg(any(feature = "cuda", test))]
const _: () = assert!(size_of::<PointersParams>() == 96);

/// The addresses of the matrices of a batch, `[3, products]`: those of a, of b and of c, whose buffers begin at
/// `base` and have elements of `size` bytes. Only CUDA's products need it; the emulator tests it.
#[cfg(any(feature = "cuda", test))]
pub(super) fn matmul_pointers<D: Device>(
    device: &D,
    what: &MatMul,
    base: [u64; 3],
    size: [usize; 3],
    pointers: &mut dyn Writable<u64, D>,
) -> Result<(), Error> {
    const NAME: &str = "matmul_pointers";
    let [outer, inner] = what.batch;
    let count = outer.saturating_mul(inner);
    let room = pointers.elements() / 3;
    if count == 0 || count > room {
        return Err(Error::argument(NAME, "batch", format!("1 to {room} products"), count));
    }
    let matrices = [what.a, what.b, what.c];
    let bytes = |x: usize, elements: usize| (elements * size[x]) as u64;
    let pointers = pointers.write(device)?;
    let params = PointersParams {
        pointers: pointers.pointer,
        base: std::array::from_fn(|x| base[x] + bytes(x, matrices[x].offset)),
        stride: std::array::from_fn(|x| matrices[x].batch.map(|stride| bytes(x, stride))),
        count: count as u32,
        inner: IndexDivisor::new(inner as u32),
    };
    let kernel = Kernel { operator: NAME, name: "matmul_pointers_u64" };
    // SAFETY: three addresses a product are written, and there is room for them.
    unsafe { launch(device, kernel, count.div_ceil(ELEMENTS_A_BLOCK), &params) }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::emulator::Emulator;
    use crate::transformer::backend::Layout;

    #[test]
    fn pointers_are_those_of_the_matrices() {
        let layout = |offset, batch| Layout { offset, batch, ..Layout::rows(2) };
        let what = MatMul {
            mnk: [2, 2, 2],
            batch: [400, 3],
            a: layout(5, [1000, 7]),
            b: layout(0, [0, 9]),
            c: layout(1, [13, 1 << 30]),
            add: false,
        };
        let (base, size) = ([1 << 40, 3 << 33, 64], [2, 2, 4]);
        for order in [0, 1, 2] {
            let device = Emulator::new().order(order);
            let mut pointers = vec![u64::MAX; 3 * 1200 + 6];
            matmul_pointers(&device, &what, base, size, &mut pointers).unwrap();
            for (x, matrix) in [what.a, what.b, what.c].into_iter().enumerate() {
                for i in 0..1200 {
                    let elements =
                        matrix.offset + i / 3 * matrix.batch[0] + i % 3 * matrix.batch[1];
                    assert_eq!(pointers[x * 1200 + i], base[x] + (elements * size[x]) as u64);
                }
            }
            assert_eq!(pointers[3600..], [u64::MAX; 6]);
        }
        let mut few = vec![0; 3 * 1199];
        let error = matmul_pointers(&Emulator::new(), &what, base, size, &mut few).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "batch", .. }), "{error}");
    }
}
