//! Every kernel, run by the emulator, against naive loops written from the contract.
#![cfg(feature = "emulator")]

use fused_dropout::device::BiasGrad;
use fused_dropout::device::softmax_dropout as softmax;
use fused_dropout::device::{
    Call, Readable, Writable, dropout, dropout_add, embedding_dropout, keep_mask,
};
use fused_dropout::emulator::Emulator;
use fused_dropout::ops::embedding_dropout::{
    Gradients, Ids, Lookups, NormGradients, Tables, check_report,
};
use fused_dropout::ops::keep_mask::bits_len;
use fused_dropout::ops::sum_rows::workspace_len;
use fused_dropout::{
    Affine, AttentionMask, Dropout, Dtype, Key, Mode, Norm, Place, Probability, RowMap, Scaling,
    Scores, Shape,
};
use half::{bf16, f16};

const P: [f64; 5] = [0.0, 1.0 / 65536.0, 0.1, 0.5, 1.0];

/// A value that depends on its index, with a NaN and an infinity now and then.
fn value(index: usize, salt: u32) -> f32 {
    let mixed = (index as u32)
        .wrapping_mul(0x9E37_79B9)
        .wrapping_add(salt)
        .rotate_left(13)
        .wrapping_mul(0x85EB_CA6B);
    match mixed % 251 {
        0 => f32::NAN,
        1 => f32::INFINITY,
        2 => -0.0,
        3 => 1e-41,
        _ => (mixed >> 8) as f32 / (1 << 22) as f32 - 2.0,
    }
}

/// The same without NaN and infinities.
fn finite(index: usize, salt: u32) -> f32 {
    let value = value(index, salt);
    if value.is_finite() { value } else { 0.5 }
}

fn tensor<T: Dtype>(len: usize, salt: u32) -> Vec<T> {
    (0..len).map(|i| T::from_f32(value(i, salt))).collect()
}

/// Bits of a value, all NaN alike.
fn bits<T: Dtype>(value: T) -> u32 {
    let value = value.to_f32();
    if value.is_nan() { u32::MAX } else { value.to_bits() }
}

fn assert_same<T: Dtype>(got: &[T], expected: &[T], what: &str) {
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(bits(got), bits(expected), "{what}: element {i}: {got:?}, not {expected:?}");
    }
}

fn threshold(p: Probability) -> u32 {
    p.threshold()
}

fn keeps(d: &Dropout, r: usize, c: usize) -> bool {
    let col = d.place.first_col + c as u64;
    u32::from(d.key.lane(d.place.rows.logical(r), col)) >= threshold(d.p)
}

/// `shift` leading elements put a tensor off its 16-byte boundary.
struct Case<'a> {
    shape: Shape,
    drop: Dropout<'a>,
    shift: usize,
}

fn cases() -> Vec<Case<'static>> {
    let mut cases = Vec::new();
    let shapes = [
        (1, 1),
        (1, 8),
        (3, 5),
        (7, 24),
        (2, 4096),
        (1, 4104),
        (5, 1000),
        (3, 999),
        (65, 17),
        (64, 64),
        (130, 72),
        (1, 5000),
        (0, 8),
        (4, 0),
        (513, 8),
        (9, 1031),
    ];
    let maps = [
        RowMap::WHOLE,
        RowMap::Contiguous { first: u32::MAX - 1000 },
        RowMap::Blocks { first: 3, block: 2, stride: 11 },
        RowMap::Attention { first: 9, heads: 2, queries: 3, head_stride: 50, batch_stride: 1000 },
    ];
    for (i, (rows, cols)) in shapes.into_iter().enumerate() {
        for (k, p) in P.into_iter().enumerate() {
            for shift in [0, 1] {
                let key = Key::new(42 + i as u64, (7 << 40) + k as u64);
                let place = Place {
                    first_col: [0, 1 << 34, 24][(i + k) % 3],
                    rows: maps[(i + k + shift) % 4],
                };
                let drop = Dropout::new(key, Probability::new(p).unwrap()).at(place);
                cases.push(Case { shape: Shape::new(rows, cols), drop, shift });
            }
        }
    }
    cases
}

