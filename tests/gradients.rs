//! Gradients against finite differences, in f64, of the forward pass as the mathematics states it: with
//! the mask fixed, the backward pass must be its derivative.

use fused_dropout::cpu::Cpu;
use fused_dropout::ops::dropout_add_norm::Saved;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::{
    bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout, softmax_dropout,
    swiglu_dropout,
};
use fused_dropout::{
    Activation, AttentionMask, Dropout, Gradient, In, Key, Norm, NormKind, Probability, Scores,
    Shape, Source,
};

const SCORES: Scores = Scores { batch: 1, heads: 2, queries: 3, keys: 11, scale: 0.7 };
const N: usize = 66;

fn drop() -> Dropout<'static> {
    Dropout::new(Key::new(8, 9), Probability::new(0.25).unwrap())
}

fn values(salt: f64) -> Vec<f64> {
    (0..N).map(|i| f64::from((i as f64 * 1.7 + salt).sin() as f32)).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// sum of weight * forward(x), a scalar loss.
fn loss(forward: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], weight: &[f64]) -> f64 {
    forward(x).iter().zip(weight).map(|(y, w)| y * w).sum()
}

/// Central differences: the error is h^2 / 6 times a third derivative of order 1, 2e-10, and rounding,
/// 66 * 2^-53 / h, below 1e-9. The backward pass is in f32: a few hundred of its roundings at most.
fn compare(forward: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], weight: &[f64], gradient: &[f32]) {
    let h = 3e-5;
    for i in 0..x.len() {
        let (mut up, mut down) = (x.to_vec(), x.to_vec());
        up[i] += h;
        down[i] -= h;
        let expected = (loss(forward, &up, weight) - loss(forward, &down, weight)) / (2.0 * h);
        let bound = 2e-9 + 300.0 * f64::from(f32::EPSILON) * expected.abs().max(0.01);
        let given = f64::from(gradient[i]);
        assert!((given - expected).abs() <= bound, "{i}: {given}, not {expected}");
    }
}

fn dropped(y: &[f64], cols: usize) -> Vec<f64> {
    let d = drop();
    let value = |(i, y): (usize, &f64)| match d.key.keeps(d.p, (i / cols) as u32, (i % cols) as u64)
    {
        true => y * f64::from(d.p.scale()),
        false => 0.0,
    };
    y.iter().enumerate().map(value).collect()
}

#[test]
fn dropout_and_dropout_add() {
    let (x, weight, shape) = (values(0.0), values(5.0), Shape::new(6, 11));
    let (cpu, dy, mut dx) = (Cpu::new(), narrow(&weight), vec![0.0; N]);
    let source = || Source::Tensor(&dy as _);
    cpu.run(&drop(), dropout::Backward { shape, dy: source(), dx: &mut dx }).unwrap();
    compare(&|x| dropped(x, 11), &x, &weight, &dx);

    let mut dbias = vec![0.0; 11];
    let gradient = Some(Gradient::Write(&mut dbias));
    let (dy, dx) = (source(), Some(&mut dx as _));
    cpu.run(&drop(), dropout_add::Backward { shape, dy, dx, dbias: gradient }).unwrap();
    let with_bias = |bias: &[f64]| {
        let sums: Vec<f64> = x.iter().enumerate().map(|(i, x)| x + bias[i % 11]).collect();
        dropped(&sums, 11)
    };
    compare(&with_bias, &values(3.0)[..11], &weight, &dbias);
}

/// Six rows of 11: three tokens that repeat, two positions, one of two segments a row.
const TOKENS: [u32; 6] = [2, 0, 2, 2, 1, 0];
const SEGMENTS: [u32; 6] = [0, 0, 1, 1, 1, 0];

fn lookups() -> Lookups<In<'static, u32, Cpu>> {
    Lookups {
        token: Lookup { entries: 3, ids: Ids::Given(&TOKENS) },
        position: Some(Lookup { entries: 2, ids: Ids::Sequence(2) }),
        segment: Some(Lookup { entries: 2, ids: Ids::Given(&SEGMENTS) }),
    }
}

/// The sums of what the rows look up in the three tables, which follow each other.
fn embeddings(tables: &[f64]) -> Vec<f64> {
    let (token, rest) = tables.split_at(33);
    let (position, segment) = rest.split_at(22);
    let at = |i: usize| {
        let (r, c) = (i / 11, i % 11);
        token[TOKENS[r] as usize * 11 + c]
            + position[r % 2 * 11 + c]
            + segment[SEGMENTS[r] as usize * 11 + c]
    };
    (0..N).map(at).collect()
}

#[test]
fn embedding_dropout() {
    let tables = &[values(0.0), values(2.0)].concat()[..77];
    let (weight, shape) = (values(5.0), Shape::new(6, 11));
    // On top of what is there already.
    let mut gradients = [33, 22, 22].map(|len| vec![1.0f32; len]);
    let [token, position, segment] = gradients.each_mut().map(|table| Some(Gradient::Add(table)));
    let pass = embedding_dropout::Backward {
        shape,
        lookups: lookups(),
        dy: &narrow(&weight),
        gradients: Gradients { token, position, segment },
    };
    Cpu::new().run(&drop(), pass).unwrap();
    let gradient: Vec<f32> = gradients.concat().iter().map(|gradient| gradient - 1.0).collect();
    compare(&|tables| dropped(&embeddings(tables), 11), tables, &weight, &gradient);
}

