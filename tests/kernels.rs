//! What only a device does, and what the case table does not reach, on the emulator.
#![cfg(feature = "emulator")]

use fused_dropout::cpu::Cpu;
use fused_dropout::device::{Address, Pointer};
use fused_dropout::emulator::Emulator;
use fused_dropout::ops::dropout::Forward as Dropped;
use fused_dropout::ops::embedding_dropout::{
    Backward, BackwardNorm, Forward, ForwardNorm, Gradients, Ids, Lookup, Lookups, Tables,
    check_report,
};
use fused_dropout::ops::{dropout_add_norm, softmax_dropout};
use fused_dropout::{
    AttentionMask, Backend, Dropout, Dtype, Error, Gradient, In, Key, Mode, Norm, Probability,
    Readable, RowMap, Scaling, Scores, Shape, Shard, Source, Strided, Writable,
};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// Ordinary values that depend on their index.
fn values(len: usize, salt: u64) -> Vec<f32> {
    let value = |i: usize| {
        let mixed = rand_philox::splitmix64(i as u64 * 31 + salt);
        (mixed >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..len).map(value).collect()
}

#[track_caller]
fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(got), bits(expected), "{what}");
}

/// y = D(x) of 6 rows of 40.
fn dropped<B: Backend>(backend: &B, drop: &impl fused_dropout::AsDropout<B>, x: &[f32]) -> Vec<f32>
where
    Vec<f32>: fused_dropout::Writable<f32, B>,
{
    let (x, mut y) = (x.to_vec(), vec![9.0; x.len()]);
    let pass = Dropped { shape: Shape::new(6, 40), x: Source::Tensor(&x), y: &mut y };
    backend.run(drop, pass).unwrap();
    y
}

#[test]
fn a_key_in_memory_draws_what_the_same_key_on_the_host_does() {
    let (emulator, x) = (Emulator::new(), values(240, 1));
    let p = Probability::new(0.5).unwrap();
    let (stream, list) = ([u64::MAX - 4], [9u32, 1, u32::MAX, 1, 0, 77]);
    let shard = Shard { first_col: 16, rows: RowMap::Explicit(&list) };
    let host = Dropout::new(Key::new(3, stream[0]), p).shard(shard);
    let expected = dropped(&Cpu::new(), &host, &x);
    let columns = Shard { rows: RowMap::WHOLE, ..shard };
    let resident = Dropout::<Emulator>::resident(3, &stream, p).shard(columns).row_list(&list);
    assert_same(&dropped(&emulator, &resident, &x), &expected, "the emulator");
    let resident = Dropout::<Cpu>::resident(3, &stream, p).shard(columns).row_list(&list);
    assert_same(&dropped(&Cpu::new(), &resident, &x), &expected, "the CPU");
    // A list on the host is refused on a device, and nothing is written.
    let mut y = x.clone();
    let pass = Dropped { shape: Shape::new(6, 40), x: Source::InPlace, y: &mut y };
    let error = emulator.run(&host, pass).unwrap_err().to_string();
    assert!(error.starts_with("dropout: rows: expected an explicit row list in device memory"));
    assert_same(&y, &x, "refused");
}

/// One application whose probability changes in memory, as a captured graph has it.
#[test]
fn a_probability_in_memory_drops_what_the_same_one_on_the_host_does() {
    let (emulator, x) = (Emulator::new(), values(240, 1));
    let drop = |p| Dropout::new(Key::new(3, 4), Probability::new(p).unwrap());
    for p in [0.5, 0.0, 0.1, 1.0, 1.0 / 65536.0] {
        let (packed, other) = ([drop(p).p.packed()], drop(0.7));
        let expected = dropped(&Cpu::new(), &drop(p), &x);
        assert_same(
            &dropped(&emulator, &other.resident_p::<Emulator>(&packed), &x),
            &expected,
            "the emulator",
        );
        assert_same(
            &dropped(&Cpu::new(), &other.resident_p::<Cpu>(&packed), &x),
            &expected,
            "the CPU",
        );
        let inference = other.mode(Mode::Inference).resident_p::<Emulator>(&packed);
        assert_same(&dropped(&emulator, &inference, &x), &x, "inference");
    }
    // What no probability is is refused where it is seen, and harms nobody's memory where it is not.
    for garbage in [[0], [3], [u64::MAX]] {
        dropped(&emulator, &drop(0.7).resident_p::<Emulator>(&garbage), &x);
    }
}