fn name(case: &Case) -> String {
    format!("{:?} p {} shift {}", case.shape, case.drop.p.effective(), case.shift)
}

fn dropout_of<T: Dtype>(case: &Case, x: &[T]) -> Vec<T> {
    let Shape { rows, cols } = case.shape;
    let mut y = vec![T::from_f32(0.0); rows * cols];
    for r in 0..rows {
        for c in 0..cols {
            if keeps(&case.drop, r, c) {
                y[r * cols + c] = T::from_f32(x[r * cols + c].to_f32() * case.drop.p.scale());
            }
        }
    }
    y
}

fn check_dropout<T: Dtype>() {
    for (i, case) in cases().iter().enumerate() {
        let n = case.shape.rows * case.shape.cols;
        let gpu = Emulator::new().order(i as u64 % 4);
        let call = Call::on(&gpu);
        let x = tensor::<T>(n + case.shift, 1);
        let x = &x[case.shift..];
        let expected = dropout_of(case, x);
        let mut y = tensor::<T>(n + case.shift, 2);
        dropout::forward(&call, &case.drop, case.shape, &x, &mut &mut y[case.shift..]).unwrap();
        assert_same(&y[case.shift..], &expected, &name(case));
        let mut dx = tensor::<T>(n, 3);
        dropout::backward(&call, &case.drop, case.shape, &x, &mut dx).unwrap();
        assert_same(&dx, &expected, &name(case));
        let mut y = x.to_vec();
        dropout::forward_in_place::<T, _>(&call, &case.drop, case.shape, &mut y).unwrap();
        assert_same(&y, &expected, &name(case));
        dx.copy_from_slice(x);
        dropout::backward_in_place::<T, _>(&call, &case.drop, case.shape, &mut dx).unwrap();
        assert_same(&dx, &expected, &name(case));
    }
}

#[test]
fn dropout_is_the_contract() {
    check_dropout::<f32>();
    check_dropout::<f16>();
    check_dropout::<bf16>();
}

fn check_add<T: Dtype>() {
    for (i, case) in cases().iter().enumerate() {
        let Shape { rows, cols } = case.shape;
        let n = rows * cols;
        let gpu = Emulator::new().order(i as u64 % 4);
        let call = Call::on(&gpu);
        let x = tensor::<T>(n, 1);
        let residual = tensor::<T>(n + case.shift, 2);
        let residual = &residual[case.shift..];
        let bias = tensor::<T>(cols, 3);
        for with_bias in [false, true] {
            let mut expected = residual.to_vec();
            for r in 0..rows {
                for (c, bias) in bias.iter().enumerate() {
                    let at = r * cols + c;
                    if keeps(&case.drop, r, c) {
                        let mut x = x[at].to_f32();
                        if with_bias {
                            x += bias.to_f32();
                        }
                        let y = x.mul_add(case.drop.p.scale(), residual[at].to_f32());
                        expected[at] = T::from_f32(y);
                    }
                }
            }
            let bias: Option<&dyn Readable<T, Emulator>> = with_bias.then_some(&bias as _);
            let mut y = tensor::<T>(n, 4);
            dropout_add::forward(&call, &case.drop, case.shape, &x, bias, &residual, &mut y)
                .unwrap();
            assert_same(&y, &expected, &name(case));
            let mut y = residual.to_vec();
            dropout_add::forward_in_place(&call, &case.drop, case.shape, &x, bias, &mut y).unwrap();
            assert_same(&y, &expected, &name(case));
        }
    }
}

#[test]
fn dropout_add_is_the_contract() {
    check_add::<f32>();
    check_add::<f16>();
    check_add::<bf16>();
}

/// The tree of `TILE_ROWS`.
fn tree(mut level: Vec<f32>) -> f32 {
    loop {
        level = level.chunks(64).map(|part| part.iter().fold(0.0, |a, b| a + b)).collect();
        if level.len() <= 1 {
            return level.first().copied().unwrap_or(0.0);
        }
    }
}

