//! Bad arguments: a typed error that names the operator and the argument, no panic, untouched outputs.

use fused_dropout::cpu::Cpu;
use fused_dropout::ops::dropout_add_norm::Saved;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::{
    bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout, keep_mask,
    softmax_dropout,
};
use fused_dropout::{
    Activation, AttentionMask, Dropout, Error, Gradient, Groups, In, Key, Mode, Norm, Pass,
    Probability, RowMap, Scaling, Scores, Shape, Shard, Source, Strided,
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
                .shard(Shard { first_col, rows })
                .groups(groups)
        },
    )
}

fn run<'a>(drop: &Dropout<'_>, pass: impl Pass<'a, Cpu>) -> Result<(), Error> {
    Cpu::new().run(drop, pass)
}

/// A forward and a backward call of `dropout_add_norm` on tensors that fit `shape` (on `n` elements, where it is
/// too large), but for number `odd`, which is one longer; and what the outputs held afterwards.
fn norm_calls(
    d: &Dropout<'_>,
    norm: Norm,
    shape: Shape,
    n: usize,
    odd: Option<usize>,
    sum: bool,
) -> [(Result<(), Error>, Vec<f32>); 2] {
    let n = shape.rows.checked_mul(shape.cols).filter(|&n| n <= 400).unwrap_or(n);
    let (cols, rows) = (shape.cols.min(400), shape.rows.min(400));
    let len = |index, len| len + usize::from(Some(index) == odd);
    let input = |index, n| vec![1.0f32; len(index, n)];
    let output = |index, n| vec![7.0f32; len(index, n)];
    let (x, bias, residual) = (input(0, n), input(1, cols), input(2, n));
    let (weight, norm_bias) = (input(3, cols), input(4, cols));
    let (mut s, mut y, mut stats) = (output(5, n), output(6, n), output(7, 2 * rows));
    let pass = dropout_add_norm::Forward {
        shape,
        norm,
        x: &x,
        bias: Some(&bias),
        residual: Source::Tensor(&residual),
        weight: &weight,
        norm_bias: Some(&norm_bias),
        s: Some(&mut s),
        y: &mut y,
        stats: Some(&mut stats),
    };
    let forward = run(d, pass);
    let outputs = [s, y, stats].concat();

    let (stats, dy, ds) = (input(7, 2 * rows), input(8, n), input(9, n));
    let (mut dresidual, mut dx) = (output(10, n), output(11, n));
    let mut sums = [output(12, cols), output(13, cols), output(14, cols)];
    let [dbias, dweight, dnorm_bias] = sums.each_mut().map(|sum| Some(Gradient::Write(sum)));
    let pass = dropout_add_norm::Backward {
        shape,
        norm,
        saved: match sum {
            true => Saved::Sum(&x),
            false => Saved::Inputs { x: &x, bias: Some(&bias), residual: &residual },
        },
        weight: &weight,
        stats: &stats,
        dy: &dy,
        ds: Some(&ds),
        dresidual: &mut dresidual,
        dx: &mut dx,
        dbias,
        dweight,
        dnorm_bias,
    };
    let backward = run(d, pass);
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
            let [forward, backward] = norm_calls(&d, norm, Shape::new(5, 7), 0, Some(index), sum);
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
        let shape = Shape::new(rows, cols);
        // Lengths that fit, half of the time.
        let fit = rows.checked_mul(cols).filter(|&n| n <= 400 && x % 2 == 0);
        let (x, mut y) = (vec![1.0f32; fit.unwrap_or(x)], vec![7.0f32; fit.unwrap_or(y)]);
        let result = run(&d, dropout::Forward { shape, x: Source::Tensor(&x), y: &mut y });
        judge("dropout", result, &y)?;
        y.fill(7.0);
        let result = run(&d, dropout::Backward { shape, dy: Source::InPlace, dx: &mut y });
        judge("dropout", result, &y)?;
    }

    #[test]
    fn dropout_add(d in dropouts(), rows in sizes(), cols in sizes(), x in 0..400usize, bias in 0..20usize) {
        let shape = Shape::new(rows, cols);
        let n = rows.checked_mul(cols).filter(|&n| n <= 400).unwrap_or(x);
        let (x, bias, mut out) = (vec![1.0f32; n], vec![1.0f32; bias], vec![7.0f32; n]);
        let residual = Source::Tensor(&x as _);
        let result =
            run(&d, dropout_add::Forward { shape, x: &x, bias: Some(&bias), residual, y: &mut out });
        judge("dropout_add", result, &out)?;
        out.fill(7.0);
        let mut dbias = vec![7.0f32; bias.len()];
        let gradient = Some(Gradient::Write(&mut dbias));
        let dy = Source::Tensor(&x as _);
        let result =
            run(&d, dropout_add::Backward { shape, dy, dx: Some(&mut out), dbias: gradient });
        judge("dropout_add", result, &[out, dbias].concat())?;
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
        for (result, outputs) in norm_calls(&d, Norm::rms(epsilon), Shape::new(rows, cols), n, odd, sum) {
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
        let shape = Shape::new(rows, cols);
        let n = rows.checked_mul(cols).filter(|&n| n <= 400).unwrap_or(x);
        let (x, bias, mut out) = (vec![1.0f32; n], vec![1.0f32; bias], vec![7.0f32; n]);
        let forward = bias_act_dropout::Forward {
            shape,
            activation,
            x: Source::Tensor(&x),
            bias: Some(&bias),
            y: &mut out,
        };
        let result = run(&d, forward);
        judge("bias_act_dropout", result, &out)?;
        out.fill(7.0);
        let mut dbias = vec![7.0f32; bias.len()];
        let backward = bias_act_dropout::Backward {
            shape,
            activation,
            x: &x,
            bias: None,
            dy: Source::Tensor(&x),
            dx: &mut out,
            dbias: Some(Gradient::Write(&mut dbias)),
        };
        let result = run(&d, backward);
        judge("bias_act_dropout", result, &[out, dbias].concat())?;
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
        let product = |sizes: &[usize]| sizes.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        let n = product(&[batch, heads, queries, keys]).filter(|&n| n <= 400).unwrap_or(x);
        let lengths = lengths.map(|n| vec![3u32; n]);
        let lengths = lengths.as_ref().map(|lengths| lengths as _);
        let (x, mut out) = (vec![1.0f32; n], vec![7.0f32; n]);
        let pass = softmax_dropout::Forward {
            scores: Scores { batch, heads, queries, keys, scale },
            mask: AttentionMask { causal, lengths, additive: None },
            x: Source::Tensor(&x),
            y: &mut out,
            statistics: None,
        };
        let result = run(&d, pass);
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
        let shape = Shape::new(rows, cols);
        // Lengths that fit, where there are none.
        let fit = |n: Option<usize>| n.filter(|&n| n <= 400).unwrap_or(7);
        let lens = lens.unwrap_or((rows, fit(entries.checked_mul(cols)), fit(rows.checked_mul(cols))));
        let (ids, table, n) = (&ids[..lens.0.min(20)], vec![1.0f32; lens.1], lens.2);
        let position = Lookup { entries, ids: Ids::Sequence(sequence) };
        let lookups = Lookups {
            token: Lookup { entries, ids: Ids::Given(&ids as _) },
            position: tables.0.then_some(position),
            segment: None,
        };
        let given =
            Tables { token: &table as _, position: tables.1.then_some(&table as _), segment: None };
        let mut y = vec![7.0f32; n];
        let pass = embedding_dropout::Forward::<f32, _> {
            shape,
            lookups,
            tables: given,
            y: &mut y,
            report: None,
        };
        let result = run(&d, pass);
        judge("embedding_dropout", result, &y)?;
        let (dy, mut token, mut position) = (vec![1.0f32; n], vec![7.0f32; lens.1], vec![7.0f32; lens.1]);
        let gradients = Gradients {
            token: Some(Gradient::Write(&mut token)),
            position: tables.1.then_some(Gradient::Write(&mut position)),
            segment: None,
        };
        let result = run(&d, embedding_dropout::Backward { shape, lookups, dy: &dy, gradients });
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
        let shape = Shape::new(rows, cols);
        let (weight, gradient, stats, n) = lens.unwrap_or((cols, cols, 2 * rows, rows * cols));
        let (ids, table, norm) = (&ids[..rows], vec![1.0f32; 5 * cols], Norm::layer(epsilon));
        let lookups = Lookups { token: tokens(&ids, 5), position: None, segment: None };
        let tables = Tables { token: &table as _, position: None, segment: None };
        let weight = vec![1.0f32; weight];
        let (mut y, mut out_stats) = (vec![7.0f32; n], vec![7.0f32; stats]);
        let pass = embedding_dropout::ForwardNorm {
            shape,
            norm,
            lookups,
            tables,
            weight: &weight,
            norm_bias: bias.then_some(&weight as _),
            y: &mut y,
            stats: Some(&mut out_stats),
            report: None,
        };
        let result = run(&d, pass);
        judge("embedding_dropout", result, &[y, out_stats].concat())?;
        let (dy, stats) = (vec![1.0f32; n], vec![1.0f32; stats]);
        let (mut token, mut dweight) = (vec![7.0f32; 5 * cols], vec![7.0f32; gradient]);
        let pass = embedding_dropout::BackwardNorm {
            shape,
            norm,
            lookups,
            tables,
            weight: &weight,
            stats: &stats,
            dy: &dy,
            gradients: Gradients { token: Some(Gradient::Write(&mut token)), ..Gradients::NONE },
            dweight: Some(Gradient::Write(&mut dweight)),
            dnorm_bias: None,
        };
        let result = run(&d, pass);
        judge("embedding_dropout", result, &[token, dweight].concat())?;
    }

    #[test]
    fn probabilities(p in any::<f64>()) {
        prop_assert_eq!(Probability::new(p).is_ok(), (0.0..=1.0).contains(&p));
    }
}

