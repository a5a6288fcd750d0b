//! Tensors without elements, however many rows or columns they have: every operator answers `Ok` and takes no memory
//! for what there is not.

use fused_dropout::ops::embedding_dropout::{
    Gradients, Ids, Lookup, Lookups, NormGradients, Tables,
};
use fused_dropout::{
    Activation, Affine, AttentionMask, Dropout, Error, Key, Norm, Probability, Scores, Shape,
};

/// Without rows, without columns, and without either.
const SHAPES: [Shape; 3] = [
    Shape { rows: 0, cols: 1 << 35 },
    Shape { rows: 1 << 32, cols: 0 },
    Shape { rows: 0, cols: 0 },
];

fn dropout() -> Dropout<'static> {
    Dropout::new(Key::new(1, 2), Probability::new(0.5).unwrap())
}

/// One head; its rows are queries.
fn scores(shape: Shape) -> Scores {
    Scores { batch: 1, heads: 1, queries: shape.rows, keys: shape.cols, scale: 1.0 }
}

/// A table of one entry where there are no columns, and of none where there are no rows, whose ids are `none`.
fn lookups<I>(shape: Shape, none: I) -> Lookups<I> {
    let (entries, ids) = match shape.rows {
        0 => (0, Ids::Given(none)),
        _ => (1, Ids::Sequence(1)),
    };
    Lookups { token: Lookup { entries, ids }, position: None, segment: None }
}

/// A parameter has as many elements as a row: a shape whose parameters fit in no memory has none of the operators
/// with a weight.
fn has_weight(shape: Shape) -> bool {
    shape.cols == 0
}

fn is_ok(shape: Shape, results: &[(&str, Result<(), Error>)]) {
    for (call, result) in results {
        assert!(result.is_ok(), "{call} of {shape:?}: {result:?}");
    }
}

#[test]
fn on_the_cpu() {
    use fused_dropout::cpu::dropout_add_norm::{Inputs, ParamGrads, Saved};
    use fused_dropout::cpu::{self, Cpu};
    let (cpu, d, act) = (&Cpu::new(), &dropout(), Activation::Gelu);
    let none: &[f32] = &[];
    for shape in SHAPES {
        let out = || -> &mut [f32] { &mut [] };
        let (scores, all) = (&scores(shape), &AttentionMask::NONE);
        let (lookups, tables) =
            (&lookups(shape, &[][..]), &Tables { token: none, position: None, segment: None });
        let gradients = || Gradients { token: Some(out()), position: None, segment: None };
        is_ok(
            shape,
            &[
                ("keep_mask::bits", cpu::keep_mask::bits(cpu, d, shape, &mut [])),
                ("keep_mask::bytes", cpu::keep_mask::bytes(cpu, d, shape, &mut [])),
                ("dropout", cpu::dropout::forward(cpu, d, shape, none, out())),
                ("dropout backward", cpu::dropout::backward(cpu, d, shape, none, out())),
                ("dropout_add", cpu::dropout_add::forward(cpu, d, shape, none, None, none, out())),
                (
                    "dropout_add backward",
                    cpu::dropout_add::backward(cpu, d, shape, none, out(), None),
                ),
                (
                    "bias_act_dropout",
                    cpu::bias_act_dropout::forward(cpu, d, shape, act, none, None, out()),
                ),
                (
                    "bias_act_dropout backward",
                    cpu::bias_act_dropout::backward(
                        cpu,
                        d,
                        shape,
                        act,
                        none,
                        None,
                        none,
                        out(),
                        None,
                    ),
                ),
                (
                    "softmax_dropout",
                    cpu::softmax_dropout::forward(cpu, d, scores, all, none, out(), None),
                ),
                (
                    "softmax_dropout backward",
                    cpu::softmax_dropout::backward(cpu, d, scores, all, none, None, none, out()),
                ),
                (
                    "embedding_dropout",
                    cpu::embedding_dropout::forward(cpu, d, shape, lookups, tables, out()),
                ),
                (
                    "embedding_dropout backward",
                    cpu::embedding_dropout::backward(cpu, d, shape, lookups, none, gradients()),
                ),
            ],
        );
        if !has_weight(shape) {
            continue;
        }
        let (norm, affine) = (&Norm::layer(1e-5), &Affine { weight: none, bias: None });
        let inputs = Inputs { x: none, bias: None, residual: none };
        is_ok(
            shape,
            &[
                (
                    "dropout_add_norm",
                    cpu::dropout_add_norm::forward(
                        cpu,
                        d,
                        norm,
                        shape,
                        &inputs,
                        affine,
                        None,
                        out(),
                        None,
                    ),
                ),
                (
                    "embedding_dropout with a norm",
                    cpu::embedding_dropout::forward_norm(
                        cpu,
                        d,
                        norm,
                        shape,
                        lookups,
                        tables,
                        affine,
                        out(),
                        None,
                    ),
                ),
            ],
        );
        // The statistics of 2^32 rows have elements.
        if shape.rows > 0 {
            continue;
        }
        let norm_gradients = NormGradients { weight: Some(out()), bias: Some(out()) };
        is_ok(
            shape,
            &[
                (
                    "dropout_add_norm backward",
                    cpu::dropout_add_norm::backward(
                        cpu,
                        d,
                        norm,
                        shape,
                        &Saved::Inputs(inputs),
                        none,
                        none,
                        none,
                        None,
                        out(),
                        out(),
                        ParamGrads { dbias: Some(out()), dweight: None, dnorm_bias: None },
                    ),
                ),
                (
                    "embedding_dropout with a norm, backward",
                    cpu::embedding_dropout::backward_norm(
                        cpu,
                        d,
                        norm,
                        shape,
                        lookups,
                        tables,
                        none,
                        none,
                        none,
                        gradients(),
                        norm_gradients,
                    ),
                ),
            ],
        );
    }
}

