//! The mask contract, version 1: which elements are dropped, as a function of seed, stream, row and
//! column, and of nothing else. `CONTRACT.md` is the specification; this file is that page in Rust.

use crate::error::Error;
use rand_philox::{philox4x32_10, splitmix64};

/// Version of the contract that this crate implements. Any change of a mask is a new version.
pub const CONTRACT_VERSION: u32 = 1;

/// Columns that share one Philox block.
pub const OCTET: usize = 8;

/// Columns lie below this bound, 2^35: 2^32 octets.
pub const MAX_COLS: u64 = 1 << 35;

/// A probability of **dropping**, with a resolution of 1/65536.
///
/// The probability asked for is rounded once, to the nearest multiple of 1/65536 (ties to even), and
/// everything else follows from the rounded one: [`effective`](Self::effective) gives it back, and
/// the scale belongs to it, so that `E[output] = input` holds exactly.
///
/// ```
/// use fused_dropout::Probability;
/// let p = Probability::new(0.1)?;
/// assert_eq!(p.threshold(), 6554);
/// assert_eq!(p.effective(), 6554.0 / 65536.0);
/// assert!(Probability::new(f64::NAN).is_err());
/// # Ok::<(), fused_dropout::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Probability {
    threshold: u32,
}

impl Probability {
    /// Nothing is dropped.
    pub const ZERO: Self = Self { threshold: 0 };
    /// Everything is dropped.
    pub const ONE: Self = Self { threshold: 65536 };

    /// The probability `p` of dropping, rounded to a multiple of 1/65536. A p of at most 1/131072 becomes 0: see
    /// [`nonvanishing`](Self::nonvanishing).
    ///
    /// # Errors
    /// [`Error::Argument`] unless `0 <= p <= 1` (a NaN fails the same comparison).
    pub fn new(p: f64) -> Result<Self, Error> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::argument("Probability::new", "p", "0 <= p <= 1", p));
        }
        Ok(Self {
            // p * 65536 is exact: a multiplication by a power of two.
            threshold: (p * 65536.0).round_ties_even() as u32,
        })
    }

    /// [`new`](Self::new) for a probability that a person set: one that rounding would turn into never, or into always, is
    /// refused. 0 and 1 themselves are what they are.
    ///
    /// ```
    /// use fused_dropout::Probability;
    /// assert_eq!(Probability::new(0.000_005)?, Probability::ZERO);
    /// assert!(Probability::nonvanishing(0.000_005).is_err());
    /// assert_eq!(Probability::nonvanishing(0.000_008)?.threshold(), 1);
    /// # Ok::<(), fused_dropout::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] as [`new`](Self::new), and where `0 < p <= 1 / 131072` or `1 - 1 / 131072 <= p < 1`.
    pub fn nonvanishing(p: f64) -> Result<Self, Error> {
        let rounded = Self::new(p)?;
        if rounded.effective() == p || !matches!(rounded, Self::ZERO | Self::ONE) {
            return Ok(rounded);
        }
        let expected =
            "0, 1, or a probability that is neither when rounded to a multiple of 1/65536";
        Err(Error::argument("Probability::nonvanishing", "p", expected, p))
    }

    /// `round_half_even(p * 65536)`, 0 ..= 65536: a 16-bit lane below it is dropped.
    pub fn threshold(self) -> u32 {
        self.threshold
    }

    /// The probability that is really realised, `threshold / 65536`, exactly.
    pub fn effective(self) -> f64 {
        f64::from(self.threshold) / 65536.0
    }

    /// The probability of keeping, `1 - effective()`, exactly representable in f32.
    pub fn keep(self) -> f32 {
        (65536 - self.threshold) as f32 / 65536.0
    }

    /// What a kept value is multiplied by in inverted scaling: `65536 / (65536 - threshold)` rounded
    /// to f32, and 0 where everything is dropped.
    pub fn scale(self) -> f32 {
        if self.threshold == 65536 {
            return 0.0;
        }
        // The quotient of two exact f32 values, correctly rounded.
        65536.0 / (65536 - self.threshold) as f32
    }

    /// The one u64 that [`Dropout::resident_p`](crate::Dropout::resident_p) reads from a backend's memory, as kernels want it:
    /// in the high 32 bits those of [`scale`](Self::scale), in the low ones `threshold · 2^16`, or 1 where nothing is dropped
    /// and 2 where everything is.
    ///
    /// ```
    /// use fused_dropout::Probability;
    /// let packed = Probability::new(0.5)?.packed();
    /// assert_eq!(packed as u32, 32768 << 16);
    /// assert_eq!(f32::from_bits((packed >> 32) as u32), 2.0);
    /// # Ok::<(), fused_dropout::Error>(())
    /// ```
    pub fn packed(self) -> u64 {
        u64::from(self.scale().to_bits()) << 32 | u64::from(high_threshold(self.threshold))
    }

    /// The probability that [`packed`](Self::packed) made `packed` of, if there is one.
    pub(crate) fn of_packed(packed: u64) -> Option<Self> {
        let threshold = match packed as u32 {
            KEEPS_ALL => 0,
            DROPS_ALL => 65536,
            high => high >> 16,
        };
        Some(Self { threshold }).filter(|p| p.packed() == packed)
    }
}