fn tokens<'a>(ids: &'a &[u32], entries: usize) -> Lookup<In<'a, u32, Cpu>> {
    Lookup { entries, ids: Ids::Given(ids) }
}

fn drop() -> Dropout<'static> {
    Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap())
}

#[test]
fn errors_say_what_was_expected_and_what_was_given() {
    let (shape, mut y) = (Shape::new(2, 3), [7.0f32; 6]);
    let mut forward = |drop: &Dropout<'_>, x: &[f32]| {
        let pass = dropout::Forward { shape, x: Source::Tensor(&x), y: &mut y };
        let error = run(drop, pass).unwrap_err().to_string();
        assert_eq!(y, [7.0; 6]);
        error
    };
    assert_eq!(forward(&drop(), &[1.0; 5]), "dropout: x: expected 6 elements, got 5");
    let shard = drop().shard(Shard { first_col: 4, ..Shard::WHOLE });
    let error = forward(&shard, &[1.0; 6]);
    assert_eq!(error, "dropout: first_col: expected a multiple of 8, got 4");
    let [(error, _), _] = norm_calls(&drop(), Norm::rms(-1.0), shape, 6, None, true);
    let expected = "dropout_add_norm: epsilon: expected a finite number, at least 0, got -1";
    assert_eq!(error.unwrap_err().to_string(), expected);
    let error = Probability::new(f64::NAN).unwrap_err().to_string();
    assert_eq!(error, "Probability::new: p: expected 0 <= p <= 1, got NaN");
}