fn dbias_of<T: Dtype>(case: &Case, dy: &[T]) -> Vec<f32> {
    let Shape { rows, cols } = case.shape;
    let kept = |r: usize, c: usize| {
        if keeps(&case.drop, r, c) { dy[r * cols + c].to_f32() } else { 0.0 }
    };
    let sum = |c: usize| tree((0..rows).map(|r| kept(r, c)).collect());
    (0..cols).map(|c| sum(c) * case.drop.p.scale()).collect()
}

fn check_bias_grad<T: Dtype>() {
    let mut all = cases();
    let p = Probability::new(0.1).unwrap();
    for (rows, cols) in [(4097, 3), (5000, 8), (64, 300), (4096, 5), (20000, 1), (1000, 136)] {
        for shift in [0, 1] {
            let drop = Dropout::new(Key::new(rows as u64, 9), p);
            all.push(Case { shape: Shape::new(rows, cols), drop, shift });
        }
    }
    for (i, case) in all.iter().enumerate() {
        let Shape { rows, cols } = case.shape;
        let n = rows * cols;
        let gpu = Emulator::new().order(i as u64 % 4);
        let call = Call::on(&gpu);
        let dy = tensor::<T>(n + case.shift, 5);
        let dy = &dy[case.shift..];
        let expected = dropout_of(case, dy);
        let expected_dbias = dbias_of(case, dy);
        let mut dx = tensor::<T>(n, 6);
        let mut dbias = vec![7.0f32; cols];
        let mut workspace = vec![f32::NAN; workspace_len(case.shape)];
        let grad = BiasGrad { dbias: &mut dbias, workspace: &mut workspace };
        dropout_add::backward(&call, &case.drop, case.shape, &dy, &mut dx, Some(grad)).unwrap();
        assert_same(&dx, &expected, &name(case));
        assert_same(&dbias, &expected_dbias, &name(case));
        dx.copy_from_slice(dy);
        dbias.fill(8.0);
        let grad = BiasGrad { dbias: &mut dbias, workspace: &mut workspace };
        let in_place = &mut dx as &mut dyn Writable<T, Emulator>;
        dropout_add::backward_in_place(&call, &case.drop, case.shape, in_place, Some(grad))
            .unwrap();
        assert_same(&dx, &expected, &name(case));
        assert_same(&dbias, &expected_dbias, &name(case));
        let mut dx = tensor::<T>(n, 6);
        dropout_add::backward(&call, &case.drop, case.shape, &dy, &mut dx, None).unwrap();
        assert_same(&dx, &expected, &name(case));
    }
}

#[test]
fn bias_gradient_is_the_tree() {
    check_bias_grad::<f32>();
    check_bias_grad::<f16>();
    check_bias_grad::<bf16>();
}

#[test]
fn masks_are_exported() {
    for case in cases() {
        let Shape { rows, cols } = case.shape;
        let gpu = Emulator::new();
        let call = Call::on(&gpu);
        let mut bytes = vec![7u8; rows * cols];
        keep_mask::bytes(&call, &case.drop, case.shape, &mut bytes).unwrap();
        let mut bits = vec![7u8; bits_len(case.shape)];
        keep_mask::bits(&call, &case.drop, case.shape, &mut bits).unwrap();
        let mut expected = vec![0u8; bits.len()];
        for r in 0..rows {
            for c in 0..cols {
                let keep = keeps(&case.drop, r, c);
                assert_eq!(bytes[r * cols + c], u8::from(keep));
                expected[r * cols.div_ceil(8) + c / 8] |= u8::from(keep) << (c % 8);
            }
        }
        assert_eq!(bits, expected);
    }
}