/// In place of a threshold in the upper half of a word, where no random numbers are needed.
pub(crate) const KEEPS_ALL: u32 = 1;
pub(crate) const DROPS_ALL: u32 = 2;

/// A threshold, 0 ..= 65536, as kernels compare with it: in the upper half of a word, as which 0 and 65536 are the same.
pub(crate) fn high_threshold(threshold: u32) -> u32 {
    match threshold {
        0 => KEEPS_ALL,
        65536 => DROPS_ALL,
        _ => threshold << 16,
    }
}

/// The key of one application of dropout: the run's seed, and the number of the application.
///
/// Every (training step, site) takes a stream of its own. The same key gives the same mask, in the
/// forward pass, in the backward pass and in a recomputation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Chosen once a run.
    pub seed: u64,
    /// Which application of dropout this is.
    pub stream: u64,
}

impl Key {
    /// The key of `stream` under `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream }
    }

    /// The Philox key: `splitmix64(seed)`, low half first.
    pub fn philox_key(self) -> [u32; 2] {
        let mixed = splitmix64(self.seed);
        [mixed as u32, (mixed >> 32) as u32]
    }

    /// The four random words of an octet of columns: columns `8 * octet ..= 8 * octet + 7` of `row`.
    pub fn words(self, row: u32, octet: u32) -> [u32; 4] {
        let counter = [octet, row, self.stream as u32, (self.stream >> 32) as u32];
        philox4x32_10(counter, self.philox_key())
    }

    /// The 16-bit lane of one element. `col` lies below 2^35; higher bits are not looked at.
    pub fn lane(self, row: u32, col: u64) -> u16 {
        let words = self.words(row, (col / OCTET as u64) as u32);
        let j = (col % OCTET as u64) as usize;
        (words[j / 2] >> (16 * (j % 2))) as u16
    }

    /// Whether the element at (`row`, `col`) of the whole tensor is kept under `p`.
    ///
    /// This is the contract, an element at a time: for looking at a mask, not for speed.
    ///
    /// ```
    /// use fused_dropout::{Key, Probability};
    /// let key = Key::new(42, 7);
    /// let p = Probability::new(0.5)?;
    /// let line: String = (0..8).map(|col| if key.keeps(p, 0, col) { '1' } else { '0' }).collect();
    /// assert_eq!(line.len(), 8);
    /// # Ok::<(), fused_dropout::Error>(())
    /// ```
    pub fn keeps(self, p: Probability, row: u32, col: u64) -> bool {
        u32::from(self.lane(row, col)) >= p.threshold
    }
}

/// Which logical row of the whole tensor a local row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RowMap<'a> {
    /// `first + r`: the whole tensor, or a slice of its leading dimension.
    Contiguous {
        /// Logical row of local row 0.
        first: u32,
    },
    /// `first + (r / block) * stride + r % block`: a slice of the sequence, or of the heads, in every
    /// batch entry.
    Blocks {
        /// Logical row of local row 0.
        first: u32,
        /// Local rows in a block; at least 1.
        block: u32,
        /// Logical rows from one block's start to the next.
        stride: u32,
    },
    /// `first + b * batch_stride + h * head_stride + q` for local row `(b * heads + h) * queries + q`:
    /// any slice of batch, heads and queries of an attention tensor at once.
    Attention {
        /// Logical row of local row 0.
        first: u32,
        /// Local heads; at least 1.
        heads: u32,
        /// Local queries; at least 1.
        queries: u32,
        /// Logical rows from one head to the next (the whole tensor's queries).
        head_stride: u32,
        /// Logical rows from one batch entry to the next (the whole tensor's heads * queries).
        batch_stride: u32,
    },
    /// A logical row for each local row: packed sequences, tokens sent to experts, anything else.
    Explicit(&'a [u32]),
}

