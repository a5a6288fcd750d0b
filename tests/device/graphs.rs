//! Every operator and pass in a captured graph, with the stream number in device memory.

#[allow(unused)] // the benchmark uses the rest
#[path = "../../benches/device/operators.rs"]
mod operators;

use crate::trial_alone;
use fused_dropout::cuda::Gpu;
use fused_dropout::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use fused_dropout::{Dropout, Key, Probability};
use libtest_mimic::Trial;
use operators::{Case, Data, Operator, PASSES, Pass, STORAGES};

/// Several blocks, a last one that is not full, and two tiles of rows.
const ROWS: usize = 67;
const COLS: usize = 1032;

pub fn trials() -> Vec<Trial> {
    let trial = |(operator, pass): (Operator, Pass)| {
        trial_alone(&format!("graph: {operator:?} {pass:?}"), move |gpu| check(gpu, operator, pass))
    };
    PASSES.into_iter().map(trial).collect()
}

/// A replay gives the bits of a launch that the host gives the number of, and draws anew with another number.
fn check(gpu: &Gpu, operator: Operator, pass: Pass) {
    let data = Data::new(gpu).unwrap();
    for dtype in STORAGES {
        let case = Case { operator, pass, dtype, rows: ROWS, cols: COLS };
        let mut work = case.prepare(&data, gpu, 1).unwrap();
        let mut launched = |number| {
            work.clear(gpu).unwrap();
            work.launch(gpu, 0, &drop(number), None).unwrap();
            work.outputs(gpu, 0).unwrap()
        };
        let expected = [5, 1 << 40].map(&mut launched);

        let mut number = gpu.stream().clone_htod(&[0u64]).unwrap();
        gpu.stream().synchronize().unwrap();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        gpu.stream().begin_capture(mode).unwrap();
        work.launch(gpu, 0, &drop(999), Some(&number)).unwrap();
        let graph = gpu.stream().end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        for (stream, expected) in [5, 1 << 40].into_iter().zip(&expected) {
            gpu.stream().memcpy_htod(&[stream], &mut number).unwrap();
            work.clear(gpu).unwrap();
            graph.launch().unwrap();
            let replayed = work.outputs(gpu, 0).unwrap();
            assert!(replayed == *expected, "{case:?}: stream {stream}");
        }
        let drops = operator != Operator::Copy;
        assert_eq!(expected[0] != expected[1], drops, "{case:?}: another number, another mask");
    }
}

fn drop(stream: u64) -> Dropout<'static> {
    Dropout::new(Key::new(42, stream), Probability::new(0.1).unwrap())
}
