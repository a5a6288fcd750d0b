//! The parameter structures that host and kernels share; `kernels/mask.cuh` declares the same ones,
//! field for field.

use super::{Address, Device, pointer};
use crate::error::Error;
use crate::mask::{DROPS_ALL, Groups, KEEPS_ALL, RowMap, high_threshold};
use crate::ops::norm::{Norm, NormKind};
use crate::ops::{MaskParams, Resident};
use crate::tensor;
use bytemuck::{Pod, Zeroable};

/// Division by a constant without a division instruction: `(n * multiplier) >> 32 >> shift`, with the
/// 33rd bit of the multiplier added as `n`. Exact for every u32 n (Granlund and Montgomery, PLDI 1994).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Divisor {
    pub divisor: u32,
    pub multiplier: u32,
    pub shift: u32,
}

impl Divisor {
    /// Division by `divisor`, which is at least 1.
    pub fn new(divisor: u32) -> Self {
        // q = (((n - t) >> 1) + t) >> shift with t = mulhi(n, multiplier); multiplier is the low half
        // of ceil(2^(32 + bits) / divisor), bits = ceil(log2 divisor). Divisor 1: bits = 0 has no
        // room for the halving, so 1 is told apart by shift = 32 and answered as n.
        if divisor == 1 {
            return Self { divisor, multiplier: 0, shift: 32 };
        }
        let bits = 32 - (divisor - 1).leading_zeros();
        let wide = (1u128 << (32 + bits)).div_ceil(u128::from(divisor));
        Self { divisor, multiplier: wide as u32, shift: bits - 1 }
    }

    /// The kernels' arithmetic, for the test that holds it to `/`.
    #[cfg(test)]
    fn quotient(self, n: u32) -> u32 {
        if self.shift == 32 {
            return n;
        }
        let t = ((u64::from(n) * u64::from(self.multiplier)) >> 32) as u32;
        (((n - t) >> 1) + t) >> self.shift
    }
}

/// Division by a constant of an index below 2^31: `((n + 1) * multiplier) >> 32 >> shift`, which is
/// three instructions less than [`Divisor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct IndexDivisor {
    /// `2^32 - divisor`: the remainder is `n + quotient * minus_divisor`.
    pub minus_divisor: u32,
    pub multiplier: u32,
    pub shift: u32,
}

impl IndexDivisor {
    /// Division by `divisor`, 1 ..= 2^31.
    pub fn new(divisor: u32) -> Self {
        // With k = 32 + shift, 2^shift <= d < 2^(shift + 1), the multiplier m below 2^k / d lies in
        // 2^31 ..= 2^32 - 1, and e = 2^k - m * d in 1 ..= d. So (n + 1) * m / 2^k is (n + 1) / d less
        // (n + 1) * e / 2^k / d, which is above 0 and, for n + 1 <= 2^31, at most 1/d: at least n / d and
        // below (n + 1) / d, between which no integer but the quotient lies.
        let shift = 31 - divisor.leading_zeros();
        let multiplier = (((1u64 << (32 + shift)) - 1) / u64::from(divisor)) as u32;
        Self { minus_divisor: divisor.wrapping_neg(), multiplier, shift }
    }

    /// The kernels' arithmetic, for the test that holds it to `/`.
    #[cfg(test)]
    pub fn quotient(self, n: u32) -> u32 {
        ((u64::from(n + 1) * u64::from(self.multiplier)) >> 32 >> self.shift) as u32
    }

    #[cfg(test)]
    pub fn remainder(self, n: u32) -> u32 {
        n.wrapping_add(self.quotient(n).wrapping_mul(self.minus_divisor))
    }
}

/// A matrix, or where `pointer` is 0 none, and the elements from one row's start to the next one's: `InMatrix` and
/// `OutMatrix` in `kernels/vector.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Matrix {
    pub pointer: u64,
    pub stride: u64,
}

impl Matrix {
    pub const NONE: Self = Self { pointer: 0, stride: 0 };

    /// A matrix in a device's memory.
    pub fn of<D: Device>(matrix: &tensor::Matrix<Address<'_, D>>) -> Self {
        Self { pointer: matrix.data.pointer, stride: matrix.stride as u64 }
    }

