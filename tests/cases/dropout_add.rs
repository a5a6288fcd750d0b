//! `dropout_add`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::dropout_add::{Backward, Forward};

pub fn check<T: Dtype, L: Lab>(lab: &L, call: &Call, tally: &mut Tally) {
    tally.count::<T, L>(lab, "dropout_add", call, forward::<T, L>(lab, call));
    tally.count::<T, L>(lab, "dropout_add dx", call, dx::<T, L>(lab, call));
    tally.count::<T, L>(lab, "dropout_add dbias", call, dbias::<T, L>(lab, call));
}

fn forward<T: Dtype, L: Lab>(lab: &L, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let (x, residual) =
        (values::<T>(elements(call), 2, true), values::<T>(elements(call), 4, true));
    let bias = values::<T>(shape.cols, 3, true);
    let [x_there, residual_there] = [&x, &residual].map(|tensor| lab.tensor(tensor, call.offset));
    for bias in [None, Some(&bias[..])] {
        let expected = oracle::dropout_add(&call.dropout, shape, &x, bias, &residual);
        let bias = bias.map(|bias| lab.tensor(bias, call.offset / 2));
        let run = |residual, before: &[T]| {
            let mut y = lab.tensor(before, call.offset);
            let bias = given(&bias);
            lab.run(call, Forward { shape, x: &x_there, bias, residual, y: &mut y })?;
            lab.contents(&y)
        };
        same("y", &run(Source::Tensor(&residual_there), &x)?, &expected)?;
        same("y in place", &run(Source::InPlace, &residual)?, &expected)?;
    }
    Ok(())
}

fn dx<T: Dtype, L: Lab>(lab: &L, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let dy = values::<T>(elements(call), 5, true);
    let expected = oracle::dropout(&call.dropout, shape, &dy);
    let mut dx = lab.tensor(&vec![T::from_f32(0.0); dy.len()], call.offset);
    let dy = lab.tensor(&dy, call.offset);
    let pass = Backward { shape, dy: Source::Tensor(&dy), dx: Some(&mut dx), dbias: None };
    lab.run(call, pass)?;
    same("dx", &lab.contents(&dx)?, &expected)
}

fn dbias<T: Dtype, L: Lab>(lab: &L, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let before = values::<f32>(shape.cols, 7, false);
    for specials in [false, true] {
        let dy = values::<T>(elements(call), 6, specials);
        let expected = oracle::dropout(&call.dropout, shape, &dy);
        let sums = oracle::dbias(&call.dropout, shape, &dy);
        let dy_there = lab.tensor(&dy, call.offset);
        // In place for one of the two.
        let source = if specials { Source::InPlace } else { Source::Tensor(&dy_there as _) };
        let mut dx = lab.tensor(&dy, call.offset);
        let mut dbias = lab.tensor(&before, call.offset / 2);
        let gradient = Some(Gradient::Write(&mut dbias));
        lab.run(call, Backward { shape, dy: source, dx: Some(&mut dx), dbias: gradient })?;
        same("dx", &lab.contents(&dx)?, &expected)?;
        same("dbias", &lab.contents(&dbias)?, &sums)?;
        // Alone, and added to what is there.
        let mut dbias = lab.tensor(&before, call.offset / 2);
        let gradient = Some(Gradient::Add(&mut dbias));
        let dy = Source::Tensor(&dy_there as _);
        lab.run(call, Backward { shape, dy, dx: None, dbias: gradient })?;
        same("dbias, added", &lab.contents(&dbias)?, &added(&before, &sums))?;
    }
    Ok(())
}