#[test]
fn embedding_dropout_with_a_norm() {
    // The three tables, then the weight and the bias.
    let all = &[values(0.0), values(2.0)].concat()[..99];
    let (weight, shape, cpu) = (values(5.0), Shape::new(6, 11), Cpu::new());
    let narrowed = narrow(all);
    let [token, position, segment, norm_weight, norm_bias] =
        [0..33, 33..55, 55..77, 77..88, 88..99].map(|part| narrowed[part].to_vec());
    let tables =
        Tables { token: &token as _, position: Some(&position as _), segment: Some(&segment as _) };
    for norm in [Norm::layer(1e-3), Norm::rms(1e-3)] {
        let (mut y, mut stats) = (vec![0.0; N], vec![0.0; 12]);
        let pass = embedding_dropout::ForwardNorm {
            shape,
            norm,
            lookups: lookups(),
            tables,
            weight: &norm_weight,
            norm_bias: Some(&norm_bias),
            y: &mut y,
            stats: Some(&mut stats),
            report: None,
        };
        cpu.run(&drop(), pass).unwrap();
        let mut gradients = [33, 22, 22, 11, 11].map(|len| vec![9.0f32; len]);
        let [token, position, segment, dweight, dnorm_bias] =
            gradients.each_mut().map(|gradient| Some(Gradient::Write(gradient)));
        let pass = embedding_dropout::BackwardNorm {
            shape,
            norm,
            lookups: lookups(),
            tables,
            weight: &norm_weight,
            stats: &stats,
            dy: &narrow(&weight),
            gradients: Gradients { token, position, segment },
            dweight,
            dnorm_bias,
        };
        cpu.run(&drop(), pass).unwrap();
        let gradient = gradients.concat();
        let forward = |all: &[f64]| {
            let sums = embeddings(&all[..77]);
            dropped(&normalised(&norm, &sums, &all[77..88], &all[88..]), 11)
        };
        compare(&forward, all, &weight, &gradient);
    }
}

#[test]
fn bias_act_dropout() {
    let (x, bias, weight) = (values(0.0), values(3.0), values(5.0));
    let (shape, cpu) = (Shape::new(6, 11), Cpu::new());
    let (x32, bias32, dy) = (narrow(&x), narrow(&bias[..11]), narrow(&weight));
    for activation in Activation::ALL {
        let forward = |x: &[f64], bias: &[f64]| {
            let sums = x.iter().enumerate().map(|(i, x)| act(activation, x + bias[i % 11]));
            dropped(&sums.collect::<Vec<_>>(), 11)
        };
        let (mut dx, mut dbias) = (vec![0.0; N], vec![0.0; 11]);
        let pass = bias_act_dropout::Backward {
            shape,
            activation,
            x: &x32,
            bias: Some(&bias32),
            dy: Source::Tensor(&dy),
            dx: &mut dx,
            dbias: Some(Gradient::Write(&mut dbias)),
        };
        cpu.run(&drop(), pass).unwrap();
        compare(&|x| forward(x, &bias), &x, &weight, &dx);
        compare(&|bias| forward(&x, bias), &bias[..11], &weight, &dbias);
    }
}

#[test]
fn swiglu_dropout() {
    let (gate, up, weight) = (values(0.0), values(3.0), values(5.0));
    let (shape, cpu) = (Shape::new(6, 11), Cpu::new());
    let forward = |gate: &[f64], up: &[f64]| {
        let product = gate.iter().zip(up).map(|(&gate, up)| act(Activation::Silu, gate) * up);
        dropped(&product.collect::<Vec<_>>(), 11)
    };
    let (mut dgate, mut dup) = (vec![0.0; N], vec![0.0; N]);
    let pass = swiglu_dropout::Backward {
        shape,
        gate: &narrow(&gate),
        up: &narrow(&up),
        dy: Source::Tensor(&narrow(&weight)),
        dgate: &mut dgate,
        dup: &mut dup,
    };
    cpu.run(&drop(), pass).unwrap();
    compare(&|gate| forward(gate, &up), &gate, &weight, &dgate);
    compare(&|up| forward(&gate, up), &up, &weight, &dup);
}

fn act(activation: Activation, x: f64) -> f64 {
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    match activation {
        Activation::Gelu => x * libm::erfc(-x / std::f64::consts::SQRT_2) / 2.0,
        Activation::GeluTanh => 0.5 * x * (1.0 + u.tanh()),
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
        Activation::Identity => x,
        other => unreachable!("{other:?} has no formula here"),
    }
}