#[test]
fn modes_on_a_device() {
    let (emulator, x) = (Emulator::new(), values(240, 1));
    let drop = Dropout::new(Key::new(3, 0), Probability::new(0.5).unwrap());
    let inference = drop.mode(Mode::Inference);
    assert_same(&dropped(&emulator, &inference, &x), &x, "inference");
    let classic = inference.scaling(Scaling::Classic);
    let half: Vec<f32> = x.iter().map(|x| x * 0.5).collect();
    assert_same(&dropped(&emulator, &classic, &x), &half, "classic inference");
}

/// `rows` rows of a matrix, `gap` elements of 7 apart.
fn spread(matrix: &[f32], cols: usize, gap: usize) -> Vec<f32> {
    matrix.chunks(cols).flat_map(|row| row.iter().copied().chain(vec![7.0; gap])).collect()
}

/// In every form of a kernel that shares a row: a warp's, a block's, and the one that reads a row several times.
#[test]
fn rows_with_a_stride_give_the_bits_of_contiguous_rows() {
    let emulator = Emulator::new();
    let drop = Dropout::new(Key::new(3, 4), Probability::new(0.3).unwrap());
    for (cols, gap) in [(1024, 8), (1032, 8), (8200, 8), (8200, 3)] {
        let scores = Scores { batch: 1, heads: 1, queries: 2, keys: cols, scale: 0.5 };
        let (shape, norm) = (Shape::new(2, cols), Norm::layer(1e-5));
        let (x, dy, weight) = (values(2 * cols, 1), values(2 * cols, 2), values(cols, 3));
        let run = |gap: usize| {
            let stride = cols + gap;
            let [x, dy] = [&x, &dy].map(|matrix| spread(matrix, cols, gap));
            let [x, dy] = [&x, &dy].map(|matrix| Strided::new(matrix, stride));
            let mut outputs = [(); 4].map(|()| spread(&vec![9.0; 2 * cols], cols, gap));
            let [y, dx, s, normalised] = &mut outputs;
            let [mut y, mut dx, mut s, mut normalised] =
                [y, dx, s, normalised].map(|matrix| Strided::new(matrix, stride));
            let (mask, statistics) = (AttentionMask::causal(cols as i64 / 2), None);
            let pass = softmax_dropout::Forward {
                scores,
                mask,
                x: Source::Tensor(&x),
                y: &mut y,
                statistics,
            };
            emulator.run(&drop, pass).unwrap();
            let pass = softmax_dropout::Backward {
                scores,
                mask,
                x: &x,
                statistics: None,
                dy: Source::Tensor(&dy),
                dx: &mut dx,
            };
            emulator.run(&drop, pass).unwrap();
            let pass = dropout_add_norm::Forward {
                shape,
                norm,
                x: &x,
                bias: None,
                residual: Source::Tensor(&dy),
                weight: &weight,
                norm_bias: None,
                s: Some(&mut s),
                y: &mut normalised,
                stats: None,
            };
            emulator.run(&drop, pass).unwrap();
            outputs
        };
        for (strided, contiguous) in run(gap).iter().zip(&run(0)) {
            assert_same(strided, &spread(contiguous, cols, gap), &format!("{cols} + {gap}"));
        }
    }
}

/// `dropout` on columns of a whole tensor, from tensor to tensor and in place, on any backend.
fn dropped_columns<B: Backend>(backend: &B, first: usize) -> Vec<f32>
where
    Vec<f32>: Writable<f32, B>,
{
    let drop = Dropout::new(Key::new(3, 4), Probability::new(0.3).unwrap());
    let (shape, width) = (Shape::new(5, 40), 64);
    let (x, mut y) = (values(5 * width, 1), vec![9.0f32; 5 * width]);
    let columns = first..first + 40;
    let x = Strided::columns(&x, columns.clone(), width);
    let mut out = Strided::columns(&mut y, columns, width);
    backend.run(&drop, Dropped { shape, x: Source::Tensor(&x), y: &mut out }).unwrap();
    backend.run(&drop, Dropped { shape, x: Source::InPlace, y: &mut out }).unwrap();
    y
}

