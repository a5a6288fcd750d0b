//! The emulator notices what a broken kernel does, and lets its correct twin pass.
#![cfg(feature = "emulator")]

use fused_dropout::Error;
use fused_dropout::device::{Device, Kernel, Readable, Writable};
use fused_dropout::emulator::Emulator;
use std::ffi::c_void;

/// The parameters of the kernels in `kernels/emulator/faults.cu`.
#[repr(C)]
struct Params {
    x: u64,
    y: u64,
    count: u32,
    broken: u32,
}

/// Runs the kernel `name` on enough blocks of 64 threads for `x`.
fn run(
    emulator: &Emulator,
    name: &'static str,
    broken: bool,
    x: &dyn Readable<f32, Emulator>,
    y: &mut dyn Writable<f32, Emulator>,
) -> Result<(), Error> {
    let count = x.elements() as u32;
    let (x, y) = (x.read(emulator)?, y.write(emulator)?);
    let params = Params { x: x.pointer, y: y.pointer, count, broken: broken.into() };
    let kernel = Kernel { operator: "faults", name };
    let params = (&raw const params).cast::<c_void>();
    // SAFETY: the kernels take these parameters; what they do to the tensors, the emulator checks.
    unsafe { emulator.launch(kernel, count.div_ceil(64), 64, params) }
}

/// The text of the fault that must have come.
fn fault(result: Result<(), Error>) -> String {
    match result {
        Err(Error::Fault { fault, .. }) => fault,
        other => panic!("expected a fault, got {other:?}"),
    }
}

#[test]
fn a_tail_that_is_not_cut_off_is_a_fault() {
    let x: Vec<f32> = (0..100).map(|i| i as f32).collect();
    let mut y = vec![0.0f32; 100];
    let emulator = Emulator::new();
    run(&emulator, "fault_tail", false, &x, &mut y).unwrap();
    assert!(x.iter().zip(&y).all(|(x, y)| *y == x * 0.5));
    let traffic = emulator.traffic();
    assert_eq!((traffic.launches, traffic.reads.bytes(), traffic.writes.bytes()), (1, 400, 400));
    assert_eq!((traffic.reads.of_width(4), traffic.reads.of_width(16)), (100, 0));

    let text = fault(run(&emulator, "fault_tail", true, &x, &mut y));
    assert_eq!(
        text,
        "block 1, thread 36: a read of 4 bytes at byte 400 of tensor 0, which has 400 bytes"
    );
}
