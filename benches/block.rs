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
use fused_dropout::cpu::Cpu;
use fused_dropout::ops::dropout_add_norm::{self, Saved};
use fused_dropout::ops::embedding_dropout::{self, Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::{bias_act_dropout, dropout, dropout_add};
use fused_dropout::{
    Activation, Dropout, Dtype, Gradient, In, Key, Mode, Norm, Out, Pass, Probability, Shape,
    Source,
};
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
        let keep = drop.mode(Mode::Inference);
        let shape = Shape::new(ELEMENTS / cols, cols);
        let every_row = (0..shape.rows as u32).collect();
        Self { cpu: Cpu::new(), drop, keep, shape, every_row }
    }

    fn run<'a>(&self, drop: &Dropout<'_>, pass: impl Pass<'a, Cpu>) {
        self.cpu.run(drop, pass).unwrap();
    }

    /// LayerNorm as a pass of its own.
    fn normalise<T: Dtype>(
        &self,
        s: In<'_, T, Cpu>,
        weight: In<'_, T, Cpu>,
        bias: In<'_, T, Cpu>,
        y: &mut Vec<T>,
    ) {
        let token = Lookup { entries: self.shape.rows, ids: Ids::Given(&self.every_row as _) };
        let pass = embedding_dropout::ForwardNorm {
            shape: self.shape,
            norm: Norm::layer(EPSILON),
            lookups: Lookups { token, position: None, segment: None },
            tables: Tables { token: s, position: None, segment: None },
            weight,
            norm_bias: Some(bias),
            y,
            stats: None,
            report: None,
        };
        self.run(&self.keep, pass);
    }

    /// A bias and an activation as a pass of their own.
    fn activate<T: Dtype>(
        &self,
        activation: Activation,
        x: In<'_, T, Cpu>,
        bias: Option<In<'_, T, Cpu>>,
        y: &mut Vec<T>,
    ) {
        let (shape, x) = (self.shape, Source::Tensor(x));
        self.run(&self.keep, bias_act_dropout::Forward { shape, activation, x, bias, y });
    }

    /// Dropout as a pass of its own.
    fn dropped<T: Dtype>(&self, x: In<'_, T, Cpu>, y: &mut Vec<T>) {
        self.run(&self.drop, dropout::Forward { shape: self.shape, x: Source::Tensor(x), y });
    }

    fn name<T: Dtype>(&self, operator: &str) -> String {
        format!("{operator} {} {}", T::NAME, self.shape.cols)
    }

    fn bias_act_dropout<T: Dtype>(&self, report: &mut Report) {
        let Self { drop, shape, .. } = *self;
        let len = shape.rows * shape.cols;
        let moved = 2 * len * size_of::<T>();
        let (x, dy, bias) = (random::<T>(len), random::<T>(len), random::<T>(shape.cols));
        let [mut y, mut biased, mut active] = [(); 3].map(|()| zeros::<T>(len));
        let fused = |activation, y: &mut Vec<T>| {
            let (x, bias) = (Source::Tensor(&x as _), Some(&bias as _));
            self.run(&drop, bias_act_dropout::Forward { shape, activation, x, bias, y });
        };
        let mut chain = |act, y: &mut Vec<T>| {
            self.activate(Activation::Identity, &x, Some(&bias), &mut biased);
            self.activate(act, &biased, None, &mut active);
            self.dropped(&active, y);
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
                let pass = bias_act_dropout::Backward {
                    shape,
                    activation: act,
                    x: &x,
                    bias: Some(&bias),
                    dy: Source::Tensor(&dy),
                    dx: &mut y,
                    dbias: Some(Gradient::Write(&mut dbias)),
                };
                self.run(&drop, pass);
            });
        }
    }

    fn dropout_add_norm<T: Dtype>(&self, report: &mut Report) {
        let Self { drop, keep, shape, .. } = *self;
        let len = shape.rows * shape.cols;
        let moved = 4 * len * size_of::<T>();
        let (x, residual) = (random::<T>(len), random::<T>(len));
        let [bias, weight, norm_bias] = [(); 3].map(|()| random::<T>(shape.cols));
        let norm = Norm::layer(EPSILON);
        let mut stats = vec![0.0; 2 * shape.rows];
        let [mut s, mut y, mut biased, mut dropped] = [(); 4].map(|()| zeros::<T>(len));
        let fused = |s: Option<&mut Vec<T>>, y: &mut Vec<T>, stats: Option<&mut Vec<f32>>| {
            let pass = dropout_add_norm::Forward {
                shape,
                norm,
                x: &x,
                bias: Some(&bias),
                residual: Source::Tensor(&residual),
                weight: &weight,
                norm_bias: Some(&norm_bias),
                s: s.map(|s| s as Out<'_, T, Cpu>),
                y,
                stats: stats.map(|stats| stats as Out<'_, f32, Cpu>),
            };
            self.run(&drop, pass);
        };
        let mut chain = |s: &mut Vec<T>, y: &mut Vec<T>| {
            self.activate(Activation::Identity, &x, Some(&bias), &mut biased);
            self.dropped(&biased, &mut dropped);
            let residual = Source::Tensor(&residual as _);
            self.run(
                &keep,
                dropout_add::Forward { shape, x: &dropped, bias: None, residual, y: s },
            );
            self.normalise(s, &weight, &norm_bias, y);
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
        let mut sums = [(); 3].map(|()| vec![0.0; shape.cols]);
        for (name, with_parameters) in [("backward", true), ("backward, no parameters", false)] {
            group.row(name, moved, || {
                let [dbias, dweight, dnorm_bias] =
                    sums.each_mut().map(|sum| with_parameters.then_some(Gradient::Write(sum)));
                let pass = dropout_add_norm::Backward {
                    shape,
                    norm,
                    saved: Saved::Sum(&s),
                    weight: &weight,
                    stats: &stats,
                    dy: &x,
                    ds: None,
                    dresidual: &mut y,
                    dx: &mut dropped,
                    dbias,
                    dweight,
                    dnorm_bias,
                };
                self.run(&drop, pass);
            });
        }
    }

    fn embedding_dropout(&self, report: &mut Report) {
        let Self { drop, shape, .. } = *self;
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
        let lookups = Lookups {
            token: Lookup { entries, ids: Ids::Given(&ids as _) },
            position: Some(Lookup { entries: positions, ids: Ids::Sequence(positions) }),
            segment: Some(Lookup { entries: segments, ids: Ids::Given(&segment as _) }),
        };
        let tables = Tables {
            token: &token_table as _,
            position: Some(&position_table as _),
            segment: Some(&segment_table as _),
        };
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
        let mut chain = |with_norm: bool, y: &mut Vec<f32>| {
            gather(&mut sum, &token_table, &|row| ids[row] as usize, false);
            gather(&mut sum, &position_table, &|row| row % positions, true);
            gather(&mut sum, &segment_table, &|row| segment[row] as usize, true);
            if with_norm {
                self.normalise(&sum, &weight, &norm_bias, &mut standard);
            }
            self.dropped(if with_norm { &standard } else { &sum }, y);
        };
        let fused = |with_norm: bool, y: &mut Vec<f32>| {
            if !with_norm {
                let pass = embedding_dropout::Forward::<f32, _> {
                    shape,
                    lookups,
                    tables,
                    y,
                    report: None,
                };
                return self.run(&drop, pass);
            }
            let pass = embedding_dropout::ForwardNorm {
                shape,
                norm,
                lookups,
                tables,
                weight: &weight,
                norm_bias: Some(&norm_bias),
                y,
                stats: None,
                report: None,
            };
            self.run(&drop, pass);
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
            let [token, position, segment] =
                gradients.each_mut().map(|gradient| Some(Gradient::Add(gradient)));
            let gradients = Gradients { token, position, segment };
            self.run(&drop, embedding_dropout::Backward { shape, lookups, dy: &dy, gradients });
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
