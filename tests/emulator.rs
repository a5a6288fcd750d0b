//! The emulator notices what a broken kernel does, and lets its correct twin pass.
#![cfg(feature = "emulator")]

use fused_dropout::device::{Address, Device, Kernel};
use fused_dropout::emulator::Emulator;
use fused_dropout::{Error, Readable, Writable};
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
fn fault<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Fault { fault, .. }) => fault,
        other => panic!("expected a fault, got {other:?}"),
    }
}

/// x = 0, 1, 2, ..
fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|i| i as f32).collect()
}

/// Runs `name` on 0 .. `count` in the order `order`.
fn ramp_through(
    name: &'static str,
    count: usize,
    broken: bool,
    order: u64,
) -> Result<Vec<f32>, Error> {
    let mut y = vec![-1.0f32; count];
    run(&Emulator::new().order(order), name, broken, &ramp(count), &mut y)?;
    Ok(y)
}

/// The orders that the tests go through: ascending, descending, and random ones.
const ORDERS: [u64; 6] = [0, 1, 2, 3, 4, 5];

/// `name` gives `expected(i)` in every order where it is not broken, and where it is, a fault in every
/// order whose text contains `text`.
fn caught(name: &'static str, count: usize, expected: impl Fn(usize) -> f32, text: &str) {
    let expected: Vec<f32> = (0..count).map(expected).collect();
    for order in ORDERS {
        assert_eq!(ramp_through(name, count, false, order).unwrap(), expected, "{name}, {order}");
        let fault = fault(ramp_through(name, count, true, order));
        assert!(fault.contains(text), "{name}, order {order}: {fault}");
    }
}

fn half(i: usize) -> f32 {
    i as f32 * 0.5
}

fn reversed(i: usize) -> f32 {
    (i / 64 * 64 + 63 - i % 64) as f32
}

fn swapped(i: usize) -> f32 {
    (i ^ 1) as f32
}

#[test]
fn a_tail_that_is_not_cut_off_is_a_fault() {
    caught("fault_tail", 100, half, "a read of 4 bytes at byte ");
    let first = fault(ramp_through("fault_tail", 100, true, 0));
    assert_eq!(
        first,
        "block 1, thread 36: a read of 4 bytes at byte 400 of tensor 0, which has 400 bytes"
    );
}

#[test]
fn accesses_outside_of_the_tensors_are_faults() {
    caught("fault_store_past", 100, half, "a write of 4 bytes at byte 400 of tensor 1");
    caught(
        "fault_raw_store",
        100,
        half,
        "a write of 4 bytes past the accessors at byte 400 of tensor 1",
    );
    caught(
        "fault_raw_load",
        100,
        half,
        "a read of 4 bytes past the accessors at byte -4 of tensor 0",
    );
    caught(
        "fault_unseen_store",
        100,
        half,
        "a store outside of the accessors to byte 400 of tensor 1",
    );
    caught("fault_input_store", 100, half, "of tensor 0, which is read only");
    caught("fault_wild_store", 100, half, "in no tensor of this launch");
}

#[test]
fn a_misaligned_vector_is_a_fault() {
    // The last four elements are left to nobody, so that the broken kernel stays inside.
    let expected = |i: usize| if i < 252 { half(i) } else { -1.0 };
    caught("fault_misaligned", 256, expected, "a read of 16 bytes at ");
    let emulator = Emulator::new();
    // The copies that kernels see lie as the tensors do, modulo 128.
    let x = ramp(256);
    for start in 0..32 {
        let part = &x[start..];
        let address = (&part as &dyn Readable<f32, _>).read(&emulator).unwrap();
        assert_eq!(address.pointer % 128, part.as_ptr() as u64 % 128);
    }
}

#[test]
fn a_missing_barrier_differs_between_orders() {
    let expected: Vec<f32> = (0..128).map(reversed).collect();
    let mut broken = Vec::new();
    for order in ORDERS {
        assert_eq!(ramp_through("fault_reverse_global", 128, false, order).unwrap(), expected);
        broken.push(ramp_through("fault_reverse_global", 128, true, order).unwrap());
    }
    // Any two of the orders tell.
    for (i, one) in broken.iter().enumerate() {
        assert_ne!(*one, expected);
        assert!(broken[..i].iter().all(|other| one != other), "order {}", ORDERS[i]);
    }
}

