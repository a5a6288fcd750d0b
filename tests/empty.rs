//! Tensors without elements, however many rows or columns they have: every operator answers `Ok` and takes no memory
//! for what there is not.

use fused_dropout::cpu::Cpu;
use fused_dropout::ops::dropout_add_norm::Saved;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::{
    bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout, keep_mask,
    softmax_dropout, swiglu_dropout,
};
use fused_dropout::{
    Activation, AttentionMask, Backend, Dropout, Gradient, Key, Norm, Pass, Probability, Readable,
    Scores, Shape, Source, Writable,
};

/// Without rows, without columns, and without either.
const SHAPES: [Shape; 3] = [
    Shape { rows: 0, cols: 1 << 35 },
    Shape { rows: 1 << 32, cols: 0 },
    Shape { rows: 0, cols: 0 },
];

#[test]
fn on_the_cpu() {
    SHAPES.into_iter().for_each(|shape| every_operator(&Cpu::new(), shape));
}

#[cfg(feature = "emulator")]
#[test]
fn through_the_kernels() {
    let emulator = fused_dropout::emulator::Emulator::new();
    SHAPES.into_iter().for_each(|shape| every_operator(&emulator, shape));
}

fn every_operator<B: Backend>(backend: &B, shape: Shape)
where
    Vec<f32>: Writable<f32, B>,
    Vec<u32>: Readable<u32, B> + Writable<u32, B>,
    Vec<u8>: Writable<u8, B>,
{
    let none = Vec::<f32>::new();
    let x = || Source::Tensor(&none as &dyn Readable<f32, B>);
    let [mut a, mut b, mut c, mut d, mut e] = [const { Vec::<f32>::new() }; 5];
    let mut bytes = Vec::<u8>::new();
    let mut report = vec![u32::MAX];

    is_ok(backend, shape, keep_mask::Bits { shape, out: &mut bytes });
    is_ok(backend, shape, keep_mask::Bytes { shape, out: &mut bytes });
    is_ok(backend, shape, dropout::Forward { shape, x: x(), y: &mut a });
    is_ok(backend, shape, dropout::Backward { shape, dy: x(), dx: &mut a });
    let residual = x();
    is_ok(
        backend,
        shape,
        dropout_add::Forward { shape, x: &none, bias: None, residual, y: &mut a },
    );
    let (dx, dbias) = (Some(&mut a as _), None);
    is_ok(backend, shape, dropout_add::Backward { shape, dy: x(), dx, dbias });
    let activation = Activation::Gelu;
    let forward = bias_act_dropout::Forward { shape, activation, x: x(), bias: None, y: &mut a };
    is_ok(backend, shape, forward);
    let backward = bias_act_dropout::Backward {
        shape,
        activation,
        x: &none,
        bias: None,
        dy: x(),
        dx: &mut a,
        dbias: None,
    };
    is_ok(backend, shape, backward);
    is_ok(backend, shape, swiglu_dropout::Forward { shape, gate: x(), up: &none, y: &mut a });
    let (gate, dgate, dup) = (&none, &mut a, &mut b);
    let backward = swiglu_dropout::Backward { shape, gate, up: &none, dy: x(), dgate, dup };
    is_ok(backend, shape, backward);
    // One head; its rows are queries.
    let scores = Scores { batch: 1, heads: 1, queries: shape.rows, keys: shape.cols, scale: 1.0 };
    let mask = AttentionMask::NONE;
    let forward = softmax_dropout::Forward { scores, mask, x: x(), y: &mut a, statistics: None };
    is_ok(backend, shape, forward);
    let (statistics, dx) = (None, &mut a);
    let backward = softmax_dropout::Backward { scores, mask, x: &none, statistics, dy: x(), dx };
    is_ok(backend, shape, backward);
    // A table of one entry where there are no columns, and of none where there are no rows.
    let no_ids = Vec::<u32>::new();
    let token = match shape.rows {
        0 => Lookup { entries: 0, ids: Ids::Given(&no_ids as &dyn Readable<u32, B>) },
        _ => Lookup { entries: 1, ids: Ids::Sequence(1) },
    };
    let lookups = Lookups { token, position: None, segment: None };
    let tables = Tables { token: &none as &dyn Readable<f32, B>, position: None, segment: None };
    let forward =
        embedding_dropout::Forward { shape, lookups, tables, y: &mut a, report: Some(&mut report) };
    is_ok(backend, shape, forward);
    assert_eq!(report, [u32::MAX], "no row has an id that is in no table");
    let gradients = Gradients { token: Some(Gradient::Write(&mut a)), ..Gradients::NONE };
    is_ok(backend, shape, embedding_dropout::Backward { shape, lookups, dy: &none, gradients });

    // A parameter has as many elements as a row: a shape whose parameters fit in no memory has none of the operators
    // with a weight.
    if shape.cols > 0 {
        return;
    }
    let norm = Norm::layer(1e-5);
    let forward = dropout_add_norm::Forward {
        shape,
        norm,
        x: &none,
        bias: None,
        residual: x(),
        weight: &none,
        norm_bias: None,
        s: None,
        y: &mut a,
        stats: None,
    };
    is_ok(backend, shape, forward);
    let forward = embedding_dropout::ForwardNorm {
        shape,
        norm,
        lookups,
        tables,
        weight: &none,
        norm_bias: None,
        y: &mut a,
        stats: None,
        report: Some(&mut report),
    };
    is_ok(backend, shape, forward);
    assert_eq!(report, [u32::MAX], "no row has an id that is in no table");
    // The statistics of 2^32 rows have elements.
    if shape.rows > 0 {
        return;
    }
    let backward = dropout_add_norm::Backward {
        shape,
        norm,
        saved: Saved::Inputs { x: &none, bias: None, residual: &none },
        weight: &none,
        stats: &none,
        dy: &none,
        ds: None,
        dresidual: &mut a,
        dx: &mut b,
        dbias: Some(Gradient::Write(&mut c)),
        dweight: Some(Gradient::Add(&mut d)),
        dnorm_bias: None,
    };
    is_ok(backend, shape, backward);
    let backward = embedding_dropout::BackwardNorm {
        shape,
        norm,
        lookups,
        tables,
        weight: &none,
        stats: &none,
        dy: &none,
        gradients: Gradients { token: Some(Gradient::Add(&mut a)), ..Gradients::NONE },
        dweight: Some(Gradient::Write(&mut d)),
        dnorm_bias: Some(Gradient::Add(&mut e)),
    };
    is_ok(backend, shape, backward);
}

fn is_ok<'a, B: Backend + 'a, P: Pass<'a, B>>(backend: &B, shape: Shape, pass: P) {
    let drop = Dropout::new(Key::new(1, 2), Probability::new(0.5).unwrap());
    let result = backend.run(&drop, pass);
    assert!(result.is_ok(), "{} of {shape:?}: {result:?}", std::any::type_name::<P>());
}
