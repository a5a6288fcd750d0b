//! CPU throughput beside its limit, a copy that moves the same bytes on the same threads, and beside
//! what is done elsewhere: candle's dropout as separate passes.
//!
//!     cargo bench --bench throughput              # everything, about two minutes
//!     cargo bench --bench throughput -- softmax   # one group
//!
//! Answers are checked before the clock starts. A group's rows share the bytes that the fused operator
//! moves, so the GiB/s compare as times do. The table at the end puts each row beside its group's copy.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use fused_dropout::cpu::{self, Cpu};
use fused_dropout::{AttentionMask, Dropout, Dtype, Key, Probability, Scores, Shape};
use half::bf16;
use rand_philox::Philox;
use rayon::prelude::*;
use std::time::Duration;

const ELEMENTS: usize = 1 << 24;
const SHAPE: Shape = Shape { rows: ELEMENTS / 1024, cols: 1024 };

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1).unwrap());
    check(&drop);
    dropout::<f32>(&mut criterion, &drop);
    dropout::<bf16>(&mut criterion, &drop);
    dropout_add::<f32>(&mut criterion, &drop);
    dropout_add::<bf16>(&mut criterion, &drop);
    softmax_dropout(&mut criterion, &drop);
    criterion.final_summary();
    summary();
}

/// Ordinary values, never zeros.
fn random<T: Dtype>(len: usize) -> Vec<T> {
    let mut philox = Philox::from_u64_seed(1);
    (0..len)
        .map(|_| T::from_f32(rand_philox::u32_to_unit_f32(philox.next_u32()) * 4.0 - 2.0))
        .collect()
}

/// The mask of the first row, an element at a time, and the mean of the output over the input's.
fn check(drop: &Dropout<'_>) {
    let x = vec![1.0f32; ELEMENTS];
    let mut y = vec![0.0f32; ELEMENTS];
    cpu::dropout::forward(&Cpu::new(), drop, SHAPE, &x, &mut y).unwrap();
    for (col, y) in y[..SHAPE.cols].iter().enumerate() {
        assert_eq!(*y != 0.0, drop.key.keeps(drop.p, 0, col as u64));
    }
    let p = drop.p.effective();
    let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / ELEMENTS as f64;
    let sigma = (p / (1.0 - p) / ELEMENTS as f64).sqrt();
    assert!((mean - 1.0).abs() < 5.0 * sigma, "E[y]/x = {mean}");
}

/// A copy on all threads: the limit.
fn copy<T: Copy + Send + Sync>(from: &[T], to: &mut [T]) {
    // As large as the operators' own pieces; memcpy chooses how it stores.
    let chunk = from.len().div_ceil(4 * rayon::current_num_threads());
    to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| {
        to.copy_from_slice(from);
    });
}