#[cfg(feature = "emulator")]
#[test]
fn through_the_kernels() {
    use fused_dropout::device::dropout_add_norm::Inputs;
    use fused_dropout::device::{self, Call, Readable};
    use fused_dropout::emulator::Emulator;
    let emulator = Emulator::new();
    let (call, d, act) = (&Call::on(&emulator), &dropout(), Activation::Gelu);
    let none: &dyn Readable<f32, Emulator> = &(&[] as &[f32]);
    let no_ids: &dyn Readable<u32, Emulator> = &(&[] as &[u32]);
    for shape in SHAPES {
        let (scores, all) = (&scores(shape), &AttentionMask::NONE);
        let (lookups, tables) =
            (&lookups(shape, no_ids), &Tables { token: none, position: None, segment: None });
        let [mut a, mut b, mut c, mut e, mut f, mut g, mut h, mut i] = [const { vec![] }; 8];
        let mut report = vec![0u32];
        let gradients = Gradients { token: None, position: None, segment: None };
        use device::{
            bias_act_dropout, dropout as plain, dropout_add, embedding_dropout, softmax_dropout,
        };
        is_ok(
            shape,
            &[
                ("dropout", plain::forward(call, d, shape, none, &mut a)),
                ("dropout_add", dropout_add::forward(call, d, shape, none, None, none, &mut b)),
                (
                    "bias_act_dropout",
                    bias_act_dropout::forward(call, d, shape, act, none, None, &mut c),
                ),
                (
                    "bias_act_dropout backward",
                    bias_act_dropout::backward(call, d, shape, act, none, None, none, &mut e, None),
                ),
                (
                    "softmax_dropout",
                    softmax_dropout::forward(call, d, scores, all, none, &mut f, None),
                ),
                (
                    "softmax_dropout backward",
                    softmax_dropout::backward(call, d, scores, all, none, None, none, &mut g),
                ),
                (
                    "embedding_dropout",
                    embedding_dropout::forward(
                        call,
                        d,
                        shape,
                        lookups,
                        tables,
                        &mut h,
                        &mut report,
                    ),
                ),
                (
                    "embedding_dropout backward",
                    embedding_dropout::backward(call, d, shape, lookups, none, gradients),
                ),
            ],
        );
        if !has_weight(shape) {
            continue;
        }
        let (norm, affine) = (&Norm::layer(1e-5), &Affine { weight: none, bias: None });
        let inputs = Inputs { x: none, bias: None, residual: none };
        is_ok(
            shape,
            &[
                (
                    "dropout_add_norm",
                    device::dropout_add_norm::forward(
                        call, d, norm, shape, &inputs, affine, None, &mut i, None,
                    ),
                ),
                (
                    "embedding_dropout with a norm",
                    embedding_dropout::forward_norm(
                        call,
                        d,
                        norm,
                        shape,
                        lookups,
                        tables,
                        affine,
                        &mut a,
                        None,
                        &mut report,
                    ),
                ),
            ],
        );
    }
}
