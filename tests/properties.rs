//! What must hold for every mask, whatever the numbers: shared between the passes, the same for every
//! shard and any number of threads, unbiased, and without visible dependence.
//!
//! Seeds are fixed, so a test that passes keeps passing. The bounds are stated as what an ideal source
//! would miss: 5 sigma once in 1.7 million, a chi-square of one degree above 30 once in 23 million.

use fused_dropout::cpu::Cpu;
use fused_dropout::ops::dropout_add_norm::Saved;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::{
    bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout, keep_mask,
    softmax_dropout, swiglu_dropout,
};
use fused_dropout::{
    Activation, AttentionMask, Dropout, Gradient, Groups, Key, Norm, Probability, RowMap, Scores,
    Shape, Shard, Source,
};

fn drop(seed: u64, stream: u64, p: f64) -> Dropout<'static> {
    Dropout::new(Key::new(seed, stream), Probability::new(p).unwrap())
}

fn mask(dropout: &Dropout<'_>, shape: Shape) -> Vec<u8> {
    let mut out = vec![2; shape.rows * shape.cols];
    Cpu::new().run(dropout, keep_mask::Bytes { shape, out: &mut out }).unwrap();
    out
}

#[test]
fn every_operator_and_pass_draws_the_mask_of_the_key() {
    let cpu = Cpu::new();
    let (scores, d) =
        (Scores { batch: 2, heads: 3, queries: 5, keys: 77, scale: 1.0 }, drop(1, 2, 0.3));
    let shape = Shape::new(30, 77);
    let keep = mask(&d, shape);
    let ones = vec![1.0f32; 30 * 77];
    let mut out = vec![9.0f32; 30 * 77];
    let same = |what: &str, out: &[f32], zero: f32| {
        let differs = |(v, k): (&f32, &u8)| (*v != zero) != (*k == 1);
        assert!(!out.iter().zip(&keep).any(differs), "{what}");
    };
    let x = || Source::Tensor(&ones as _);
    cpu.run(&d, dropout::Forward { shape, x: x(), y: &mut out }).unwrap();
    same("dropout", &out, 0.0);
    cpu.run(&d, dropout::Backward { shape, dy: x(), dx: &mut out }).unwrap();
    same("dropout backward", &out, 0.0);
    let add = dropout_add::Forward { shape, x: &ones, bias: None, residual: x(), y: &mut out };
    cpu.run(&d, add).unwrap();
    same("dropout_add", &out, 1.0);
    let mut dbias = [0.0; 77];
    let dbias = Some(Gradient::Write(&mut dbias));
    cpu.run(&d, dropout_add::Backward { shape, dy: x(), dx: Some(&mut out), dbias }).unwrap();
    same("dropout_add backward", &out, 0.0);
    let (norm, weight, mut y) = (Norm::layer(1e-5), [1.0; 77], vec![0.0; 30 * 77]);
    let (mut s, mut stats) = (vec![9.0f32; 30 * 77], [0.0; 60]);
    let add_and_norm = dropout_add_norm::Forward {
        shape,
        norm,
        x: &ones,
        bias: None,
        residual: x(),
        weight: &weight,
        norm_bias: None,
        s: Some(&mut s),
        y: &mut y,
        stats: Some(&mut stats),
    };
    cpu.run(&d, add_and_norm).unwrap();
    same("dropout_add_norm", &s, 1.0);
    let backward = dropout_add_norm::Backward {
        shape,
        norm,
        saved: Saved::Sum(&s),
        weight: &weight,
        stats: &stats,
        dy: &ones,
        ds: Some(&ones),
        dresidual: &mut y,
        dx: &mut out,
        dbias: None,
        dweight: None,
        dnorm_bias: None,
    };
    cpu.run(&d, backward).unwrap();
    same("dropout_add_norm backward", &out, 0.0);
    // One token, and a token a row: its gradient is the row of dy.
    let (zeros, own): ([u32; 30], Vec<u32>) = ([0; 30], (0..30).collect());
    let table = &ones[..77];
    let tables = Tables { token: &table as _, position: None, segment: None };
    let token = Lookup { entries: 1, ids: Ids::Given(&zeros as _) };
    let lookups = Lookups { token, position: None, segment: None };
    let embed =
        embedding_dropout::Forward::<f32, _> { shape, lookups, tables, y: &mut out, report: None };
    cpu.run(&d, embed).unwrap();
    same("embedding_dropout", &out, 0.0);
    // The norm of a row of ones is its bias.
    let embed = embedding_dropout::ForwardNorm {
        shape,
        norm,
        lookups,
        tables,
        weight: &table,
        norm_bias: Some(&table),
        y: &mut out,
        stats: None,
        report: None,
    };
    cpu.run(&d, embed).unwrap();
    same("embedding_dropout with a norm", &out, 0.0);
    let token = Lookup { entries: 30, ids: Ids::Given(&own as _) };
    let backward = embedding_dropout::Backward {
        shape,
        lookups: Lookups { token, position: None, segment: None },
        dy: &ones,
        gradients: Gradients { token: Some(Gradient::Write(&mut out)), ..Gradients::NONE },
    };
    cpu.run(&d, backward).unwrap();
    same("embedding_dropout backward", &out, 0.0);
    // With a norm: its bias has D(dy) for gradient, here of a dy that has one row.
    for (row, mut seen) in out.chunks_mut(77).enumerate() {
        let mut dy = vec![0.0; 30 * 77];
        dy[row * 77..][..77].fill(1.0);
        let backward = embedding_dropout::BackwardNorm {
            shape,
            norm,
            lookups,
            tables,
            weight: &weight,
            stats: &stats,
            dy: &dy,
            gradients: Gradients::NONE,
            dweight: None,
            dnorm_bias: Some(Gradient::Write(&mut seen)),
        };
        cpu.run(&d, backward).unwrap();
    }
    same("embedding_dropout with a norm, backward", &out, 0.0);
    let softmax = softmax_dropout::Forward {
        scores,
        mask: AttentionMask::NONE,
        x: x(),
        y: &mut out,
        statistics: None,
    };
    cpu.run(&d, softmax).unwrap();
    same("softmax_dropout", &out, 0.0);
    let softmax = softmax_dropout::Backward {
        scores,
        mask: AttentionMask::NONE,
        x: &ones,
        statistics: None,
        dy: x(),
        dx: &mut out,
    };
    cpu.run(&d, softmax).unwrap();
    // g - sum P g of a row with kept and dropped elements: above 0 where g is the scale, below where it is 0.
    let signs: Vec<f32> = out.iter().map(|dx| dx.max(0.0)).collect();
    same("softmax_dropout backward", &signs, 0.0);
    let forward = swiglu_dropout::Forward { shape, gate: x(), up: &ones, y: &mut out };
    cpu.run(&d, forward).unwrap();
    same("swiglu_dropout", &out, 0.0);
    let (gate, dy) = (&ones, x());
    let backward =
        swiglu_dropout::Backward { shape, gate, up: &ones, dy, dgate: &mut y, dup: &mut out };
    cpu.run(&d, backward).unwrap();
    same("swiglu_dropout's dgate", &y, 0.0);
    same("swiglu_dropout's dup", &out, 0.0);
    for activation in Activation::ALL {
        // Every activation of 1 is above 0, and so is its slope.
        let forward =
            bias_act_dropout::Forward { shape, activation, x: x(), bias: None, y: &mut out };
        cpu.run(&d, forward).unwrap();
        same("bias_act_dropout", &out, 0.0);
        let backward = bias_act_dropout::Backward {
            shape,
            activation,
            x: &ones,
            bias: None,
            dy: x(),
            dx: &mut out,
            dbias: None,
        };
        cpu.run(&d, backward).unwrap();
        same("bias_act_dropout backward", &out, 0.0);
    }
}

