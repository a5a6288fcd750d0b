//! The bytes that each kernel moves, counted by the emulator: what the operator cannot avoid, all of it in
//! accesses of 16 bytes, and a few bytes a row or a block beside that.
#![cfg(feature = "emulator")]

use fused_dropout::emulator::Emulator;
use fused_dropout::ops::dropout_add_norm::Saved;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::softmax_dropout::STATISTICS;
use fused_dropout::ops::{
    bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout, softmax_dropout,
    swiglu_dropout,
};
use fused_dropout::{
    Activation, AttentionMask, Dropout, Gradient, In, Key, Norm, Pass, Probability, Scores, Shape,
    Source,
};
use half::bf16;

const SHAPE: Shape = Shape { rows: 128, cols: 1024 };
const ELEMENTS: usize = 128 * 1024;

/// Aligned to 16 bytes, as the kernels for aligned tensors ask.
#[repr(align(64))]
struct Aligned([bf16; ELEMENTS]);

fn tensor() -> Box<Aligned> {
    Box::new(Aligned(std::array::from_fn(|i| bf16::from_f32((i % 97) as f32 / 50.0 - 1.0))))
}

/// Runs `pass`, and holds its traffic to `reads` and `writes` bytes an element in accesses of 16 bytes, and
/// at most `beside` bytes that are not one an element (a bias, a row's statistics, partial sums).
fn moves<'a>(reads: usize, writes: usize, beside: usize, pass: impl Pass<'a, Emulator>) {
    let emulator = Emulator::new();
    let drop = Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap());
    emulator.run(&drop, pass).unwrap();
    let traffic = emulator.traffic();
    for (name, accesses, bytes) in
        [("reads", traffic.reads, reads), ("writes", traffic.writes, writes)]
    {
        let least = (bytes * ELEMENTS) as u64;
        assert!(16 * accesses.of_width(16) >= least, "{name}: {accesses:?}");
        let most = least + beside as u64;
        assert!((least..=most).contains(&accesses.bytes()), "{name}: {accesses:?}, not {least}");
    }
}

