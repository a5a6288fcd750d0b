//! `bias_act_dropout`: y = D(act(x + bias)), the inner half of a feed-forward layer.
//!
//! The backward pass recomputes the activation from x: nothing else is saved. Its bias gradient is a sum
//! over rows in the fixed order of [`sum_rows`](super::sum_rows).

use super::{Check, Shape};
use crate::error::Error;
use crate::tensor::{Gradient, In, Memory, Out, Source};

/// The operator's name in errors.
pub(crate) const NAME: &str = "bias_act_dropout";

/// The activation between bias and dropout.
///
/// Computed in f32 with a relative error of a few roundings, also far out on the negative side; the bounds
/// are in CONTRACT.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// x Φ(x), Φ the standard normal distribution function: the exact GELU (Hendrycks and Gimpel, 2016);
    /// BERT's.
    Gelu,
    /// x σ(2u), u = √(2/π) (x + 0.044715 x³), which is 0.5 x (1 + tanh u): the approximation in the same
    /// paper; GPT-2's.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x σ(x), σ the logistic function (the same paper); also named swish.
    Silu,
    /// tanh x; of BERT's pooler and GPT-2's sequence summary.
    Tanh,
    /// x.
    Identity,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Self; 6] =
        [Self::Gelu, Self::GeluTanh, Self::Relu, Self::Silu, Self::Tanh, Self::Identity];
}

/// y = D(act(x + bias)).
///
/// Kept: act(x') · scale, rounded once, with x' = x or x + bias rounded to f32. Dropped: +0.
pub struct Forward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// The activation between bias and dropout.
    pub activation: Activation,
    /// `[rows, cols]`. The backward pass needs it: compute in place only where a copy is kept.
    pub x: Source<In<'a, T, M>>,
    /// `[cols]`.
    pub bias: Option<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
}

/// dx = D(dy) · act'(x + bias), and dbias: the sum over the rows of dx before it is rounded to T, in f32 and in the
/// order of [`sum_rows`](super::sum_rows).
///
/// Kept: (dy · scale) · act'(x'), the product's factors in f32. Dropped: +0.
pub struct Backward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// As in the forward pass.
    pub activation: Activation,
    /// The forward pass's, `[rows, cols]`.
    pub x: In<'a, T, M>,
    /// The forward pass's, `[cols]`.
    pub bias: Option<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub dy: Source<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub dx: Out<'a, T, M>,
    /// `[cols]`.
    pub dbias: Option<Gradient<'a, M>>,
}

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.source("x", &self.x)?;
        self.bias.map_or(Ok(()), |bias| check.row("bias", bias))?;
        check.matrix("y", &*self.y)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check.matrix("x", self.x)?;
        self.bias.map_or(Ok(()), |bias| check.row("bias", bias))?;
        check.source("dy", &self.dy)?;
        check.matrix("dx", &*self.dx)?;
        check.gradient("dbias", &self.dbias)?;
        Ok(self.shape)
    }
}
