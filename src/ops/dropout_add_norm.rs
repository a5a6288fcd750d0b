//! `dropout_add_norm`: s = residual + D(x + bias), y = norm(s), the end of a residual branch and the
//! normalisation behind it, LayerNorm or RMSNorm ([`norm`](super::norm)).
//!
//! s is [`dropout_add`](super::dropout_add)'s, rounded to the storage type, and y is the norm of what s was
//! rounded to: so the fused operator is the chain of the two, and a backward pass from a stored s is
//! exact. Pre-norm models keep s, the next residual; post-norm ones need y alone, and their backward
//! pass computes s again from its inputs with the same mask.
//!
//! With g = dy · weight and the n columns' means written E:
//!
//! - layer: dnorm = rstd · (g - E\[g\] - xhat · E\[g · xhat\]); RMS: the same without E\[g\];
//! - dresidual = ds + dnorm, with ds the gradient that reaches s by another way; dx = D(dresidual), from
//!   its value before it is rounded;
//! - dweight = Σ dy · xhat, dnorm_bias = Σ dy, dbias = scale · Σ (kept ? dresidual : 0), over the rows in
//!   the fixed order of [`sum_rows`](super::sum_rows), in f32.

use super::norm::{Norm, stats_len};
use super::{Check, Shape};
use crate::error::Error;
use crate::tensor::{Gradient, In, Memory, Out, Source};

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout_add_norm";

/// s = residual + D(x + bias), y = norm(s).
///
/// s is bit for bit what [`dropout_add`](super::dropout_add) gives; y is the norm of s as it was rounded, within the
/// bound that CONTRACT.md states. A row whose deviation and epsilon are 0 gives the norm's bias.
pub struct Forward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// LayerNorm or RMSNorm.
    pub norm: Norm,
    /// `[rows, cols]`.
    pub x: In<'a, T, M>,
    /// `[cols]`.
    pub bias: Option<In<'a, T, M>>,
    /// `[rows, cols]`; in place: it lies in s.
    pub residual: Source<In<'a, T, M>>,
    /// Of the norm, `[cols]`.
    pub weight: In<'a, T, M>,
    /// Of the norm, `[cols]`.
    pub norm_bias: Option<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub s: Option<Out<'a, T, M>>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
    /// For the backward pass, `[rows, 2]`: the mean (0 for RMS) and the reciprocal deviation of each row.
    pub stats: Option<Out<'a, f32, M>>,
}

/// Where the backward pass finds s. `I` is how a tensor is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved<I> {
    /// s itself, as the forward pass gave it: `[rows, cols]`.
    Sum(I),
    /// The forward pass's inputs: s is computed again.
    Inputs {
        /// `[rows, cols]`.
        x: I,
        /// `[cols]`.
        bias: Option<I>,
        /// `[rows, cols]`.
        residual: I,
    },
}

/// dresidual = ds + dnorm and dx = D(dresidual), and the gradients of the parameters that are asked for, in the order
/// of [`sum_rows`](super::sum_rows). dx is computed from dresidual before that is rounded.
pub struct Backward<'a, T, M: Memory> {
    /// Rows and columns.
    pub shape: Shape,
    /// As in the forward pass.
    pub norm: Norm,
    /// s, or what it was computed from.
    pub saved: Saved<In<'a, T, M>>,
    /// The forward pass's, `[cols]`.
    pub weight: In<'a, T, M>,
    /// The forward pass's, `[rows, 2]`.
    pub stats: In<'a, f32, M>,
    /// Gradient of y, `[rows, cols]`.
    pub dy: In<'a, T, M>,
    /// Gradient that reaches s by another way, `[rows, cols]`: in pre-norm models.
    pub ds: Option<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub dresidual: Out<'a, T, M>,
    /// `[rows, cols]`.
    pub dx: Out<'a, T, M>,
    /// Of the bias of x, `[cols]`.
    pub dbias: Option<Gradient<'a, M>>,
    /// Of the norm's weight, `[cols]`.
    pub dweight: Option<Gradient<'a, M>>,
    /// Of the norm's bias, `[cols]`.
    pub dnorm_bias: Option<Gradient<'a, M>>,
}

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        self.norm.check(NAME)?;
        check.matrix("x", self.x)?;
        self.bias.map_or(Ok(()), |bias| check.row("bias", bias))?;
        check.source("residual", &self.residual)?;
        check.row("weight", self.weight)?;
        self.norm_bias.map_or(Ok(()), |bias| check.row("norm_bias", bias))?;
        match (&self.s, &self.residual) {
            (Some(s), _) => check.matrix("s", &**s)?,
            (None, Source::Tensor(_)) => {}
            (None, Source::InPlace) => {
                return Err(Error::argument(
                    NAME,
                    "s",
                    "the tensor that the residual lies in",
                    "none",
                ));
            }
        }
        check.matrix("y", &*self.y)?;
        self.stats
            .as_ref()
            .map_or(Ok(()), |stats| check.len("stats", stats_len(self.shape.rows), &**stats))?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        self.norm.check(NAME)?;
        match self.saved {
            Saved::Sum(s) => check.matrix("s", s)?,
            Saved::Inputs { x, bias, residual } => {
                check.matrix("x", x)?;
                bias.map_or(Ok(()), |bias| check.row("bias", bias))?;
                check.matrix("residual", residual)?;
            }
        }
        check.row("weight", self.weight)?;
        check.len("stats", stats_len(self.shape.rows), self.stats)?;
        check.matrix("dy", self.dy)?;
        self.ds.map_or(Ok(()), |ds| check.matrix("ds", ds))?;
        check.matrix("dresidual", &*self.dresidual)?;
        check.matrix("dx", &*self.dx)?;
        check.gradient("dbias", &self.dbias)?;
        check.gradient("dweight", &self.dweight)?;
        check.gradient("dnorm_bias", &self.dnorm_bias)?;
        Ok(self.shape)
    }
}
