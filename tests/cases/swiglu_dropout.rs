//! `swiglu_dropout`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::swiglu_dropout::{Backward, Forward};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "swiglu_dropout", call, forward::<T, B>(backend, call));
    tally.count::<T, B>(
        backend,
        "swiglu_dropout dgate, dup",
        call,
        backward::<T, B>(backend, call),
    );
}

fn forward<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let (gate, up) =
        (far_out::<T>(elements(call), 30, true), values::<T>(elements(call), 31, true));
    let expected = oracle::swiglu_dropout(&call.dropout, shape, &gate, &up);
    let (gate_there, up) = (backend.matrix(&gate, call, 0), backend.matrix(&up, call, 1));
    let mut y = backend.matrix(&vec![T::from_f32(5.0); gate.len()], call, 2);
    let gate_source = Source::Tensor(&gate_there as _);
    backend.run(call, Forward { shape, gate: gate_source, up: &up, y: &mut y })?;
    let y = backend.rows(&y)?;
    close("y", &y, &expected)?;
    let mut again = backend.matrix(&gate, call, 0);
    backend.run(call, Forward { shape, gate: Source::InPlace, up: &up, y: &mut again })?;
    same("y in place, against y", &backend.rows(&again)?, &y)
}

fn backward<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let (gate, up) =
        (far_out::<T>(elements(call), 30, true), values::<T>(elements(call), 31, true));
    let dy = values::<T>(elements(call), 32, true);
    let [dgate, dup] = oracle::swiglu_dropout_backward(&call.dropout, shape, &gate, &up, &dy);
    let (gate, up) = (backend.matrix(&gate, call, 0), backend.matrix(&up, call, 1));
    let dy_there = backend.matrix(&dy, call, 2);
    let run = |dy_source| {
        let [mut dgate, mut dup] = [1, 2].map(|which| backend.matrix(&dy, call, which));
        let (gate, up, dy) = (&gate, &up, dy_source);
        backend.run(call, Backward { shape, gate, up, dy, dgate: &mut dgate, dup: &mut dup })?;
        Ok::<_, String>([backend.rows(&dgate)?, backend.rows(&dup)?])
    };
    let given = run(Source::Tensor(&dy_there))?;
    close("dgate", &given[0], &dgate)?;
    close("dup", &given[1], &dup)?;
    let again = run(Source::InPlace)?;
    same("dgate in place, against dgate", &again[0], &given[0])?;
    same("dup in place, against dup", &again[1], &given[1])
}
