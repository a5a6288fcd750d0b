//! What each operator is: its parameters and the checks on them, without a backend.

use crate::error::Error;
use crate::mask::{Groups, Key, OCTET, Place, Probability, RowMap};

pub mod bias_act_dropout;
pub mod dropout;
pub mod dropout_add;
pub mod dropout_add_norm;
pub mod embedding_dropout;
pub mod keep_mask;
pub mod norm;
pub mod softmax_dropout;
pub mod sum_rows;

/// The shape of a row-major tensor without gaps, all leading dimensions counted into `rows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Product of the leading dimensions; 0 and 1 included. A flat vector is one row.
    pub rows: usize,
    /// The last dimension; 0 and 1 included.
    pub cols: usize,
}

impl Shape {
    /// A tensor of `rows` x `cols` elements.
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols }
    }

    /// Elements in the tensor.
    pub(crate) fn elements(self, operator: &'static str) -> Result<usize, Error> {
        // isize::MAX bytes is what a slice can hold; f32 is the widest storage type.
        self.rows.checked_mul(self.cols).filter(|&n| n <= isize::MAX as usize / 4).ok_or_else(
            || {
                let given = format!("{} x {}", self.rows, self.cols);
                Error::argument(operator, "shape", "rows * cols elements that fit in memory", given)
            },
        )
    }
}

/// Whether dropout acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Elements are dropped.
    #[default]
    Training,
    /// Nothing is dropped; the result is deterministic and equals the training result on average.
    Inference,
}

/// On which side the scale stands that makes both modes agree on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// Training multiplies kept values by `1 / (1 - p)`, inference is the identity. The usual one.
    #[default]
    Inverted,
    /// Training leaves kept values as they are, inference multiplies by `1 - p` (Srivastava et al.,
    /// JMLR 2014). At p = 1 inference gives zeros.
    Classic,
}

/// One application of dropout: with which mask, and what is done with it.
///
/// ```
/// use fused_dropout::{Dropout, Key, Mode, Place, Probability, RowMap};
/// let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1)?);
/// // The same application on a shard that starts at column 1024 and row 64 of the whole tensor:
/// let shard = drop.at(Place { first_col: 1024, rows: RowMap::Contiguous { first: 64 } });
/// let evaluation = drop.mode(Mode::Inference);
/// # let _ = (shard, evaluation);
/// # Ok::<(), fused_dropout::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dropout<'a> {
    /// Which mask.
    pub key: Key,
    /// Probability of dropping.
    pub p: Probability,
    /// Training (the default) or inference.
    pub mode: Mode,
    /// Inverted (the default) or classic scaling.
    pub scaling: Scaling,
    /// Where the local tensor lies in the whole one; by default it is the whole one.
    pub place: Place<'a>,
    /// Which elements share a decision; by default none do.
    pub groups: Groups,
}

impl<'a> Dropout<'a> {
    /// Dropout in training, inverted scaling, on a tensor that is not sharded.
    pub fn new(key: Key, p: Probability) -> Self {
        Self {
            key,
            p,
            mode: Mode::Training,
            scaling: Scaling::Inverted,
            place: Place::WHOLE,
            groups: Groups::EACH,
        }
    }

    /// The same in another mode.
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// The same with another scaling.
    pub fn scaling(self, scaling: Scaling) -> Self {
        Self { scaling, ..self }
    }

    /// The same on a shard.
    pub fn at(self, place: Place<'a>) -> Self {
        Self { place, ..self }
    }

    /// The same with decisions that several elements share.
    pub fn groups(self, groups: Groups) -> Self {
        Self { groups, ..self }
    }

    /// Checks the place against `shape`, and resolves mode and scaling.
    pub(crate) fn draw(&self, operator: &'static str, shape: Shape) -> Result<Draw<'a>, Error> {
        self.place.check(operator, shape.rows, shape.cols)?;
        self.groups.check(operator)?;
        let (p, scale) = match (self.mode, self.scaling) {
            (Mode::Training, Scaling::Inverted) => (self.p, self.p.scale()),
            (Mode::Training, Scaling::Classic) => (self.p, 1.0),
            (Mode::Inference, Scaling::Inverted) => (Probability::ZERO, 1.0),
            // Selected to be zero, like everything that is dropped: 0 * NaN would not be zero.
            (Mode::Inference, Scaling::Classic) if self.p == Probability::ONE => (self.p, 0.0),
            (Mode::Inference, Scaling::Classic) => (Probability::ZERO, self.p.keep()),
        };
        Ok(Draw {
            key: self.key,
            threshold: p.threshold(),
            scale,
            // Below 2^32: the place was checked against 2^35 columns. The one first column that is
            // not, 2^35 itself, belongs to a tensor without columns, which draws nothing.
            first_octet: (self.place.first_col / OCTET as u64) as u32,
            rows: self.place.rows,
            groups: self.groups,
        })
    }
}

/// A checked application of dropout, reduced to what every backend computes from: an element is kept
/// where its lane is at least `threshold`, and a kept value is multiplied by `scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Draw<'a> {
    pub key: Key,
    /// 0 (nothing is dropped: no random numbers are needed) ..= 65536 (everything is: none either).
    pub threshold: u32,
    pub scale: f32,
    /// Octet of local column 0.
    pub first_octet: u32,
    pub rows: RowMap<'a>,
    pub groups: Groups,
}

impl Draw<'_> {
    /// The row whose lanes decide about local row `local`.
    pub fn row(&self, local: usize) -> u32 {
        self.rows.logical(local) / self.groups.rows
    }

    /// The octet whose lanes decide about local octet `local`; all of them are lane 0 where columns are
    /// together.
    pub fn octet(&self, local: usize) -> u32 {
        if self.groups.columns_together { 0 } else { self.first_octet + local as u32 }
    }
}

/// Refuses a tensor of another length than the operator's shape asks for.
pub(crate) fn check_len(
    operator: &'static str,
    argument: &'static str,
    expected: usize,
    given: usize,
) -> Result<(), Error> {
    if expected == given {
        return Ok(());
    }
    Err(Error::argument(operator, argument, format!("{expected} elements"), given))
}