#[test]
fn key_in_device_memory_and_modes() {
    let gpu = Emulator::new();
    let shape = Shape::new(6, 40);
    let drop = Dropout::new(Key::new(3, 0), Probability::new(0.5).unwrap());
    let (stream, list) = ([u64::MAX - 4], [9u32, 1, u32::MAX, 1, 0, 77]);
    let call = Call::on(&gpu).stream_number(&stream).row_list(&list);
    let x = tensor::<f32>(240, 1);
    let mut y = vec![0f32; 240];
    dropout::forward(&call, &drop, shape, &x, &mut y).unwrap();
    let place = Place { first_col: 0, rows: RowMap::Explicit(&list) };
    let same = Dropout::new(Key::new(3, stream[0]), drop.p).at(place);
    let case = Case { shape, drop: same, shift: 0 };
    assert_same(&y, &dropout_of(&case, &x), "device key");
    // A list on the host is refused, and nothing is written.
    let before = y.clone();
    assert!(dropout::forward(&Call::on(&gpu), &same, shape, &x, &mut y).is_err());
    assert_same(&y, &before, "refused");
    // Inference: the identity, and classic scaling by 1 - p.
    dropout::forward(&Call::on(&gpu), &drop.mode(Mode::Inference), shape, &x, &mut y).unwrap();
    assert_same(&y, &x, "inference");
    let classic = drop.mode(Mode::Inference).scaling(Scaling::Classic);
    dropout::forward(&Call::on(&gpu), &classic, shape, &x, &mut y).unwrap();
    assert_same(&y, &x.iter().map(|x| x * 0.5).collect::<Vec<_>>(), "classic inference");
}

/// Ids that are in no table: their rows are zeros and give no gradient, the first of them is reported, and
/// everything else is as if they were not there.
#[test]
fn ids_outside_of_their_table_are_reported() {
    let (rows, cols) = (70, 24);
    let shape = Shape::new(rows, cols);
    let drop = Dropout::new(Key::new(4, 5), Probability::new(0.2).unwrap());
    let good: Vec<u32> = (0..rows as u32).map(|r| r % 5).collect();
    let table = tensor::<f32>(6 * cols, 1);
    let dy: Vec<f32> = (0..rows * cols).map(|i| finite(i, 2)).collect();
    // Rows, and what they have in place of an id below 6, 6 and 2.
    let faults = [(66, u32::MAX), (41, 6), (69, 1 << 31)];
    for (order, which) in [(0, 0), (1, 1), (7, 2), (0, 2)] {
        let gpu = Emulator::new().order(order);
        let call = Call::on(&gpu);
        let mut ids = [good.clone(), good.clone(), good.iter().map(|id| id % 2).collect()];
        for (row, id) in faults {
            ids[which][row] = id;
        }
        let [token, position, segment] = &ids;
        let lookups = Lookups::tokens(6, token as &dyn Readable<u32, Emulator>)
            .positions(6, Ids::Given(position))
            .segments(2, segment);
        let half = &table[..2 * cols];
        let tables =
            Tables { token: &table as _, position: Some(&table as _), segment: Some(&half as _) };
        let (mut y, mut report) = (vec![9f32; rows * cols], [u32::MAX]);
        embedding_dropout::forward::<f32, _>(
            &call,
            &drop,
            shape,
            &lookups,
            &tables,
            &mut y,
            &mut report,
        )
        .unwrap();
        assert_eq!(report, [41]);
        let error = check_report(report[0]).unwrap_err().to_string();
        let text = "ids below their table's entries, got a larger one in row 41";
        assert_eq!(error, format!("embedding_dropout: lookups: expected {text}"));
        let mut gradients = [vec![0f32; 6 * cols], vec![0f32; 6 * cols], vec![0f32; 2 * cols]];
        let [t, p, s] = &mut gradients;
        let into = Gradients { token: Some(t as _), position: Some(p as _), segment: Some(s as _) };
        embedding_dropout::backward(&call, &drop, shape, &lookups, &dy, into).unwrap();

        // The same with good ids, and nothing to learn from these rows.
        let small: Vec<u32> = good.iter().map(|id| id % 2).collect();
        let lookups = Lookups::tokens(6, &good as &dyn Readable<u32, Emulator>)
            .positions(6, Ids::Given(&good))
            .segments(2, &small);
        let (mut whole, mut dy) = (vec![9f32; rows * cols], dy.clone());
        let mut report = [u32::MAX];
        embedding_dropout::forward::<f32, _>(
            &call,
            &drop,
            shape,
            &lookups,
            &tables,
            &mut whole,
            &mut report,
        )
        .unwrap();
        assert!(report == [u32::MAX] && check_report(report[0]).is_ok());
        for (row, _) in faults {
            whole[row * cols..(row + 1) * cols].fill(0.0);
            dy[row * cols..(row + 1) * cols].fill(0.0);
        }
        assert_same(&y, &whole, "y");
        let mut expected = [vec![0f32; 6 * cols], vec![0f32; 6 * cols], vec![0f32; 2 * cols]];
        let [t, p, s] = &mut expected;
        let into = Gradients { token: Some(t as _), position: Some(p as _), segment: Some(s as _) };
        embedding_dropout::backward(&call, &drop, shape, &lookups, &dy, into).unwrap();
        for (got, expected) in gradients.iter().zip(&expected) {
            assert_same(got, expected, "gradient");
        }
    }
}

