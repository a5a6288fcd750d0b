//! CPU throughput of the operators of a transformer block, at the widths of models: each beside a copy that
//! moves the same bytes on the same threads, and beside the chain of separate passes that it replaces.
//!
//!     cargo bench --bench block                          # everything, about six minutes
//!     cargo bench --bench block -- 'dropout_add_norm'    # one operator
//!
//! The passes of a chain are this crate's own operators (in inference mode for a bias, an activation, a
//! sum or a norm alone); only the embeddings' gathers are plain loops over rows, on all threads. Answers
//! are checked before the clock starts: the chain and the operator must agree.

mod common;

use common::{Report, random};
use fused_dropout::cpu::{
    Cpu, bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout,
};
use fused_dropout::ops::dropout_add_norm::{Inputs, ParamGrads, Saved};
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookups, Tables};
use fused_dropout::{Activation, Affine, Dropout, Dtype, Key, Mode, Norm, Probability, Shape};
use half::bf16;
use rayon::prelude::*;

const ELEMENTS: usize = 1 << 24;
const WIDTHS: [usize; 4] = [768, 1024, 4096, 8192];
const EPSILON: f32 = 1e-5;

fn main() {
    let mut report = Report::new();
    for cols in WIDTHS {
        let block = Block::new(cols);
        block.bias_act_dropout::<f32>(&mut report);
        block.bias_act_dropout::<bf16>(&mut report);
        block.dropout_add_norm::<f32>(&mut report);
        block.dropout_add_norm::<bf16>(&mut report);
        block.embedding_dropout(&mut report);
    }
    report.finish();
}

/// The operators on about `ELEMENTS` elements of one width.
struct Block {
    cpu: Cpu,
    drop: Dropout<'static>,
    /// The same without dropping: a pass that does the rest alone.
    keep: Dropout<'static>,
    shape: Shape,
    /// 0, 1, 2, ...: what makes a table's normalised lookup a pass that normalises its rows.
    every_row: Vec<u32>,
}