/// A copy that moves `bytes` bytes, reads and writes together.
fn bench_copy(group: &mut BenchmarkGroup<'_, WallTime>, bytes: usize) {
    let from = random::<f32>(bytes / 8);
    let mut to = vec![0.0f32; bytes / 8];
    group.bench_function("copy", |b| b.iter(|| copy(&from, &mut to)));
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

fn dropout<T: Dtype>(criterion: &mut Criterion, drop: &Dropout<'_>) {
    let cpu = Cpu::new();
    let bytes = 2 * ELEMENTS * size_of::<T>();
    let mut group = criterion.benchmark_group(format!("dropout {}", T::NAME));
    group.throughput(Throughput::Bytes(bytes as u64));
    bench_copy(&mut group, bytes);
    let x = random::<T>(ELEMENTS);
    let mut y = vec![T::from_f32(0.0); ELEMENTS];
    group.bench_function("fused", |b| {
        b.iter(|| cpu::dropout::forward(&cpu, drop, SHAPE, &x, &mut y).unwrap())
    });
    for level in Cpu::levels().filter(|level| *level != cpu) {
        group.bench_function(format!("fused, {:?}", level.level()), |b| {
            b.iter(|| cpu::dropout::forward(&level, drop, SHAPE, &x, &mut y).unwrap())
        });
    }
    if let Ok(x) = bytemuck::try_cast_slice::<T, f32>(&x)
        && T::NAME == "f32"
    {
        group.sample_size(10);
        let mut seed = 0;
        group.bench_function("separate passes", |b| {
            b.iter(|| {
                seed += 1;
                separate_passes(x, 0.1, seed)
            })
        });
    }
    group.finish();
}

fn dropout_add<T: Dtype>(criterion: &mut Criterion, drop: &Dropout<'_>) {
    let cpu = Cpu::new();
    let bytes = 3 * ELEMENTS * size_of::<T>();
    let mut group = criterion.benchmark_group(format!("dropout_add {}", T::NAME));
    group.throughput(Throughput::Bytes(bytes as u64));
    bench_copy(&mut group, bytes);
    let (x, residual) = (random::<T>(ELEMENTS), random::<T>(ELEMENTS));
    let bias = random::<T>(SHAPE.cols);
    let mut y = vec![T::from_f32(0.0); ELEMENTS];
    for (name, bias) in [("fused", None), ("fused, bias", Some(&bias[..]))] {
        group.bench_function(name, |b| {
            b.iter(|| {
                cpu::dropout_add::forward(&cpu, drop, SHAPE, &x, bias, &residual, &mut y).unwrap()
            })
        });
    }
    group.throughput(Throughput::Bytes((bytes / 3 * 2) as u64));
    let mut dbias = vec![0.0; SHAPE.cols];
    group.bench_function("backward, dbias", |b| {
        b.iter(|| {
            cpu::dropout_add::backward(&cpu, drop, SHAPE, &x, &mut y, Some(&mut dbias)).unwrap()
        })
    });
    group.finish();
}

fn softmax_dropout(criterion: &mut Criterion, drop: &Dropout<'_>) {
    let cpu = Cpu::new();
    let scores = Scores { batch: 4, heads: 12, queries: 1024, keys: 1024, scale: 0.125 };
    let elements = 48 * 1024 * 1024;
    let mut group = criterion.benchmark_group("softmax_dropout f32");
    group.sample_size(10).throughput(Throughput::Bytes(8 * elements as u64));
    bench_copy(&mut group, 8 * elements);
    let x = random::<f32>(elements);
    let mut y = vec![0.0f32; elements];
    let masks = [("fused", AttentionMask::NONE), ("fused, causal", AttentionMask::causal(0))];
    for (name, mask) in masks {
        group.bench_function(name, |b| {
            b.iter(|| {
                cpu::softmax_dropout::forward(&cpu, drop, &scores, &mask, &x, &mut y, None).unwrap()
            })
        });
    }
    let dy = random::<f32>(elements);
    group.throughput(Throughput::Bytes(12 * elements as u64));
    group.bench_function("backward", |b| {
        b.iter(|| {
            let mask = AttentionMask::NONE;
            cpu::softmax_dropout::backward(&cpu, drop, &scores, &mask, &x, None, &dy, &mut y)
                .unwrap()
        })
    });
    group.finish();
}

/// Each row's median over that of its group's copy, from what criterion has just recorded.
fn summary() {
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned());
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(target).join("criterion");
    let median = |group: &str, row: &str| -> Option<f64> {
        let folder = root.join(group).join(row).join("new/estimates.json");
        let text = std::fs::read_to_string(folder).ok()?;
        let at = text.find("\"median\"")?;
        let value = text[at..].split("\"point_estimate\":").nth(1)?;
        value.split([',', '}']).next()?.parse().ok()
    };
    println!("\n{:<22} {:<18} {:>9} {:>12}", "group", "row", "ms", "times copy");
    for group in [
        "dropout f32",
        "dropout bf16",
        "dropout_add f32",
        "dropout_add bf16",
        "softmax_dropout f32",
    ] {
        let Some(copy) = median(group, "copy") else { continue };
        for row in [
            "copy",
            "fused",
            "fused, bias",
            "fused, causal",
            "fused, Avx2",
            "fused, Portable",
            "backward, dbias",
            "backward",
            "separate passes",
        ] {
            if let Some(time) = median(group, row) {
                println!("{group:<22} {row:<18} {:>9.2} {:>12.2}", time / 1e6, time / copy);
            }
        }
    }
}