#[test]
fn groups_share_their_decision() {
    let (rows, cols, d) = (60, 100, drop(31, 7, 0.5));
    let shape = Shape::new(rows, cols);
    let plain = mask(&d, shape);
    for a_group in [1, 7, 60, u32::MAX] {
        let of = |r: usize| r / a_group as usize;
        let features = mask(&d.groups(Groups::features(a_group)), shape);
        let samples = mask(&d.groups(Groups::samples(a_group)), shape);
        for (i, (feature, sample)) in features.into_iter().zip(samples).enumerate() {
            let (r, c) = (of(i / cols), i % cols);
            assert_eq!(feature, plain[r * cols + c], "features({a_group}), element {i}");
            assert_eq!(sample, plain[r * cols], "samples({a_group}), element {i}");
        }
    }
    // Many groups: as many are kept as p says.
    let n = 10_000;
    let kept = mask(&d.groups(Groups::samples(1)), Shape::new(n, 3));
    let kept = kept.iter().step_by(3).map(|&keep| f64::from(keep)).sum::<f64>();
    assert!((kept - n as f64 / 2.0).abs() < 5.0 * (n as f64 / 4.0).sqrt(), "{kept} of {n}");
}

#[test]
fn shards_of_any_split_give_the_whole_mask() {
    let (rows, cols) = (24, 100);
    let d = drop(5, 6, 0.4);
    let whole = mask(&d, Shape::new(rows, cols));
    let at = |r: usize, c: usize| whole[r * cols + c];
    for first_col in (0..cols).step_by(8) {
        for width in [1, 7, 8, 20] {
            let width = width.min(cols - first_col);
            for (first, count) in [(0, 24), (5, 9), (23, 1)] {
                let rows = RowMap::Contiguous { first: first as u32 };
                let shard = d.shard(Shard { first_col: first_col as u64, rows });
                let part = mask(&shard, Shape::new(count, width));
                for (i, keep) in part.into_iter().enumerate() {
                    assert_eq!(keep, at(first + i / width, first_col + i % width));
                }
            }
        }
    }
    // As [4, 6]: two of the six in every entry; as [2, 3, 4]: head 1 and 2, queries 1 and 2; a list.
    let blocks = RowMap::Blocks { first: 3, block: 2, stride: 6 };
    let attention =
        RowMap::Attention { first: 5, heads: 2, queries: 2, head_stride: 4, batch_stride: 12 };
    let list = [7, 0, 23, 7];
    let explicit = RowMap::Explicit(&list);
    let maps = [
        (blocks, vec![3, 4, 9, 10, 15, 16, 21, 22]),
        (attention, vec![5, 6, 9, 10, 17, 18, 21, 22]),
        (explicit, vec![7, 0, 23, 7]),
    ];
    for (rows, logical) in maps {
        let part = mask(&d.shard(Shard { first_col: 0, rows }), Shape::new(logical.len(), cols));
        for (i, keep) in part.into_iter().enumerate() {
            assert_eq!(keep, at(logical[i / cols], i % cols), "{rows:?}");
        }
    }
}

