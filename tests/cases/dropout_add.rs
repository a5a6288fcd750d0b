//! `dropout_add`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::dropout_add::{Backward, Forward};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "dropout_add", call, forward::<T, B>(backend, call));
    tally.count::<T, B>(backend, "dropout_add dx", call, dx::<T, B>(backend, call));
    tally.count::<T, B>(backend, "dropout_add dbias", call, dbias::<T, B>(backend, call));
}

fn forward<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let (x, residual) =
        (values::<T>(elements(call), 2, true), values::<T>(elements(call), 4, true));
    let bias = values::<T>(shape.cols, 3, true);
    let x_there = backend.matrix(&x, call, 0);
    let residual_there = backend.matrix(&residual, call, 1);
    for bias in [None, Some(&bias[..])] {
        let expected = oracle::dropout_add(&call.dropout, shape, &x, bias, &residual);
        let bias = bias.map(|bias| backend.tensor(bias, call.offset / 2));
        let run = |residual, before: &[T]| {
            let mut y = backend.matrix(before, call, 2);
            let bias = given(&bias);
            backend.run(call, Forward { shape, x: &x_there, bias, residual, y: &mut y })?;
            backend.rows(&y)
        };
        same("y", &run(Source::Tensor(&residual_there), &x)?, &expected)?;
        same("y in place", &run(Source::InPlace, &residual)?, &expected)?;
    }
    Ok(())
}

fn dx<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let dy = values::<T>(elements(call), 5, true);
    let expected = oracle::dropout(&call.dropout, shape, &dy);
    let mut dx = backend.matrix(&vec![T::from_f32(0.0); dy.len()], call, 0);
    let dy = backend.matrix(&dy, call, 1);
    let pass = Backward { shape, dy: Source::Tensor(&dy), dx: Some(&mut dx), dbias: None };
    backend.run(call, pass)?;
    same("dx", &backend.rows(&dx)?, &expected)
}

fn dbias<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let before = values::<f32>(shape.cols, 7, false);
    for specials in [false, true] {
        let dy = values::<T>(elements(call), 6, specials);
        let expected = oracle::dropout(&call.dropout, shape, &dy);
        let sums = oracle::dbias(&call.dropout, shape, &dy);
        let dy_there = backend.matrix(&dy, call, 0);
        // In place for one of the two.
        let source = if specials { Source::InPlace } else { Source::Tensor(&dy_there as _) };
        let mut dx = backend.matrix(&dy, call, 1);
        let mut dbias = backend.tensor(&before, call.offset / 2);
        let gradient = Some(Gradient::Write(&mut dbias));
        backend.run(call, Backward { shape, dy: source, dx: Some(&mut dx), dbias: gradient })?;
        same("dx", &backend.rows(&dx)?, &expected)?;
        same("dbias", &backend.contents(&dbias)?, &sums)?;
        // Alone, and added to what is there.
        let mut dbias = backend.tensor(&before, call.offset / 2);
        let gradient = Some(Gradient::Add(&mut dbias));
        let dy = Source::Tensor(&dy_there as _);
        backend.run(call, Backward { shape, dy, dx: None, dbias: gradient })?;
        same("dbias, added", &backend.contents(&dbias)?, &added(&before, &sums))?;
    }
    Ok(())
}
