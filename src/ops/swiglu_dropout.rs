//! `swiglu_dropout`: y = D(silu(gate) · up), the inner half of a gated feed-forward layer (SwiGLU: Shazeer, 2020).
//!
//! silu(x) = x σ(x), σ the logistic function. The backward pass computes it again from gate: nothing else is saved. gate and
//! up may be the halves of one projection's rows, each a [`Strided`](crate::Strided) tensor. So may dgate and dup on a device,
//! as [`Pointer`](crate::device::Pointer)s, and the output over gate beside up. On the CPU an output borrows its slice alone:
//! dgate and dup are two tensors there, and gate is in place only where up lies in another tensor.

use super::{Check, Shape};
use crate::error::Error;
use crate::tensor::{In, Memory, Out, Source};

/// The operator's name in errors.
pub(crate) const NAME: &str = "swiglu_dropout";

/// y = D(silu(gate) · up).
///
/// Kept: (silu(gate) · up) · scale, rounded once; both products are in f32, and the first may overflow. Dropped: +0.
pub struct Forward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// `[rows, cols]`. The backward pass needs it: compute in place only where a copy is kept.
    pub gate: Source<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub up: In<'a, T, M>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
}

/// dgate = (g · up) · silu'(gate) and dup = g · silu(gate), with g = D(dy).
///
/// Dropped: +0 in both.
pub struct Backward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// The forward pass's, `[rows, cols]`.
    pub gate: In<'a, T, M>,
    /// The forward pass's, `[rows, cols]`.
    pub up: In<'a, T, M>,
    /// `[rows, cols]`; in place: it lies in dup.
    pub dy: Source<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub dgate: Out<'a, T, M>,
    /// `[rows, cols]`.
    pub dup: Out<'a, T, M>,
}

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.source("gate", &self.gate)?;
        check.matrix("up", self.up)?;
        check.matrix("y", &*self.y)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.matrix("gate", self.gate)?;
        check.matrix("up", self.up)?;
        check.source("dy", &self.dy)?;
        check.matrix("dgate", &*self.dgate)?;
        check.matrix("dup", &*self.dup)?;
        Ok(self.shape)
    }
}
