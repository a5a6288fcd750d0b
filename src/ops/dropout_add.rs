//! `dropout_add`: y = residual + D(x + bias), the end of every residual branch.
//!
//! The gradient of the residual is `dy` itself. The bias gradient is a sum over rows in the fixed
//! order of [`sum_rows`](super::sum_rows).

use super::{Check, Shape};
use crate::error::Error;
use crate::tensor::{Gradient, In, Memory, Out, Source};

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout_add";

/// y = residual + D(x + bias).
///
/// Kept: `fma(x', scale, residual)`, rounded once, with x' = x or x + bias rounded to f32. Dropped: the residual.
pub struct Forward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// `[rows, cols]`.
    pub x: In<'a, T, M>,
    /// `[cols]`.
    pub bias: Option<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub residual: Source<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
}

/// dx = D(dy), and dbias: scale times the sum of kept dy over the rows, in f32 and in the order of
/// [`sum_rows`](super::sum_rows). The residual's gradient is dy. Without dx and dbias nothing is computed.
pub struct Backward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// `[rows, cols]`.
    pub dy: Source<In<'a, T, M>>,
    /// `[rows, cols]`; `None` where the bias gradient alone is asked for.
    pub dx: Option<Out<'a, T, M>>,
    /// `[cols]`.
    pub dbias: Option<Gradient<'a, M>>,
}

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.matrix("x", self.x)?;
        self.bias.map_or(Ok(()), |bias| check.row("bias", bias))?;
        check.source("residual", &self.residual)?;
        check.matrix("y", &*self.y)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.source("dy", &self.dy)?;
        match (&self.dx, &self.dy) {
            (Some(dx), _) => check.matrix("dx", &**dx)?,
            (None, Source::Tensor(_)) => {}
            (None, Source::InPlace) => {
                return Err(Error::argument(NAME, "dx", "the tensor that dy lies in", "none"));
            }
        }
        check.gradient("dbias", &self.dbias)?;
        Ok(self.shape)
    }
}