/// An input in place of an output that is not there.
#[test]
fn in_place_of_nothing_is_refused() {
    let (shape, x, mut y) = (Shape::new(2, 3), [1.0f32; 6], [7.0f32; 6]);
    let pass =
        dropout_add::Backward::<f32, _> { shape, dy: Source::InPlace, dx: None, dbias: None };
    let error = run(&drop(), pass).unwrap_err().to_string();
    assert_eq!(error, "dropout_add: dx: expected the tensor that dy lies in, got none");
    let pass = dropout_add_norm::Forward {
        shape,
        norm: Norm::layer(0.0),
        x: &x,
        bias: None,
        residual: Source::InPlace,
        weight: &[1.0; 3],
        norm_bias: None,
        s: None,
        y: &mut y,
        stats: None,
    };
    let error = run(&drop(), pass).unwrap_err().to_string();
    assert_eq!(
        error,
        "dropout_add_norm: s: expected the tensor that the residual lies in, got none"
    );
    assert_eq!(y, [7.0; 6]);
}

#[test]
fn keys_in_memory_that_do_not_fit_are_refused() {
    let (cpu, shape, mut y) = (Cpu::new(), Shape::new(2, 3), [7.0f32; 6]);
    let mut refused = |drop: &Dropout<'_, Cpu>| {
        let pass = dropout::Forward { shape, x: Source::InPlace, y: &mut y };
        let error = cpu.run(drop, pass).unwrap_err().to_string();
        assert_eq!(y, [7.0; 6]);
        error
    };
    let (numbers, list) = ([1u64, 2], [5u32, 9]);
    let error = refused(&Dropout::resident(1, &numbers, Probability::ZERO));
    assert_eq!(error, "dropout: stream: expected 1 element, got 2");
    let elsewhere = drop().shard(Shard { rows: RowMap::Contiguous { first: 1 }, ..Shard::WHOLE });
    let error = refused(&elsewhere.row_list(&list));
    assert!(error.starts_with("dropout: rows: expected no other row map beside a row list"));
    let short = &list[1..];
    let error = refused(&drop().row_list(&short));
    assert_eq!(error, "dropout: row_list: expected 2 elements, got 1");
    let error = refused(&drop().resident_p(&numbers));
    assert_eq!(error, "dropout: p: expected 1 element, got 2");
    let half = [Probability::new(0.5).unwrap().packed()];
    for mode in [Mode::Training, Mode::Inference] {
        let error = refused(&drop().mode(mode).scaling(Scaling::Classic).resident_p(&half));
        assert_eq!(
            error,
            "dropout: scaling: expected inverted scaling beside a resident p, got classic"
        );
    }
    // What is no threshold, and a scale that is another probability's.
    for garbage in [3, half[0] + 65536] {
        let error = refused(&drop().resident_p(&[garbage]));
        let expected = format!("what Probability::packed makes, got {garbage:#x}");
        assert_eq!(error, format!("dropout: p: expected {expected}"));
    }
}

