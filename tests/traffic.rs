//! The bytes that each kernel moves, counted by the emulator: what the operator cannot avoid, all of it in
//! accesses of 16 bytes, and a few bytes a row or a block beside that.
#![cfg(feature = "emulator")]

use fused_dropout::device::dropout_add_norm::{Inputs, ParamGrads, Saved, SumGrads};
use fused_dropout::device::{
    BiasGrad, Call, Readable, bias_act_dropout, dropout, dropout_add, dropout_add_norm,
    embedding_dropout, softmax_dropout,
};
use fused_dropout::emulator::Emulator;
use fused_dropout::ops;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookups, Tables};
use fused_dropout::ops::softmax_dropout::STATISTICS;
use fused_dropout::ops::sum_rows::workspace_len;
use fused_dropout::{
    Activation, Affine, AttentionMask, Dropout, Error, Key, Norm, Probability, Scores, Shape,
};
use half::bf16;

const SHAPE: Shape = Shape { rows: 128, cols: 1024 };
const ELEMENTS: usize = 128 * 1024;

fn drop() -> Dropout<'static> {
    Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap())
}

/// Aligned to 16 bytes, as the kernels for aligned tensors ask.
#[repr(align(64))]
struct Aligned([bf16; ELEMENTS]);

fn tensor() -> Box<Aligned> {
    Box::new(Aligned(std::array::from_fn(|i| bf16::from_f32((i % 97) as f32 / 50.0 - 1.0))))
}

