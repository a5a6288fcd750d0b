//! The one table of cases, the backends that are run through it, and the checks of each row: an operator's are the file
//! that bears its name.
#![allow(dead_code)] // every test file uses a part

pub mod backend;
pub mod bias_act_dropout;
pub mod dropout;
pub mod dropout_add;
pub mod dropout_add_norm;
pub mod embedding_dropout;
pub mod keep_mask;
pub mod softmax_dropout;
pub mod swiglu_dropout;
pub mod trials;

use crate::oracle::Bounded;
use backend::TestBackend;
use fused_dropout::{
    Dropout, Dtype, Gradient, Groups, In, Key, Memory, Mode, Probability, Readable, RowMap,
    Scaling, Shape, Shard, Source,
};
use half::{bf16, f16};

/// What came of the checks so far.
#[derive(Default)]
pub struct Tally {
    pub passed: usize,
    /// Which failed, and why.
    pub failures: Vec<String>,
}

impl Tally {
    /// Counts one check of a row of the table on tensors of T.
    pub fn count<T, B: TestBackend>(
        &mut self,
        backend: &B,
        what: &str,
        call: &Call,
        result: Result<(), String>,
    ) {
        let Err(why) = result else {
            self.passed += 1;
            return;
        };
        let (name, dtype) = (backend.name(), std::any::type_name::<T>());
        self.failures.push(format!("{name} {what} {dtype}: {why}\n    {call:?}"));
    }
}

/// A row of the table: which mask, of which shape.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub dropout: Dropout<'static>,
    pub shape: Shape,
    /// Elements that the tensors start behind an allocation's start.
    pub offset: usize,
    /// Elements between the rows of a matrix, once, twice or three times; 0: they follow each other.
    pub gap: usize,
    /// Whether the probability lies in the backend's memory.
    pub resident_p: bool,
}

pub const P: [f64; 6] = [0.1, 0.0, 0.5, 1.0 / 65536.0, 0.9, 1.0];

/// Odd sizes, tails on both sides of a vector, a block and a warp, tall and flat ones.
const SHAPES: [(usize, usize); 36] = [
    (0, 0),
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 7),
    (2, 8),
    (3, 9),
    (1, 15),
    (5, 16),
    (2, 17),
    (64, 1),
    (65, 2),
    (63, 8),
    (130, 3),
    (7, 31),
    (6, 33),
    (3, 63),
    (9, 64),
    (2, 65),
    (33, 127),
    (12, 128),
    (11, 129),
    (5, 255),
    (4, 512),
    (130, 520),
    (3, 1000),
    (8, 1024),
    (3, 1025),
    (2, 2049),
    (1, 4099),
    (3, 4104),
    (1, 16_384),
    (1, 20_000),
    (4097, 5),
    (4200, 8),
    (19, 1536),
];

fn row_map(index: usize, rows: usize) -> RowMap<'static> {
    match index % 6 {
        0 => RowMap::WHOLE,
        1 => RowMap::Contiguous { first: (u32::MAX - rows as u32).wrapping_add(1).max(1) },
        2 => RowMap::Blocks { first: 5, block: 3, stride: 70_000 },
        3 => RowMap::Attention {
            first: 9,
            heads: 2,
            queries: 3,
            head_stride: 50,
            batch_stride: 400_001,
        },
        4 => {
            let list: Vec<u32> =
                (0..rows as u32).map(|r| r.wrapping_mul(0x9E37_79B9) ^ 77).collect();
            RowMap::Explicit(list.leak())
        }
        _ => RowMap::Blocks { first: 1 << 31, block: 64, stride: 64 },
    }
}

/// The table: every shape with every p; the rest of a row goes round with strides that are coprime,
/// so that neighbours differ in everything.
pub fn table() -> Vec<Call> {
    let mut table = Vec::new();
    for (s, (rows, cols)) in SHAPES.into_iter().enumerate() {
        let shape = Shape::new(rows, cols);
        for (i, p) in P.into_iter().enumerate() {
            let n = s * 7 + i * 5 + 1;
            let limit = (fused_dropout::MAX_COLS - cols as u64) / 8 * 8;
            let shard =
                Shard { first_col: [0, 8, 1 << 23, limit, 0][n % 5], rows: row_map(n, rows) };
            let stream = [7, 0, u64::MAX, 1 << 32, (1 << 40) + 3][n / 2 % 5];
            let seed = [42, u64::MAX, 0, 1][n / 3 % 4];
            // Mostly the usual training call.
            let mode = if n % 11 == 3 { Mode::Inference } else { Mode::Training };
            let scaling = if n % 4 == 1 { Scaling::Classic } else { Scaling::Inverted };
            let p = Probability::new(p).unwrap();
            let groups = match n % 9 {
                2 => Groups::features(3),
                5 => Groups::samples(2),
                8 => Groups { rows: u32::MAX, columns_together: n % 2 == 0 },
                _ => Groups::NONE,
            };
            let dropout = Dropout::new(Key::new(seed, stream), p).shard(shard).groups(groups);
            let offset = [0, 0, 1, 3, 0, 8, 5][n % 7];
            let gap = [0, 8, 0, 5, 24][n / 5 % 5];
            // With the stream number in memory, and without; never with classic scaling, which refuses it.
            let resident_p = n % 2 == 0;
            let dropout = dropout.mode(mode).scaling(scaling);
            table.push(Call { dropout, shape, offset, gap, resident_p });
        }
    }
    table
}