#[test]
fn shared_memory_without_a_barrier_is_a_fault() {
    caught("fault_reverse_shared", 128, reversed, "of shared memory that");
    caught("fault_reverse_twice", 128, |i| i as f32, "of shared memory that");
    caught("fault_uninitialised", 128, reversed, "that nobody in the block has written");
    caught("fault_shared_index", 128, reversed, "an index beyond the end of an array");
    caught("fault_swap_shared", 128, swapped, "of shared memory that");
    caught("fault_swap_after_shuffle", 128, swapped, "of shared memory that thread");
}

#[test]
fn a_barrier_that_not_all_reach_is_a_fault() {
    caught("fault_divergent_barrier", 128, reversed, "waits in __syncthreads");
    caught("fault_two_barriers", 128, reversed, "completes while thread");
}

#[test]
fn a_wrong_mask_is_a_fault() {
    caught("fault_swap_mask", 128, swapped, "which the mask");
    caught("fault_swap_own_lane", 128, swapped, "does not name");
    caught("fault_swap_absent", 128, swapped, "waits in __shfl_xor_sync");
}

#[test]
fn a_shift_beyond_the_type_is_a_fault() {
    caught("fault_shift", 100, |i| i as f32, "a shift by more bits");
}

#[test]
fn traffic_counts_bytes_by_width() {
    let emulator = Emulator::new();
    run(&emulator, "fault_misaligned", false, &ramp(256), &mut [0.0f32; 256]).unwrap();
    let traffic = emulator.traffic();
    assert_eq!(traffic.launches, 1);
    assert_eq!((traffic.reads.of_width(16), traffic.reads.of_width(4)), (63, 0));
    assert_eq!((traffic.reads.count(), traffic.reads.bytes()), (63, 63 * 16));
    assert_eq!((traffic.writes.of_width(4), traffic.writes.bytes()), (252, 252 * 4));
    emulator.reset_traffic();
    assert_eq!(emulator.traffic(), Default::default());
}

#[test]
fn launches_of_other_threads_do_not_disturb() {
    let emulator = Emulator::new().order(9);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let emulator = &emulator;
            scope.spawn(move || {
                let count = 64 * (thread + 1);
                let mut y = vec![0.0f32; count];
                for _ in 0..50 {
                    run(emulator, "fault_reverse_shared", false, &ramp(count), &mut y).unwrap();
                    assert!((0..count).all(|i| y[i] == reversed(i)));
                    fault(run(emulator, "fault_reverse_shared", true, &ramp(count), &mut y));
                }
            });
        }
    });
    assert_eq!(emulator.traffic().launches, 800);
}

#[test]
fn what_cannot_be_launched_is_an_error() {
    let emulator = Emulator::new();
    let missing = run(&emulator, "no_such_kernel", false, &ramp(1), &mut [0.0f32]);
    assert!(matches!(missing, Err(Error::Unavailable { backend: "emulator", .. })));
    let empty: [f32; 0] = [];
    assert!(fault(run(&emulator, "fault_tail", false, &empty, &mut [0.0f32])).contains("0 blocks"));
}

/// Runs `name` on `x`, one element a thread.
fn convert<X, Y>(name: &'static str, x: &[X], outputs: usize) -> Vec<Y>
where
    X: bytemuck::Pod,
    Y: bytemuck::Pod,
{
    let emulator = Emulator::new();
    let mut y = vec![Y::zeroed(); outputs];
    let count = x.len() as u32;
    {
        let x: Address<'_, _> = (&x as &dyn Readable<X, Emulator>).read(&emulator).unwrap();
        let y = (&mut y as &mut dyn Writable<Y, Emulator>).write(&emulator).unwrap();
        let params = Params { x: x.pointer, y: y.pointer, count, broken: 0 };
        let kernel = Kernel { operator: "built_ins", name };
        let params = (&raw const params).cast::<c_void>();
        let threads = count.min(256);
        // SAFETY: the kernels take these parameters; what they do to the tensors, the emulator checks.
        unsafe { emulator.launch(kernel, count.div_ceil(threads), threads, params) }.unwrap();
    }
    y
}

/// Every f32 that matters to a rounding to 16 bits with `drop` bits less: the exact values, the ties
/// and their neighbours, with subnormal ones in between.
fn roundings() -> Vec<f32> {
    let around =
        |bits: u32| (-2..=2).map(move |step: i32| f32::from_bits(bits.wrapping_add_signed(step)));
    (0..1u32 << 20).flat_map(|high| around(high << 12)).collect()
}

#[test]
fn f16_converts_as_the_crate_half_does() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let wide: Vec<f32> = convert("convert_f16_to_f32", &all, all.len());
    for (&bits, wide) in all.iter().zip(&wide) {
        let expected = half::f16::from_bits(bits).to_f32();
        assert!(
            wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan(),
            "{bits:#x}"
        );
    }
    let x = roundings();
    let narrow: Vec<u16> = convert("convert_f32_to_f16", &x, x.len());
    for (x, &bits) in x.iter().zip(&narrow) {
        let (given, expected) = (half::f16::from_bits(bits), half::f16::from_f32(*x));
        assert!(
            given.to_bits() == expected.to_bits() || given.is_nan() && expected.is_nan(),
            "{x:e}"
        );
    }
}

