//! A whole training step on the CPU: nanoGPT's small model (4 layers, 4 heads, width 128, 12 sequences of 64 characters), without
//! dropout and with it at every site. What dropout costs is the ratio of the two rows.
//!
//!     cargo bench --features transformer --bench transformer

use criterion::Criterion;
use fused_dropout::transformer::{
    AdamW, CpuBackend, Gpt, GptBatch, GptConfig, GptInput, GptRun, Grads, Optimizer, Params, Pass,
    shifted,
};
use fused_dropout::{Activation, Error, Probability};
use std::time::Duration;

const BATCH: usize = 12;
const LENGTH: usize = 64;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .configure_from_args();
    let mut group = criterion.benchmark_group("nanogpt-cpu, ms a step");
    for p in [0.0, 0.2] {
        let mut training = Training::new(p).unwrap();
        let first = training.step().unwrap();
        (0..20).for_each(|_| _ = training.step().unwrap());
        let later = training.step().unwrap();
        assert!(later < first, "it learns its one batch: {first}, then {later}");
        group.bench_function(format!("dropout {p}"), |bencher| {
            bencher.iter(|| training.step().unwrap());
        });
    }
    group.finish();
    criterion.final_summary();
}

struct Training {
    backend: CpuBackend,
    gpt: Gpt,
    params: Params<CpuBackend>,
    grads: Grads<CpuBackend>,
    run: GptRun<CpuBackend>,
    batch: GptBatch<CpuBackend>,
    optimizer: Optimizer<CpuBackend>,
    step: u64,
}

impl Training {
    fn new(p: f64) -> Result<Self, Error> {
        let p = Probability::new(p)?;
        let gpt = Gpt::new(
            GptConfig {
                vocab_size: 65,
                n_positions: LENGTH,
                n_embd: 128,
                n_layer: 4,
                n_head: 4,
                n_inner: 512,
                activation_function: Activation::GeluTanh,
                layer_norm_epsilon: 1e-5,
                initializer_range: 0.02,
                embd_pdrop: p,
                attn_pdrop: p,
                resid_pdrop: p,
                summary_first_dropout: p,
                summary_activation: Activation::Identity,
                bos_token_id: None,
                eos_token_id: None,
                num_labels: 1,
            },
            false,
        )?;
        let backend = CpuBackend::new();
        let ids: Vec<u32> = (0..BATCH * LENGTH).map(|i| (i * i * 31 % 65) as u32).collect();
        let labels = shifted(&ids, LENGTH);
        let run = gpt.run(&backend, BATCH, LENGTH, false)?;
        Ok(Self {
            params: Params::upload(&backend, &gpt.specs().init(1))?,
            grads: Grads::zeros(&backend, gpt.specs())?,
            batch: gpt.batch(
                &backend,
                &run,
                &GptInput { ids: &ids, labels: &labels, choice: None },
            )?,
            optimizer: Optimizer::new(&backend, gpt.specs(), AdamW::default())?,
            run,
            gpt,
            backend,
            step: 0,
        })
    }

    fn step(&mut self) -> Result<f32, Error> {
        let Self { backend, gpt, params, grads, run, batch, optimizer, step } = self;
        let pass = Pass::train(1, *step);
        gpt.forward(backend, params, run, batch, pass)?;
        gpt.loss(backend, run, batch)?;
        gpt.backward(backend, params, run, batch, pass, grads)?;
        optimizer.step(backend, gpt.specs(), params, grads, 1e-3)?;
        *step += 1;
        Ok(run.read_loss(backend)?.total())
    }
}
