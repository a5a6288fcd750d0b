//! The CUDA layer: loading, launching, what it refuses, streams and graphs. That the operators compute what they
//! should is the case table's business.

use crate::{trial, trial_alone};
use fused_dropout::cpu::Cpu;
use fused_dropout::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use fused_dropout::cuda::cudarc::driver::{CudaContext, CudaSlice, DevicePtr};
use fused_dropout::cuda::{self, Gpu};
use fused_dropout::ops::dropout;
use fused_dropout::{
    AsDropout, Backend, Dropout, Error, Key, Probability, Readable, RowMap, Shape, Shard, Source,
    Writable,
};
use libtest_mimic::Trial;

/// Odd in both directions, and more than one block.
const SHAPE: Shape = Shape { rows: 37, cols: 1003 };
const ELEMENTS: usize = 37 * 1003;

pub fn trials() -> Vec<Trial> {
    let missing = || {
        a_missing_device_is_an_error_and_no_panic();
        Ok(())
    };
    vec![
        Trial::test("a missing device is an error and no panic", missing),
        trial("a launch gives the naive loop's bits", a_launch_gives_the_naive_loops_bits),
        trial("views at odd elements", views_at_odd_elements),
        trial("a borrowed stream", a_borrowed_stream),
        trial("refused calls leave the output as it was", refused_calls_leave_the_output_as_it_was),
        trial("another context is refused", another_context_is_refused),
        trial("two streams take turns at a tensor", two_streams_take_turns_at_a_tensor),
        trial("several streams at once", several_streams_at_once),
        trial("the stream number from device memory", the_stream_number_from_device_memory),
        trial_alone("each replay of a graph draws a fresh mask", each_replay_draws_a_fresh_mask),
    ]
}

/// Runs everywhere: a machine without a driver, or without a hundred devices.
fn a_missing_device_is_an_error_and_no_panic() {
    let error = cuda::context(100).expect_err("no machine has a hundred GPUs");
    assert!(matches!(error, Error::Unavailable { backend: "cuda", .. }), "{error}");
}

fn drop_at(stream: u64) -> Dropout<'static> {
    Dropout::new(Key::new(42, stream), Probability::new(0.25).unwrap())
}

/// y = D(x).
fn dropped<B: Backend>(
    backend: &B,
    drop: &impl AsDropout<B>,
    x: &impl Readable<f32, B>,
    y: &mut impl Writable<f32, B>,
) -> Result<(), Error> {
    backend.run(drop, dropout::Forward { shape: SHAPE, x: Source::Tensor(x), y })
}

/// x = D(x).
fn dropped_in_place(gpu: &Gpu, stream: u64, x: &mut CudaSlice<f32>) {
    let pass = dropout::Forward { shape: SHAPE, x: Source::InPlace, y: x };
    gpu.run(&drop_at(stream), pass).unwrap();
}

fn input() -> Vec<f32> {
    (0..ELEMENTS).map(|i| i as f32 * 0.37 - 1000.0).collect()
}

/// The contract, an element at a time, as bits.
fn naive(drop: &Dropout<'_>, x: &[f32]) -> Vec<u32> {
    let kept = |i: usize| drop.key.keeps(drop.p, (i / SHAPE.cols) as u32, (i % SHAPE.cols) as u64);
    let y = |(i, x): (usize, &f32)| if kept(i) { x * drop.p.scale() } else { 0.0 };
    x.iter().enumerate().map(y).map(f32::to_bits).collect()
}

/// Reads a tensor back, as bits.
fn bits(gpu: &Gpu, tensor: &impl DevicePtr<f32>) -> Vec<u32> {
    let mut host = vec![0.0; tensor.len()];
    gpu.stream().memcpy_dtoh(tensor, &mut host).unwrap();
    gpu.stream().synchronize().unwrap();
    host.into_iter().map(f32::to_bits).collect()
}

fn a_launch_gives_the_naive_loops_bits(gpu: &Gpu) {
    let x = gpu.stream().clone_htod(&input()).unwrap();
    let mut y = gpu.stream().alloc_zeros(ELEMENTS).unwrap();
    dropped(gpu, &drop_at(7), &x, &mut y).unwrap();
    assert_eq!(bits(gpu, &y), naive(&drop_at(7), &input()));
}

fn views_at_odd_elements(gpu: &Gpu) {
    let mut padded = input();
    padded.insert(0, f32::NAN);
    let x = gpu.stream().clone_htod(&padded).unwrap();
    let mut y = gpu.stream().clone_htod(&vec![5.0; ELEMENTS + 4]).unwrap();
    let mut inner = y.slice_mut(3..3 + ELEMENTS);
    dropped(gpu, &drop_at(7), &x.slice(1..), &mut inner).unwrap();
    let y = bits(gpu, &y);
    assert_eq!(y[3..3 + ELEMENTS], naive(&drop_at(7), &input()));
    for outside in [0, 1, 2, ELEMENTS + 3] {
        assert_eq!(y[outside], 5f32.to_bits(), "element {outside} lies outside of the view");
    }
}

fn a_borrowed_stream(gpu: &Gpu) {
    // SAFETY: the stream belongs to the kernels' context, and `gpu` keeps it alive. Everything below
    // uses this one stream.
    let borrowed = unsafe { Gpu::from_raw(gpu.kernels(), gpu.stream().cu_stream()) };
    let mut y = borrowed.stream().clone_htod(&input()).unwrap();
    dropped_in_place(&borrowed, 7, &mut y);
    assert_eq!(bits(&borrowed, &y), naive(&drop_at(7), &input()));
}