#[test]
fn bf16_converts_as_the_crate_half_does() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let wide: Vec<f32> = convert("convert_bf16_to_f32", &all, all.len());
    for (&bits, wide) in all.iter().zip(&wide) {
        let expected = half::bf16::from_bits(bits).to_f32();
        assert!(
            wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan(),
            "{bits:#x}"
        );
    }
    let x = roundings();
    let narrow: Vec<u16> = convert("convert_f32_to_bf16", &x, x.len());
    for (x, &bits) in x.iter().zip(&narrow) {
        let (given, expected) = (half::bf16::from_bits(bits), half::bf16::from_f32(*x));
        assert!(
            given.to_bits() == expected.to_bits() || given.is_nan() && expected.is_nan(),
            "{x:e}"
        );
    }
}

#[test]
fn collectives_give_what_cuda_documents() {
    let x: Vec<u32> = (0..32).map(|lane| lane * lane + 1).collect();
    let y: Vec<u32> = convert("convert_collectives", &x, 32 * 8);
    let ballot: u32 = (0..32).filter(|&l| x[l].is_multiple_of(3)).map(|l| 1 << l).sum();
    let fives = x.iter().filter(|&x| x % 5 == 0).count() as u32;
    for (l, y) in y.chunks(8).enumerate() {
        assert_eq!(y[0], x[5]);
        assert_eq!(y[1], x[l ^ 3]);
        assert_eq!(y[2], x[if l + 4 < 32 { l + 4 } else { l }]);
        assert_eq!(y[3], x[if l >= 4 { l - 4 } else { l }]);
        assert_eq!(y[4], ballot);
        assert_eq!(y[5], 2);
        assert_eq!(y[6], x[l / 8 * 8 + 1]);
        assert_eq!(y[7], fives);
    }
}

#[test]
fn instructions_on_words_give_what_cuda_documents() {
    let edges = [0, 1, 31, 32, 0xffff, 0x1_0000, 0x8000_0000, 0x7fff_8001, 0x1234_5678, u32::MAX];
    let pairs: Vec<u32> =
        edges.iter().flat_map(|&a| edges.iter().flat_map(move |&b| [a, b])).collect();
    // One block: a thread a pair, the rest of the words belong to nobody.
    let y: Vec<u32> = convert("convert_words", &pairs, 256 * 8);
    for (x, y) in pairs.chunks(2).zip(y.chunks(8)) {
        let (a, b) = (x[0], x[1]);
        let wide = u64::from(b) << 32 | u64::from(a);
        let byte = |i: u32| (wide >> (8 * i)) as u8;
        assert_eq!(u64::from(y[0]), (u64::from(a) * u64::from(b)) >> 32);
        assert_eq!(y[1], ((wide << (b & 31)) >> 32) as u32);
        assert_eq!(y[2], (wide >> (b & 31)) as u32);
        assert_eq!(y[3].to_le_bytes(), [byte(0), byte(4), byte(2), byte(6)]);
        assert_eq!(y[4] >> 16, (a >> 16).max(b >> 16));
        assert_eq!(y[4] & 0xffff, (a & 0xffff).max(b & 0xffff));
        assert_eq!(y[5] >> 1, u32::from(a >> 16 >= b >> 16));
        assert_eq!(y[5] & 1, u32::from(a & 0xffff >= b & 0xffff));
        assert_eq!(y[6], a.reverse_bits());
        assert_eq!(y[7], a.count_ones() << 16 | b.leading_zeros());
    }
}
