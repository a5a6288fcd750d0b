//! `dropout`: y = D(x), and its gradient dx = D(dy) with the same mask.

use super::{Draw, Dropout, Shape, check_len};
use crate::error::Error;

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout";

/// Checks a call on an input and an output of `x` and `y` elements (gradients alike).
pub(crate) fn check<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    [(x_name, x), (y_name, y)]: [(&'static str, usize); 2],
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    check_len(NAME, x_name, elements, x)?;
    check_len(NAME, y_name, elements, y)?;
    dropout.draw(NAME, shape)
}
