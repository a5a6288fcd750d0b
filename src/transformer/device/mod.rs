//! Models on anything that runs the crate's kernels: a GPU, or the emulator.
//!
//! ```no_run
//! # #[cfg(feature = "cuda")] {
//! use fused_dropout::transformer::device::{Accelerator, CudaDevice};
//!
//! // An error, no panic, where there is no driver, no GPU or no cuBLAS.
//! let backend = Accelerator::<_, half::bf16>::new(CudaDevice::open(0)?)?;
//! # let _ = backend;
//! # }
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! # Scratch memory
//! What the operators need besides their tensors belongs to the [`Accelerator`]. It is allocated when a size is
//! asked for the first time and kept: a training step allocates from its second time on nothing.
//!
//! # Ids
//! A device cannot refuse a token that is in no table: such a row is zeros, and
//! [`Backend::read`] and [`Accelerator::check`] return the error.
//!
//! # A training step as a graph
//! [`Backend::repeat`] captures a step on a GPU and replays it: one launch in place of hundreds. The parameters of a
//! captured kernel are fixed, so stream numbers lie in device memory ([`Accelerator::resident`]), where every step finds
//! its own.

use super::backend::{Backend, Element, MatMul, Weight};
use super::streams::{MAX_STEPS, STEP_SHIFT, kept};
use crate::device::dropout_add_norm::SumGrads;
use crate::device::softmax_dropout;
use crate::device::{Address, BiasGrad, Call, Device, Readable, Writable};
use crate::device::{bias_act_dropout, dropout_add, dropout_add_norm, embedding_dropout};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add_norm::{Inputs, ParamGrads, Saved};
use crate::ops::embedding_dropout::{Gradients, Lookups, NormGradients, Tables, check_report};
use crate::ops::{self, Dropout, Mode, Shape, sum_rows};
use crate::{Activation, Affine, AttentionMask, Norm, Probability, Scores};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;

#[cfg(feature = "cuda")]
mod capture;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulator")]
mod emulator;
mod kernels;

#[cfg(feature = "cuda")]
pub use cuda::{CudaBuffer, CudaDevice, StepGraph};

/// A [`Device`] with memory of its own and a matrix product: what an [`Accelerator`] needs of it.
pub trait Memory: Device + Sized {
    /// `E`s in the device's memory.
    type Buffer<E: Element>: Writable<E, Self>;
    /// Work that the device can do again as a whole.
    type Graph;

