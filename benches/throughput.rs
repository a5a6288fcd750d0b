//! CPU throughput of the core operators beside its limit, a copy that moves the same bytes on the same
//! threads, and beside what is done elsewhere: candle's dropout as separate passes.
//!
//!     cargo bench --bench throughput              # everything, about two minutes
//!     cargo bench --bench throughput -- softmax   # one group
//!
//! Answers are checked before the clock starts. The table at the end puts what was timed beside a copy.

mod common;

use common::{Report, random};
use fused_dropout::cpu::Cpu;
use fused_dropout::ops::{dropout, dropout_add, softmax_dropout};
use fused_dropout::{
    AttentionMask, Dropout, Dtype, Gradient, Key, Probability, Scores, Shape, Source,
};
use half::bf16;
use rand_philox::Philox;

const ELEMENTS: usize = 1 << 24;
const SHAPE: Shape = Shape { rows: ELEMENTS / 1024, cols: 1024 };

fn main() {
    let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1).unwrap());
    check(&drop);
    let mut report = Report::new();
    dropout_of::<f32>(&mut report, &drop);
    dropout_of::<bf16>(&mut report, &drop);
    dropout_add_of::<f32>(&mut report, &drop);
    dropout_add_of::<bf16>(&mut report, &drop);
    softmax_of(&mut report, &drop);
    report.finish();
}

/// The mask of the first row, an element at a time, and the mean of the output over the input's.
fn check(drop: &Dropout<'_>) {
    let x = vec![1.0f32; ELEMENTS];
    let mut y = vec![0.0f32; ELEMENTS];
    let pass = dropout::Forward { shape: SHAPE, x: Source::Tensor(&x), y: &mut y };
    Cpu::new().run(drop, pass).unwrap();
    for (col, y) in y[..SHAPE.cols].iter().enumerate() {
        assert_eq!(*y != 0.0, drop.key.keeps(drop.p, 0, col as u64));
    }
    let p = drop.p.effective();
    let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / ELEMENTS as f64;
    let sigma = (p / (1.0 - p) / ELEMENTS as f64).sqrt();
    assert!((mean - 1.0).abs() < 5.0 * sigma, "E[y]/x = {mean}");
}

/// candle's way on the CPU: one thread draws a tensor of uniform numbers, then separate passes compare
/// it, scale the mask, and multiply.
fn separate_passes(x: &[f32], p: f32, seed: u64) -> Vec<f32> {
    let mut philox = Philox::from_u64_seed(seed);
    let mut words = vec![0u32; x.len()];
    philox.fill_u32(&mut words);
    let uniform: Vec<f32> = words.iter().map(|&w| rand_philox::u32_to_unit_f32(w)).collect();
    let keep: Vec<u8> = uniform.iter().map(|&u| u8::from(u >= p)).collect();
    let scaled: Vec<f32> = keep.iter().map(|&k| f32::from(k) * (1.0 / (1.0 - p))).collect();
    x.iter().zip(&scaled).map(|(x, m)| x * m).collect()
}

fn dropout_of<T: Dtype>(report: &mut Report, drop: &Dropout<'_>) {
    let bytes = 2 * ELEMENTS * size_of::<T>();
    let mut group = report.group(&format!("dropout {}", T::NAME), bytes);
    let x = random::<T>(ELEMENTS);
    let mut y = vec![T::from_f32(0.0); ELEMENTS];
    for cpu in Cpu::levels() {
        let name = match cpu == Cpu::new() {
            true => "fused".to_owned(),
            false => format!("fused, {:?}", cpu.level()),
        };
        group.row(&name, bytes, || {
            let pass = dropout::Forward { shape: SHAPE, x: Source::Tensor(&x), y: &mut y };
            cpu.run(drop, pass).unwrap();
        });
    }
    if T::NAME != "f32" {
        return;
    }
    let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let mut seed = 0;
    group.row("separate passes", bytes, || {
        seed += 1;
        std::hint::black_box(separate_passes(&x, 0.1, seed));
    });
}

fn dropout_add_of<T: Dtype>(report: &mut Report, drop: &Dropout<'_>) {
    let cpu = Cpu::new();
    let bytes = 3 * ELEMENTS * size_of::<T>();
    let mut group = report.group(&format!("dropout_add {}", T::NAME), bytes);
    let (x, residual) = (random::<T>(ELEMENTS), random::<T>(ELEMENTS));
    let bias = random::<T>(SHAPE.cols);
    let mut y = vec![T::from_f32(0.0); ELEMENTS];
    for (name, bias) in [("fused", None), ("fused, bias", Some(&bias as _))] {
        group.row(name, bytes, || {
            let residual = Source::Tensor(&residual as _);
            let pass = dropout_add::Forward { shape: SHAPE, x: &x, bias, residual, y: &mut y };
            cpu.run(drop, pass).unwrap();
        });
    }
    let mut dbias = vec![0.0; SHAPE.cols];
    group.row("backward, dbias", bytes / 3 * 2, || {
        let pass = dropout_add::Backward {
            shape: SHAPE,
            dy: Source::Tensor(&x),
            dx: Some(&mut y),
            dbias: Some(Gradient::Write(&mut dbias)),
        };
        cpu.run(drop, pass).unwrap();
    });
}

fn softmax_of(report: &mut Report, drop: &Dropout<'_>) {
    let cpu = Cpu::new();
    let scores = Scores { batch: 4, heads: 12, queries: 1024, keys: 1024, scale: 0.125 };
    let elements = 48 * 1024 * 1024;
    let mut group = report.group("softmax_dropout f32", 8 * elements);
    let x = random::<f32>(elements);
    let mut y = vec![0.0f32; elements];
    let masks = [("fused", AttentionMask::NONE), ("fused, causal", AttentionMask::causal(0))];
    for (name, mask) in masks {
        group.row(name, 8 * elements, || {
            let x = Source::Tensor(&x as _);
            let pass = softmax_dropout::Forward { scores, mask, x, y: &mut y, statistics: None };
            cpu.run(drop, pass).unwrap();
        });
    }
    let dy = random::<f32>(elements);
    group.row("backward", 12 * elements, || {
        let pass = softmax_dropout::Backward {
            scores,
            mask: AttentionMask::NONE,
            x: &x,
            statistics: None,
            dy: Source::Tensor(&dy),
            dx: &mut y,
        };
        cpu.run(drop, pass).unwrap();
    });
}