/// The same for the normalised form.
#[test]
fn ids_outside_of_their_table_are_reported_with_a_norm() {
    let (rows, cols) = (70, 24);
    let shape = Shape::new(rows, cols);
    let (norm, drop) = (Norm::layer(1e-5), Dropout::new(Key::new(4, 5), Probability::ZERO));
    let good: Vec<u32> = (0..rows as u32).map(|r| r % 5).collect();
    let mut bad = good.clone();
    (bad[66], bad[41]) = (u32::MAX, 5);
    let numbers = |len, salt| (0..len).map(|i| finite(i, salt)).collect::<Vec<f32>>();
    let (table, weight) = (numbers(5 * cols, 1), numbers(cols, 2));
    let tables = Tables { token: &table as _, position: None, segment: None };
    let affine = Affine { weight: &weight as &dyn Readable<f32, Emulator>, bias: None };
    let run = |ids: &Vec<u32>, dy: &Vec<f32>| {
        let gpu = Emulator::new().order(3);
        let call = Call::on(&gpu);
        let lookups = Lookups::tokens(5, ids as &dyn Readable<u32, Emulator>);
        let (mut y, mut stats) = (vec![9f32; rows * cols], vec![9f32; 2 * rows]);
        let (mut report, mut workspace) = ([u32::MAX], vec![f32::NAN; 2 * rows * cols]);
        let out = Some(&mut stats as _);
        embedding_dropout::forward_norm(
            &call,
            &drop,
            &norm,
            shape,
            &lookups,
            &tables,
            &affine,
            &mut y,
            out,
            &mut report,
        )
        .unwrap();
        let mut gradients = [vec![0f32; 5 * cols], vec![0f32; cols], vec![0f32; cols]];
        let [token, weight, bias] = &mut gradients;
        embedding_dropout::backward_norm(
            &call,
            &drop,
            &norm,
            shape,
            &lookups,
            &tables,
            affine.weight,
            &stats,
            dy,
            Gradients { token: Some(token as _), ..Gradients::NONE },
            NormGradients { weight: Some(weight as _), bias: Some(bias as _) },
            &mut workspace,
        )
        .unwrap();
        (y, stats, report[0], gradients)
    };
    let dy = numbers(rows * cols, 3);
    let (y, stats, report, gradients) = run(&bad, &dy);
    assert_eq!(report, 41);
    // The same with good ids, and nothing to learn from these rows.
    let mut quiet = dy.clone();
    let (mut whole, mut whole_stats, report, _) = run(&good, &dy);
    assert_eq!(report, u32::MAX);
    for row in [41, 66] {
        whole[row * cols..(row + 1) * cols].fill(0.0);
        quiet[row * cols..(row + 1) * cols].fill(0.0);
        whole_stats[2 * row..2 * row + 2].fill(0.0);
    }
    assert_same(&y, &whole, "y");
    assert_same(&stats, &whole_stats, "stats");
    for (got, expected) in gradients.iter().zip(&run(&good, &quiet).3) {
        assert_same(got, expected, "gradient");
    }
}