    /// Calls `work` and keeps what it submits, in place of doing it; `None`, and `work` was not called, on a device
    /// that has no graphs. The graph keeps the memory that it uses.
    ///
    /// # Errors
    /// What `work` says; [`Error::Argument`] where it cannot be kept; otherwise what the device says.
    fn record(
        &self,
        work: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Option<Self::Graph>, Error>;

    /// Does the work of a graph.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is another device's; otherwise what the device says.
    fn replay(&self, graph: &Self::Graph) -> Result<(), Error>;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// What the device says.
    fn zeros<E: Element>(&self, len: usize) -> Result<Self::Buffer<E>, Error>;

    /// Copies `values` to the start of a buffer that is at least as long.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is shorter; otherwise what the device says.
    fn write<E: Element>(&self, buffer: &mut Self::Buffer<E>, values: &[E]) -> Result<(), Error>;

    /// The contents of a buffer, when all earlier work is done.
    ///
    /// # Errors
    /// What the device says, also about earlier work.
    fn read<E: Element>(&self, buffer: &Self::Buffer<E>) -> Result<Vec<E>, Error>;

    /// Copies `from` to another buffer, from its element `at` on.
    ///
    /// # Errors
    /// [`Error::Argument`] where that has no room; otherwise what the device says.
    fn copy(
        &self,
        from: &Self::Buffer<f32>,
        to: &mut Self::Buffer<f32>,
        at: usize,
    ) -> Result<(), Error>;

    /// Sets every value to zero.
    ///
    /// # Errors
    /// What the device says.
    fn clear<E: Element>(&self, buffer: &mut Self::Buffer<E>) -> Result<(), Error>;

    /// Sets a part of a buffer to zero.
    ///
    /// # Errors
    /// [`Error::Argument`] where the buffer has no such part; otherwise what the device says.
    fn clear_part(&self, buffer: &mut Self::Buffer<f32>, part: Range<usize>) -> Result<(), Error>;

    /// c = a · b or c += a · b, accumulated in f32 and rounded once into `C`.
    ///
    /// # Errors
    /// [`Error::Argument`] where a matrix is not in its buffer; otherwise what the device says.
    fn matmul<T: Dtype + Element, C: Dtype + Element>(
        &self,
        what: &MatMul,
        a: &Self::Buffer<T>,
        b: &Self::Buffer<T>,
        c: &mut Self::Buffer<C>,
    ) -> Result<(), Error>;
}

/// A device `D` as a backend, with activations and weights stored as `T`.
pub struct Accelerator<D: Memory, T> {
    device: D,
    scratch: RefCell<HashMap<usize, D::Buffer<f32>>>,
    report: RefCell<D::Buffer<u32>>,
    /// Whether an embedding ran since the report was last looked at.
    reports: Cell<bool>,
    streams: RefCell<Option<Streams<D>>>,
    /// Whether a graph is being captured: no copy and no allocation may get into it.
    capturing: Cell<bool>,
    element: PhantomData<T>,
}

/// Says that a graph is being captured, until it is dropped: after a panic too.
struct Capturing<'a>(&'a Cell<bool>);

impl<'a> Capturing<'a> {
    fn new(capturing: &'a Cell<bool>) -> Self {
        capturing.set(true);
        Self(capturing)
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Stream numbers in device memory, one for each layer and site that a step has used.
struct Streams<D: Memory> {
    step: u64,
    /// The low bits of a stream number, and where the whole number lies.
    slots: HashMap<u64, usize>,
    /// The whole numbers, as they are in the device's memory.
    host: Vec<u64>,
    /// [`CHUNK`] numbers each. They never move: a captured graph has their addresses.
    device: Vec<D::Buffer<u64>>,
}

/// Stream numbers of a buffer.
const CHUNK: usize = 256;

/// One number of a buffer.
struct Slot<'a, D: Memory> {
    numbers: &'a D::Buffer<u64>,
    index: usize,
}

// SAFETY: `Accelerator::with_call`, which alone makes slots, takes the index of a number in the buffer, which
// is as long as it was when it was made.
unsafe impl<D: Memory> Readable<u64, D> for Slot<'_, D> {
    fn elements(&self) -> usize {
        1
    }

    fn read<'a>(&'a self, device: &'a D) -> Result<Address<'a, D>, Error> {
        let mut address = self.numbers.read(device)?;
        address.pointer += (self.index * size_of::<u64>()) as u64;
        Ok(address)
    }
}

impl<D: Memory> Streams<D> {
    fn new(step: u64) -> Self {
        Self { step, slots: HashMap::new(), host: Vec::new(), device: Vec::new() }
    }

    /// A slot for the layer and site of stream number `low`, which has none.
    fn add(&mut self, device: &D, low: u64) -> Result<usize, Error> {
        let index = self.host.len();
        if index == CHUNK * self.device.len() {
            self.device.push(device.zeros(CHUNK)?);
        }
        self.host.push(self.step << STEP_SHIFT | low);
        self.upload(device, index / CHUNK)?;
        self.slots.insert(low, index);
        Ok(index)
    }

    fn advance(&mut self, device: &D, step: u64) -> Result<(), Error> {
        if self.step == step {
            return Ok(());
        }
        for number in &mut self.host {
            *number = step << STEP_SHIFT | (*number & LOW_BITS);
        }
        (0..self.device.len()).try_for_each(|chunk| self.upload(device, chunk))?;
        self.step = step;
        Ok(())
    }

