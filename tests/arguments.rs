//! Bad arguments: a typed error that names the operator and the argument, no panic, untouched outputs.

use fused_dropout::cpu::dropout_add_norm::{Inputs, ParamGrads, Saved};
use fused_dropout::cpu::{self, Cpu};
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookups, NormGradients, Tables};
use fused_dropout::{
    Activation, Affine, AttentionMask, Dropout, Error, Groups, Key, Mode, Norm, Place, Probability,
    RowMap, Scaling, Scores, Shape,
};
use proptest::prelude::*;

/// The error names its operator, or the call was fine; refused calls left the output alone.
fn judge(operator: &str, result: Result<(), Error>, out: &[f32]) -> Result<(), TestCaseError> {
    match result {
        Ok(()) => Ok(()),
        Err(Error::Argument { operator: named, argument, .. }) => {
            prop_assert_eq!(named, operator);
            prop_assert!(!argument.is_empty());
            prop_assert!(out.iter().all(|&value| value == 7.0), "{} wrote", operator);
            Ok(())
        }
        Err(error) => Err(TestCaseError::fail(error.to_string())),
    }
}

fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![0..20usize, Just(usize::MAX), Just(usize::MAX / 2), Just(1 << 40)]
}

fn numbers() -> impl Strategy<Value = u32> {
    prop_oneof![0..10u32, Just(u32::MAX), any::<u32>()]
}

fn row_maps() -> impl Strategy<Value = RowMap<'static>> {
    prop_oneof![
        numbers().prop_map(|first| RowMap::Contiguous { first }),
        (numbers(), numbers(), numbers()).prop_map(|(first, block, stride)| RowMap::Blocks {
            first,
            block,
            stride
        }),
        (numbers(), numbers(), numbers(), numbers(), numbers()).prop_map(
            |(first, heads, queries, head_stride, batch_stride)| RowMap::Attention {
                first,
                heads,
                queries,
                head_stride,
                batch_stride
            }
        ),
        (0..20usize).prop_map(|n| RowMap::Explicit(&[u32::MAX; 20][..n])),
    ]
}

fn dropouts() -> impl Strategy<Value = Dropout<'static>> {
    let columns =
        prop_oneof![Just(0u64), 0..100u64, Just(1 << 35), Just(u64::MAX), Just(u64::MAX - 7)];
    let groups = (numbers(), any::<bool>())
        .prop_map(|(rows, columns_together)| Groups { rows, columns_together });
    (any::<(u64, u64, bool, bool)>(), 0.0..=1.0f64, columns, row_maps(), groups).prop_map(
        |((seed, stream, inference, classic), p, first_col, rows, groups)| {
            Dropout::new(Key::new(seed, stream), Probability::new(p).unwrap())
                .mode(if inference { Mode::Inference } else { Mode::Training })
                .scaling(if classic { Scaling::Classic } else { Scaling::Inverted })
                .at(Place { first_col, rows })
                .groups(groups)
        },
    )
}