#[test]
fn columns_of_a_whole_tensor_are_the_same_on_every_backend() {
    for first in [0, 3, 8, 24] {
        let on_cpu = dropped_columns(&Cpu::new(), first);
        let drop = Dropout::new(Key::new(3, 4), Probability::new(0.3).unwrap());
        let x = values(5 * 64, 1);
        for (at, (&x, &y)) in x.iter().zip(&on_cpu).enumerate() {
            let (row, col) = (at / 64, (at % 64).wrapping_sub(first));
            let expected = match col < 40 {
                false => 9.0,
                true if !drop.key.keeps(drop.p, row as u32, col as u64) => 0.0,
                true => x * drop.p.scale() * drop.p.scale(),
            };
            assert_eq!(y, expected, "row {row}, column {col} from {first}");
        }
        assert_same(&dropped_columns(&Emulator::new(), first), &on_cpu, "the emulator");
    }
}

/// A bare address is a tensor like any other: here one that the emulator gave.
#[test]
fn bare_addresses() {
    use fused_dropout::Readable;
    let (emulator, x, mut y) = (Emulator::new(), values(240, 1), vec![9.0f32; 240]);
    let drop = Dropout::new(Key::new(3, 4), Probability::new(0.5).unwrap());
    let from = Readable::<f32, Emulator>::read(&x, &emulator).unwrap();
    let to = Writable::<f32, Emulator>::write(&mut y, &emulator).unwrap();
    // SAFETY: `from` and `to` are held, and nobody else uses the tensors.
    let [bare_x, mut bare_y] =
        [&from, &to].map(|address| unsafe { Pointer::<f32>::new(address.pointer, 240) });
    let pass = |y| Dropped { shape: Shape::new(6, 40), x: Source::Tensor(&bare_x), y };
    emulator.run(&drop, pass(&mut bare_y)).unwrap();
    // SAFETY: as above, of fewer elements.
    let mut short = unsafe { Pointer::<f32>::new(to.pointer, 239) };
    let error = emulator.run(&drop, pass(&mut short)).unwrap_err().to_string();
    assert_eq!(error, "dropout: y: expected 240 elements, got 239");
    std::mem::drop((from, to));
    assert_same(&y, &dropped(&emulator, &drop, &x), "through addresses");
}

const ROWS: usize = 70;
const COLS: usize = 24;
const SHAPE: Shape = Shape { rows: ROWS, cols: COLS };

fn lookup<'a>(entries: usize, ids: In<'a, u32, Emulator>) -> Lookup<In<'a, u32, Emulator>> {
    Lookup { entries, ids: Ids::Given(ids) }
}

/// y, the report and the three tables' gradients.
fn embed(
    order: u64,
    ids: &[Vec<u32>; 3],
    table: &[f32],
    dy: &[f32],
) -> (Vec<f32>, u32, [Vec<f32>; 3]) {
    let emulator = Emulator::new().order(order);
    let drop = Dropout::new(Key::new(4, 5), Probability::new(0.2).unwrap());
    let [token, position, segment] = ids;
    let lookups = Lookups {
        token: lookup(6, token),
        position: Some(lookup(6, position)),
        segment: Some(lookup(2, segment)),
    };
    let tables = Tables { token: &table as _, position: Some(&table as _), segment: None };
    let half = &table[..2 * COLS];
    let tables = Tables { segment: Some(&half as _), ..tables };
    let (mut y, mut report) = (vec![9.0f32; ROWS * COLS], [u32::MAX]);
    let forward =
        Forward::<f32, _> { shape: SHAPE, lookups, tables, y: &mut y, report: Some(&mut report) };
    emulator.run(&drop, forward).unwrap();
    let mut gradients = [6, 6, 2].map(|entries| vec![0.0f32; entries * COLS]);
    let [token, position, segment] =
        gradients.each_mut().map(|gradient| Some(Gradient::Write(gradient)));
    let gradients_of = Gradients { token, position, segment };
    let backward = Backward { shape: SHAPE, lookups, dy: &dy, gradients: gradients_of };
    emulator.run(&drop, backward).unwrap();
    (y, report[0], gradients)
}

