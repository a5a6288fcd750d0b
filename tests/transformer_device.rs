//! The models trained on the kernels: what the CPU computes, the same with stream numbers in device memory, and with
//! layers computed again.

use fused_dropout::Error;
use fused_dropout::transformer::backend::Backend;
use fused_dropout::transformer::{
    AdamW, DropoutSchedule, Gpt, GptBatch, GptConfig, GptInput, GptRun, Grads, Optimizer, Params,
    Pass, shifted,
};

const BATCH: usize = 2;
const LENGTH: usize = 9;
const VOCAB: usize = 21;

/// Schedules that change within four steps.
pub(crate) const SCHEDULES: [DropoutSchedule; 3] =
    [DropoutSchedule::Until(2), DropoutSchedule::FallingUntil(3), DropoutSchedule::From(1)];

/// A GPT with dropout 0.2 at every site.
fn gpt() -> Gpt {
    let text = format!(
        r#"{{"model_type": "gpt2", "vocab_size": {VOCAB}, "n_positions": 12, "n_embd": 24, "n_layer": 2,
        "n_head": 3, "embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2,
        "initializer_range": 0.1}}"#
    );
    Gpt::new(GptConfig::from_json(&text).unwrap(), false).unwrap()
}

/// Other tokens at every step.
fn ids(step: u64) -> Vec<u32> {
    let id = |i: usize| (i * i * 7 + i / 3 + 5 * step as usize) % VOCAB;
    (0..BATCH * LENGTH).map(|i| id(i) as u32).collect()
}

/// A training run.
pub(crate) struct Training<'b, B: Backend> {
    backend: &'b B,
    gpt: Gpt,
    params: Params<B>,
    optimizer: Optimizer<B>,
    grads: Grads<B>,
    run: GptRun<B>,
    batch: GptBatch<B>,
    seed: u64,
    schedule: DropoutSchedule,
}

impl<'b, B: Backend> Training<'b, B> {
    pub(crate) fn new(backend: &'b B, seed: u64, recompute: bool) -> Result<Self, Error> {
        let gpt = gpt();
        let params = Params::upload(backend, &gpt.specs().init(1))?;
        let optimizer = Optimizer::new(backend, gpt.specs(), AdamW::default())?;
        let grads = Grads::zeros(backend, gpt.specs())?;
        let run = gpt.run(backend, BATCH, LENGTH, recompute)?;
        let (ids, choice) = (ids(0), None);
        let input = GptInput { ids: &ids, labels: &shifted(&ids, LENGTH), choice };
        let batch = gpt.batch(backend, &run, &input)?;
        let schedule = DropoutSchedule::Constant;
        Ok(Self { backend, gpt, params, optimizer, grads, run, batch, seed, schedule })
    }

    /// The same with another schedule of dropout.
    pub(crate) fn scheduled(self, schedule: DropoutSchedule) -> Self {
        Self { schedule, ..self }
    }

    /// What the host writes before step `step`.
    pub(crate) fn prepare(&mut self, step: u64) -> Result<(), Error> {
        let (backend, ids) = (self.backend, ids(step));
        let labels = shifted(&ids, LENGTH);
        self.gpt.refill(backend, &self.run, &mut self.batch, &ids, &labels)?;
        self.optimizer.advance(backend, 1e-3)
    }

    /// The step: what a graph can capture.
    pub(crate) fn work(&mut self, step: u64) -> Result<(), Error> {
        let pass = Pass::train(self.seed, step).scheduled(self.schedule);
        let Self { backend, gpt, params, optimizer, grads, run, batch, .. } = self;
        gpt.forward(*backend, params, run, batch, pass)?;
        gpt.loss(*backend, run, batch)?;
        gpt.backward(*backend, params, run, batch, pass, grads)?;
        optimizer.apply(*backend, gpt.specs(), params, grads)
    }

    pub(crate) fn loss(&self) -> Result<f32, Error> {
        Ok(self.run.read_loss(self.backend)?.total())
    }

    pub(crate) fn weights(&self) -> Vec<Vec<u32>> {
        let weights = self.params.download(self.backend).unwrap();
        weights.iter().map(|w| w.iter().map(|w| w.to_bits()).collect()).collect()
    }

    /// The losses of the first `steps` steps; `advance` is called before each.
    pub(crate) fn losses(&mut self, steps: u64, advance: impl Fn(u64)) -> Vec<f32> {
        let step = |step| {
            advance(step);
            self.prepare(step).unwrap();
            self.work(step).unwrap();
            self.loss().unwrap()
        };
        (0..steps).map(step).collect()
    }

    /// The same, each step as the repetition of the first. Between two of them the model looks at something else.
    /// `meanwhile` is called after each.
    pub(crate) fn repeated_losses(&mut self, steps: u64, meanwhile: impl Fn(u64)) -> Vec<f32> {
        let mut recorded = None;
        let step = |step| {
            self.prepare(step).unwrap();
            let backend = self.backend;
            backend.repeat(&mut recorded, step, || self.work(step)).unwrap();
            let loss = self.loss().unwrap();
            let Self { gpt, params, run, batch, .. } = &mut *self;
            gpt.refill(backend, run, batch, &[0; BATCH * LENGTH], &[0; BATCH * LENGTH]).unwrap();
            gpt.forward(backend, params, run, batch, Pass::Evaluate).unwrap();
            gpt.loss(backend, run, batch).unwrap();
            assert_ne!(self.loss().unwrap(), loss);
            meanwhile(step);
            loss
        };
        (0..steps).map(step).collect()
    }
}