/// Runs `work`, and holds its traffic to `reads` and `writes` bytes an element in accesses of 16 bytes, and
/// at most `beside` bytes that are not one an element (a bias, a row's statistics, partial sums).
fn moves(
    reads: usize,
    writes: usize,
    beside: usize,
    work: impl FnOnce(&Call<'_, Emulator>) -> Result<(), Error>,
) {
    let emulator = Emulator::new();
    work(&Call::on(&emulator)).unwrap();
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
    let (d, bias) = (drop(), &x.0[..SHAPE.cols]);
    // A bias is read once an octet, from a cache.
    let of_bias = 2 * ELEMENTS;
    let (x, r, y) = (&&x.0[..], &&r.0[..], &mut &mut y.0[..]);
    moves(2, 2, 0, |call| dropout::forward(call, &d, SHAPE, x, y));
    moves(4, 2, 0, |call| dropout_add::forward(call, &d, SHAPE, x, None, r, y));
    moves(4, 2, of_bias, |call| dropout_add::forward(call, &d, SHAPE, x, Some(&bias), r, y));
    for a in Activation::ALL {
        moves(2, 2, 0, |call| bias_act_dropout::forward(call, &d, SHAPE, a, x, None, y));
        moves(2, 2, of_bias, |call| {
            bias_act_dropout::forward(call, &d, SHAPE, a, x, Some(&bias), y)
        });
        moves(4, 2, 0, |call| bias_act_dropout::backward(call, &d, SHAPE, a, x, None, r, y, None));
    }
}

#[test]
fn bias_gradients() {
    let (x, dy, mut dx) = (tensor(), tensor(), tensor());
    let (x, dy, dx) = (&&x.0[..], &&dy.0[..], &mut &mut dx.0[..]);
    let (d, a) = (drop(), Activation::Gelu);
    let mut dbias = vec![0.0f32; SHAPE.cols];
    let mut workspace = vec![0.0f32; workspace_len(SHAPE)];
    // One sum a tile of 64 rows and a column, written and read, and the sum of the two tiles.
    let sums = 4 * SHAPE.cols * 3;
    moves(2, 2, sums, |call| {
        let grad = BiasGrad { dbias: &mut dbias, workspace: &mut workspace };
        dropout_add::backward(call, &d, SHAPE, dy, dx, Some(grad))
    });
    moves(2, 0, sums, |call| {
        let grad = BiasGrad { dbias: &mut dbias, workspace: &mut workspace };
        dropout_add::bias_grad(call, &d, SHAPE, dy, grad)
    });
    moves(4, 2, sums, |call| {
        let grad = BiasGrad { dbias: &mut dbias, workspace: &mut workspace };
        bias_act_dropout::backward(call, &d, SHAPE, a, x, None, dy, dx, Some(grad))
    });
}

#[test]
fn softmax() {
    let (x, dy, mut y) = (tensor(), tensor(), tensor());
    let (x, dy, y) = (&&x.0[..], &&dy.0[..], &mut &mut y.0[..]);
    let scores = Scores { batch: 1, heads: 2, queries: 64, keys: 1024, scale: 0.1 };
    let (d, mask) = (drop(), AttentionMask::NONE);
    let mut statistics = vec![0.0f32; STATISTICS * SHAPE.rows];
    let a_row = 4 * STATISTICS * SHAPE.rows;
    moves(2, 2, a_row, |call| {
        softmax_dropout::forward(call, &d, &scores, &mask, x, y, Some(&mut statistics))
    });
    moves(4, 2, 0, |call| softmax_dropout::backward(call, &d, &scores, &mask, x, None, dy, y));
    moves(4, 2, 32 * a_row, |call| {
        softmax_dropout::backward(call, &d, &scores, &mask, x, Some(&statistics), dy, y)
    });
}

#[test]
fn add_and_norm() {
    let (x, r, dy, ds) = (tensor(), tensor(), tensor(), tensor());
    let (mut s, mut y, mut dresidual) = (tensor(), tensor(), tensor());
    let (d, norm, weight) = (drop(), Norm::layer(1e-5), &x.0[..SHAPE.cols]);
    let (x, r, dy, ds) = (&x.0[..], &r.0[..], &dy.0[..], &ds.0[..]);
    let inputs: Inputs<&dyn Readable<bf16, Emulator>> = Inputs { x: &x, bias: None, residual: &r };
    let affine: Affine<&dyn Readable<_, _>> = Affine { weight: &weight, bias: None };
    let (s, mut stats) = (&mut &mut s.0[..], vec![0.0f32; 2 * SHAPE.rows]);
    let (y, dresidual) = (&mut &mut y.0[..], &mut &mut dresidual.0[..]);
    // The weight is read once an octet, from a cache.
    let (of_weight, a_row) = (2 * ELEMENTS, 4 * SHAPE.rows);
    moves(4, 4, of_weight + 2 * a_row, |call| {
        dropout_add_norm::forward(
            call,
            &d,
            &norm,
            SHAPE,
            &inputs,
            &affine,
            Some(s),
            y,
            Some(&mut stats),
        )
    });
    moves(4, 2, of_weight, |call| {
        dropout_add_norm::forward(call, &d, &norm, SHAPE, &inputs, &affine, None, y, None)
    });
    let saved: Saved<&dyn Readable<_, _>> = Saved::Sum(&*s);
    let mut backward = |call: &Call<'_, Emulator>, sums: Option<SumGrads<'_, Emulator>>| {
        let ds = Some(&ds as &dyn Readable<_, _>);
        dropout_add_norm::backward(
            call, &d, &norm, SHAPE, &saved, &weight, &stats, &dy, ds, dresidual, y, sums,
        )
    };
    // Every lane reads the row's mean and rstd.
    moves(6, 4, of_weight + 2 * 32 * a_row, |call| backward(call, None));
    let (mut dweight, mut workspace) =
        (vec![0.0f32; SHAPE.cols], vec![0.0f32; ops::dropout_add_norm::workspace_len(SHAPE)]);
    // The means of the rows; then the tiles, in which four threads read a row's five values, and the sums.
    let beside =
        2 * of_weight + 2 * 32 * a_row + 3 * a_row + 5 * 4 * 32 * a_row + 4 * SHAPE.cols * 3;
    moves(10, 4, beside, |call| {
        let grads = ParamGrads { dweight: Some(&mut dweight as _), ..ParamGrads::default() };
        backward(call, Some(SumGrads { grads, workspace: &mut workspace }))
    });
}

#[test]
fn embeddings() {
    let (tokens, positions, dy, mut y) = (tensor(), tensor(), tensor(), tensor());
    let (tokens, positions, dy) = (&tokens.0[..], &positions.0[..16 * SHAPE.cols], &dy.0[..]);
    let (y, mut report) = (&mut &mut y.0[..], [u32::MAX]);
    let ids: Vec<u32> = (0..SHAPE.rows as u32).rev().collect();
    let lookups = Lookups::tokens(SHAPE.rows, &ids as &dyn Readable<u32, Emulator>)
        .positions(16, Ids::Sequence(16));
    let tables: Tables<&dyn Readable<_, _>> =
        Tables { token: &tokens, position: Some(&positions), segment: None };
    let d = drop();
    // An entry of each table is read; a row's id by each of its octets, from a cache.
    let of_ids = 4 * ELEMENTS / 8;
    moves(4, 2, of_ids, |call| {
        embedding_dropout::forward(call, &d, SHAPE, &lookups, &tables, y, &mut report)
    });
    // dy is read, a row's gradient read and written; and all ids, and an entry's own, by each of the four blocks
    // that so few entries take for their columns.
    let mut gradient = vec![0.0f32; ELEMENTS];
    let of_ids = 4 * 4 * SHAPE.rows * (SHAPE.rows + 1);
    moves(2 + 4, 4, of_ids, |call| {
        let gradients = Gradients { token: Some(&mut gradient as _), ..Gradients::NONE };
        embedding_dropout::backward(call, &d, SHAPE, &lookups, &dy, gradients)
    });
}