#[test]
fn nothing_depends_on_the_number_of_threads_or_the_level() {
    let (d, shape) = (drop(3, 4, 0.2), Shape::new(700, 999));
    let scores = Scores { batch: 7, heads: 10, queries: 10, keys: 999, scale: 0.3 };
    let x: Vec<f32> = (0..700 * 999).map(|i| (i % 1013) as f32 * 0.01 - 5.0).collect();
    let run = |cpu: Cpu, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut y, mut dx, mut dbias) = (x.clone(), x.clone(), vec![0.0; 999]);
            let mut s = x.clone();
            let source = || Source::Tensor(&x as _);
            cpu.run(&d, dropout::Forward { shape, x: source(), y: &mut y }).unwrap();
            let backward = dropout_add::Backward {
                shape,
                dy: source(),
                dx: Some(&mut dx),
                dbias: Some(Gradient::Write(&mut dbias)),
            };
            cpu.run(&d, backward).unwrap();
            let softmax = softmax_dropout::Forward {
                scores,
                mask: AttentionMask::causal(500),
                x: source(),
                y: &mut s,
                statistics: None,
            };
            cpu.run(&d, softmax).unwrap();
            let norm = normalised(&cpu, &d, shape, &x);
            let embedded = embedded(&cpu, &d, shape, &x);
            let all = [y, dx, dbias, s, norm, embedded].concat();
            all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        })
    };
    let first = run(Cpu::PORTABLE, 1);
    for cpu in Cpu::levels() {
        for threads in [1, 2, 3, 8] {
            assert!(run(cpu, threads) == first, "{cpu:?}, {threads} threads");
        }
    }
}