    fn upload(&mut self, device: &D, chunk: usize) -> Result<(), Error> {
        let numbers = self.host.chunks(CHUNK).nth(chunk).unwrap_or_default();
        device.write(&mut self.device[chunk], numbers)
    }
}

/// The bits of a stream number that are not the step's.
const LOW_BITS: u64 = (1 << STEP_SHIFT) - 1;

fn check_step(step: u64) -> Result<(), Error> {
    if step < MAX_STEPS {
        return Ok(());
    }
    Err(Error::argument("streams", "step", format!("a step below {MAX_STEPS}"), step))
}

impl<D: Memory, T: Dtype + Element> Accelerator<D, T> {
    /// A backend on `device`.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(device: D) -> Result<Self, Error> {
        let mut report = device.zeros(1)?;
        device.write(&mut report, &[u32::MAX])?;
        Ok(Self {
            device,
            scratch: RefCell::default(),
            report: RefCell::new(report),
            reports: Cell::new(false),
            streams: RefCell::new(None),
            capturing: Cell::new(false),
            element: PhantomData,
        })
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Whether all ids since the last check were in their tables. Waits for the device where an embedding ran
    /// since then; [`Backend::read`] does the same.
    ///
    /// # Errors
    /// [`Error::Argument`] with the first row that has a wrong id; otherwise what the device says.
    pub fn check(&self) -> Result<(), Error> {
        if !self.reports.get() {
            return Ok(());
        }
        self.no_capture("no look at the ids")?;
        let mut report = self.report.borrow_mut();
        let found = self.device.read(&report)?[0];
        self.reports.set(false);
        if found != u32::MAX {
            self.device.write(&mut report, &[u32::MAX])?;
        }
        check_report(found)
    }

    /// From now on kernels take stream numbers from device memory, where they are those of step `step`: one small
    /// copy, behind what was submitted before. A call's own stream number says which layer and site it is; its step
    /// must be the one that the device is at.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such step; otherwise what the device says.
    pub fn resident(&self, step: u64) -> Result<(), Error> {
        check_step(step)?;
        self.no_capture("no other stream numbers")?;
        let mut streams = self.streams.borrow_mut();
        streams.get_or_insert_with(|| Streams::new(step)).advance(&self.device, step)
    }

    /// Refuses what must not get into a graph.
    fn no_capture(&self, expected: &'static str) -> Result<(), Error> {
        if !self.capturing.get() {
            return Ok(());
        }
        Err(Error::argument("graph", "work", expected, "one while the graph is captured"))
    }

