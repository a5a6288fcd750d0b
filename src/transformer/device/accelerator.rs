//! A device as the backend of a model.

use super::resident::{Place, Places};
use super::{Runtime, kernels};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::Probability;
use crate::ops::embedding_dropout::check_report;
use crate::ops::{Dropout, Shape};
use crate::transformer::backend::{Backend, Element, Weight};
use crate::transformer::matmul::MatMul;
use crate::transformer::streams::{DropoutSchedule, Drops, Pass, check_step};
use std::cell::{Cell, RefCell, RefMut};
use std::marker::PhantomData;
use std::ops::Range;

/// A device `D` as a backend, with activations and weights stored as `T`.
pub struct Accelerator<D: Runtime, T> {
    device: D,
    report: RefCell<D::Buffer<u32>>,
    /// Whether an embedding ran since the report was last looked at.
    reports: Cell<bool>,
    places: RefCell<Option<Places<D>>>,
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

impl<D: Runtime, T: Dtype + Element> Accelerator<D, T> {
    /// A backend on `device`.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(device: D) -> Result<Self, Error> {
        let mut report = device.zeros(1)?;
        device.write(&mut report, &[u32::MAX])?;
        Ok(Self {
            device,
            report: RefCell::new(report),
            reports: Cell::new(false),
            places: RefCell::new(None),
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

    /// From now on kernels take stream numbers, and probabilities that follow a schedule ([`Pass::scheduled`]), from device
    /// memory, where they are those of step `step`: one small copy, behind what was submitted before. The passes from now
    /// on are those of this step.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such step; otherwise what the device says.
    pub fn resident(&self, step: u64) -> Result<(), Error> {
        check_step(step)?;
        self.no_capture("no other stream numbers")?;
        let mut places = self.places.borrow_mut();
        places.get_or_insert_with(|| Places::new(step)).advance(&self.device, step)
    }

    /// Refuses what must not get into a graph.
    fn no_capture(&self, expected: &'static str) -> Result<(), Error> {
        if !self.capturing.get() {
            return Ok(());
        }
        Err(Error::argument("graph", "work", expected, "one while the graph is captured"))
    }

    /// A place has numbers in device memory from now on.
    fn ensure_numbers(&self, step: u64, place: Place) -> Result<(), Error> {
        let mut places = self.places.borrow_mut();
        let Some(places) = places.as_mut() else { return Ok(()) };
        if step != places.step() {
            let expected = format!("step {}, which the device is at", places.step());
            return Err(Error::argument("streams", "step", expected, step));
        }
        if places.get(&place).is_some() {
            return Ok(());
        }
        self.no_capture("no layer, site and probability that the step before did not have")?;
        places.add(&self.device, place)
    }
}

impl<D: Runtime, T: Dtype + Element> Backend for Accelerator<D, T> {
    type Elem = T;
    type Memory = D;
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

    fn copy(
        &self,
        from: &D::Buffer<f32>,
        part: Range<usize>,
        to: &mut D::Buffer<f32>,
        at: usize,
    ) -> Result<(), Error> {
        self.device.copy(from, part, to, at)
    }

    fn clear<E: Element>(&self, buffer: &mut D::Buffer<E>) -> Result<(), Error> {
        self.device.clear(buffer)
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

    fn run<'a, P: crate::Pass<'a, D>>(&self, drops: Drops, pass: P) -> Result<(), Error>
    where
        D: 'a,
    {
        let dropout = drops.dropout()?;
        let Drops::At { pass: Pass::Train { seed, step, schedule, .. }, layer, site, p, .. } =
            drops
        else {
            return crate::Backend::run(&self.device, &dropout, pass);
        };
        let constant = schedule == DropoutSchedule::Constant;
        // What draws nothing at any step needs no number.
        let certain = p == Probability::ZERO || constant && p == Probability::ONE;
        if certain || self.places.borrow().is_none() {
            return crate::Backend::run(&self.device, &dropout, pass);
        }
        let place = Place { layer, site, p, schedule };
        self.ensure_numbers(step, place)?;
        let places = self.places.borrow();
        let numbers = places.as_ref().and_then(|places| places.get(&place));
        let [stream, packed] = numbers.expect("`ensure_numbers` has made them");
        let resident = Dropout::<D>::resident(seed, &stream, p).shard(dropout.shard);
        let resident = if constant { resident } else { resident.resident_p(&packed) };
        crate::Backend::run(&self.device, &resident, pass)
    }

    fn report(&self) -> Option<RefMut<'_, D::Buffer<u32>>> {
        self.reports.set(true);
        Some(self.report.borrow_mut())
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
        kernels::cross_entropy(&self.device, shape, factor, labels, logits, loss)
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
        kernels::gradient_norm(&self.device, grads, max_norm, norm)
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
                let pass = Pass::train(1, 3);
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