/// A forward and a backward call of `dropout_add_norm` on tensors that fit `shape` (on `n` elements, where it is
/// too large), but for number `odd`, which is one longer; and what the outputs held afterwards.
fn norm_calls(
    d: &Dropout<'_>,
    norm: &Norm,
    shape: Shape,
    n: usize,
    odd: Option<usize>,
    sum: bool,
) -> [(Result<(), Error>, Vec<f32>); 2] {
    let cpu = Cpu::new();
    let n = shape.rows.checked_mul(shape.cols).filter(|&n| n <= 400).unwrap_or(n);
    let (cols, rows) = (shape.cols.min(400), shape.rows.min(400));
    let len = |index, len| len + usize::from(Some(index) == odd);
    let input = |index, n| vec![1.0f32; len(index, n)];
    let output = |index, n| vec![7.0f32; len(index, n)];
    let (x, bias, residual) = (input(0, n), input(1, cols), input(2, n));
    let (weight, norm_bias) = (input(3, cols), input(4, cols));
    let inputs = Inputs { x: &x[..], bias: Some(&bias[..]), residual: &residual[..] };
    let affine = Affine { weight: &weight[..], bias: Some(&norm_bias[..]) };
    let (mut s, mut y, mut stats) = (output(5, n), output(6, n), output(7, 2 * rows));
    let forward = cpu::dropout_add_norm::forward(
        &cpu,
        d,
        norm,
        shape,
        &inputs,
        &affine,
        Some(&mut s),
        &mut y,
        Some(&mut stats),
    );
    let outputs = [s, y, stats].concat();

    let saved = if sum { Saved::Sum(&x[..]) } else { Saved::Inputs(inputs) };
    let (stats, dy, ds) = (input(7, 2 * rows), input(8, n), input(9, n));
    let (mut dresidual, mut dx) = (output(10, n), output(11, n));
    let mut sums = [output(12, cols), output(13, cols), output(14, cols)];
    let [dbias, dweight, dnorm_bias] = sums.each_mut().map(|sum| Some(&mut sum[..]));
    let grads = ParamGrads { dbias, dweight, dnorm_bias };
    let backward = cpu::dropout_add_norm::backward(
        &cpu,
        d,
        norm,
        shape,
        &saved,
        &weight,
        &stats,
        &dy,
        Some(&ds),
        &mut dresidual,
        &mut dx,
        grads,
    );
    [(forward, outputs), (backward, [dresidual, dx, sums.concat()].concat())]
}