/// More rows than a tree of three levels has room for, entries that few of them take, and blocks for rows
/// as well as for entries.
#[test]
fn table_gradients_are_the_tree() {
    let drop = Dropout::new(Key::new(4, 5), Probability::new(0.2).unwrap());
    for (rows, entries) in [(64 * 4096 + 5000, 2), (4096, 5000), (9000, 3)] {
        let shape = Shape::new(rows, 3);
        let case = Case { shape, drop, shift: 0 };
        // Most rows take entry 0.
        let id = |r: usize| if r % 997 == 5 { (r / 997 + 1) % entries } else { 0 };
        let ids: Vec<u32> = (0..rows).map(|r| id(r) as u32).collect();
        let dy: Vec<f32> = (0..rows * 3).map(|i| finite(i, 3)).collect();
        let scaled = dropout_of(&case, &dy);
        let mut expected = tensor::<f32>(entries * 3, 4);
        let mut gradient = expected.clone();
        let mut taken: Vec<usize> = (0..rows).map(id).collect();
        taken.sort_unstable();
        taken.dedup();
        for entry in taken {
            for c in 0..3 {
                let term = |r: usize| if id(r) == entry { scaled[r * 3 + c] } else { 0.0 };
                expected[entry * 3 + c] += tree((0..rows).map(term).collect());
            }
        }
        let gpu = Emulator::new();
        let lookups = Lookups::tokens(entries, &ids as &dyn Readable<u32, Emulator>);
        let into = Gradients { token: Some(&mut gradient as _), ..Gradients::NONE };
        let call = Call::on(&gpu);
        embedding_dropout::backward(&call, &drop, shape, &lookups, &dy, into).unwrap();
        assert_same(&gradient, &expected, &name(&case));
    }
}

/// One softmax call: which masks apply.
#[derive(Clone, Copy, Debug)]
struct Masks {
    causal: Option<i64>,
    lengths: bool,
    additive: bool,
}

/// Softmax in f64. Answers y, statistics, dx.
fn softmax_of(
    scores: &Scores,
    drop: &Dropout,
    mask: &AttentionMask<&[u32], &[f64]>,
    x: &[f64],
    dy: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let rows = scores.batch * scores.heads * scores.queries;
    let cols = scores.keys;
    let (mut y, mut dx) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
    let mut statistics = [f64::NEG_INFINITY, 0.0].repeat(rows);
    for r in 0..rows {
        let (b, q) = (r / scores.queries / scores.heads, r % scores.queries);
        let z: Vec<f64> = (0..cols)
            .map(|k| {
                let seen = mask.causal.is_none_or(|o| k as i64 <= o.saturating_add(q as i64))
                    && mask.lengths.is_none_or(|l| k < l[r] as usize);
                let additive =
                    mask.additive.map_or(0.0, |a| a[(b * scores.queries + q) * cols + k]);
                if seen {
                    x[r * cols + k] * f64::from(scores.scale) + additive
                } else {
                    f64::NEG_INFINITY
                }
            })
            .collect();
        let m = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if m == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = z.iter().map(|z| (z - m).exp()).sum();
        statistics[2 * r..2 * r + 2].copy_from_slice(&[m, 1.0 / sum]);
        let p: Vec<f64> = z.iter().map(|z| (z - m).exp() / sum).collect();
        let keep = |k| if keeps(drop, r, k) { f64::from(drop.p.scale()) } else { 0.0 };
        let dot: f64 = (0..cols).map(|k| p[k] * keep(k) * dy[r * cols + k]).sum();
        for k in 0..cols {
            y[r * cols + k] = p[k] * keep(k);
            dx[r * cols + k] = f64::from(scores.scale) * p[k] * (keep(k) * dy[r * cols + k] - dot);
        }
    }
    (y, statistics, dx)
}