impl Block {
    fn new(cols: usize) -> Self {
        let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1).unwrap());
        let keep = Dropout { mode: Mode::Inference, ..drop };
        let shape = Shape::new(ELEMENTS / cols, cols);
        let every_row = (0..shape.rows as u32).collect();
        Self { cpu: Cpu::new(), drop, keep, shape, every_row }
    }

    /// LayerNorm as a pass of its own.
    fn normalise<T: Dtype>(&self, s: &[T], affine: &Affine<&[T]>, y: &mut [T]) {
        let lookups = Lookups::tokens(self.shape.rows, &self.every_row[..]);
        let tables = Tables { token: s, position: None, segment: None };
        let (keep, norm) = (&self.keep, Norm::layer(EPSILON));
        embedding_dropout::forward_norm(
            &self.cpu, keep, &norm, self.shape, &lookups, &tables, affine, y, None,
        )
        .unwrap();
    }

    fn name<T: Dtype>(&self, operator: &str) -> String {
        format!("{operator} {} {}", T::NAME, self.shape.cols)
    }

    fn bias_act_dropout<T: Dtype>(&self, report: &mut Report) {
        let Self { cpu, drop, keep, shape, .. } = self;
        let len = shape.rows * shape.cols;
        let moved = 2 * len * size_of::<T>();
        let (x, dy, bias) = (random::<T>(len), random::<T>(len), random::<T>(shape.cols));
        let [mut y, mut biased, mut active] = [(); 3].map(|()| zeros::<T>(len));
        let fused = |act, y: &mut [T]| {
            bias_act_dropout::forward(cpu, drop, *shape, act, &x, Some(&bias), y).unwrap();
        };
        let mut chain = |act, y: &mut [T]| {
            let identity = Activation::Identity;
            bias_act_dropout::forward(cpu, keep, *shape, identity, &x, Some(&bias), &mut biased)
                .unwrap();
            bias_act_dropout::forward(cpu, keep, *shape, act, &biased, None, &mut active).unwrap();
            dropout::forward(cpu, drop, *shape, &active, y).unwrap();
        };
        let mut group = report.group(&self.name::<T>("bias_act_dropout"), moved);
        for (name, act) in [
            ("ReLU", Activation::Relu),
            ("GELU", Activation::Gelu),
            ("GELU, tanh", Activation::GeluTanh),
            ("SiLU", Activation::Silu),
        ] {
            let mut separate = zeros::<T>(len);
            fused(act, &mut y);
            chain(act, &mut separate);
            agree(&y, &separate, rounding::<T>(3.0));
            group.row(name, moved, || fused(act, &mut y));
            group.row(&format!("{name}, separate passes"), moved, || chain(act, &mut y));
        }
        let mut dbias = vec![0.0; shape.cols];
        for (name, act) in
            [("ReLU, backward", Activation::Relu), ("GELU, backward", Activation::Gelu)]
        {
            group.row(name, 3 * len * size_of::<T>(), || {
                let (bias, dbias) = (Some(&bias[..]), Some(&mut dbias[..]));
                bias_act_dropout::backward(cpu, drop, *shape, act, &x, bias, &dy, &mut y, dbias)
                    .unwrap();
            });
        }
    }

    fn dropout_add_norm<T: Dtype>(&self, report: &mut Report) {
        let Self { cpu, drop, keep, shape, .. } = self;
        let len = shape.rows * shape.cols;
        let moved = 4 * len * size_of::<T>();
        let (x, residual) = (random::<T>(len), random::<T>(len));
        let [bias, weight, norm_bias] = [(); 3].map(|()| random::<T>(shape.cols));
        let inputs = Inputs { x: &x[..], bias: Some(&bias[..]), residual: &residual[..] };
        let affine = Affine { weight: &weight[..], bias: Some(&norm_bias[..]) };
        let norm = Norm::layer(EPSILON);
        let mut stats = vec![0.0; 2 * shape.rows];
        let [mut s, mut y, mut biased, mut dropped] = [(); 4].map(|()| zeros::<T>(len));
        let fused = |s: Option<&mut [T]>, y: &mut [T], stats: Option<&mut [f32]>| {
            dropout_add_norm::forward(cpu, drop, &norm, *shape, &inputs, &affine, s, y, stats)
                .unwrap();
        };
        let mut chain = |s: &mut [T], y: &mut [T]| {
            let identity = Activation::Identity;
            bias_act_dropout::forward(cpu, keep, *shape, identity, &x, Some(&bias), &mut biased)
                .unwrap();
            dropout::forward(cpu, drop, *shape, &biased, &mut dropped).unwrap();
            dropout_add::forward(cpu, keep, *shape, &dropped, None, &residual, s).unwrap();
            self.normalise(s, &affine, y);
        };
        let mut separate = zeros::<T>(len);
        chain(&mut s, &mut separate);
        fused(None, &mut y, Some(&mut stats));
        // Standardised values are below 4, and so are weights below 2: a unit of rounding of s and its
        // statistics is at most sixteen of y, with the sums' own.
        agree(&y, &separate, rounding::<T>(32.0));

        let mut group = report.group(&self.name::<T>("dropout_add_norm"), moved);
        group.row("s and y", moved, || fused(Some(&mut s), &mut y, Some(&mut stats)));
        group.row("y alone", moved / 4 * 3, || fused(None, &mut y, None));
        group.row("s and y, separate passes", moved, || chain(&mut s, &mut y));
        fused(Some(&mut s), &mut y, Some(&mut stats));
        let saved = Saved::Sum(&s[..]);
        let (dresidual, dx) = (&mut y, &mut dropped);
        let dy = &x;
        let mut sums = vec![0.0; 3 * shape.cols];
        for (name, with_parameters) in [("backward", true), ("backward, no parameters", false)] {
            group.row(name, moved, || {
                let (dbias, rest) = sums.split_at_mut(shape.cols);
                let (dweight, dnorm_bias) = rest.split_at_mut(shape.cols);
                let grads = match with_parameters {
                    true => ParamGrads {
                        dbias: Some(dbias),
                        dweight: Some(dweight),
                        dnorm_bias: Some(dnorm_bias),
                    },
                    false => ParamGrads::default(),
                };
                dropout_add_norm::backward(
                    cpu, drop, &norm, *shape, &saved, &weight, &stats, dy, None, dresidual, dx,
                    grads,
                )
                .unwrap();
            });
        }
    }

    fn embedding_dropout(&self, report: &mut Report) {
        let Self { cpu, drop, shape, .. } = self;
        let cols = shape.cols;
        let len = shape.rows * cols;
        // Each row reads one of a vocabulary as large as the batch and writes one; the other tables are
        // small and stay in the caches.
        let moved = 2 * len * size_of::<f32>();
        let (entries, positions, segments) = (shape.rows, 512, 2);
        let ids: Vec<u32> = (0..shape.rows).map(|row| (row * 7919 % entries) as u32).collect();
        let segment: Vec<u32> = (0..shape.rows).map(|row| u32::from(row % 512 >= 256)).collect();
        let [token_table, position_table, segment_table] =
            [entries, positions, segments].map(|entries| random::<f32>(entries * cols));
        let [weight, norm_bias] = [(); 2].map(|()| random::<f32>(cols));
        let lookups = Lookups::tokens(entries, &ids[..])
            .positions(positions, Ids::Sequence(positions))
            .segments(segments, &segment[..]);
        let tables = Tables {
            token: &token_table[..],
            position: Some(&position_table[..]),
            segment: Some(&segment_table[..]),
        };
        let affine = Affine { weight: &weight[..], bias: Some(&norm_bias[..]) };
        let norm = Norm::layer(EPSILON);
        let gather =
            |sum: &mut [f32], table: &[f32], entry: &(dyn Fn(usize) -> usize + Sync), add: bool| {
                sum.par_chunks_mut(cols).enumerate().for_each(|(row, sum)| {
                    let entry = &table[entry(row) * cols..][..cols];
                    match add {
                        true => sum.iter_mut().zip(entry).for_each(|(sum, value)| *sum += value),
                        false => sum.copy_from_slice(entry),
                    }
                });
            };
        let [mut y, mut sum, mut standard] = [(); 3].map(|()| zeros::<f32>(len));
        let mut chain = |with_norm: bool, y: &mut [f32]| {
            gather(&mut sum, &token_table, &|row| ids[row] as usize, false);
            gather(&mut sum, &position_table, &|row| row % positions, true);
            gather(&mut sum, &segment_table, &|row| segment[row] as usize, true);
            if with_norm {
                self.normalise(&sum, &affine, &mut standard);
            }
            dropout::forward(cpu, drop, *shape, if with_norm { &standard } else { &sum }, y)
                .unwrap();
        };
        let fused = |with_norm: bool, y: &mut [f32]| match with_norm {
            true => embedding_dropout::forward_norm(
                cpu, drop, &norm, *shape, &lookups, &tables, &affine, y, None,
            )
            .unwrap(),
            false => embedding_dropout::forward(cpu, drop, *shape, &lookups, &tables, y).unwrap(),
        };
        let mut group = report.group(&self.name::<f32>("embedding_dropout"), moved);
        for (name, with_norm) in [("GPT", false), ("BERT, with a norm", true)] {
            let mut separate = zeros::<f32>(len);
            fused(with_norm, &mut y);
            chain(with_norm, &mut separate);
            agree(&y, &separate, rounding::<f32>(32.0));
            group.row(name, moved, || fused(with_norm, &mut y));
            group.row(&format!("{name}, separate passes"), moved, || chain(with_norm, &mut y));
        }
        let mut gradients = [entries, positions, segments].map(|entries| vec![0.0; entries * cols]);
        let dy = random::<f32>(len);
        // dy is read, and the tokens' gradients are read and written.
        group.row("GPT, backward", moved / 2 * 3, || {
            let [token, position, segment] = &mut gradients;
            let gradients = Gradients {
                token: Some(&mut token[..]),
                position: Some(&mut position[..]),
                segment: Some(&mut segment[..]),
            };
            embedding_dropout::backward(cpu, drop, *shape, &lookups, &dy, gradients).unwrap();
        });
    }
}

fn zeros<T: Dtype>(len: usize) -> Vec<T> {
    vec![T::from_f32(0.0); len]
}

/// So many roundings of a value to `T`, for values below 4.
fn rounding<T: Dtype>(units: f32) -> f32 {
    let unit = match T::NAME {
        "bf16" => 2f32.powi(-8),
        "f16" => 2f32.powi(-11),
        _ => f32::EPSILON / 2.0,
    };
    units * 4.0 * unit
}

fn agree<T: Dtype>(fused: &[T], chain: &[T], bound: f32) {
    for (at, (fused, chain)) in fused.iter().zip(chain).enumerate() {
        let (fused, chain) = (fused.to_f32(), chain.to_f32());
        assert!((fused - chain).abs() <= bound, "element {at}: {fused}, separate passes {chain}");
    }
}