#[test]
fn row_strides_that_do_not_fit_are_refused() {
    let (shape, x, mut y) = (Shape::new(3, 4), [1.0f32; 18], [7.0f32; 12]);
    let mut refused = |elements: usize, stride: usize| {
        let x = Strided::new(&x[..elements], stride);
        let pass = dropout::Forward { shape, x: Source::Tensor(&x), y: &mut y };
        let error = run(&drop(), pass).unwrap_err().to_string();
        assert_eq!(y, [7.0; 12]);
        error
    };
    let error = refused(12, 3);
    assert_eq!(error, "dropout: x: expected a row stride of at least 4 columns, got 3");
    for elements in [0, 13, 16, 17, 18] {
        let stride = if elements > 15 { 5 } else { 6 };
        let expected = if stride == 5 { "14 to 15" } else { "16 to 18" };
        let error = refused(elements, stride);
        let rows = format!("elements, 3 rows that begin {stride} apart, got {elements}");
        assert_eq!(error, format!("dropout: x: expected {expected} {rows}"));
    }
    let error = refused(18, usize::MAX);
    let expected = "a row stride with which 3 rows fit in memory";
    assert_eq!(error, format!("dropout: x: expected {expected}, got {}", usize::MAX));
    let error = refused(13, 4);
    assert_eq!(error, "dropout: x: expected 12 elements, 3 rows that begin 4 apart, got 13");
}

#[test]
fn columns_of_another_tensor_than_the_whole_one_are_refused() {
    let (shape, x, mut y) = (Shape::new(3, 4), [1.0f32; 96], [7.0f32; 12]);
    let mut given = |elements: usize, columns: std::ops::Range<usize>, stride: usize| {
        let x = Strided::columns(&x[..elements], columns, stride);
        run(&drop(), dropout::Forward { shape, x: Source::Tensor(&x), y: &mut y })
            .map_err(|error| error.to_string())
    };
    assert_eq!(given(72, 20..24, 24), Ok(()));
    let whole = "dropout: x: expected a whole tensor of 3 rows of";
    for stride in [23, 25, 26, 27, 36] {
        let error = format!("{whole} {stride} elements, got 72 elements");
        assert_eq!(given(72, 8..12, stride), Err(error));
    }
    for elements in [0, 4, 71, 73] {
        let error = format!("{whole} 24 elements, got {elements} elements");
        assert_eq!(given(elements, 8..12, 24), Err(error));
    }
    for columns in [8..11, 8..13, 21..25, 24..28, usize::MAX - 4..usize::MAX] {
        let error = format!("dropout: x: expected 4 columns of rows of 24, got {columns:?}");
        assert_eq!(given(72, columns, 24), Err(error));
    }
    assert!(given(72, 0..4, usize::MAX).is_err());
    assert!(given(72, 0..4, 3).is_err());
}

