//! `bias_act_dropout`: y = D(act(x + bias)), the inner half of a feed-forward layer.
//!
//! The backward pass recomputes the activation from x: nothing else is saved. Its bias gradient is a sum
//! over rows in the fixed order of [`sum_rows`](super::sum_rows).

use super::{Draw, Dropout, Shape, check_len};
use crate::error::Error;

/// The operator's name in errors.
pub(crate) const NAME: &str = "bias_act_dropout";

/// What stands between bias and dropout.
///
/// Computed in f32 with a relative error of a few roundings, also far out on the negative side; the bounds
/// are in CONTRACT.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// Lengths of the tensors of a call, in elements.
pub(crate) struct Lens {
    pub x: usize,
    pub bias: Option<usize>,
    /// dy of a backward call.
    pub dy: Option<usize>,
    /// The output's name, and its elements.
    pub out: (&'static str, usize),
    pub dbias: Option<usize>,
}

/// Checks a call, forward or backward.
pub(crate) fn check<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    lens: &Lens,
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    check_len(NAME, "x", elements, lens.x)?;
    if let Some(bias) = lens.bias {
        check_len(NAME, "bias", shape.cols, bias)?;
    }
    if let Some(dy) = lens.dy {
        check_len(NAME, "dy", elements, dy)?;
    }
    check_len(NAME, lens.out.0, elements, lens.out.1)?;
    if let Some(dbias) = lens.dbias {
        check_len(NAME, "dbias", shape.cols, dbias)?;
    }
    dropout.draw(NAME, shape)
}