#[test]
fn streaming_operators() {
    let (x, r, mut y) = (tensor(), tensor(), tensor());
    let shape = SHAPE;
    // A bias is read once an octet, from a cache.
    let of_bias = 2 * ELEMENTS;
    let (bias, x, r, y) = (&&x.0[..SHAPE.cols], &&x.0[..], &&r.0[..], &mut &mut y.0[..]);
    let residual = Source::Tensor(r as In<'_, bf16, Emulator>);
    moves(2, 2, 0, dropout::Forward { shape, x: Source::Tensor(x), y });
    moves(4, 2, 0, dropout_add::Forward { shape, x, bias: None, residual, y });
    moves(4, 2, of_bias, dropout_add::Forward { shape, x, bias: Some(bias), residual, y });
    for activation in Activation::ALL {
        let x_only = Source::Tensor(x as In<'_, bf16, Emulator>);
        let forward = bias_act_dropout::Forward { shape, activation, x: x_only, bias: None, y };
        moves(2, 2, 0, forward);
        let bias = Some(bias as _);
        moves(2, 2, of_bias, bias_act_dropout::Forward { shape, activation, x: x_only, bias, y });
        let (dy, dx) = (Source::Tensor(r as _), &mut *y);
        let backward =
            bias_act_dropout::Backward { shape, activation, x, bias: None, dy, dx, dbias: None };
        moves(4, 2, 0, backward);
    }
}

#[test]
fn gated() {
    let (gate, up, dy) = (tensor(), tensor(), tensor());
    let (mut a, mut b) = (tensor(), tensor());
    let (gate, up, dy) = (&&gate.0[..], &&up.0[..], &&dy.0[..]);
    let (a, b) = (&mut &mut a.0[..], &mut &mut b.0[..]);
    let shape = SHAPE;
    let forward = swiglu_dropout::Forward { shape, gate: Source::Tensor(gate), up, y: a };
    moves(4, 2, 0, forward);
    let dy = Source::Tensor(dy as _);
    moves(6, 4, 0, swiglu_dropout::Backward { shape, gate, up, dy, dgate: a, dup: b });
}

#[test]
fn bias_gradients() {
    let (x, dy, mut dx) = (tensor(), tensor(), tensor());
    let (x, dx) = (&&x.0[..], &mut &mut dx.0[..]);
    let dy = &dy.0[..];
    let dy = Source::Tensor(&dy as In<'_, bf16, Emulator>);
    let shape = SHAPE;
    let mut sum = vec![0.0f32; SHAPE.cols];
    // One sum a tile of 64 rows and a column, written and read, and the sum of the two tiles.
    let sums = 4 * SHAPE.cols * 3;
    let dbias = Some(Gradient::Write(&mut sum));
    moves(2, 2, sums, dropout_add::Backward { shape, dy, dx: Some(dx), dbias });
    let dbias = Some(Gradient::Write(&mut sum));
    moves(2, 0, sums, dropout_add::Backward { shape, dy, dx: None, dbias });
    let backward = bias_act_dropout::Backward {
        shape,
        activation: Activation::Gelu,
        x,
        bias: None,
        dy,
        dx,
        dbias: Some(Gradient::Write(&mut sum)),
    };
    moves(4, 2, sums, backward);
}

#[test]
fn softmax() {
    let (x, dy, mut y) = (tensor(), tensor(), tensor());
    let (x, dy, y) = (&&x.0[..], &&dy.0[..], &mut &mut y.0[..]);
    let scores = Scores { batch: 1, heads: 2, queries: 64, keys: 1024, scale: 0.1 };
    let mask = AttentionMask::NONE;
    let mut saved = vec![0.0f32; STATISTICS * SHAPE.rows];
    let a_row = 4 * STATISTICS * SHAPE.rows;
    let statistics = Some(&mut saved as _);
    let x_only = Source::Tensor(x as _);
    moves(2, 2, a_row, softmax_dropout::Forward { scores, mask, x: x_only, y, statistics });
    for statistics in [None, Some(&saved as _)] {
        let beside = statistics.map_or(0, |_| 32 * a_row);
        let dy = Source::Tensor(dy as _);
        let backward = softmax_dropout::Backward { scores, mask, x, statistics, dy, dx: y };
        moves(4, 2, beside, backward);
    }
}

#[test]
fn add_and_norm() {
    let (x, r, dy, ds) = (tensor(), tensor(), tensor(), tensor());
    let (mut s, mut y, mut dresidual) = (tensor(), tensor(), tensor());
    let (norm, weight) = (Norm::layer(1e-5), &x.0[..SHAPE.cols]);
    let (x, r, dy, ds) = (&x.0[..], &r.0[..], &dy.0[..], &ds.0[..]);
    let (s, mut stats) = (&mut &mut s.0[..], vec![0.0f32; 2 * SHAPE.rows]);
    let (y, dresidual) = (&mut &mut y.0[..], &mut &mut dresidual.0[..]);
    // The weight is read once an octet, from a cache.
    let (of_weight, a_row) = (2 * ELEMENTS, 4 * SHAPE.rows);
    for keeps in [true, false] {
        let forward = dropout_add_norm::Forward {
            shape: SHAPE,
            norm,
            x: &x,
            bias: None,
            residual: Source::Tensor(&r),
            weight: &weight,
            norm_bias: None,
            s: keeps.then_some(s as _),
            y,
            stats: keeps.then_some(&mut stats as _),
        };
        match keeps {
            true => moves(4, 4, of_weight + 2 * a_row, forward),
            false => moves(4, 2, of_weight, forward),
        }
    }
    let mut sum = vec![0.0f32; SHAPE.cols];
    for with_sum in [false, true] {
        let backward = dropout_add_norm::Backward {
            shape: SHAPE,
            norm,
            saved: Saved::Sum(&*s),
            weight: &weight,
            stats: &stats,
            dy: &dy,
            ds: Some(&ds),
            dresidual,
            dx: y,
            dbias: None,
            dweight: with_sum.then_some(Gradient::Write(&mut sum)),
            dnorm_bias: None,
        };
        // Every lane reads the row's mean and rstd.
        let alone = of_weight + 2 * 32 * a_row;
        // The means of the rows; then the tiles, in which four threads read a row's five values, and the sums.
        let sums = of_weight + 3 * a_row + 5 * 4 * 32 * a_row + 4 * SHAPE.cols * 3;
        match with_sum {
            false => moves(6, 4, alone, backward),
            true => moves(10, 4, alone + sums, backward),
        }
    }
}

#[test]
fn embeddings() {
    let (tokens, positions, dy, mut y) = (tensor(), tensor(), tensor(), tensor());
    let (tokens, positions, dy) = (&tokens.0[..], &positions.0[..16 * SHAPE.cols], &dy.0[..]);
    let (y, mut report) = (&mut &mut y.0[..], [u32::MAX]);
    let ids: Vec<u32> = (0..SHAPE.rows as u32).rev().collect();
    let lookups = Lookups {
        token: Lookup { entries: SHAPE.rows, ids: Ids::Given(&ids as _) },
        position: Some(Lookup { entries: 16, ids: Ids::Sequence(16) }),
        segment: None,
    };
    let forward = embedding_dropout::Forward::<bf16, _> {
        shape: SHAPE,
        lookups,
        tables: Tables { token: &tokens, position: Some(&positions), segment: None },
        y,
        report: Some(&mut report),
    };
    // An entry of each table is read; a row's id by each of its octets, from a cache.
    moves(4, 2, 4 * ELEMENTS / 8, forward);
    // dy is read, a row's gradient read and written; and all ids, and an entry's own, by each of the four blocks
    // that so few entries take for their columns.
    let mut gradient = vec![0.0f32; ELEMENTS];
    let of_ids = 4 * 4 * SHAPE.rows * (SHAPE.rows + 1);
    let gradients = Gradients { token: Some(Gradient::Add(&mut gradient)), ..Gradients::NONE };
    let backward = embedding_dropout::Backward { shape: SHAPE, lookups, dy: &dy, gradients };
    moves(2 + 4, 4, of_ids, backward);
}
