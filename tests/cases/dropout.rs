//! `dropout`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::dropout::{Backward, Forward};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "dropout", call, dropout::<T, B>(backend, call));
}

/// Forward and backward pass are one function: a row takes one of them, apart and in place.
fn dropout<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let values = values::<T>(elements(call), 1, true);
    let expected = oracle::dropout(&call.dropout, shape, &values);
    let x = backend.matrix(&values, call, 0);
    let mut y = backend.matrix(&vec![T::from_f32(5.0); values.len()], call, 1);
    let mut both = backend.matrix(&values, call, 2);
    if call.offset.is_multiple_of(2) {
        backend.run(call, Forward { shape, x: Source::Tensor(&x), y: &mut y })?;
        backend.run(call, Forward { shape, x: Source::InPlace, y: &mut both })?;
    } else {
        backend.run(call, Backward { shape, dy: Source::Tensor(&x), dx: &mut y })?;
        backend.run(call, Backward { shape, dy: Source::InPlace, dx: &mut both })?;
    }
    same("y", &backend.rows(&y)?, &expected)?;
    same("y in place", &backend.rows(&both)?, &expected)
}