/// Ids that are in no table: their rows are zeros and give no gradient, the first of them is reported, and
/// everything else is as if they were not there.
#[test]
fn ids_outside_of_their_table_are_reported() {
    let good: Vec<u32> = (0..ROWS as u32).map(|r| r % 5).collect();
    let good = [good.clone(), good.clone(), good.iter().map(|id| id % 2).collect()];
    let (table, dy) = (values(6 * COLS, 1), values(ROWS * COLS, 2));
    // Rows, and what they have in place of an id below 6, 6 and 2.
    let faults = [(66, u32::MAX), (41, 6), (69, 1 << 31)];
    for (order, which) in [(0, 0), (1, 1), (7, 2), (0, 2)] {
        let mut bad = good.clone();
        faults.iter().for_each(|&(row, id)| bad[which][row] = id);
        let (y, report, gradients) = embed(order, &bad, &table, &dy);
        let error = check_report(report).unwrap_err().to_string();
        let text = "ids below their table's entries, got a larger one in row 41";
        assert_eq!(error, format!("embedding_dropout: lookups: expected {text}"));
        // The same with good ids, and nothing to learn from these rows.
        let (mut whole, report, _) = embed(order, &good, &table, &dy);
        assert!(report == u32::MAX && check_report(report).is_ok());
        let mut quiet = dy.clone();
        for (row, _) in faults {
            whole[row * COLS..(row + 1) * COLS].fill(0.0);
            quiet[row * COLS..(row + 1) * COLS].fill(0.0);
        }
        assert_same(&y, &whole, "y");
        let (_, _, expected) = embed(order, &good, &table, &quiet);
        gradients.iter().zip(&expected).for_each(|(g, e)| assert_same(g, e, "gradient"));
    }
}

/// y, statistics, the report, and the gradients of the table, the norm's weight and its bias.
fn embed_norm(ids: In<'_, u32, Emulator>, dy: &[f32]) -> (Vec<f32>, Vec<f32>, u32, [Vec<f32>; 3]) {
    let emulator = Emulator::new().order(3);
    let drop = Dropout::new(Key::new(4, 5), Probability::ZERO);
    let (norm, table, weight) = (Norm::layer(1e-5), values(5 * COLS, 1), values(COLS, 2));
    let lookups = Lookups { token: lookup(5, ids), position: None, segment: None };
    let tables = Tables { token: &table as _, position: None, segment: None };
    let (mut y, mut stats) = (vec![9.0f32; ROWS * COLS], vec![9.0f32; 2 * ROWS]);
    let mut report = [u32::MAX];
    let forward = ForwardNorm::<f32, _> {
        shape: SHAPE,
        norm,
        lookups,
        tables,
        weight: &weight,
        norm_bias: None,
        y: &mut y,
        stats: Some(&mut stats),
        report: Some(&mut report),
    };
    emulator.run(&drop, forward).unwrap();
    let mut gradients = [5 * COLS, COLS, COLS].map(|len| vec![0.0f32; len]);
    let [token, dweight, dnorm_bias] =
        gradients.each_mut().map(|gradient| Some(Gradient::Add(gradient)));
    let backward = BackwardNorm {
        shape: SHAPE,
        norm,
        lookups,
        tables,
        weight: &weight,
        stats: &stats,
        dy: &dy,
        gradients: Gradients { token, ..Gradients::NONE },
        dweight,
        dnorm_bias,
    };
    emulator.run(&drop, backward).unwrap();
    (y, stats, report[0], gradients)
}

#[test]
fn ids_outside_of_their_table_are_reported_with_a_norm() {
    let good: Vec<u32> = (0..ROWS as u32).map(|r| r % 5).collect();
    let mut bad = good.clone();
    (bad[66], bad[41]) = (u32::MAX, 5);
    let dy = values(ROWS * COLS, 3);
    let (y, stats, report, gradients) = embed_norm(&bad, &dy);
    assert_eq!(report, 41);
    // The same with good ids, and nothing to learn from these rows.
    let mut quiet = dy.clone();
    let (mut whole, mut whole_stats, report, _) = embed_norm(&good, &dy);
    assert_eq!(report, u32::MAX);
    for row in [41, 66] {
        whole[row * COLS..(row + 1) * COLS].fill(0.0);
        quiet[row * COLS..(row + 1) * COLS].fill(0.0);
        whole_stats[2 * row..2 * row + 2].fill(0.0);
    }
    assert_same(&y, &whole, "y");
    assert_same(&stats, &whole_stats, "stats");
    let (.., expected) = embed_norm(&good, &quiet);
    gradients.iter().zip(&expected).for_each(|(g, e)| assert_same(g, e, "gradient"));
}

