//! What each operator is: the description of each pass, with its tensors by name, and the checks on them. A
//! description is the same for every backend; `M` says in which memory its tensors lie.

use crate::error::Error;
use crate::tensor::{Gradient, Memory, Readable, Source};

mod application;

pub mod bias_act_dropout;
pub mod dropout;
pub mod dropout_add;
pub mod dropout_add_norm;
pub mod embedding_dropout;
pub mod keep_mask;
pub mod norm;
pub mod softmax_dropout;
pub mod sum_rows;
pub mod swiglu_dropout;

pub use application::{AsDropout, Dropout, Mode, Scaling};
pub(crate) use application::{MaskParams, Resident};

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

/// The tensors of one pass, checked against its shape under the names of their fields.
pub(crate) struct Check {
    operator: &'static str,
    shape: Shape,
    elements: usize,
}

impl Check {
    /// Refuses a shape that fits in no memory.
    pub fn new(operator: &'static str, shape: Shape) -> Result<Self, Error> {
        Ok(Self { operator, shape, elements: shape.elements(operator)? })
    }

    /// `[rows, cols]`.
    pub fn matrix<T, M: Memory>(
        &self,
        name: &'static str,
        tensor: &dyn Readable<T, M>,
    ) -> Result<(), Error> {
        self.len(name, self.elements, tensor)
    }

    /// `[rows, cols]`, where it is not the output.
    pub fn source<T, M: Memory>(
        &self,
        name: &'static str,
        source: &Source<&dyn Readable<T, M>>,
    ) -> Result<(), Error> {
        match source {
            Source::Tensor(tensor) => self.matrix(name, *tensor),
            Source::InPlace => Ok(()),
        }
    }

    /// `[cols]`: a value a column.
    pub fn row<T, M: Memory>(
        &self,
        name: &'static str,
        tensor: &dyn Readable<T, M>,
    ) -> Result<(), Error> {
        self.len(name, self.shape.cols, tensor)
    }

    /// `[cols]`, where it is asked for.
    pub fn gradient<M: Memory>(
        &self,
        name: &'static str,
        gradient: &Option<Gradient<'_, M>>,
    ) -> Result<(), Error> {
        gradient.as_ref().map_or(Ok(()), |gradient| {
            check_len(self.operator, name, self.shape.cols, gradient.tensor().elements())
        })
    }

    /// Any other length.
    pub fn len<T, M: Memory>(
        &self,
        name: &'static str,
        expected: usize,
        tensor: &dyn Readable<T, M>,
    ) -> Result<(), Error> {
        check_len(self.operator, name, expected, tensor.elements())
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