#[test]
fn softmax_dropout() {
    let (x, weight) = (values(0.0), values(5.0));
    for causal in [None, Some(4)] {
        let forward = |x: &[f64]| {
            let mut p = vec![0.0; N];
            for (r, (x, p)) in x.chunks(11).zip(p.chunks_mut(11)).enumerate() {
                let seen = causal.map_or(11, |offset: i64| (r as i64 % 3 + offset + 1) as usize);
                let e = x[..seen].iter().map(|x| (x * f64::from(SCORES.scale)).exp());
                let sum: f64 = e.clone().sum();
                p.iter_mut().zip(e).for_each(|(p, e)| *p = e / sum);
            }
            dropped(&p, 11)
        };
        let (x32, dy, mut dx) = (narrow(&x), narrow(&weight), vec![0.0; N]);
        let pass = softmax_dropout::Backward {
            scores: SCORES,
            mask: AttentionMask { causal, ..AttentionMask::NONE },
            x: &x32,
            statistics: None,
            dy: Source::Tensor(&dy),
            dx: &mut dx,
        };
        Cpu::new().run(&drop(), pass).unwrap();
        compare(&forward, &x, &weight, &dx);
    }
}

/// norm(s) of rows of 11.
fn normalised(norm: &Norm, s: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let row = |s: &[f64]| -> Vec<f64> {
        let mean = if norm.kind == NormKind::Layer { s.iter().sum::<f64>() / 11.0 } else { 0.0 };
        let variance = s.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / 11.0;
        let rstd = 1.0 / (variance + f64::from(norm.epsilon)).sqrt();
        (0..11).map(|k| (s[k] - mean) * rstd * weight[k] + bias[k]).collect()
    };
    s.chunks(11).flat_map(row).collect()
}

/// The loss is of s beside y, as in a pre-norm model.
#[test]
fn dropout_add_norm() {
    let (cpu, d, shape) = (Cpu::new(), drop(), Shape::new(6, 11));
    let [x, residual, of_y, of_s] = [0.0, 1.0, 5.0, 6.0].map(values);
    let [bias, weight, norm_bias] = [2.0, 3.0, 4.0].map(|salt| values(salt)[..11].to_vec());
    let sums = |x: &[f64], bias: &[f64], residual: &[f64]| -> Vec<f64> {
        let biased: Vec<f64> = x.iter().enumerate().map(|(i, x)| x + bias[i % 11]).collect();
        dropped(&biased, 11).iter().zip(residual).map(|(d, r)| d + r).collect()
    };
    let both: Vec<f64> = of_y.iter().chain(&of_s).copied().collect();
    for norm in [Norm::layer(1e-3), Norm::rms(1e-3)] {
        let forward =
            |x: &[f64], bias: &[f64], residual: &[f64], weight: &[f64], norm_bias: &[f64]| {
                let s = sums(x, bias, residual);
                let y = normalised(&norm, &s, weight, norm_bias);
                [y, s].concat()
            };
        let (x32, bias32, residual32) = (narrow(&x), narrow(&bias), narrow(&residual));
        let (weight32, norm_bias32) = (narrow(&weight), narrow(&norm_bias));
        let (mut s, mut y, mut stats) = (vec![0.0; N], vec![0.0; N], [0.0; 12]);
        let pass = dropout_add_norm::Forward {
            shape,
            norm,
            x: &x32,
            bias: Some(&bias32),
            residual: Source::Tensor(&residual32),
            weight: &weight32,
            norm_bias: Some(&norm_bias32),
            s: Some(&mut s),
            y: &mut y,
            stats: Some(&mut stats),
        };
        cpu.run(&d, pass).unwrap();
        let (dy, ds) = (narrow(&of_y), narrow(&of_s));
        let inputs =
            Saved::Inputs { x: &x32 as _, bias: Some(&bias32 as _), residual: &residual32 as _ };
        for saved in [Saved::Sum(&s as _), inputs] {
            let (mut dresidual, mut dx) = (vec![0.0; N], vec![0.0; N]);
            let [mut dbias, mut dweight, mut dnorm_bias] = [[0.0; 11]; 3];
            let pass = dropout_add_norm::Backward {
                shape,
                norm,
                saved,
                weight: &weight32,
                stats: &stats,
                dy: &dy,
                ds: Some(&ds),
                dresidual: &mut dresidual,
                dx: &mut dx,
                dbias: Some(Gradient::Write(&mut dbias)),
                dweight: Some(Gradient::Write(&mut dweight)),
                dnorm_bias: Some(Gradient::Write(&mut dnorm_bias)),
            };
            cpu.run(&d, pass).unwrap();
            let (b, r, w, n) = (&bias, &residual, &weight, &norm_bias);
            compare(&|x| forward(x, b, r, w, n), &x, &both, &dx);
            compare(&|b| forward(&x, b, r, w, n), b, &both, &dbias);
            compare(&|r| forward(&x, b, r, w, n), r, &both, &dresidual);
            compare(&|w| forward(&x, b, r, w, n), w, &both, &dweight);
            compare(&|n| forward(&x, b, r, w, n), n, &both, &dnorm_bias);
        }
    }
}