/// Every so-many-th row of the table, at another probability for every two shapes: the rest of a row goes
/// round with the difference of both.
pub fn thinned(cases: &[Call], every: usize, rest: usize) -> Vec<Call> {
    let rows = cases.chunks(P.len()).enumerate();
    let some = rows.flat_map(|(shape, row)| {
        let shift = shape / 2;
        row.iter().enumerate().filter(move |(p, _)| (shift + p) % every == rest)
    });
    some.map(|(_, call)| *call).collect()
}

/// Values that depend on their index: ordinary ones, and among them NaN, infinities, zeros of both
/// signs, subnormals and the largest numbers.
pub fn values<T: Dtype>(len: usize, salt: u64, specials: bool) -> Vec<T> {
    let value = |i: usize| {
        let mixed =
            rand_philox::splitmix64((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt);
        let ordinary = (mixed >> 40) as f32 / (1 << 22) as f32 - 2.0;
        let special = match mixed % 97 {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => f32::NEG_INFINITY,
            3 => -0.0,
            4 => 1e-42,
            5 => -6e-8,
            6 => 3e38,
            7 => 65504.0,
            _ => ordinary,
        };
        T::from_f32(if specials { special } else { ordinary })
    };
    (0..len).map(value).collect()
}

/// [`values`] up to 14 on both sides, where every activation is flat.
pub fn far_out<T: Dtype>(len: usize, salt: u64, specials: bool) -> Vec<T> {
    let values = values::<T>(len, salt, specials).into_iter();
    values.map(|x| T::from_f32(x.to_f32() * 7.0)).collect()
}

/// [`values`] for sums whose order of magnitude f32 and f64 must agree on: special ones in every eleventh row, and none
/// that is finite and beyond 1e10.
pub fn some_special<T: Dtype>(len: usize, cols: usize, salt: u64) -> Vec<T> {
    let ordinary = values::<T>(len, salt, false);
    with_special(ordinary, cols, salt)
}

/// `ordinary` with special values in every eleventh row.
pub fn with_special<T: Dtype>(mut ordinary: Vec<T>, cols: usize, salt: u64) -> Vec<T> {
    let special = values::<T>(ordinary.len(), salt, true);
    for (i, special) in special.into_iter().enumerate() {
        let value = special.to_f32();
        let large = value.is_finite() && value.abs() > 1e10;
        if (i / cols.max(1)) as u64 % 11 == salt % 11 && i.is_multiple_of(3) {
            ordinary[i] = if large { T::from_f32(1e10f32.copysign(value)) } else { special };
        }
    }
    ordinary
}

/// Bits, all NaNs alike.
pub fn bits<T: Dtype>(value: T) -> u32 {
    let value = value.to_f32();
    if value.is_nan() { u32::MAX } else { value.to_bits() }
}

pub fn elements(call: &Call) -> usize {
    call.shape.rows * call.shape.cols
}

/// An input that is there for some calls.
pub fn given<T, M: Memory>(tensor: &Option<impl Readable<T, M>>) -> Option<In<'_, T, M>> {
    tensor.as_ref().map(|tensor| tensor as _)
}

/// What is there after `sums` were added to `before`, in one addition an element.
pub fn added(before: &[f32], sums: &[f32]) -> Vec<f32> {
    before.iter().zip(sums).map(|(before, sum)| before + sum).collect()
}

pub fn same<T: Dtype>(what: &str, given: &[T], expected: &[T]) -> Result<(), String> {
    match (0..expected.len()).find(|&i| bits(given[i]) != bits(expected[i])) {
        Some(i) => Err(format!("{what}[{i}] is {:?}, not {:?}", given[i], expected[i])),
        None => Ok(()),
    }
}

/// [`within`] of sums and products in which an infinity may meet what is 0 or of either sign: where the oracle has no
/// finite number, neither has `given`, and that is all that is promised.
pub fn close<T: Dtype>(what: &str, given: &[T], expected: &[Bounded]) -> Result<(), String> {
    let nan = Bounded { value: f64::NAN, error: 0.0 };
    let pair = |(given, expected): (&T, &Bounded)| match expected.value.is_finite() {
        false if !given.to_f32().is_finite() => (T::from_f32(f32::NAN), nan),
        _ => (*given, *expected),
    };
    let (given, expected): (Vec<T>, Vec<Bounded>) = given.iter().zip(expected).map(pair).unzip();
    within(what, &given, &expected)
}

pub fn within<T: Dtype>(what: &str, given: &[T], expected: &[Bounded]) -> Result<(), String> {
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let zero = expected.value == 0.0 && expected.error == 0.0;
        let value = f64::from(given.to_f32());
        // A value at the end of the storage type's range may be rounded to infinity.
        let edge = expected.value + value.signum() * expected.error;
        let overflows =
            value.is_infinite() && f64::from(T::from_f32(edge as f32).to_f32()) == value;
        if zero && given.to_f32().to_bits() != 0 || !expected.admits(value) && !overflows {
            return Err(format!("{what}[{i}] is {value:e}, not {expected:?}"));
        }
    }
    Ok(())
}
