//! `bias_act_dropout`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::Activation;
use fused_dropout::ops::bias_act_dropout::{Backward, Forward};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    // Two activations a row, so that neighbours in the table go through all of them.
    let count = Activation::ALL.len();
    let first = call.shape.rows + call.shape.cols + call.dropout.p.threshold() as usize % count;
    for activation in [first, first + 3].map(|i| Activation::ALL[i % count]) {
        let name = |pass: &str| format!("bias_act_dropout {activation:?} {pass}");
        let result = forward::<T, B>(backend, call, activation);
        tally.count::<T, B>(backend, &name("y"), call, result);
        let result = backward::<T, B>(backend, call, activation);
        tally.count::<T, B>(backend, &name("dx, dbias"), call, result);
    }
}

fn forward<T: Dtype, B: TestBackend>(
    backend: &B,
    call: &Call,
    activation: Activation,
) -> Result<(), String> {
    let shape = call.shape;
    let x = far_out::<T>(elements(call), 10, true);
    let bias = values::<T>(shape.cols, 11, true);
    let x_there = backend.matrix(&x, call, 0);
    for bias in [None, Some(&bias[..])] {
        let expected = oracle::bias_act_dropout(&call.dropout, shape, activation, &x, bias);
        let bias = bias.map(|bias| backend.tensor(bias, call.offset / 2));
        let run = |x, before: &[T]| {
            let mut y = backend.matrix(before, call, 1);
            backend.run(call, Forward { shape, activation, x, bias: given(&bias), y: &mut y })?;
            backend.rows(&y)
        };
        let y = run(Source::Tensor(&x_there), &vec![T::from_f32(5.0); x.len()])?;
        within("y", &y, &expected)?;
        same("y in place, against y", &run(Source::InPlace, &x)?, &y)?;
    }
    Ok(())
}

fn backward<T: Dtype, B: TestBackend>(
    backend: &B,
    call: &Call,
    activation: Activation,
) -> Result<(), String> {
    let shape = call.shape;
    for specials in [false, true] {
        let x = far_out::<T>(elements(call), 12, specials);
        let bias = values::<T>(shape.cols, 13, specials);
        let bias = specials.then_some(&bias[..]);
        let dy = match specials {
            true => some_special::<T>(elements(call), shape.cols, 14),
            false => values::<T>(elements(call), 14, false),
        };
        let (expected, sums) =
            oracle::bias_act_dropout_backward(&call.dropout, shape, activation, &x, bias, &dy);
        let (x, dy_there) = (backend.matrix(&x, call, 0), backend.matrix(&dy, call, 1));
        let bias = bias.map(|bias| backend.tensor(bias, call.offset / 2));
        let before = dy.clone();
        let run = |dy, mut dbias: Option<Gradient<'_, B::Backend>>| {
            let mut dx = backend.matrix(&before, call, 2);
            let (bias, dbias) = (given(&bias), dbias.as_mut().map(Gradient::reborrow));
            backend
                .run(call, Backward { shape, activation, x: &x, bias, dy, dx: &mut dx, dbias })?;
            backend.rows(&dx)
        };
        // In place for one of the two.
        let source = if specials { Source::Tensor(&dy_there as _) } else { Source::InPlace };
        let mut dbias = backend.tensor(&vec![9.0f32; shape.cols], call.offset / 2);
        let dx = run(source, Some(Gradient::Write(&mut dbias)))?;
        within("dx", &dx, &expected)?;
        let dbias = backend.contents(&dbias)?;
        within("dbias", &dbias, &sums)?;
        let alone = run(Source::Tensor(&dy_there), None)?;
        same("dx without dbias, against dx", &alone, &dx)?;
        let before = values::<f32>(shape.cols, 7, false);
        let mut sum = backend.tensor(&before, 0);
        run(Source::Tensor(&dy_there), Some(Gradient::Add(&mut sum)))?;
        same("dbias, added", &backend.contents(&sum)?, &added(&before, &dbias))?;
    }
    Ok(())
}
