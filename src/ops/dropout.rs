//! `dropout`: y = D(x), and its gradient dx = D(dy) with the same mask.

use super::{Check, Shape};
use crate::error::Error;
use crate::tensor::{In, Memory, Out, Source};

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout";

/// y = D(x): x · scale, rounded once, where kept; +0 where dropped.
pub struct Forward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// `[rows, cols]`.
    pub x: Source<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
}

/// dx = D(dy), with the mask of the forward pass of the same [`Dropout`](crate::Dropout).
pub struct Backward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// `[rows, cols]`.
    pub dy: Source<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub dx: Out<'a, T, M>,
}

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.source("x", &self.x)?;
        check.matrix("y", &*self.y)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.source("dy", &self.dy)?;
        check.matrix("dx", &*self.dx)?;
        Ok(self.shape)
    }
}