fn assert_close<T: Dtype>(got: &[T], expected: &[f64], absolute: f64, what: &str) {
    // Half a unit in the last place of the storage type, relative, and of its smallest number.
    let unit = match T::NAME {
        "f32" => 0.0,
        "f16" => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    };
    for (i, (got, &expected)) in got.iter().zip(expected).enumerate() {
        let got = f64::from(got.to_f32());
        if expected.is_infinite() {
            assert_eq!(got, expected, "{what}: element {i}");
            continue;
        }
        // f32 arithmetic: |z| below 16, so z - max is off by 2^-20; 64 roundings of 2^-24 beside it.
        let bound = expected.abs() * (unit + 2f64.powi(-17)) + absolute + 2f64.powi(-24);
        assert!((got - expected).abs() <= bound, "{what}: element {i}: {got}, not {expected}");
    }
}

fn check_softmax<T: Dtype>(scores: Scores, masks: Masks, p: f64, shift: usize) {
    let what = format!("{} {scores:?} {masks:?} p {p} shift {shift}", T::NAME);
    let rows = scores.batch * scores.heads * scores.queries;
    let (n, keys) = (rows * scores.keys, scores.keys);
    let place = Place { first_col: 16, rows: RowMap::Contiguous { first: 5 } };
    let drop = Dropout::new(Key::new(1, 2), Probability::new(p).unwrap()).at(place);
    let numbers = |len: usize, salt| -> Vec<T> {
        (0..len + shift).map(|i| T::from_f32(finite(i, salt))).collect()
    };
    let wide = |v: &[T]| v.iter().map(|v| f64::from(v.to_f32())).collect::<Vec<_>>();
    let (x, dy) = (numbers(n, 1), numbers(n, 2));
    let (x, dy) = (&x[shift..], &dy[shift..]);
    let lengths: Vec<u32> = (0..rows).map(|r| (r * 37 % (keys + 2)) as u32).collect();
    let mut additive = numbers(scores.batch * scores.queries * keys, 3);
    for masked in additive.iter_mut().step_by(3) {
        *masked = T::from_f32(f32::NEG_INFINITY);
    }
    let additive = &additive[shift..];
    let wide_additive = wide(additive);
    let (y, statistics, dx) = softmax_of(
        &scores,
        &drop,
        &AttentionMask {
            causal: masks.causal,
            lengths: masks.lengths.then_some(&lengths[..]),
            additive: masks.additive.then_some(&wide_additive[..]),
        },
        &wide(x),
        &wide(dy),
    );
    let gpu = Emulator::new().order(n as u64 % 4);
    let call = Call::on(&gpu);
    let mask: softmax::DeviceMask<T, Emulator> = AttentionMask {
        causal: masks.causal,
        lengths: masks.lengths.then_some(&lengths as _),
        additive: masks.additive.then_some(&additive as _),
    };
    let mut got = numbers(n, 4);
    let mut got_statistics = vec![1f32; 2 * rows];
    let out = &mut &mut got[shift..];
    softmax::forward(&call, &drop, &scores, &mask, &x, out, Some(&mut got_statistics)).unwrap();
    assert_close(&got[shift..], &y, 0.0, &format!("y, {what}"));
    assert_close(&got_statistics, &statistics, 2f64.powi(-20), &format!("statistics, {what}"));
    for (i, (got, want)) in got[shift..].iter().zip(&y).enumerate() {
        assert!(*want != 0.0 || bits(*got) == 0, "{what}: element {i} is not +0");
    }
    let mut again = x.to_vec();
    softmax::forward_in_place(
        &call,
        &drop,
        &scores,
        &mask,
        &mut again as &mut dyn Writable<T, _>,
        None,
    )
    .unwrap();
    assert_same(&again, &got[shift..], &what);
    // g - sum P g: |g| is below 2 * scale, a sum of as many products as there are keys.
    let absolute = 2f64.powi(-15) * f64::from(drop.p.scale());
    for with_statistics in [false, true] {
        let saved: Option<&dyn Readable<f32, Emulator>> =
            with_statistics.then_some(&got_statistics as _);
        let mut got = numbers(n, 5);
        let out = &mut &mut got[shift..];
        softmax::backward(&call, &drop, &scores, &mask, &x, saved, &dy, out).unwrap();
        assert_close(&got[shift..], &dx, absolute, &format!("dx, {what}"));
        let mut again = dy.to_vec();
        let in_place = &mut again as &mut dyn Writable<T, _>;
        softmax::backward_in_place(&call, &drop, &scores, &mask, &x, saved, in_place).unwrap();
        assert_same(&again, &got[shift..], &what);
    }
}