/// Nothing is read or written of tensors without elements, wherever their columns begin.
#[test]
fn columns_of_nothing_are_nothing() {
    for (shape, columns) in [(Shape::new(0, 4), 8..12), (Shape::new(3, 0), 8..8)] {
        let (x, mut y) = (vec![1.0f32; shape.rows * 12], vec![1.0f32; shape.rows * 12]);
        let x = Strided::columns(&x, columns.clone(), 12);
        let mut columns_of_y = Strided::columns(&mut y, columns, 12);
        run(&drop(), dropout::Forward { shape, x: Source::Tensor(&x), y: &mut columns_of_y })
            .unwrap();
        assert!(y.iter().all(|&value| value == 1.0));
    }
}

/// The stride of a single row is nothing's distance: any is taken, in every pass.
#[test]
fn a_single_row_may_have_any_stride() {
    let (shape, x, weight, dropout) = (Shape::new(1, 4), [1.0f32; 4], [1.0f32; 4], drop());
    let scores = Scores { batch: 1, heads: 1, queries: 1, keys: 4, scale: 1.0 };
    let (mask, norm) = (AttentionMask::NONE, Norm::layer(1e-5));
    for stride in [4, 1 << 58, (1 << 58) + 1, 1 << 63, usize::MAX] {
        let [mut y, mut dx, mut s, mut p, mut dp] =
            [(); 5].map(|()| Strided::new([7.0f32; 4], stride));
        let (mut dbias, mut stats) = ([7.0f32; 4], [7.0f32; 2]);
        let x = Strided::new(&x, stride);
        let source = Source::Tensor(&x as In<'_, f32, Cpu>);
        let dbias = Some(Gradient::Write(&mut dbias));
        let pass = dropout_add::Backward { shape, dy: source, dx: Some(&mut dx), dbias };
        run(&dropout, pass).unwrap();
        let pass = dropout_add_norm::Forward {
            shape,
            norm,
            x: &x,
            bias: None,
            residual: source,
            weight: &weight,
            norm_bias: None,
            s: Some(&mut s),
            y: &mut y,
            stats: Some(&mut stats),
        };
        run(&dropout, pass).unwrap();
        let pass =
            softmax_dropout::Forward { scores, mask, x: source, y: &mut p, statistics: None };
        run(&dropout, pass).unwrap();
        let pass = softmax_dropout::Backward {
            scores,
            mask,
            x: &x,
            statistics: None,
            dy: source,
            dx: &mut dp,
        };
        run(&dropout, pass).unwrap();
    }
}

#[test]
fn a_stride_is_refused_where_a_tensor_is_contiguous() {
    let (shape, x, mut y) = (Shape::new(1, 4), [1.0f32; 4], [7.0f32; 4]);
    let strided = Strided::new(&x[..], 4);
    let given = "expected a contiguous tensor, got rows that begin 4 apart";
    let pass = dropout_add::Forward {
        shape,
        x: &strided,
        bias: Some(&strided),
        residual: Source::InPlace,
        y: &mut y,
    };
    assert_eq!(run(&drop(), pass).unwrap_err().to_string(), format!("dropout_add: bias: {given}"));
    let mut dbias = Strided::new([7.0f32; 4], 4);
    let dbias = Some(Gradient::Write(&mut dbias));
    let pass = dropout_add::Backward { shape, dy: Source::Tensor(&strided), dx: None, dbias };
    assert_eq!(run(&drop(), pass).unwrap_err().to_string(), format!("dropout_add: dbias: {given}"));
    let tables = Tables { token: &strided as In<'_, f32, Cpu>, position: None, segment: None };
    let ids = [0u32];
    let lookups = Lookups::tokens(1, &ids as _);
    let pass = embedding_dropout::Forward { shape, lookups, tables, y: &mut y, report: None };
    let error = run(&drop(), pass).unwrap_err().to_string();
    assert_eq!(error, format!("embedding_dropout: token_table: {given}"));
    let tables = Tables { token: &x as In<'_, f32, Cpu>, position: None, segment: None };
    let mut strided = Strided::new(&mut y[..], 4);
    let pass = embedding_dropout::Forward { shape, lookups, tables, y: &mut strided, report: None };
    let error = run(&drop(), pass).unwrap_err().to_string();
    assert_eq!(error, format!("embedding_dropout: y: {given}"));
    let mut keep = Strided::new([7u8; 4], 4);
    let error = run(&drop(), keep_mask::Bytes { shape, out: &mut keep }).unwrap_err().to_string();
    assert_eq!(error, format!("keep_mask: out: {given}"));
    assert_eq!(y, [7.0; 4]);
}

#[test]
fn ids_outside_of_their_table_are_named() {
    let shape = Shape::new(3, 2);
    let (good, bad, table, dy) = (&[0u32, 3, 1][..], &[1u32, 4, 9][..], [1.0f32; 8], [1.0f32; 6]);
    let none = |token| Lookups { token, position: None, segment: None };
    let four = |ids| Some(Lookup { entries: 4, ids });
    let cases = [
        (none(tokens(&bad, 4)), "token_ids: expected ids below 4, got 4 in row 1"),
        (
            Lookups { position: four(Ids::Given(&bad as _)), ..none(tokens(&good, 4)) },
            "position_ids: expected ids below 4, got 4 in row 1",
        ),
        (
            Lookups { segment: Some(tokens(&good, 2)), ..none(tokens(&good, 4)) },
            "segment_ids: expected ids below 2, got 3 in row 1",
        ),
        (
            Lookups { position: four(Ids::Sequence(5)), ..none(tokens(&good, 4)) },
            "position_ids: expected sequences of 1 to 4 rows, got 5",
        ),
    ];
    for (lookups, text) in cases {
        let half = &table[..4];
        let tables = Tables {
            token: &table as _,
            position: lookups.position.map(|_| &table as _),
            segment: lookups.segment.map(|_| &half as _),
        };
        let mut y = [7.0f32; 6];
        let pass = embedding_dropout::Forward::<f32, _> {
            shape,
            lookups,
            tables,
            y: &mut y,
            report: None,
        };
        let error = run(&drop(), pass);
        assert_eq!(error.unwrap_err().to_string(), format!("embedding_dropout: {text}"));
        let mut token = [7.0f32; 8];
        let gradients = Gradients { token: Some(Gradient::Write(&mut token)), ..Gradients::NONE };
        let error =
            run(&drop(), embedding_dropout::Backward { shape, lookups, dy: &dy, gradients });
        assert_eq!(error.unwrap_err().to_string(), format!("embedding_dropout: {text}"));
        assert_eq!((y, token), ([7.0; 6], [7.0; 8]));
    }
}

#[test]
fn tables_come_with_their_ids() {
    let shape = Shape::new(1, 2);
    let (id, table, mut y) = (&[0u32][..], [1.0f32; 2], [7.0f32; 2]);
    let lookups = Lookups { token: tokens(&id, 1), position: None, segment: None };
    let tables = Tables { token: &table as _, position: Some(&table as _), segment: None };
    let mut forward = |lookups, tables| {
        let pass = embedding_dropout::Forward::<f32, _> {
            shape,
            lookups,
            tables,
            y: &mut y,
            report: None,
        };
        let error = run(&drop(), pass).unwrap_err().to_string();
        assert_eq!(y, [7.0; 2]);
        error
    };
    let error = forward(lookups, tables);
    let text = "position_ids: expected ids for the table that is given, got none";
    assert_eq!(error, format!("embedding_dropout: {text}"));
    let segments = Lookups { segment: Some(tokens(&id, 1)), ..lookups };
    let error = forward(segments, Tables { position: None, ..tables });
    let text = "segment_table: expected a table for the ids, got none";
    assert_eq!(error, format!("embedding_dropout: {text}"));
}