/// Everything that `dropout_add_norm` gives.
fn normalised(cpu: &Cpu, d: &Dropout<'_>, shape: Shape, x: &[f32]) -> Vec<f32> {
    let (norm, weight) = (Norm::layer(1e-5), vec![0.7f32; shape.cols]);
    let (mut s, mut y, mut stats) = (x.to_vec(), x.to_vec(), vec![0.0; 2 * shape.rows]);
    let forward = dropout_add_norm::Forward {
        shape,
        norm,
        x: &x,
        bias: None,
        residual: Source::Tensor(&x),
        weight: &weight,
        norm_bias: None,
        s: Some(&mut s),
        y: &mut y,
        stats: Some(&mut stats),
    };
    cpu.run(d, forward).unwrap();
    let (mut dresidual, mut dx) = (x.to_vec(), x.to_vec());
    let mut sums = [(); 3].map(|()| vec![0.0f32; shape.cols]);
    let [dbias, dweight, dnorm_bias] = sums.each_mut().map(|sum| Some(Gradient::Write(sum)));
    let backward = dropout_add_norm::Backward {
        shape,
        norm,
        saved: Saved::Inputs { x: &x, bias: None, residual: &x },
        weight: &weight,
        stats: &stats,
        dy: &y,
        ds: Some(&x),
        dresidual: &mut dresidual,
        dx: &mut dx,
        dbias,
        dweight,
        dnorm_bias,
    };
    cpu.run(d, backward).unwrap();
    let sums = sums.concat();
    [s, y, stats, dresidual, dx, sums].concat()
}

/// Everything that `embedding_dropout` gives, on tables cut out of `x`.
fn embedded(cpu: &Cpu, d: &Dropout<'_>, shape: Shape, x: &[f32]) -> Vec<f32> {
    let (rows, cols) = (shape.rows as u32, shape.cols);
    let tokens: Vec<u32> = (0..rows).map(|r| r * r % 53).collect();
    let segments: Vec<u32> = (0..rows).map(|r| r / 9 % 2).collect();
    let lookups = Lookups {
        token: Lookup { entries: 53, ids: Ids::Given(&tokens as _) },
        position: Some(Lookup { entries: 90, ids: Ids::Sequence(90) }),
        segment: Some(Lookup { entries: 2, ids: Ids::Given(&segments as _) }),
    };
    let (token, position, segment) = (&x[..53 * cols], &x[cols..91 * cols], &x[..2 * cols]);
    let tables =
        Tables { token: &token as _, position: Some(&position as _), segment: Some(&segment as _) };
    let (norm, weight) = (Norm::layer(1e-5), &x[..cols]);
    let (mut y, mut normed, mut stats) = (x.to_vec(), x.to_vec(), vec![0.0; 2 * shape.rows]);
    let embed =
        embedding_dropout::Forward::<f32, _> { shape, lookups, tables, y: &mut y, report: None };
    cpu.run(d, embed).unwrap();
    let embed = embedding_dropout::ForwardNorm {
        shape,
        norm,
        lookups,
        tables,
        weight: &weight,
        norm_bias: None,
        y: &mut normed,
        stats: Some(&mut stats),
        report: None,
    };
    cpu.run(d, embed).unwrap();

    let mut sums = [53, 90, 2, 1, 1].map(|entries| x[..entries * cols].to_vec());
    let mut add = |with_norm: bool| {
        let [token, position, segment, dweight, dnorm_bias] =
            sums.each_mut().map(|sum| Some(Gradient::Add(sum)));
        let gradients = Gradients { token, position, segment };
        if !with_norm {
            let pass = embedding_dropout::Backward { shape, lookups, dy: &x, gradients };
            return cpu.run(d, pass).unwrap();
        }
        let pass = embedding_dropout::BackwardNorm {
            shape,
            norm,
            lookups,
            tables,
            weight: &weight,
            stats: &stats,
            dy: &x,
            gradients,
            dweight,
            dnorm_bias,
        };
        cpu.run(d, pass).unwrap();
    };
    add(false);
    add(true);
    [y, normed, stats, sums.concat()].concat()
}