fn check_softmaxes<T: Dtype>() {
    let scores = |batch, heads, queries, keys| Scores { batch, heads, queries, keys, scale: 0.5 };
    let shapes = [
        scores(2, 3, 5, 1),
        scores(2, 3, 5, 40),
        scores(1, 2, 9, 1000),
        scores(1, 1, 2, 1024),
        scores(1, 2, 2, 1025),
        scores(1, 2, 2, 4096),
        scores(1, 1, 2, 8200),
        scores(1, 2, 1, 8201),
    ];
    let masks = [
        Masks { causal: None, lengths: false, additive: false },
        Masks { causal: Some(0), lengths: false, additive: false },
        Masks { causal: Some(-2), lengths: true, additive: false },
        Masks { causal: Some(i64::MAX), lengths: true, additive: true },
        Masks { causal: None, lengths: false, additive: true },
        Masks { causal: Some(700), lengths: false, additive: true },
    ];
    for (i, scores) in shapes.into_iter().enumerate() {
        for (k, masks) in masks.into_iter().enumerate() {
            for shift in [0, 1] {
                check_softmax::<T>(scores, masks, [0.1, 0.0, 0.5, 1.0][(i + k) % 4], shift);
            }
        }
    }
}

#[test]
fn softmax_is_within_its_bound() {
    check_softmaxes::<f32>();
    check_softmaxes::<f16>();
    check_softmaxes::<bf16>();
}

#[test]
fn softmax_of_nan_masked_rows_and_no_columns() {
    let gpu = Emulator::new();
    let call = Call::on(&gpu);
    let drop = Dropout::new(Key::new(1, 2), Probability::ZERO);
    let scores = Scores { batch: 1, heads: 1, queries: 3, keys: 8, scale: 1.0 };
    let mut x = vec![0f32; 24];
    x[0] = f32::NAN;
    x[15] = f32::NAN; // masked by the row's length
    x[16..].fill(f32::NEG_INFINITY);
    let lengths = vec![4u32, 7, 8];
    let mask = AttentionMask { lengths: Some(&lengths as _), ..AttentionMask::NONE };
    let (mut y, mut statistics) = (vec![9f32; 24], vec![9f32; 6]);
    softmax::forward(&call, &drop, &scores, &mask, &x, &mut y, Some(&mut statistics)).unwrap();
    assert!(y[..4].iter().all(|y| y.is_nan()) && statistics[1].is_nan());
    assert_eq!(y[4..8], [0.0; 4]);
    assert!(y[8..15].iter().all(|&y| (y - 1.0 / 7.0).abs() < 1e-6));
    assert_eq!(y[15..], [0.0; 9]);
    assert_eq!(statistics[4..], [f32::NEG_INFINITY, 0.0]);
    for saved in [None, Some(&statistics as &dyn Readable<f32, Emulator>)] {
        let dy = vec![f32::INFINITY; 24];
        let mut dx = vec![9f32; 24];
        softmax::backward(&call, &drop, &scores, &mask, &x, saved, &dy, &mut dx).unwrap();
        assert_eq!(dx[15..], [0.0; 9]);
        assert_eq!(dx[4..8], [0.0; 4]);
    }
    // A row of NaN alone is no masked row.
    x.fill(f32::NAN);
    softmax::forward(&call, &drop, &scores, &AttentionMask::NONE, &x, &mut y, None).unwrap();
    assert!(y.iter().all(|y| y.is_nan()));
    let none = Scores { keys: 0, ..scores };
    let (x, mut y) = (Vec::<f32>::new(), Vec::<f32>::new());
    statistics.fill(1.0);
    softmax::forward(&call, &drop, &none, &AttentionMask::NONE, &x, &mut y, Some(&mut statistics))
        .unwrap();
    assert_eq!(statistics, [f32::NEG_INFINITY, 0.0].repeat(3)[..]);
}