/// The sum of the terms of some rows: 16 rows in order from +0, 4 such sums, and then 64 until one is left. The other rows are +0,
/// which changes no such sum.
fn tree(terms: impl Iterator<Item = (usize, f32)>) -> f32 {
    let mut level: Vec<(usize, f32)> = terms.collect();
    for radix in [16, 4, 64, 64, 64, 64] {
        let parts = level.chunk_by(|(a, _), (b, _)| a / radix == b / radix);
        level = parts
            .map(|part| (part[0].0 / radix, part.iter().fold(0.0, |sum, (_, term)| sum + term)))
            .collect();
    }
    level.first().map_or(0.0, |(_, sum)| *sum)
}

/// Adds the gradient of a table of `entries` to what is there, and compares it with the tree. Row r takes entry `id(r)`.
fn assert_table_gradient(
    rows: usize,
    entries: usize,
    ids: Ids<Vec<u32>>,
    id: impl Fn(usize) -> usize,
) {
    let emulator = Emulator::new();
    let drop = Dropout::new(Key::new(4, 5), Probability::new(0.2).unwrap());
    let dy = values(rows * 3, 3);
    let g = |r: usize, c: usize| match drop.key.keeps(drop.p, r as u32, c as u64) {
        true => dy[r * 3 + c] * drop.p.scale(),
        false => 0.0,
    };
    let before = values(entries * 3, 4);
    let mut expected = before.clone();
    let mut rows_of = BTreeMap::<usize, Vec<usize>>::new();
    (0..rows).for_each(|r| rows_of.entry(id(r)).or_default().push(r));
    for (entry, its_rows) in rows_of.into_iter().filter(|(entry, _)| *entry < entries) {
        for c in 0..3 {
            expected[entry * 3 + c] += tree(its_rows.iter().map(|&r| (r, g(r, c))));
        }
    }
    let ids = match &ids {
        Ids::Given(ids) => Ids::Given(ids as In<'_, u32, Emulator>),
        Ids::Sequence(length) => Ids::Sequence(*length),
    };
    let mut gradient = before;
    let pass = Backward {
        shape: Shape::new(rows, 3),
        lookups: Lookups { token: Lookup { entries, ids }, position: None, segment: None },
        dy: &dy,
        gradients: Gradients { token: Some(Gradient::Add(&mut gradient)), ..Gradients::NONE },
    };
    emulator.run(&drop, pass).unwrap();
    assert_same(&gradient, &expected, &format!("{rows} rows, {entries} entries"));
}

/// The same for ids that are given.
fn assert_gradient_of_ids(rows: usize, entries: usize, id: impl Fn(usize) -> usize) {
    let ids = (0..rows).map(|r| id(r) as u32).collect();
    assert_table_gradient(rows, entries, Ids::Given(ids), id);
}

/// More rows than 64^3, entries that few of them take, and blocks for rows as well as for entries.
#[test]
fn table_gradients_are_the_tree() {
    // The first three are not sorted, of which the last has a block for each row; the others are, in one pass, two, and over
    // more than one group of spans.
    let shapes = [
        (64 * 4096 + 5000, 2),
        (9000, 3),
        (1500, 5000),
        (4096, 5000),
        (5000, 1000),
        (64 * 4096 + 20_000, 40),
    ];
    for (rows, entries) in shapes {
        // Most rows take entry 0; some have an id that is in no table.
        assert_gradient_of_ids(rows, entries, |r| match r {
            r if r % 1009 == 7 => u32::MAX as usize - r % 2,
            r if r % 997 == 5 => (r / 997 + 1) % entries,
            _ => 0,
        });
    }
}

/// Entry k has k rows, from everywhere: an entry of few rows is another kernel's than one of many.
#[test]
fn gradients_of_entries_with_every_number_of_rows() {
    let taken: Vec<usize> = (1..=130).flat_map(|entry| vec![entry; entry]).collect();
    // The step has no factor in common with the number of rows, 5 * 13 * 131.
    assert_gradient_of_ids(taken.len(), 1000, |r| taken[r * 4001 % taken.len()]);
    // 44 and 45 rows an entry, over more than 64 spans.
    assert_gradient_of_ids(64 * 4096 + 5000, 6007, |r| r * 7919 % 6007);
}

/// Walks of one row to more than a warp has lanes, over more than 64 spans, and a block for each entry.
#[test]
fn gradients_of_sequences() {
    for (rows, length) in
        [(5, 9), (200, 7), (66, 2), (64 * 4096 + 5000, 4200), (1000, 3), (9000, 3)]
    {
        assert_table_gradient(rows, length + 1, Ids::Sequence(length), |r| r % length);
    }
}

/// Rows that are sorted need scratch memory beside that of a norm's gradients, and a device has one workspace at a time. A table
/// of fewer entries gives the same bits without a sort.
#[test]
fn gradients_of_a_norm_and_of_sorted_rows() {
    let shape = Shape::new(2100, 3);
    let ids: Vec<u32> = (0..shape.rows).map(|r| (r * r % 1900) as u32).collect();
    let (table, dy) = (values(2100 * 3, 3), values(shape.rows * 3, 4));
    let (weight, stats) = (vec![0.5f32, -1.0, 2.0], [0.25f32, 1.5].repeat(shape.rows));
    let gradients = |entries: usize| {
        let mut gradients = [entries * 3, 3, 3].map(|elements| vec![1.0f32; elements]);
        let [token, dweight, dnorm_bias] = gradients.each_mut();
        let pass = BackwardNorm {
            shape,
            norm: Norm::layer(1e-5),
            lookups: Lookups::tokens(entries, &ids as In<'_, u32, Emulator>),
            tables: Tables { token: &&table[..entries * 3], position: None, segment: None },
            weight: &weight,
            stats: &stats,
            dy: &dy,
            gradients: Gradients { token: Some(Gradient::Add(token)), ..Gradients::NONE },
            dweight: Some(Gradient::Add(dweight)),
            dnorm_bias: Some(Gradient::Add(dnorm_bias)),
        };
        let drop = Dropout::new(Key::new(4, 5), Probability::new(0.2).unwrap());
        Emulator::new().run(&drop, pass).unwrap();
        gradients
    };
    let [[token, dweight, dnorm_bias], expected] = [gradients(2100), gradients(1900)];
    assert_same(&token[..1900 * 3], &expected[0], "token");
    assert_same(&token[1900 * 3..], &[1.0; 200 * 3], "token beyond the ids");
    assert_same(&dweight, &expected[1], "dweight");
    assert_same(&dnorm_bias, &expected[2], "dnorm_bias");
}

/// A tensor that a device does not take.
struct Foreign(Vec<f32>);

fn foreign<'a>() -> Result<Address<'a, Emulator>, Error> {
    Err(Error::Unavailable { backend: "emulator", reason: "of another device".to_owned() })
}

// SAFETY: no address is given.
unsafe impl Readable<f32, Emulator> for Foreign {
    fn elements(&self) -> usize {
        self.0.len()
    }
    fn read<'a>(&'a self, _: &'a Emulator) -> Result<Address<'a, Emulator>, Error> {
        foreign()
    }
}

// SAFETY: as above.
unsafe impl Writable<f32, Emulator> for Foreign {
    fn write<'a>(&'a mut self, _: &'a Emulator) -> Result<Address<'a, Emulator>, Error> {
        foreign()
    }
}

/// A gradient that cannot be written is found before another one is.
#[test]
fn a_refused_gradient_leaves_the_others_as_they_were() {
    let ids: Vec<u32> = (0..ROWS as u32).map(|r| r % 5).collect();
    let dy = values(ROWS * COLS, 2);
    let (mut token, mut position) = (vec![9.0f32; 5 * COLS], Foreign(vec![9.0; ROWS * COLS]));
    let pass = Backward {
        shape: SHAPE,
        lookups: Lookups::tokens(5, &ids as In<'_, u32, Emulator>)
            .positions(ROWS, Ids::Sequence(ROWS)),
        dy: &dy,
        gradients: Gradients {
            token: Some(Gradient::Write(&mut token)),
            position: Some(Gradient::Write(&mut position)),
            segment: None,
        },
    };
    let drop = Dropout::new(Key::new(4, 5), Probability::ZERO);
    assert!(matches!(Emulator::new().run(&drop, pass), Err(Error::Unavailable { .. })));
    assert_same(&token, &vec![9.0; 5 * COLS], "token");
}

#[test]
fn softmax_of_nan_masked_rows_and_no_columns() {
    let emulator = Emulator::new();
    let drop = Dropout::new(Key::new(1, 2), Probability::ZERO);
    let scores = Scores { batch: 1, heads: 1, queries: 3, keys: 8, scale: 1.0 };
    let mut x = vec![0.0f32; 24];
    x[0] = f32::NAN;
    x[15] = f32::NAN; // masked by the row's length
    x[16..].fill(f32::NEG_INFINITY);
    let lengths = vec![4u32, 7, 8];
    let mask = AttentionMask { lengths: Some(&lengths as _), ..AttentionMask::NONE };
    let forward = |scores, mask, x: &Vec<f32>| {
        let (mut y, mut statistics) = (vec![9.0f32; x.len()], vec![9.0f32; 6]);
        let x = Source::Tensor(x as _);
        let statistics_out = Some(&mut statistics as _);
        let pass =
            softmax_dropout::Forward { scores, mask, x, y: &mut y, statistics: statistics_out };
        emulator.run(&drop, pass).unwrap();
        (y, statistics)
    };
    let (y, statistics) = forward(scores, mask, &x);
    assert!(y[..4].iter().all(|y| y.is_nan()) && statistics[1].is_nan());
    assert_eq!(y[4..8], [0.0; 4]);
    assert!(y[8..15].iter().all(|&y| (y - 1.0 / 7.0).abs() < 1e-6));
    assert_eq!(y[15..], [0.0; 9]);
    assert_eq!(statistics[4..], [f32::NEG_INFINITY, 0.0]);
    for saved in [None, Some(&statistics as _)] {
        let (dy, mut dx) = (vec![f32::INFINITY; 24], vec![9.0f32; 24]);
        let pass = softmax_dropout::Backward {
            scores,
            mask,
            x: &x,
            statistics: saved,
            dy: Source::Tensor(&dy),
            dx: &mut dx,
        };
        emulator.run(&drop, pass).unwrap();
        assert_eq!(dx[15..], [0.0; 9]);
        assert_eq!(dx[4..8], [0.0; 4]);
    }
    // A row of NaN alone is no masked row.
    x.fill(f32::NAN);
    let (y, _) = forward(scores, AttentionMask::NONE, &x);
    assert!(y.iter().all(|y| y.is_nan()));
    let none = Scores { keys: 0, ..scores };
    let (_, statistics) = forward(none, AttentionMask::NONE, &Vec::new());
    assert_eq!(statistics, [f32::NEG_INFINITY, 0.0].repeat(3));
}

/// Offsets beyond every key and every query: the same keys as on the CPU.
#[test]
fn causal_offsets_of_any_size() {
    let (emulator, cpu) = (Emulator::new(), Cpu::new());
    let drop = Dropout::new(Key::new(1, 2), Probability::ZERO);
    let scores = Scores { batch: 1, heads: 2, queries: 5, keys: 1025, scale: 1.0 };
    let x = vec![0.0f32; 10 * 1025];
    for offset in [i64::MIN, -1 << 41, -6, -2, 0, 700, 1 << 41, i64::MAX] {
        let mut seen = [vec![9.0f32; x.len()], vec![9.0f32; x.len()]];
        let [on_cpu, on_emulator] = &mut seen;
        let pass = softmax_dropout::Forward {
            scores,
            mask: AttentionMask::causal(offset),
            x: Source::Tensor(&x),
            y: on_cpu,
            statistics: None,
        };
        cpu.run(&drop, pass).unwrap();
        let pass = softmax_dropout::Forward {
            scores,
            mask: AttentionMask::causal(offset),
            x: Source::Tensor(&x),
            y: on_emulator,
            statistics: None,
        };
        emulator.run(&drop, pass).unwrap();
        let [on_cpu, on_emulator] = seen.map(|y| y.iter().map(|&y| y > 0.0).collect::<Vec<_>>());
        assert!(on_cpu == on_emulator, "{offset}");
    }
}

/// The gradients of a norm of so many rows that they are summed in one pass, of values whose every sum is exact: each row's
/// mean is 0 and its rstd is given as 1, pairs of columns have one s and opposite gradients, and p is 1/2. So the means of a
/// row are 0, dresidual is ds + dy * weight, and the sums are of whole numbers.
fn norm_sums_in_one_pass<T: Dtype>(shape: Shape) {
    let Shape { rows, cols } = shape;
    let tensor = |value: &dyn Fn(usize, usize) -> i32| -> Vec<T> {
        (0..rows * cols).map(|i| T::from_f32(value(i / cols, i % cols) as f32)).collect()
    };
    let sign = |odd: usize| if odd % 2 == 1 { -1 } else { 1 };
    let s_at = |r: usize, c: usize| sign(c / 2) * (1 + (r + c / 4) % 3) as i32;
    let dy_at = |r: usize, c: usize| sign(c) * (1 + (7 * r + c / 2) % 5) as i32;
    let ds_at = |r: usize, c: usize| (r * 3 + c) as i32 % 7 - 3;
    let weight_at = |c: usize| 1 + (c / 2) as i32 % 2;
    let (s, dy, ds) = (tensor(&s_at), tensor(&dy_at), tensor(&ds_at));
    let weight: Vec<T> = (0..cols).map(|c| T::from_f32(weight_at(c) as f32)).collect();
    let stats = [0.0, 1.0].repeat(rows);
    let [mut dresidual, mut dx] = [(); 2].map(|()| vec![T::from_f32(9.0); rows * cols]);
    let [mut dbias, mut dweight, mut dnorm_bias] = [(); 3].map(|()| vec![9.0f32; cols]);
    let (key, p) = (Key::new(3, 4), Probability::new(0.5).unwrap());
    let emulator = Emulator::new().order(77);
    let pass = dropout_add_norm::Backward {
        shape,
        norm: Norm::layer(1e-5),
        saved: dropout_add_norm::Saved::Sum(&s),
        weight: &weight,
        stats: &stats,
        dy: &dy,
        ds: Some(&ds),
        dresidual: &mut dresidual,
        dx: &mut dx,
        dbias: Some(Gradient::Write(&mut dbias)),
        dweight: Some(Gradient::Write(&mut dweight)),
        dnorm_bias: Some(Gradient::Write(&mut dnorm_bias)),
    };
    emulator.run(&Dropout::new(key, p), pass).unwrap();

    let [mut sum_dx, mut sum_dweight, mut sum_dy] = [(); 3].map(|()| vec![0i32; cols]);
    for r in 0..rows {
        for c in 0..cols {
            let t = ds_at(r, c) + dy_at(r, c) * weight_at(c);
            let kept = if key.keeps(p, r as u32, c as u64) { 2 * t } else { 0 };
            let given = (dresidual[r * cols + c].to_f32(), dx[r * cols + c].to_f32());
            assert_eq!(given, (t as f32, kept as f32), "row {r}, column {c}");
            sum_dx[c] += kept;
            sum_dweight[c] += dy_at(r, c) * s_at(r, c);
            sum_dy[c] += dy_at(r, c);
        }
    }
    for (given, sum) in [(dbias, sum_dx), (dweight, sum_dweight), (dnorm_bias, sum_dy)] {
        assert_eq!(given, sum.into_iter().map(|sum| sum as f32).collect::<Vec<_>>());
    }
    // s, dy and ds once, and the weight twice, for whole tiles of rows at most; two passes would read two tensors more.
    let read = 16 * emulator.traffic().reads.of_width(16);
    let most = 5 * rows.next_multiple_of(64) * cols * size_of::<T>();
    assert!(read <= most as u64, "{read} bytes read, not {most}");
}

#[test]
fn norm_sums_of_a_warp_a_row() {
    norm_sums_in_one_pass::<bf16>(Shape::new(2051, 264));
    norm_sums_in_one_pass::<f32>(Shape::new(2100, 24));
}

#[test]
fn norm_sums_of_two_warps_a_row() {
    norm_sums_in_one_pass::<f16>(Shape::new(2065, 520));
}

#[test]
fn norm_sums_of_two_warps_a_row_in_f32() {
    norm_sums_in_one_pass::<f32>(Shape::new(2048, 520));
}

#[test]
fn norm_sums_of_four_warps_a_row() {
    norm_sums_in_one_pass::<bf16>(Shape::new(2050, 1032));
}