fn refused_calls_leave_the_output_as_it_was(gpu: &Gpu) {
    let x = gpu.stream().clone_htod(&input()).unwrap();
    let mut y = gpu.stream().clone_htod(&vec![5.0; ELEMENTS]).unwrap();
    let list = vec![3; SHAPE.rows];
    let on_host = Shard { first_col: 0, rows: RowMap::Explicit(&list) };
    let odd_column = Shard { first_col: 4, ..Shard::WHOLE };
    let errors = [
        dropped(gpu, &drop_at(7), &x.slice(1..), &mut y),
        gpu.run(
            &drop_at(7),
            dropout::Forward { shape: Shape::new(37, 1004), x: Source::Tensor(&x), y: &mut y },
        ),
        dropped(gpu, &drop_at(7).shard(on_host), &x, &mut y),
        dropped(gpu, &drop_at(7).shard(odd_column), &x, &mut y),
    ];
    for error in errors {
        assert!(matches!(error, Err(Error::Argument { operator: "dropout", .. })), "{error:?}");
    }
    assert_eq!(bits(gpu, &y), vec![5f32.to_bits(); ELEMENTS]);
}

fn another_context_is_refused(gpu: &Gpu) {
    let other = CudaContext::new_non_primary(0, 0).unwrap();
    let stream = other.new_stream().unwrap();
    let error = Gpu::new(gpu.kernels(), stream.clone()).expect_err("a stream of another context");
    assert!(matches!(error, Error::Argument { argument: "stream", .. }), "{error}");

    let x = stream.clone_htod(&input()).unwrap();
    let mut y = gpu.stream().alloc_zeros(ELEMENTS).unwrap();
    let error = dropped(gpu, &drop_at(7), &x, &mut y).expect_err("a tensor of another context");
    assert!(matches!(error, Error::Argument { argument: "tensor", .. }), "{error}");
}

/// A read behind a write on another stream, and a write behind that read.
fn two_streams_take_turns_at_a_tensor(gpu: &Gpu) {
    let context = gpu.stream().context();
    let other = Gpu::new(gpu.kernels(), context.new_stream().unwrap()).unwrap();
    let mut x = gpu.stream().clone_htod(&input()).unwrap();
    let mut y = other.stream().alloc_zeros(ELEMENTS).unwrap();
    dropped_in_place(gpu, 7, &mut x);
    dropped(&other, &drop_at(8), &x, &mut y).unwrap();
    dropped_in_place(gpu, 9, &mut x);

    let first = naive(&drop_at(7), &input()).into_iter().map(f32::from_bits).collect::<Vec<_>>();
    assert_eq!(bits(gpu, &x), naive(&drop_at(9), &first));
    assert_eq!(bits(&other, &y), naive(&drop_at(8), &first));
}

/// Each stream drops what another has written, eight at a time and around them several times, and the host
/// waits for none of them: cudarc's events order them.
fn several_streams_at_once(gpu: &Gpu) {
    const STREAMS: usize = 8;
    const ROUNDS: u64 = 5;
    let stream = || Gpu::new(gpu.kernels(), gpu.stream().context().new_stream().unwrap()).unwrap();
    let streams: Vec<Gpu> = (0..STREAMS).map(|_| stream()).collect();
    let key = |round, i: usize| drop_at(round * STREAMS as u64 + i as u64);
    let mut tensors: Vec<CudaSlice<f32>> =
        streams.iter().map(|gpu| gpu.stream().clone_htod(&input()).unwrap()).collect();
    for round in 0..ROUNDS {
        for (i, gpu) in streams.iter().enumerate() {
            let from = tensors[(i + 1) % STREAMS].clone();
            dropped(gpu, &key(round, i), &from, &mut tensors[i]).unwrap();
        }
    }
    let mut expected = vec![input(); STREAMS];
    for round in 0..ROUNDS {
        for i in 0..STREAMS {
            let from = expected[(i + 1) % STREAMS].clone();
            dropped(&Cpu::new(), &key(round, i), &from, &mut expected[i]).unwrap();
        }
    }
    for (i, (gpu, tensor)) in streams.iter().zip(&tensors).enumerate() {
        let expected: Vec<u32> = expected[i].iter().map(|x| x.to_bits()).collect();
        assert_eq!(bits(gpu, tensor), expected, "stream {i}");
    }
}

fn the_stream_number_from_device_memory(gpu: &Gpu) {
    let x = gpu.stream().clone_htod(&input()).unwrap();
    let mut y = gpu.stream().alloc_zeros(ELEMENTS).unwrap();
    for stream in [0, 7, u64::MAX, 1 << 32] {
        let number = gpu.stream().clone_htod(&[stream]).unwrap();
        dropped(gpu, &Dropout::resident(42, &number, drop_at(0).p), &x, &mut y).unwrap();
        assert_eq!(bits(gpu, &y), naive(&drop_at(stream), &input()), "stream {stream}");
    }
}

fn each_replay_draws_a_fresh_mask(gpu: &Gpu) {
    let x = gpu.stream().clone_htod(&input()).unwrap();
    let mut y = gpu.stream().alloc_zeros(ELEMENTS).unwrap();
    let mut number = gpu.stream().clone_htod(&[0u64]).unwrap();
    let mut run = |number: &CudaSlice<u64>| {
        dropped(gpu, &Dropout::resident(42, number, drop_at(0).p), &x, &mut y).unwrap();
    };
    run(&number); // the kernel is looked up and loaded before the capture
    gpu.stream().synchronize().unwrap();

    gpu.stream().begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    run(&number);
    let graph = gpu.stream().end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    for stream in [3, 4, 1 << 40] {
        gpu.stream().memcpy_htod(&[stream], &mut number).unwrap();
        graph.launch().unwrap();
        assert_eq!(bits(gpu, &y), naive(&drop_at(stream), &input()), "stream {stream}");
    }
}