impl RowMap<'_> {
    /// Row 0 first, as in a tensor that is not sharded.
    pub const WHOLE: RowMap<'static> = RowMap::Contiguous { first: 0 };

    /// The logical row of `local`.
    ///
    /// # Panics
    /// Where an explicit list is shorter, or a block of 0 rows makes no sense; operators refuse such maps.
    #[inline]
    pub fn logical(&self, local: usize) -> u32 {
        match *self {
            RowMap::Explicit(list) => list[local],
            _ => self.affine(local as u64) as u32,
        }
    }

    /// `first + b * batch_stride + h * head_stride + q`, which covers every map but the explicit one.
    fn affine(&self, local: u64) -> u128 {
        let (first, heads, queries, head_stride, batch_stride) = self.coefficients();
        let (block, query) = (local / u64::from(queries), local % u64::from(queries));
        let (batch, head) = (block / u64::from(heads), block % u64::from(heads));
        u128::from(first)
            + u128::from(batch) * u128::from(batch_stride)
            + u128::from(head) * u128::from(head_stride)
            + u128::from(query)
    }

    /// (first, heads, queries, head_stride, batch_stride) of the affine map that this map is. A
    /// contiguous map is one of blocks of 2^31 rows that follow each other without a gap; an
    /// explicit one has none, and is answered as the whole tensor's.
    pub(crate) fn coefficients(&self) -> (u32, u32, u32, u32, u32) {
        match *self {
            RowMap::Contiguous { first } => (first, 1, 1 << 31, 0, 1 << 31),
            RowMap::Blocks { first, block, stride } => (first, 1, block, 0, stride),
            RowMap::Attention { first, heads, queries, head_stride, batch_stride } => {
                (first, heads, queries, head_stride, batch_stride)
            }
            RowMap::Explicit(_) => RowMap::WHOLE.coefficients(),
        }
    }

    /// Refuses a map that cannot give `rows` rows a logical row each within u32.
    pub(crate) fn check(&self, operator: &'static str, rows: usize) -> Result<(), Error> {
        let refuse = |expected: String, given: String| {
            Err(Error::argument(operator, "rows", expected, given))
        };
        if rows as u64 > 1 << 32 {
            return refuse("at most 2^32 rows".into(), format!("{rows}"));
        }
        if let RowMap::Explicit(list) = self {
            if list.len() != rows {
                return refuse(format!("a list of {rows} logical rows"), format!("{}", list.len()));
            }
            return Ok(());
        }
        let (_, heads, queries, _, _) = self.coefficients();
        if heads == 0 || queries == 0 {
            return refuse("at least one row in a block".into(), format!("{self:?}"));
        }
        // Strides may be of any size, so the last row need not be the largest: the last one of the
        // complete heads, or of the complete batch entries, can lie beyond it.
        let rows = rows as u64;
        let head = u64::from(queries);
        let batch = head * u64::from(heads);
        let largest = [rows, rows - rows % head, rows - rows % batch]
            .into_iter()
            .filter(|&end| end > 0)
            .map(|end| self.affine(end - 1))
            .max()
            .unwrap_or(0);
        if largest > u128::from(u32::MAX) {
            return refuse("logical rows below 2^32".into(), format!("{largest}"));
        }
        Ok(())
    }
}

/// A shard: where a local tensor lies in the whole one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard<'a> {
    /// Logical column of local column 0, a multiple of 8.
    pub first_col: u64,
    /// Logical rows of the local rows.
    pub rows: RowMap<'a>,
}

