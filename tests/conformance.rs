//! The case table, run by every backend against the oracle: the CPU at each SIMD level, the kernels on
//! the host (feature `emulator`) in several orders of their threads, and the kernels on a GPU (feature
//! `cuda`) where there is one. What was skipped is counted in the closing line.
//!
//! Masks, `dropout` and `dropout_add` must be the oracle's bits; the other operators lie within the bounds
//! that `oracle` derives.

mod cases;
mod oracle;

use cases::{Backend, Call, Tally, table};
use fused_dropout::cpu::{Cpu, Level};
use std::process::ExitCode;

fn main() -> ExitCode {
    // A test runner that lists tests gets this file as one.
    if std::env::args().any(|argument| argument == "--list") {
        println!("conformance: test");
        return ExitCode::SUCCESS;
    }
    let mut tally = Tally::default();
    let cases = table();
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        match Cpu::at(level) {
            Some(cpu) => run(&cpu, &cases, &mut tally),
            None => skip(&format!("cpu {level:?}"), "not on this machine", &cases, &mut tally),
        }
    }
    emulators(&cases, &mut tally);
    gpu(&cases, &mut tally);
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(feature = "emulator")]
fn emulators(cases: &[Call], tally: &mut Tally) {
    use cases::lab::{Emulated, Kernels};
    use fused_dropout::emulator::Emulator;
    // Ascending through every other row of the table, which meets each shape, probability, place, row map,
    // group and offset; a random order through every sixth, of the others. The CPU's levels run all of it.
    for (order, every, rest) in [(0, 2, 0), (12345, 6, 1)] {
        let emulator = Emulator::new().order(order);
        let lab = Emulated { emulator, name: format!("emulator, order {order}") };
        run(&Kernels(lab), &thinned(cases, every, rest), tally);
    }
}

/// Every so-many-th row of the table, at another probability for every two shapes: the rest of a row goes
/// round with the difference of both.
#[cfg(feature = "emulator")]
fn thinned(cases: &[Call], every: usize, rest: usize) -> Vec<Call> {
    let rows = cases.chunks(cases::P.len()).enumerate();
    let some = rows.flat_map(|(shape, row)| {
        let shift = shape / 2;
        row.iter().enumerate().filter(move |(p, _)| (shift + p) % every == rest)
    });
    some.map(|(_, call)| *call).collect()
}

#[cfg(not(feature = "emulator"))]
fn emulators(cases: &[Call], tally: &mut Tally) {
    skip("emulator", "feature `emulator` is off", cases, tally);
}

#[cfg(feature = "cuda")]
fn gpu(cases: &[Call], tally: &mut Tally) {
    match cases::gpu::Gpu::new() {
        Ok(lab) => run(&cases::lab::Kernels(lab), cases, tally),
        Err(error) => skip("cuda", &error.to_string(), cases, tally),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(cases: &[Call], tally: &mut Tally) {
    skip("cuda", "feature `cuda` is off", cases, tally);
}

/// A backend that is not run: its checks are counted all the same.
fn skip(name: &str, why: &str, cases: &[Call], tally: &mut Tally) {
    println!("{name}: skipped, {why}");
    let mut checks = Tally::default();
    // A row's checks are the same whatever its shape: count those of a small one.
    let smallest = cases.iter().min_by_key(|call| call.shape.rows * call.shape.cols);
    smallest.into_iter().for_each(|call| cases::check(&Cpu::PORTABLE, call, &mut checks));
    tally.skipped += (checks.passed + checks.failed) * cases.len();
}

fn run<B: Backend>(backend: &B, cases: &[Call], tally: &mut Tally) {
    let (passed, failed) = (tally.passed, tally.failed);
    cases.iter().for_each(|call| cases::check(backend, call, tally));
    let (passed, failed) = (tally.passed - passed, tally.failed - failed);
    println!("{}: {passed} passed, {failed} failed", backend.name());
}