    /// [`of`](Self::of) a matrix that may be absent.
    pub fn of_optional<D: Device>(matrix: &Option<tensor::Matrix<Address<'_, D>>>) -> Self {
        matrix.as_ref().map_or(Self::NONE, Self::of)
    }
}

/// The octets of one launch, counted row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Octets {
    pub count: u32,
    pub per_row: IndexDivisor,
    /// Columns of the launch.
    pub cols: u64,
}

/// `RowMap` with its list in device memory (`list`, null for an affine map), and the local row that
/// the launch starts at.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Rows {
    pub list: u64,
    /// Logical row of local row 0; where the map is contiguous, of the launch's row 0.
    pub first: u32,
    pub head_stride: u32,
    pub batch_stride: u32,
    /// Local row of the launch's row 0, where a large tensor is launched in parts.
    pub offset: u32,
    pub queries: Divisor,
    pub heads: Divisor,
}

/// The mask of one launch: Philox key and counter, threshold and scale. A packed probability is what
/// [`Probability::packed`](crate::Probability::packed) says.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Mask {
    /// The ten round keys, (k0, k1) a round, so that no thread computes them.
    pub round_keys: [u32; 20],
    /// Stream number, read at run time from here unless null.
    pub stream_pointer: u64,
    /// Stream number, low word first, where `stream_pointer` is null.
    pub stream: [u32; 2],
    /// The probability, packed, read at run time from here unless null.
    pub probability: u64,
    /// Where it is null: the threshold, 1 ..= 65535, in the upper half of a word: a lane below it is dropped. Where no
    /// random numbers are needed, [`KEEPS_ALL`] or [`DROPS_ALL`].
    pub high_threshold: u32,
    /// Where it is null: what kept values are multiplied by.
    pub scale: f32,
    /// Octet of the launch's column 0.
    pub first_octet: u32,
    pub padding: u32,
    pub rows: Rows,
    /// Logical rows that share their decisions.
    pub group_rows: Divisor,
    /// 1: lane 0 of octet 0 decides about all columns of a row.
    pub columns_together: u32,
    /// 1: the logical row is `rows.first` + the launch's row, and no thread divides.
    pub contiguous: u32,
    /// 1: contiguous, random, not in groups, and neither stream number nor probability in device memory. The usual
    /// case, for which kernels have a path of their own.
    pub plain: u32,
}

impl Mask {
    /// The mask of `params` for the part of the tensor that starts at local row `row` and octet `octet`.
    pub fn new<D: Device>(
        operator: &'static str,
        params: &MaskParams<'_>,
        resident: &Resident<'_, D>,
    ) -> Result<Self, Error> {
        let (stream_pointer, probability) = (pointer(&resident.stream), pointer(&resident.p));
        let row_list = pointer(&resident.row_list);
        if row_list == 0 && matches!(params.rows, RowMap::Explicit(_)) {
            return Err(Error::argument(
                operator,
                "rows",
                "an explicit row list in device memory (Dropout::row_list)",
                "a list on the host",
            ));
        }
        let (first, heads, queries, head_stride, batch_stride) = params.rows.coefficients();
        let high_threshold = high_threshold(params.threshold);
        let contiguous = row_list == 0 && matches!(params.rows, RowMap::Contiguous { .. });
        Ok(Self {
            round_keys: round_keys(params.key.philox_key()),
            stream_pointer,
            stream: [params.key.stream as u32, (params.key.stream >> 32) as u32],
            probability,
            high_threshold,
            scale: params.scale,
            first_octet: params.first_octet,
            padding: 0,
            rows: Rows {
                list: row_list,
                first,
                head_stride,
                batch_stride,
                offset: 0,
                queries: Divisor::new(queries),
                heads: Divisor::new(heads),
            },
            group_rows: Divisor::new(params.groups.rows),
            columns_together: u32::from(params.groups.columns_together),
            contiguous: u32::from(contiguous),
            plain: u32::from(
                contiguous
                    && high_threshold > DROPS_ALL
                    && params.groups == Groups::NONE
                    && (stream_pointer, probability) == (0, 0),
            ),
        })
    }