#[test]
fn dropout_add_norm_names_the_tensor_that_does_not_fit() {
    let d = Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap());
    let names = [
        "x",
        "bias",
        "residual",
        "weight",
        "norm_bias",
        "s",
        "y",
        "stats",
        "dy",
        "ds",
        "dresidual",
        "dx",
        "dbias",
        "dweight",
        "dnorm_bias",
    ];
    let of_forward = 0..8;
    let of_backward = |index: usize, sum: bool| match index {
        0 | 3 | 7.. => true,
        1 | 2 => !sum,
        _ => false,
    };
    for sum in [false, true] {
        for (index, name) in names.into_iter().enumerate() {
            let norm = Norm::layer(0.0);
            let [forward, backward] = norm_calls(&d, &norm, Shape::new(5, 7), 0, Some(index), sum);
            // The sum that a backward pass is given is called s.
            let of_sum = if sum && index == 0 { "s" } else { name };
            let passes = [
                (forward, of_forward.contains(&index), name),
                (backward, of_backward(index, sum), of_sum),
            ];
            for ((result, outputs), concerned, name) in passes {
                if !concerned {
                    result.unwrap();
                    continue;
                }
                let expected = format!("dropout_add_norm: {name}: expected");
                assert!(result.unwrap_err().to_string().starts_with(&expected), "{name}");
                assert!(outputs.iter().all(|&value| value == 7.0), "{name}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn dropout(d in dropouts(), rows in sizes(), cols in sizes(), x in 0..400usize, y in 0..400usize) {
        let (cpu, shape) = (Cpu::new(), Shape::new(rows, cols));
        // Lengths that fit, half of the time.
        let fit = rows.checked_mul(cols).filter(|&n| n <= 400 && x % 2 == 0);
        let (input, mut out) = (vec![1.0f32; fit.unwrap_or(x)], vec![7.0f32; fit.unwrap_or(y)]);
        judge("dropout", cpu::dropout::forward(&cpu, &d, shape, &input, &mut out), &out)?;
        out.fill(7.0);
        judge("dropout", cpu::dropout::backward_in_place(&cpu, &d, shape, &mut out), &out)?;
    }

    #[test]
    fn dropout_add(d in dropouts(), rows in sizes(), cols in sizes(), x in 0..400usize, bias in 0..20usize) {
        let (cpu, shape) = (Cpu::new(), Shape::new(rows, cols));
        let n = rows.checked_mul(cols).filter(|&n| n <= 400).unwrap_or(x);
        let (input, bias) = (vec![1.0f32; n], vec![1.0f32; bias]);
        let mut out = vec![7.0f32; n];
        let result = cpu::dropout_add::forward(&cpu, &d, shape, &input, Some(&bias), &input, &mut out);
        judge("dropout_add", result, &out)?;
        out.fill(7.0);
        let mut dbias = vec![7.0f32; bias.len()];
        let result = cpu::dropout_add::backward(&cpu, &d, shape, &input, &mut out, Some(&mut dbias));
        let refused = result.is_err();
        judge("dropout_add", result, &out)?;
        prop_assert!(!refused || dbias.iter().all(|&value| value == 7.0));
    }

    #[test]
    fn dropout_add_norm(
        d in dropouts(),
        (rows, cols, n) in (sizes(), sizes(), 0..400usize),
        odd in proptest::option::of(0..15usize),
        epsilon in prop_oneof![
            3 => Just(1e-5f32), 1 => Just(0.0), 1 => Just(f32::NAN), 1 => Just(-1.0), 1 => Just(f32::INFINITY)
        ],
        sum in any::<bool>(),
    ) {
        for (result, outputs) in norm_calls(&d, &Norm::rms(epsilon), Shape::new(rows, cols), n, odd, sum) {
            prop_assert!(result.is_err() || epsilon >= 0.0 && epsilon.is_finite());
            judge("dropout_add_norm", result, &outputs)?;
        }
    }

    #[test]
    fn bias_act_dropout(
        d in dropouts(),
        (rows, cols) in (sizes(), sizes()),
        activation in proptest::sample::select(&Activation::ALL),
        (x, bias) in (0..400usize, 0..20usize),
    ) {
        let (cpu, shape) = (Cpu::new(), Shape::new(rows, cols));
        let n = rows.checked_mul(cols).filter(|&n| n <= 400).unwrap_or(x);
        let (input, bias) = (vec![1.0f32; n], vec![1.0f32; bias]);
        let mut out = vec![7.0f32; n];
        let result = cpu::bias_act_dropout::forward(
            &cpu, &d, shape, activation, &input, Some(&bias), &mut out,
        );
        judge("bias_act_dropout", result, &out)?;
        out.fill(7.0);
        let mut dbias = vec![7.0f32; bias.len()];
        let result = cpu::bias_act_dropout::backward(
            &cpu, &d, shape, activation, &input, None, &input, &mut out, Some(&mut dbias),
        );
        let refused = result.is_err();
        judge("bias_act_dropout", result, &out)?;
        prop_assert!(!refused || dbias.iter().all(|&value| value == 7.0));
    }

    #[test]
    fn softmax_dropout(
        d in dropouts(),
        (batch, heads, queries, keys) in (sizes(), sizes(), sizes(), sizes()),
        scale in prop_oneof![Just(1.0f32), Just(f32::NAN), Just(f32::INFINITY)],
        causal in proptest::option::of(any::<i64>()),
        lengths in proptest::option::of(0..30usize),
        x in 0..400usize,
    ) {
        let cpu = Cpu::new();
        let scores = Scores { batch, heads, queries, keys, scale };
        let product = |sizes: &[usize]| sizes.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        let n = product(&[batch, heads, queries, keys]).filter(|&n| n <= 400).unwrap_or(x);
        let lengths = lengths.map(|n| vec![3u32; n]);
        let mask = AttentionMask { causal, lengths: lengths.as_deref(), additive: None };
        let (input, mut out) = (vec![1.0f32; n], vec![7.0f32; n]);
        let result = cpu::softmax_dropout::forward(&cpu, &d, &scores, &mask, &input, &mut out, None);
        judge("softmax_dropout", result, &out)?;
    }

    #[test]
    fn embedding_dropout(
        d in dropouts(),
        (rows, cols, entries) in (sizes(), sizes(), sizes()),
        ids in proptest::collection::vec(0..25u32, 20),
        lens in proptest::option::of((0..20usize, 0..400usize, 0..400usize)),
        sequence in sizes(),
        tables in any::<(bool, bool)>(),
    ) {
        let (cpu, shape) = (Cpu::new(), Shape::new(rows, cols));
        // Lengths that fit, where there are none.
        let fit = |n: Option<usize>| n.filter(|&n| n <= 400).unwrap_or(7);
        let lens = lens.unwrap_or((rows, fit(entries.checked_mul(cols)), fit(rows.checked_mul(cols))));
        let (ids, table, n) = (&ids[..lens.0.min(20)], vec![1.0f32; lens.1], lens.2);
        let mut lookups = Lookups::tokens(entries, ids);
        if tables.0 {
            lookups = lookups.positions(entries, Ids::Sequence(sequence));
        }
        let given = Tables { token: &table[..], position: tables.1.then_some(&table[..]), segment: None };
        let mut y = vec![7.0f32; n];
        let result = cpu::embedding_dropout::forward(&cpu, &d, shape, &lookups, &given, &mut y);
        judge("embedding_dropout", result, &y)?;
        let (dy, mut token, mut position) = (vec![1.0f32; n], vec![7.0f32; lens.1], vec![7.0f32; lens.1]);
        let gradients = Gradients {
            token: Some(&mut token[..]),
            position: tables.1.then_some(&mut position[..]),
            segment: None,
        };
        let result = cpu::embedding_dropout::backward(&cpu, &d, shape, &lookups, &dy, gradients);
        judge("embedding_dropout", result, &[token, position].concat())?;
    }

    #[test]
    fn embedding_dropout_with_a_norm(
        d in dropouts(),
        (rows, cols) in (0..20usize, 0..20usize),
        ids in proptest::collection::vec(0..6u32, 20),
        lens in proptest::option::of((0..20usize, 0..20usize, 0..40usize, 0..400usize)),
        epsilon in prop_oneof![Just(0.0f32), Just(1e-5), Just(-1e-5), Just(f32::NAN)],
        bias in any::<bool>(),
    ) {
        let (cpu, shape) = (Cpu::new(), Shape::new(rows, cols));
        let (weight, gradient, stats, n) = lens.unwrap_or((cols, cols, 2 * rows, rows * cols));
        let (ids, table, norm) = (&ids[..rows], vec![1.0f32; 5 * cols], Norm::layer(epsilon));
        let lookups = Lookups::tokens(5, ids);
        let tables = Tables { token: &table[..], position: None, segment: None };
        let weight = vec![1.0f32; weight];
        let affine = Affine { weight: &weight[..], bias: bias.then_some(&weight[..]) };
        let (mut y, mut out_stats) = (vec![7.0f32; n], vec![7.0f32; stats]);
        let result = cpu::embedding_dropout::forward_norm(
            &cpu, &d, &norm, shape, &lookups, &tables, &affine, &mut y, Some(&mut out_stats),
        );
        judge("embedding_dropout", result, &[y, out_stats].concat())?;
        let (dy, stats) = (vec![1.0f32; n], vec![1.0f32; stats]);
        let (mut token, mut of_norm) = (vec![7.0f32; 5 * cols], vec![7.0f32; gradient]);
        let gradients = Gradients { token: Some(&mut token[..]), ..Gradients::NONE };
        let norm_gradients = NormGradients { weight: Some(&mut of_norm[..]), bias: None };
        let result = cpu::embedding_dropout::backward_norm(
            &cpu, &d, &norm, shape, &lookups, &tables, &weight, &stats, &dy, gradients, norm_gradients,
        );
        judge("embedding_dropout", result, &[token, of_norm].concat())?;
    }

    #[test]
    fn probabilities(p in any::<f64>()) {
        prop_assert_eq!(Probability::new(p).is_ok(), (0.0..=1.0).contains(&p));
    }
}

#[test]
fn errors_say_what_was_expected_and_what_was_given() {
    let cpu = Cpu::new();
    let d = Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap());
    let place = Place { first_col: 4, ..Place::WHOLE };
    let mut y = [7.0f32; 6];
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    let error = cpu::dropout::forward(&cpu, &d, Shape::new(2, 3), &[1.0; 5], &mut y);
    assert_eq!(text(error), "dropout: x: expected 6 elements, got 5");
    let error = cpu::dropout::forward(&cpu, &d.at(place), Shape::new(2, 3), &[1.0; 6], &mut y);
    assert_eq!(text(error), "dropout: first_col: expected a multiple of 8, got 4");
    let (norm, affine) = (Norm::rms(-1.0), Affine { weight: &[1.0; 3][..], bias: None });
    let inputs = Inputs { x: &[1.0; 6][..], bias: None, residual: &[1.0; 6] };
    let shape = Shape::new(2, 3);
    let error = cpu::dropout_add_norm::forward(
        &cpu, &d, &norm, shape, &inputs, &affine, None, &mut y, None,
    );
    let expected = "dropout_add_norm: epsilon: expected a finite number, at least 0, got -1";
    assert_eq!(text(error), expected);
    let error = Probability::new(f64::NAN).unwrap_err().to_string();
    assert_eq!(error, "Probability::new: p: expected 0 <= p <= 1, got NaN");
    assert_eq!(y, [7.0; 6]);
}

#[test]
fn ids_outside_of_their_table_are_named() {
    let (cpu, shape) = (Cpu::new(), Shape::new(3, 2));
    let d = Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap());
    let (good, bad, table, dy) = ([0u32, 3, 1], [1u32, 4, 9], [1.0f32; 8], [1.0f32; 6]);
    let tokens = Lookups::tokens(4, &good[..]);
    let cases = [
        (Lookups::tokens(4, &bad[..]), "token_ids: expected ids below 4, got 4 in row 1"),
        (
            tokens.positions(4, Ids::Given(&bad[..])),
            "position_ids: expected ids below 4, got 4 in row 1",
        ),
        (tokens.segments(2, &good[..]), "segment_ids: expected ids below 2, got 3 in row 1"),
        (
            tokens.positions(4, Ids::Sequence(5)),
            "position_ids: expected sequences of 1 to 4 rows, got 5",
        ),
    ];
    for (lookups, text) in cases {
        let optional = |is: bool, len: usize| is.then_some(&table[..len]);
        let tables = Tables {
            token: &table[..],
            position: optional(lookups.position.is_some(), 8),
            segment: optional(lookups.segment.is_some(), 4),
        };
        let mut y = [7.0f32; 6];
        let error = cpu::embedding_dropout::forward(&cpu, &d, shape, &lookups, &tables, &mut y);
        assert_eq!(error.unwrap_err().to_string(), format!("embedding_dropout: {text}"));
        let mut token = [7.0f32; 8];
        let gradients = Gradients { token: Some(&mut token[..]), ..Gradients::NONE };
        let error = cpu::embedding_dropout::backward(&cpu, &d, shape, &lookups, &dy, gradients);
        assert_eq!(error.unwrap_err().to_string(), format!("embedding_dropout: {text}"));
        assert_eq!((y, token), ([7.0; 6], [7.0; 8]));
    }
}

#[test]
fn tables_come_with_their_ids() {
    let (cpu, shape) = (Cpu::new(), Shape::new(1, 2));
    let d = Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap());
    let (id, table, mut y) = ([0u32], [1.0f32; 2], [7.0f32; 2]);
    let lookups = Lookups::tokens(1, &id[..]);
    let tables = Tables { token: &table[..], position: Some(&table[..]), segment: None };
    let mut forward = |lookups: &Lookups<&[u32]>, tables: &Tables<&[f32]>| {
        let result = cpu::embedding_dropout::forward(&cpu, &d, shape, lookups, tables, &mut y);
        assert_eq!(y, [7.0; 2]);
        result.unwrap_err().to_string()
    };
    let error = forward(&lookups, &tables);
    let text = "position_ids: expected ids for the table that is given, got none";
    assert_eq!(error, format!("embedding_dropout: {text}"));
    let error = forward(&lookups.segments(1, &id[..]), &Tables { position: None, ..tables });
    let text = "segment_table: expected a table for the ids, got none";
    assert_eq!(error, format!("embedding_dropout: {text}"));
}
