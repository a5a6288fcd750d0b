//! Every operator and pass in a captured graph, with stream number and probability in device memory.

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

/// Stream numbers and probabilities of replays: each differs from the one before in one of the two, and some draw nothing.
const REPLAYS: [(u64, f64); 5] =
    [(5, 0.1), (1 << 40, 0.1), (1 << 40, 0.4), (1 << 40, 0.0), (1 << 40, 1.0)];

/// A replay gives the bits of a launch that the host gives number and probability of, and drops other elements with others.
fn check(gpu: &Gpu, operator: Operator, pass: Pass) {
    let data = Data::new(gpu).unwrap();
    for dtype in STORAGES {
        let case = Case { operator, pass, dtype, rows: ROWS, cols: COLS };
        let mut work = case.prepare(&data, gpu, 1).unwrap();
        let expected = REPLAYS.map(|(number, p)| {
            let drop = Dropout::new(Key::new(42, number), Probability::new(p).unwrap());
            work.clear(gpu).unwrap();
            work.launch(gpu, 0, &drop.into()).unwrap();
            work.outputs(gpu, 0).unwrap()
        });

        let [mut number, mut packed] = [0, 1].map(|_| gpu.stream().clone_htod(&[0u64]).unwrap());
        gpu.stream().synchronize().unwrap();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        gpu.stream().begin_capture(mode).unwrap();
        let captured = Dropout::<Gpu>::resident(42, &number, Probability::new(0.7).unwrap());
        work.launch(gpu, 0, &captured.resident_p(&packed)).unwrap();
        let graph = gpu.stream().end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        for ((stream, p), expected) in REPLAYS.into_iter().zip(&expected) {
            let p = Probability::new(p).unwrap().packed();
            gpu.stream().memcpy_htod(&[stream], &mut number).unwrap();
            gpu.stream().memcpy_htod(&[p], &mut packed).unwrap();
            work.clear(gpu).unwrap();
            graph.launch().unwrap();
            let replayed = work.outputs(gpu, 0).unwrap();
            assert!(replayed == *expected, "{case:?}: stream {stream}, p {p:#x}");
        }
        let drops = operator != Operator::Copy;
        for pair in expected.windows(2) {
            assert_eq!(pair[0] != pair[1], drops, "{case:?}: another key, another mask");
        }
    }
}