#[cfg(feature = "emulator")]
mod emulated {
    use super::*;
    use fused_dropout::emulator::Emulator;
    use fused_dropout::transformer::CpuBackend;
    use fused_dropout::transformer::device::Accelerator;
    use half::bf16;

    fn emulated<T: fused_dropout::Dtype + fused_dropout::transformer::backend::Element>()
    -> Accelerator<Emulator, T> {
        Accelerator::new(Emulator::new()).unwrap()
    }

    fn apart(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// How far apart rounding drives two runs is measured, not guessed: by a third run on the CPU whose weights begin
    /// a last place away; it is a last place of the loss at least. The kernels round differently at every operation and
    /// not once, so they are given 8 times that. Another mask, of which one element would be enough, is seen in the run with another
    /// seed: a thousand times that.
    #[test]
    fn the_first_20_steps_are_those_of_the_cpu() {
        let (cpu, device) = (CpuBackend::new(), emulated::<f32>());
        let run = |seed| Training::new(&cpu, seed, false).unwrap().losses(20, |_| {});
        let on_cpu = run(7);
        let on_device = Training::new(&device, 7, false).unwrap().losses(20, |_| {});
        let mut nudged = Training::new(&cpu, 7, false).unwrap();
        let mut weights = nudged.gpt.specs().init(1);
        for (i, weight) in weights.iter_mut().flatten().enumerate() {
            *weight *= 1.0 + if i % 2 == 0 { f32::EPSILON } else { -f32::EPSILON };
        }
        nudged.params = Params::upload(&cpu, &weights).unwrap();
        let place = on_cpu[0].next_up() - on_cpu[0];
        let rounding = apart(&nudged.losses(20, |_| {}), &on_cpu).max(place);
        let (distance, others) = (apart(&on_device, &on_cpu), apart(&run(8), &on_cpu));
        println!("rounding {rounding:e}, kernels {distance:e}, another seed {others:e}");
        assert!(distance <= 8.0 * rounding, "{distance:e}, rounding {rounding:e}");
        assert!(others > 1000.0 * rounding, "{others:e}, rounding {rounding:e}");
        assert!(on_cpu[19] < on_cpu[0], "it learns: {on_cpu:?}");
    }

    #[test]
    fn resident_streams_and_layers_computed_again_give_the_same_bits() {
        let device = emulated::<f32>();
        let mut expected = Training::new(&device, 7, false).unwrap();
        let losses = expected.losses(4, |_| {});
        let mut again = Training::new(&device, 7, true).unwrap();
        assert_eq!(again.losses(4, |_| {}), losses);
        assert_eq!(again.weights(), expected.weights());

        let device = emulated::<f32>();
        let mut resident = Training::new(&device, 7, false).unwrap();
        assert_eq!(resident.losses(4, |step| device.resident(step).unwrap()), losses);
        assert_eq!(resident.weights(), expected.weights());

        let device = emulated::<f32>();
        let mut repeated = Training::new(&device, 7, false).unwrap();
        assert_eq!(repeated.repeated_losses(4, |_| {}), losses);
        assert_eq!(repeated.weights(), expected.weights());
    }

    /// A schedule in device memory is the one that the host gives: each step has its own probabilities, and after the
    /// last change nothing is as it would be without a schedule.
    #[test]
    fn a_resident_schedule_gives_the_bits_of_the_hosts() {
        let device = emulated::<f32>();
        let constant = Training::new(&device, 7, false).unwrap().losses(4, |_| {});
        for schedule in SCHEDULES {
            let device = emulated::<f32>();
            let mut expected = Training::new(&device, 7, false).unwrap().scheduled(schedule);
            let losses = expected.losses(4, |_| {});
            assert_ne!(losses, constant, "{schedule:?}");

            let device = emulated::<f32>();
            let mut resident = Training::new(&device, 7, false).unwrap().scheduled(schedule);
            assert_eq!(resident.losses(4, |step| device.resident(step).unwrap()), losses);
            assert_eq!(resident.weights(), expected.weights(), "{schedule:?}");
        }
        // Models with schedules of their own take turns on a device.
        let device = emulated::<f32>();
        let mut models =
            SCHEDULES.map(|schedule| Training::new(&device, 7, false).unwrap().scheduled(schedule));
        let mut turns = [(); SCHEDULES.len()].map(|()| Vec::new());
        for step in 0..4 {
            for (model, losses) in models.iter_mut().zip(&mut turns) {
                model.prepare(step).unwrap();
                device.resident(step).unwrap();
                model.work(step).unwrap();
                losses.push(model.loss().unwrap());
            }
        }
        for (schedule, losses) in SCHEDULES.into_iter().zip(turns) {
            let device = emulated::<f32>();
            let mut expected = Training::new(&device, 7, false).unwrap().scheduled(schedule);
            assert_eq!(expected.losses(4, |_| {}), losses, "{schedule:?}");
        }
    }

    /// A loss of 3 from logits that went through some 30 roundings of 2^-9 each: 0.05 would need most of them to agree
    /// in sign at every position.
    #[test]
    fn bfloat16_with_masters_in_f32_learns_the_same() {
        let (full, half) = (emulated::<f32>(), emulated::<bf16>());
        let full = Training::new(&full, 7, false).unwrap().losses(6, |_| {});
        let half = Training::new(&half, 7, false).unwrap().losses(6, |_| {});
        assert!(apart(&full, &half) < 0.05, "{full:?}, {half:?}");
        assert_ne!(full, half);
    }
}