impl Shard<'_> {
    /// The tensor is not sharded.
    pub const WHOLE: Shard<'static> = Shard { first_col: 0, rows: RowMap::WHOLE };

    /// Refuses a shard that `rows` x `cols` elements cannot have.
    pub(crate) fn check(
        &self,
        operator: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<(), Error> {
        if !self.first_col.is_multiple_of(OCTET as u64) {
            return Err(Error::argument(operator, "first_col", "a multiple of 8", self.first_col));
        }
        let end = u128::from(self.first_col) + cols as u128;
        if end > u128::from(MAX_COLS) {
            return Err(Error::argument(operator, "first_col", "columns below 2^35", end));
        }
        self.rows.check(operator, rows)
    }
}

/// Which elements share one decision: a structured mask.
///
/// The decision of the element at logical (row, col) is that of the element at (⌊row / rows⌋, col), or at
/// (⌊row / rows⌋, 0) where a row's columns are together. No other generator, and no other key: the same
/// mask on every backend and shard, as an ordinary one.
///
/// ```
/// use fused_dropout::{Dropout, Groups, Key, Probability};
/// let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1)?);
/// let sequence = 512;
/// // DropPath: a sample of 512 rows is dropped as a whole, or not.
/// let path = drop.groups(Groups::samples(sequence));
/// // Variational dropout: the same features at each of a sample's 512 positions.
/// let variational = drop.groups(Groups::features(sequence));
/// # let _ = (path, variational);
/// # Ok::<(), fused_dropout::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Groups {
    /// Consecutive logical rows that share their decisions; at least 1.
    pub rows: u32,
    /// Whether all columns share one decision.
    pub columns_together: bool,
}

impl Groups {
    /// A decision for each element.
    pub const NONE: Self = Self { rows: 1, columns_together: false };

    /// One decision for every `rows` rows, all their columns together: stochastic depth (Huang et al.,
    /// ECCV 2016), also named DropPath, with the rows of a sample; LayerDrop (Fan et al., ICLR 2020) with
    /// the rows of the batch; spatial dropout (Tompson et al., CVPR 2015) with 1, where a row is a channel's
    /// map.
    pub const fn samples(rows: u32) -> Self {
        Self { rows, columns_together: true }
    }

    /// One decision for each column in every `rows` rows: variational dropout (Gal and Ghahramani, NIPS
    /// 2016) with the rows of a sequence; spatial dropout where a column is a channel.
    pub const fn features(rows: u32) -> Self {
        Self { rows, columns_together: false }
    }

    /// Refuses groups of no rows.
    pub(crate) fn check(&self, operator: &'static str) -> Result<(), Error> {
        if self.rows == 0 {
            return Err(Error::argument(operator, "groups", "at least one row in a group", 0));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probability_that_vanishes_is_refused_where_asked() {
        let half_a_step = 1.0 / 131_072.0;
        for p in [f64::MIN_POSITIVE, half_a_step, 1.0 - half_a_step, 1.0 - f64::EPSILON, -0.1] {
            assert!(Probability::nonvanishing(p).is_err(), "{p}");
        }
        for p in [0.0, -0.0, 1.0, half_a_step.next_up(), 0.1, (1.0 - half_a_step).next_down()] {
            assert_eq!(Probability::nonvanishing(p), Probability::new(p), "{p}");
        }
    }

    #[test]
    fn every_probability_comes_back_from_its_packed_form_and_nothing_else_does() {
        for threshold in 0..=65536 {
            let p = Probability { threshold };
            assert_eq!(Probability::of_packed(p.packed()), Some(p));
        }
        let half = Probability { threshold: 32768 }.packed();
        for garbage in [0, 3, u64::MAX, half + 1, half + 65536, half ^ 1 << 40] {
            assert_eq!(Probability::of_packed(garbage), None, "{garbage:x}");
        }
    }

    #[test]
    fn affine_maps_agree_with_their_formulas() {
        let blocks = RowMap::Blocks { first: 5, block: 3, stride: 10 };
        let attention = RowMap::Attention {
            first: 7,
            heads: 2,
            queries: 3,
            head_stride: 100,
            batch_stride: 1000,
        };
        for r in 0..30u32 {
            assert_eq!(RowMap::Contiguous { first: 9 }.logical(r as usize), 9 + r);
            assert_eq!(blocks.logical(r as usize), 5 + (r / 3) * 10 + r % 3);
            let (b, h, q) = (r / 6, r / 3 % 2, r % 3);
            assert_eq!(attention.logical(r as usize), 7 + b * 1000 + h * 100 + q);
        }
    }
}