    /// What kept values are multiplied by.
    pub fn factor(&self) -> Factor {
        Factor { probability: self.probability, value: self.scale, padding: 0 }
    }

    /// The mask that keeps everything, as it is.
    pub fn all_kept(self) -> Self {
        Self { probability: 0, high_threshold: KEEPS_ALL, scale: 1.0, plain: 0, ..self }
    }

    /// The mask that drops everything, of whatever shape.
    pub fn all_dropped(mut self) -> Self {
        self.rows.list = 0;
        let (probability, high_threshold) = (0, DROPS_ALL);
        Self { probability, high_threshold, plain: 0, first_octet: 0, contiguous: 1, ..self }
    }

    /// The same mask for a part that starts `rows` rows and `octets` octets further on.
    pub fn advanced(mut self, rows: u32, octets: u32) -> Self {
        self.rows.offset += rows;
        if self.contiguous != 0 {
            self.rows.first = self.rows.first.wrapping_add(rows);
        }
        self.first_octet += octets;
        self
    }
}

/// A factor: `value`, or where `probability` is not null, the scale of the packed probability that lies there. The twin of
/// the one in `kernels/mask.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Factor {
    pub probability: u64,
    pub value: f32,
    pub padding: u32,
}

impl Factor {
    pub const ONE: Self = Self { probability: 0, value: 1.0, padding: 0 };
}

/// A normalisation of rows: the twin of the one in `kernels/norm.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct RowNorm {
    /// 1 over the columns of a row: what a value counts for in a mean.
    pub share: f32,
    pub epsilon: f32,
    /// 1: LayerNorm; 0: RMSNorm.
    pub layer: u32,
}

impl RowNorm {
    pub fn new(norm: &Norm, cols: usize) -> Self {
        let layer = u32::from(norm.kind == NormKind::Layer);
        Self { share: 1.0 / cols.max(1) as f32, epsilon: norm.epsilon, layer }
    }
}

// The kernels assert the same sizes.
const _: () = assert!(size_of::<RowNorm>() == 12);
const _: () = assert!(size_of::<Divisor>() == 12 && size_of::<IndexDivisor>() == 12);
const _: () = assert!(size_of::<Octets>() == 24);
const _: () = assert!(size_of::<Rows>() == 48);
const _: () = assert!(size_of::<Mask>() == 192);
const _: () = assert!(size_of::<Factor>() == 16);

/// Philox4x32's key schedule: each round's key is the last one plus the two Weyl constants of
/// Salmon et al. (SC'11).
fn round_keys(key: [u32; 2]) -> [u32; 20] {
    let mut keys = [0; 20];
    for round in 0..10u32 {
        keys[2 * round as usize] = key[0].wrapping_add(round.wrapping_mul(0x9E37_79B9));
        keys[2 * round as usize + 1] = key[1].wrapping_add(round.wrapping_mul(0xBB67_AE85));
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisor_is_exact() {
        let edges = |d: u32| {
            let near = [0, 1, 2, d - 1, d, d.wrapping_add(1), d.wrapping_mul(2), u32::MAX];
            let last = u32::MAX / d * d;
            near.into_iter().chain([last, last.wrapping_sub(1), 0x8000_0000, 0x7fff_ffff])
        };
        let divisors = (1..2000).chain((0..32).flat_map(|b| {
            let power = 1u32 << b;
            [power, power.wrapping_sub(1).max(1), power.wrapping_add(1)]
        }));
        for d in divisors.chain([u32::MAX, u32::MAX - 1]) {
            for n in edges(d) {
                assert_eq!(Divisor::new(d).quotient(n), n / d, "{n} / {d}");
                if d <= 1 << 31 {
                    let n = n & 0x7fff_ffff;
                    let index = IndexDivisor::new(d);
                    assert_eq!(
                        (index.quotient(n), index.remainder(n)),
                        (n / d, n % d),
                        "{n} / {d}"
                    );
                }
            }
        }
    }
}
