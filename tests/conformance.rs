//! The case table, run by every backend against the oracle: the CPU at each SIMD level, and the kernels on
//! the host (feature `emulator`) in several orders of their threads. `tests/device` runs it on a GPU.
//!
//! Masks, `dropout` and `dropout_add` must be the oracle's bits; the other operators lie within the bounds
//! that `oracle` derives.

mod cases;
mod oracle;

use cases::trials::trials;
use cases::{Call, table};
use fused_dropout::cpu::{Cpu, Level};
use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let cases = Arc::new(table());
    let mut all = Vec::new();
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        let open = move || Cpu::at(level).ok_or_else(|| "not on this machine".to_owned());
        all.extend(trials(&format!("cpu {level:?}"), &cases, open));
    }
    all.extend(emulators(&cases));
    libtest_mimic::run(&Arguments::from_args(), all).exit_code()
}

#[cfg(feature = "emulator")]
fn emulators(cases: &[Call]) -> Vec<Trial> {
    use cases::backend::Emulated;
    use fused_dropout::emulator::Emulator;
    // Ascending through every other row of the table, which meets each shape, probability, place, row map,
    // group and offset; a random order through every sixth, of the others. The CPU's levels run all of it.
    let orders = [(0, 2, 0), (12345, 6, 1)].into_iter();
    orders
        .flat_map(|(order, every, rest)| {
            let name = format!("emulator, order {order}");
            let cases = Arc::new(cases::thinned(cases, every, rest));
            trials(&name.clone(), &cases, move || {
                let emulator = Emulator::new().order(order);
                Ok(Emulated { emulator, name: name.clone() })
            })
        })
        .collect()
}

#[cfg(not(feature = "emulator"))]
fn emulators(_: &[Call]) -> Vec<Trial> {
    eprintln!("the emulator is left out: feature `emulator` is off");
    Vec::new()
}