#[test]
fn outputs_are_unbiased() {
    let shape = Shape::new(1 << 10, 1 << 10);
    let n = f64::from(1 << 20);
    for p in [0.001, 0.1, 0.5, 0.9] {
        let d = drop(11, 12, p);
        let mut y = vec![0.0f32; 1 << 20];
        let ones = vec![1.0; 1 << 20];
        let pass = dropout::Forward { shape, x: Source::Tensor(&ones), y: &mut y };
        Cpu::new().run(&d, pass).unwrap();
        let p = d.p.effective();
        let kept = y.iter().filter(|&&y| y != 0.0).count() as f64;
        let sigma = (n * p * (1.0 - p)).sqrt();
        assert!((kept - n * (1.0 - p)).abs() < 5.0 * sigma, "p = {p}: {kept} kept");
        let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / n;
        // 1e-7: the scale is rounded to f32.
        let bound = 5.0 * (p / (1.0 - p) / n).sqrt() + 1e-7;
        assert!((mean - 1.0).abs() < bound, "p = {p}: E[y]/x = {mean}");
    }
}

#[test]
fn the_scale_makes_the_expectation_exact_for_every_threshold() {
    for threshold in 0..65536u32 {
        let p = Probability::new(f64::from(threshold) / 65536.0).unwrap();
        let product = f64::from(p.scale()) * (1.0 - p.effective());
        assert!((product - 1.0).abs() <= 2f64.powi(-24), "threshold {threshold}");
    }
}

/// Chi-square of independence of two masks, one degree of freedom.
fn chi_square(a: impl Iterator<Item = u8>, b: impl Iterator<Item = u8>) -> f64 {
    let mut table = [[0.0f64; 2]; 2];
    a.zip(b).for_each(|(a, b)| table[a as usize][b as usize] += 1.0);
    let [[n00, n01], [n10, n11]] = table;
    let n = n00 + n01 + n10 + n11;
    let det = n00 * n11 - n01 * n10;
    n * det * det / ((n00 + n01) * (n10 + n11) * (n00 + n10) * (n01 + n11))
}

#[test]
fn neighbours_are_independent() {
    let (rows, cols) = (512, 2048);
    let shape = Shape::new(rows, cols);
    for p in [0.1, 0.5] {
        let a = mask(&drop(21, 1000, p), shape);
        let pairs = |columns: usize, down: usize| {
            let first = a.iter().copied().take(a.len() - columns - down * cols);
            chi_square(first, a.iter().copied().skip(columns + down * cols))
        };
        // Lanes of a word, words of an octet, octets, rows, and diagonals.
        for (columns, down) in
            [(1, 0), (2, 0), (4, 0), (7, 0), (8, 0), (16, 0), (0, 1), (1, 1), (8, 2)]
        {
            let chi = pairs(columns, down);
            assert!(chi < 30.0, "p = {p}, {columns} columns and {down} rows further: {chi}");
        }
        for (seed, stream) in [(21, 1001), (21, 1000 + (1 << 32)), (22, 1000), (21, 0)] {
            let b = mask(&drop(seed, stream, p), shape);
            let chi = chi_square(a.iter().copied(), b.into_iter());
            assert!(chi < 30.0, "p = {p}, seed {seed}, stream {stream}: {chi}");
        }
    }
}