    /// Runs `work` with the call of an application of dropout.
    fn with_call(
        &self,
        dropout: &Dropout<'_>,
        work: impl FnOnce(&Call<'_, D>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let resident = self.streams.borrow().is_some();
        // What draws nothing needs no number, and may have one that is no step's.
        let certain = [Probability::ZERO, Probability::ONE].contains(&dropout.p);
        let draws = dropout.mode == Mode::Training && !certain;
        if !(resident && draws) {
            return work(&Call::on(&self.device));
        }
        let index = self.slot(dropout.key.stream)?;
        let streams = self.streams.borrow();
        let numbers = &streams.as_ref().expect("it was there above").device[index / CHUNK];
        let slot = Slot { numbers, index: index % CHUNK };
        work(&Call::on(&self.device).stream_number(&slot))
    }

    /// Where a stream number lies in device memory.
    fn slot(&self, stream: u64) -> Result<usize, Error> {
        let mut streams = self.streams.borrow_mut();
        let streams = streams.as_mut().expect("`with_call` has seen it");
        let (step, low) = (stream >> STEP_SHIFT, stream & LOW_BITS);
        if step != streams.step {
            let expected = format!("step {}, which the device is at", streams.step);
            return Err(Error::argument("streams", "dropout.key.stream", expected, step));
        }
        if let Some(&index) = streams.slots.get(&low) {
            return Ok(index);
        }
        self.no_capture("no layer and site that the step before did not have")?;
        streams.add(&self.device, low)
    }

    /// Runs `work` with scratch memory of `len` f32, whose contents do not matter.
    fn with_scratch(
        &self,
        len: usize,
        work: impl FnOnce(&mut D::Buffer<f32>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let known = self.scratch.borrow_mut().remove(&len);
        let mut buffer = match known {
            Some(buffer) => buffer,
            None => {
                self.no_capture("no size of scratch memory that the step before did not have")?;
                self.device.zeros(len)?
            }
        };
        let result = work(&mut buffer);
        self.scratch.borrow_mut().insert(len, buffer);
        result
    }
}

/// Tensors of the device as its operators take them.
macro_rules! readable {
    () => {
        |tensor| Ok(tensor as &dyn Readable<_, D>)
    };
}

impl<D: Memory, T: Dtype + Element> Backend for Accelerator<D, T> {
    type Elem = T;
    type Buffer<E: Element> = D::Buffer<E>;
    type Recorded = D::Graph;

    /// The first call does the work as usual, which allocates the scratch memory and loads the kernels, and records it
    /// behind that.
    fn repeat(
        &self,
        recorded: &mut Option<D::Graph>,
        step: u64,
        mut work: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.resident(step)?;
        if let Some(graph) = recorded {
            self.reports.set(true);
            return self.device.replay(graph);
        }
        work()?;
        *recorded = self.device.record(|| {
            let _until_here = Capturing::new(&self.capturing);
            work()
        })?;
        Ok(())
    }

    fn zeros<E: Element>(&self, len: usize) -> Result<D::Buffer<E>, Error> {
        self.no_capture("no allocation")?;
        self.device.zeros(len)
    }

    fn write<E: Element>(&self, buffer: &mut D::Buffer<E>, values: &[E]) -> Result<(), Error> {
        self.no_capture("no copy from the host")?;
        self.device.write(buffer, values)
    }

    /// Waits for all earlier work, and returns what [`Accelerator::check`] finds.
    fn read<E: Element>(&self, buffer: &D::Buffer<E>) -> Result<Vec<E>, Error> {
        self.no_capture("no copy to the host")?;
        self.check()?;
        self.device.read(buffer)
    }

    fn copy(&self, from: &D::Buffer<f32>, to: &mut D::Buffer<f32>, at: usize) -> Result<(), Error> {
        self.device.copy(from, to, at)
    }

    fn clear<E: Element>(&self, buffer: &mut D::Buffer<E>) -> Result<(), Error> {
        self.device.clear(buffer)
    }

    fn clear_part(&self, buffer: &mut D::Buffer<f32>, part: Range<usize>) -> Result<(), Error> {
        self.device.clear_part(buffer, part)
    }

    fn matmul(
        &self,
        what: &MatMul,
        a: &D::Buffer<T>,
        b: &D::Buffer<T>,
        c: &mut D::Buffer<T>,
    ) -> Result<(), Error> {
        self.device.matmul(what, a, b, c)
    }

    fn matmul_f32(
        &self,
        what: &MatMul,
        a: &D::Buffer<T>,
        b: &D::Buffer<T>,
        c: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        self.device.matmul(what, a, b, c)
    }

    fn embedding(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        lookups: &Lookups<&D::Buffer<u32>>,
        tables: &Tables<&D::Buffer<T>>,
        y: &mut D::Buffer<T>,
    ) -> Result<(), Error> {
        let lookups = lookups.try_map(readable!())?;
        let tables = tables.try_map(readable!())?;
        let report = &mut *self.report.borrow_mut();
        self.reports.set(true);
        self.with_call(dropout, |call| {
            embedding_dropout::forward(call, dropout, shape, &lookups, &tables, y, report)
        })
    }

    fn embedding_backward(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        lookups: &Lookups<&D::Buffer<u32>>,
        dy: &D::Buffer<T>,
        gradients: Gradients<&mut D::Buffer<f32>>,
    ) -> Result<(), Error> {
        let lookups = lookups.try_map(readable!())?;
        let gradients = gradients.try_map(|tensor| Ok(tensor as &mut dyn Writable<f32, D>))?;
        self.with_call(dropout, |call| {
            embedding_dropout::backward(call, dropout, shape, &lookups, dy, gradients)
        })
    }

    fn embedding_norm(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        lookups: &Lookups<&D::Buffer<u32>>,
        tables: &Tables<&D::Buffer<T>>,
        affine: &Affine<&D::Buffer<T>>,
        y: &mut D::Buffer<T>,
        stats: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        let lookups = lookups.try_map(readable!())?;
        let tables = tables.try_map(readable!())?;
        let affine = affine.map(|tensor| tensor as &dyn Readable<T, D>);
        let report = &mut *self.report.borrow_mut();
        self.reports.set(true);
        self.with_call(dropout, |call| {
            embedding_dropout::forward_norm(
                call,
                dropout,
                norm,
                shape,
                &lookups,
                &tables,
                &affine,
                y,
                Some(stats),
                report,
            )
        })
    }

    fn embedding_norm_backward(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        lookups: &Lookups<&D::Buffer<u32>>,
        tables: &Tables<&D::Buffer<T>>,
        weight: &D::Buffer<T>,
        stats: &D::Buffer<f32>,
        dy: &D::Buffer<T>,
        gradients: Gradients<&mut D::Buffer<f32>>,
        norm_gradients: NormGradients<&mut D::Buffer<f32>>,
    ) -> Result<(), Error> {
        let lookups = lookups.try_map(readable!())?;
        let tables = tables.try_map(readable!())?;
        let gradients = gradients.try_map(|tensor| Ok(tensor as &mut dyn Writable<f32, D>))?;
        let norm_gradients =
            norm_gradients.try_map(|tensor| Ok(tensor as &mut dyn Writable<f32, D>))?;
        self.with_scratch(ops::embedding_dropout::workspace_len(shape), |workspace| {
            self.with_call(dropout, |call| {
                embedding_dropout::backward_norm(
                    call,
                    dropout,
                    norm,
                    shape,
                    &lookups,
                    &tables,
                    weight,
                    stats,
                    dy,
                    gradients,
                    norm_gradients,
                    workspace,
                )
            })
        })
    }

    fn bias_act_dropout(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        activation: Activation,
        x: &D::Buffer<T>,
        bias: &D::Buffer<T>,
        y: &mut D::Buffer<T>,
    ) -> Result<(), Error> {
        self.with_call(dropout, |call| {
            bias_act_dropout::forward(call, dropout, shape, activation, x, Some(bias), y)
        })
    }

    fn bias_act_dropout_backward(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        activation: Activation,
        x: &D::Buffer<T>,
        bias: &D::Buffer<T>,
        dy: &mut D::Buffer<T>,
        dbias: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        self.with_scratch(sum_rows::workspace_len(shape), |workspace| {
            let (bias, grad) = (Some(bias as _), Some(BiasGrad { dbias, workspace }));
            self.with_call(dropout, |call| {
                bias_act_dropout::backward_in_place(
                    call, dropout, shape, activation, x, bias, dy, grad,
                )
            })
        })
    }

    fn add_bias(
        &self,
        shape: Shape,
        x: &mut D::Buffer<T>,
        bias: &D::Buffer<T>,
    ) -> Result<(), Error> {
        let (call, identity) = (Call::on(&self.device), Activation::Identity);
        bias_act_dropout::forward_in_place(&call, &kept(), shape, identity, x, Some(bias))
    }

    fn bias_grad(
        &self,
        shape: Shape,
        dy: &mut D::Buffer<T>,
        dbias: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        self.with_scratch(sum_rows::workspace_len(shape), |workspace| {
            let call = Call::on(&self.device);
            let grad = BiasGrad { dbias, workspace };
            dropout_add::bias_grad::<T, D>(&call, &kept(), shape, dy, grad)
        })
    }

    fn dropout_add_norm(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        inputs: &Inputs<&D::Buffer<T>>,
        affine: &Affine<&D::Buffer<T>>,
        s: Option<&mut D::Buffer<T>>,
        y: &mut D::Buffer<T>,
        stats: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        let inputs = inputs.map(|tensor| tensor as &dyn Readable<T, D>);
        let affine = affine.map(|tensor| tensor as &dyn Readable<T, D>);
        let s = s.map(|s| s as &mut dyn Writable<T, D>);
        let stats = Some(stats as &mut dyn Writable<f32, D>);
        self.with_call(dropout, |call| {
            dropout_add_norm::forward(call, dropout, norm, shape, &inputs, &affine, s, y, stats)
        })
    }

    fn dropout_add_norm_backward(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        saved: &Saved<&D::Buffer<T>>,
        weight: &D::Buffer<T>,
        stats: &D::Buffer<f32>,
        dy: &D::Buffer<T>,
        ds: Option<&D::Buffer<T>>,
        dresidual: &mut D::Buffer<T>,
        dx: &mut D::Buffer<T>,
        grads: ParamGrads<&mut D::Buffer<f32>>,
    ) -> Result<(), Error> {
        let saved = saved.map(|tensor| tensor as &dyn Readable<T, D>);
        let ds = ds.map(|ds| ds as &dyn Readable<T, D>);
        self.with_scratch(ops::dropout_add_norm::workspace_len(shape), |workspace| {
            let grads = grads.map(|grad| grad as &mut dyn Writable<f32, D>);
            let sums = Some(SumGrads { grads, workspace });
            self.with_call(dropout, |call| {
                dropout_add_norm::backward(
                    call, dropout, norm, shape, &saved, weight, stats, dy, ds, dresidual, dx, sums,
                )
            })
        })
    }

    fn softmax_dropout(
        &self,
        dropout: &Dropout<'_>,
        scores: &Scores,
        mask: &AttentionMask<&D::Buffer<u32>, &D::Buffer<T>>,
        x: &D::Buffer<T>,
        y: &mut D::Buffer<T>,
        statistics: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        let mask = device_mask(mask);
        self.with_call(dropout, |call| {
            softmax_dropout::forward(call, dropout, scores, &mask, x, y, Some(statistics))
        })
    }

    fn softmax_dropout_backward(
        &self,
        dropout: &Dropout<'_>,
        scores: &Scores,
        mask: &AttentionMask<&D::Buffer<u32>, &D::Buffer<T>>,
        x: &D::Buffer<T>,
        statistics: &D::Buffer<f32>,
        dy: &mut D::Buffer<T>,
    ) -> Result<(), Error> {
        let mask = device_mask(mask);
        self.with_call(dropout, |call| {
            softmax_dropout::backward_in_place(
                call,
                dropout,
                scores,
                &mask,
                x,
                Some(statistics),
                dy,
            )
        })
    }

    /// A label that is no column makes the loss a NaN, and its row of the gradient zeros: the host does not
    /// see the labels.
    fn cross_entropy(
        &self,
        shape: Shape,
        factor: &D::Buffer<f32>,
        labels: &D::Buffer<i32>,
        logits: &mut D::Buffer<T>,
        loss: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        self.with_scratch(shape.rows, |losses| {
            kernels::cross_entropy(&self.device, shape, factor, labels, logits, losses, loss)
        })
    }

    fn accumulate(&self, from: &D::Buffer<f32>, to: &mut D::Buffer<T>) -> Result<(), Error> {
        kernels::accumulate(&self.device, from, to)
    }

    fn gradient_norm(
        &self,
        grads: &[D::Buffer<f32>],
        max_norm: f32,
        norm: &mut D::Buffer<f32>,
    ) -> Result<(), Error> {
        self.with_scratch(kernels::norm_parts(grads), |parts| {
            kernels::gradient_norm(&self.device, grads, max_norm, parts, norm)
        })
    }

    fn adamw(
        &self,
        numbers: &D::Buffer<f32>,
        norm: &D::Buffer<f32>,
        weights: Vec<Weight<'_, Self>>,
    ) -> Result<(), Error> {
        let of_device = weights.into_iter().map(|weight| {
            let Weight { weight, master, grad, m, v, decay } = weight;
            let master = master.map(|master| master as _);
            kernels::DeviceWeight { weight: weight as _, master, grad, m, v, decay }
        });
        let mut weights: Vec<kernels::DeviceWeight<'_, T, D>> = of_device.collect();
        kernels::adamw(&self.device, numbers, norm, &mut weights)
    }
}

/// The mask's tensors as the operators take them.
fn device_mask<'a, D: Memory, T: Element>(
    mask: &AttentionMask<&'a D::Buffer<u32>, &'a D::Buffer<T>>,
) -> softmax_dropout::DeviceMask<'a, T, D> {
    AttentionMask {
        causal: mask.causal,
        lengths: mask.lengths.map(|lengths| lengths as &dyn Readable<u32, D>),
        additive: mask.additive.map(|additive| additive as &dyn Readable<T, D>),
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::emulator::Emulator;
    use crate::transformer::{
        AdamW, Gpt, GptConfig, GptInput, Grads, Optimizer, Params, Pass, shifted,
    };

    /// What a graph's capture relies on, without a GPU: a step that ran once copies and allocates nothing when it
    /// runs again, with layers kept or computed again; and what would is refused.
    #[test]
    fn a_step_allocates_and_copies_nothing_the_second_time() {
        let text = r#"{"model_type": "gpt2", "vocab_size": 9, "n_positions": 5, "n_embd": 8, "n_layer": 2,
            "n_head": 2, "embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}"#;
        let gpt = Gpt::new(GptConfig::from_json(text).unwrap(), true).unwrap();
        let ids = [1, 2, 3, 4, 5, 6, 7, 8, 0, 1];
        let (labels, choice) = (shifted(&ids, 5), Some((&[4, 4][..], &[1][..])));
        for recompute in [false, true] {
            let backend = Accelerator::<_, half::bf16>::new(Emulator::new()).unwrap();
            let mut params = Params::upload(&backend, &gpt.specs().init(1)).unwrap();
            let mut optimizer = Optimizer::new(&backend, gpt.specs(), AdamW::default()).unwrap();
            let mut grads = Grads::zeros(&backend, gpt.specs()).unwrap();
            let mut run = gpt.run(&backend, 2, 5, recompute).unwrap();
            let input = GptInput { ids: &ids, labels: &labels, choice };
            let batch = gpt.batch(&backend, &run, &input).unwrap();
            optimizer.advance(&backend, 1e-3).unwrap();
            let mut step = || {
                let pass = Pass::Train { seed: 1, step: 3 };
                gpt.forward(&backend, &params, &mut run, &batch, pass)?;
                gpt.loss(&backend, &mut run, &batch)?;
                gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads)?;
                optimizer.apply(&backend, gpt.specs(), &mut params, &grads)
            };
            backend.resident(3).unwrap();
            backend.capturing.set(true);
            let first = step();
            assert!(matches!(first, Err(Error::Argument { operator: "graph", .. })), "{first:?}");
            backend.capturing.set(false);
            step().unwrap();
            backend.capturing.set(true);
            step().unwrap();
            assert!(backend.zeros::<f32>(1).is_err());
            assert!(backend.check().is_err() && backend.resident(4).is_err());
        }
    }
}
