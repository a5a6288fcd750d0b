//! What each operator is: the description of each pass, with its tensors by name, and the checks on them. A
//! description is the same for every backend; `M` says in which memory its tensors lie.

use crate::error::Error;
use crate::tensor::{Columns, Gradient, Memory, Readable, Source};

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

/// The shape of a row-major tensor, all leading dimensions counted into `rows`. Its rows follow each other without gaps,
/// but for a [`Strided`](crate::Strided) one.
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

    /// `[rows, cols]`, whose rows may have a stride.
    pub fn matrix<T, M: Memory>(
        &self,
        name: &'static str,
        tensor: &dyn Readable<T, M>,
    ) -> Result<(), Error> {
        let Some(stride) = tensor.row_stride() else {
            return self.contiguous(name, tensor);
        };
        let Shape { rows, cols } = self.shape;
        if stride < cols {
            let expected = format!("a row stride of at least {cols} columns");
            return Err(Error::argument(self.operator, name, expected, stride));
        }
        if let Some(Columns { range, whole }) = tensor.columns() {
            if range.len() != cols || range.end > stride {
                let expected = format!("{cols} columns of rows of {stride}");
                return Err(Error::argument(self.operator, name, expected, format!("{range:?}")));
            }
            if rows.checked_mul(stride) == Some(whole) {
                return Ok(());
            }
            let expected = format!("a whole tensor of {rows} rows of {stride} elements");
            return Err(Error::argument(
                self.operator,
                name,
                expected,
                format!("{whole} elements"),
            ));
        }
        let last_row = rows.saturating_sub(1).saturating_mul(stride);
        if last_row > isize::MAX as usize {
            let expected = format!("a row stride with which {rows} rows fit in memory");
            return Err(Error::argument(self.operator, name, expected, stride));
        }
        let least = last_row + if rows == 0 { 0 } else { cols };
        let most = rows.saturating_mul(stride);
        if (least..=most).contains(&tensor.elements()) {
            return Ok(());
        }
        let lengths =
            if least == most { elements(least) } else { format!("{least} to {most} elements") };
        let expected = format!("{lengths}, {rows} rows that begin {stride} apart");
        Err(Error::argument(self.operator, name, expected, tensor.elements()))
    }

    /// `[rows, cols]` without a stride.
    pub fn contiguous<T, M: Memory>(
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
        gradient.as_ref().map_or(Ok(()), |gradient| self.row(name, gradient.tensor()))
    }

    /// Any other length.
    pub fn len<T, M: Memory>(
        &self,
        name: &'static str,
        expected: usize,
        tensor: &dyn Readable<T, M>,
    ) -> Result<(), Error> {
        check_tensor(self.operator, name, expected, tensor)
    }
}

/// Refuses a tensor of another length than the operator's shape asks for, and one with a stride.
pub(crate) fn check_tensor<T, M: Memory>(
    operator: &'static str,
    argument: &'static str,
    expected: usize,
    tensor: &dyn Readable<T, M>,
) -> Result<(), Error> {
    if let Some(stride) = tensor.row_stride() {
        let given = format!("rows that begin {stride} apart");
        return Err(Error::argument(operator, argument, "a contiguous tensor", given));
    }
    check_len(operator, argument, expected, tensor.elements())
}

/// Refuses another length than the operator's shape asks for.
pub(crate) fn check_len(
    operator: &'static str,
    argument: &'static str,
    expected: usize,
    given: usize,
) -> Result<(), Error> {
    if expected == given {
        return Ok(());
    }
    Err(Error::argument(operator, argument, elements(expected), given))
}

/// A number of elements in words.
fn elements(number: usize) -> String {
    format!("{number} element{}", if number == 1 { "" } else { "s" })
}
