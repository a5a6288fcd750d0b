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

use super::norm::{Affine, Norm, check_affine, check_stats};
use super::{Draw, Dropout, Shape, check_len, sum_rows};
use crate::error::Error;
use std::convert::Infallible;

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout_add_norm";

/// What s is computed from.
///
/// `A` is how a backend takes a tensor: a slice on the CPU, device memory on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs<A> {
    /// `[rows, cols]`.
    pub x: A,
    /// `[cols]`.
    pub bias: Option<A>,
    /// `[rows, cols]`.
    pub residual: A,
}

/// Where the backward pass finds s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved<A> {
    /// s itself, as the forward pass gave it: `[rows, cols]`.
    Sum(A),
    /// The forward pass's inputs: s is computed again.
    Inputs(Inputs<A>),
}

/// The gradients of the parameters, each where it is asked for: f32, `[cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamGrads<G> {
    /// Of the bias of x.
    pub dbias: Option<G>,
    /// Of the norm's weight.
    pub dweight: Option<G>,
    /// Of the norm's bias.
    pub dnorm_bias: Option<G>,
}

impl<G> Default for ParamGrads<G> {
    /// None.
    fn default() -> Self {
        Self { dbias: None, dweight: None, dnorm_bias: None }
    }
}

// Each of these is a few tensors of one kind: `map` makes a few things of another kind of them.

impl<A> Inputs<A> {
    pub(crate) fn try_map<B, E>(
        self,
        mut map: impl FnMut(A) -> Result<B, E>,
    ) -> Result<Inputs<B>, E> {
        let (x, residual) = (map(self.x)?, map(self.residual)?);
        Ok(Inputs { x, bias: self.bias.map(map).transpose()?, residual })
    }

    pub(crate) fn map<B>(self, mut map: impl FnMut(A) -> B) -> Inputs<B> {
        let Ok(mapped) = self.try_map(|a| Ok::<B, Infallible>(map(a)));
        mapped
    }
}

impl<A> Saved<A> {
    pub(crate) fn try_map<B, E>(
        self,
        mut map: impl FnMut(A) -> Result<B, E>,
    ) -> Result<Saved<B>, E> {
        Ok(match self {
            Saved::Sum(s) => Saved::Sum(map(s)?),
            Saved::Inputs(inputs) => Saved::Inputs(inputs.try_map(map)?),
        })
    }

    pub(crate) fn map<B>(self, mut map: impl FnMut(A) -> B) -> Saved<B> {
        let Ok(mapped) = self.try_map(|a| Ok::<B, Infallible>(map(a)));
        mapped
    }

    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn as_ref(&self) -> Saved<&A> {
        match self {
            Saved::Sum(s) => Saved::Sum(s),
            Saved::Inputs(Inputs { x, bias, residual }) => {
                Saved::Inputs(Inputs { x, bias: bias.as_ref(), residual })
            }
        }
    }
}

impl<G> ParamGrads<G> {
    pub(crate) fn try_map<B, E>(
        self,
        mut map: impl FnMut(G) -> Result<B, E>,
    ) -> Result<ParamGrads<B>, E> {
        Ok(ParamGrads {
            dbias: self.dbias.map(&mut map).transpose()?,
            dweight: self.dweight.map(&mut map).transpose()?,
            dnorm_bias: self.dnorm_bias.map(&mut map).transpose()?,
        })
    }

    pub(crate) fn map<B>(self, mut map: impl FnMut(G) -> B) -> ParamGrads<B> {
        let Ok(mapped) = self.try_map(|g| Ok::<B, Infallible>(map(g)));
        mapped
    }

    pub(crate) fn as_ref(&self) -> ParamGrads<&G> {
        ParamGrads {
            dbias: self.dbias.as_ref(),
            dweight: self.dweight.as_ref(),
            dnorm_bias: self.dnorm_bias.as_ref(),
        }
    }

    /// Whether any is asked for.
    pub(crate) fn any(&self) -> bool {
        self.dbias.is_some() || self.dweight.is_some() || self.dnorm_bias.is_some()
    }
}

/// f32 elements of scratch memory that the gradients of parameters need on a device: three sums over the
/// rows ([`sum_rows`](super::sum_rows)), and three means of each row.
pub fn workspace_len(shape: Shape) -> usize {
    sum_rows::workspace_len(shape).saturating_add(shape.rows).saturating_mul(3)
}

/// Lengths of the tensors of a forward call, in elements.
pub(crate) struct ForwardLens {
    pub inputs: Inputs<usize>,
    pub affine: Affine<usize>,
    pub s: Option<usize>,
    pub y: usize,
    pub stats: Option<usize>,
}

/// Checks a forward call.
pub(crate) fn check_forward<'a>(
    dropout: &Dropout<'a>,
    norm: &Norm,
    shape: Shape,
    lens: &ForwardLens,
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    norm.check(NAME)?;
    check_inputs(shape, elements, &lens.inputs)?;
    check_affine(NAME, shape.cols, &lens.affine)?;
    check_optional("s", elements, lens.s)?;
    check_len(NAME, "y", elements, lens.y)?;
    if let Some(stats) = lens.stats {
        check_stats(NAME, shape.rows, stats)?;
    }
    dropout.draw(NAME, shape)
}

/// Lengths of the tensors of a backward call, in elements.
pub(crate) struct BackwardLens {
    pub saved: Saved<usize>,
    pub weight: usize,
    pub stats: usize,
    pub dy: usize,
    pub ds: Option<usize>,
    pub dresidual: usize,
    pub dx: usize,
    pub grads: ParamGrads<usize>,
}

/// Checks a backward call.
pub(crate) fn check_backward<'a>(
    dropout: &Dropout<'a>,
    norm: &Norm,
    shape: Shape,
    lens: &BackwardLens,
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    norm.check(NAME)?;
    match &lens.saved {
        Saved::Sum(s) => check_len(NAME, "s", elements, *s)?,
        Saved::Inputs(inputs) => check_inputs(shape, elements, inputs)?,
    }
    check_len(NAME, "weight", shape.cols, lens.weight)?;
    check_stats(NAME, shape.rows, lens.stats)?;
    check_len(NAME, "dy", elements, lens.dy)?;
    check_optional("ds", elements, lens.ds)?;
    check_len(NAME, "dresidual", elements, lens.dresidual)?;
    check_len(NAME, "dx", elements, lens.dx)?;
    check_optional("dbias", shape.cols, lens.grads.dbias)?;
    check_optional("dweight", shape.cols, lens.grads.dweight)?;
    check_optional("dnorm_bias", shape.cols, lens.grads.dnorm_bias)?;
    dropout.draw(NAME, shape)
}

fn check_inputs(shape: Shape, elements: usize, inputs: &Inputs<usize>) -> Result<(), Error> {
    check_len(NAME, "x", elements, inputs.x)?;
    check_optional("bias", shape.cols, inputs.bias)?;
    check_len(NAME, "residual", elements, inputs.residual)
}

fn check_optional(
    argument: &'static str,
    expected: usize,
    given: Option<usize>,
) -> Result<(), Error> {
    given.map_or(Ok(()), |given| check_len(NAME, argument, expected, given))
}
