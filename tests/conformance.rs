//! The case table, run by every backend against the oracle: the CPU at each SIMD level, the kernels on
//! the host (feature `emulator`) in several orders of their threads, and the kernels on a GPU (feature
//! `cuda`) where there is one. What was skipped is counted in the closing line.
//!
//! Masks, `dropout` and `dropout_add` must be the oracle's bits; `softmax_dropout` lies within the bound
//! that `oracle` derives.

mod cases;
mod oracle;

use cases::{Backend, Call, Guarded, bits, table, values};
use fused_dropout::cpu::{Cpu, Level};
use fused_dropout::{Dtype, Error, Scores, Shape};
use half::{bf16, f16};
use oracle::{AttentionMask, Bounded};
use std::process::ExitCode;

/// What came of the cases so far.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Tally {
    fn count(&mut self, what: &str, call: &dyn std::fmt::Debug, result: Result<(), String>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(why) => {
                self.failed += 1;
                if self.failed <= 20 {
                    println!("FAILED {what}: {why}\n       {call:?}");
                }
            }
        }
    }
}

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
    use cases::kernels::{Emulated, Kernels};
    use fused_dropout::emulator::Emulator;
    // Ascending through the whole table; a random order through every third row of it.
    for (order, every) in [(0, 1), (12345, 3)] {
        let emulator = Emulator::new().order(order);
        let lab = Emulated { emulator, name: format!("emulator, order {order}") };
        let some: Vec<Call> = cases.iter().copied().step_by(every).collect();
        run(&Kernels(lab), &some, tally);
    }
}

#[cfg(not(feature = "emulator"))]
fn emulators(cases: &[Call], tally: &mut Tally) {
    skip("emulator", "feature `emulator` is off", cases, tally);
}

#[cfg(feature = "cuda")]
fn gpu(cases: &[Call], tally: &mut Tally) {
    match cuda_lab::Gpu::new() {
        Ok(lab) => run(&cases::kernels::Kernels(lab), cases, tally),
        Err(error) => skip("cuda", &error.to_string(), cases, tally),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(cases: &[Call], tally: &mut Tally) {
    skip("cuda", "feature `cuda` is off", cases, tally);
}

/// Checks of one row of the table: six a storage type, and two of the exported mask.
const CHECKS: usize = 3 * 6 + 2;

fn skip(name: &str, why: &str, cases: &[Call], tally: &mut Tally) {
    println!("{name}: skipped, {why}");
    tally.skipped += CHECKS * cases.len();
}

fn run<B: Backend>(backend: &B, cases: &[Call], tally: &mut Tally) {
    let (passed, failed) = (tally.passed, tally.failed);
    for call in cases {
        typed::<f32, B>(backend, call, tally);
        typed::<f16, B>(backend, call, tally);
        typed::<bf16, B>(backend, call, tally);
        tally.count("mask as bytes", call, mask_as_bytes(backend, call));
        tally.count("mask as bits", call, mask_as_bits(backend, call));
    }
    let (passed, failed) = (tally.passed - passed, tally.failed - failed);
    println!("{}: {passed} passed, {failed} failed", backend.name());
}

fn typed<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
    let name = |operator: &str| format!("{} {operator} {}", backend.name(), T::NAME);
    tally.count(&name("dropout"), call, dropout::<T, B>(backend, call));
    tally.count(&name("dropout_add"), call, dropout_add::<T, B>(backend, call));
    tally.count(&name("dropout_add dx"), call, dropout_add_dx::<T, B>(backend, call));
    tally.count(&name("dropout_add dbias"), call, dropout_add_dbias::<T, B>(backend, call));
    tally.count(&name("softmax_dropout"), call, softmax::<T, B>(backend, call));
    tally.count(&name("softmax_dropout dx"), call, softmax_backward::<T, B>(backend, call));
}

fn elements(call: &Call) -> usize {
    call.shape.rows * call.shape.cols
}

/// Runs `operator` on an output within canaries that starts as `content`.
fn output<T: Dtype>(
    content: &[T],
    call: &Call,
    operator: impl FnOnce(&mut [T]) -> Result<(), Error>,
) -> Result<Vec<T>, String> {
    let mut out = Guarded::new(content, call.offset);
    operator(out.tensor()).map_err(|error| error.to_string())?;
    out.finish()
}

fn same<T: Dtype>(what: &str, given: &[T], expected: &[T]) -> Result<(), String> {
    match (0..expected.len()).find(|&i| bits(given[i]) != bits(expected[i])) {
        Some(i) => Err(format!("{what}[{i}] is {:?}, not {:?}", given[i], expected[i])),
        None => Ok(()),
    }
}

fn within<T: Dtype>(what: &str, given: &[T], expected: &[Bounded]) -> Result<(), String> {
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let zero = expected.value == 0.0 && expected.error == 0.0;
        let value = f64::from(given.to_f32());
        if zero && given.to_f32().to_bits() != 0 || !expected.admits(value) {
            return Err(format!("{what}[{i}] is {value:e}, not {expected:?}"));
        }
    }
    Ok(())
}

fn dropout<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let x = values::<T>(elements(call), 1, true);
    let expected = oracle::dropout(&call.dropout, call.shape, &x);
    let mut shifted = Guarded::new(&x, call.offset);
    let x_view = &*shifted.tensor();
    let y =
        output(&vec![T::from_f32(5.0); x.len()], call, |y| backend.dropout(call, Some(x_view), y))?;
    same("y", &y, &expected)?;
    let y = output(&x, call, |y| backend.dropout(call, None, y))?;
    same("y in place", &y, &expected)
}

fn dropout_add<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let x = values::<T>(elements(call), 2, true);
    let bias = values::<T>(call.shape.cols, 3, true);
    let residual = values::<T>(elements(call), 4, true);
    for bias in [None, Some(&bias[..])] {
        let expected = oracle::dropout_add(&call.dropout, call.shape, &x, bias, &residual);
        let y = output(&x, call, |y| backend.dropout_add(call, &x, bias, Some(&residual), y))?;
        same("y", &y, &expected)?;
        let y = output(&residual, call, |y| backend.dropout_add(call, &x, bias, None, y))?;
        same("y in place", &y, &expected)?;
    }
    Ok(())
}

fn dropout_add_dx<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let dy = values::<T>(elements(call), 5, true);
    let expected = oracle::dropout(&call.dropout, call.shape, &dy);
    let zeros = vec![T::from_f32(0.0); dy.len()];
    let dx = output(&zeros, call, |dx| backend.dropout_add_backward(call, Some(&dy), dx, None))?;
    same("dx", &dx, &expected)
}

fn dropout_add_dbias<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    for specials in [false, true] {
        let dy = values::<T>(elements(call), 6, specials);
        let expected = oracle::dropout(&call.dropout, call.shape, &dy);
        let sums = oracle::dbias(&call.dropout, call.shape, &dy);
        let mut dbias = Guarded::new(&vec![9.0f32; call.shape.cols], 0);
        let dx = output(&dy, call, |dx| {
            // In place for one of the two.
            let dy = (!specials).then_some(&dy[..]);
            backend.dropout_add_backward(call, dy, dx, Some(dbias.tensor()))
        })?;
        same("dx", &dx, &expected)?;
        same("dbias", &dbias.finish()?, &sums)?;
    }
    Ok(())
}

/// The case's rows as attention scores: batch, heads and queries whose product they are, and one of
/// the masks.
struct Attention<T> {
    scores: Scores,
    causal: Option<i64>,
    lengths: Option<Vec<u32>>,
    additive: Option<Vec<T>>,
    x: Vec<T>,
}

impl<T: Dtype> Attention<T> {
    fn new(call: &Call) -> Self {
        let Shape { rows, cols } = call.shape;
        let (batch, heads) = match rows {
            0 => (0, 2),
            n if n % 6 == 0 => (3, 2),
            n if n % 2 == 0 => (1, 2),
            _ => (1, 1),
        };
        let queries = if rows == 0 { 4 } else { rows / (batch * heads) };
        let scores = Scores { batch, heads, queries, keys: cols, scale: 0.37 };
        let kind = rows + cols + call.dropout.p.threshold() as usize % 5;
        let lengths = |r: usize| (r * 13 % (cols + 3)) as u32;
        let additive = |i: usize| match i % 5 {
            0 => f32::NEG_INFINITY,
            n => n as f32 - 2.5,
        };
        Self {
            scores,
            causal: (kind % 4 == 1 || kind % 7 == 2)
                .then_some(cols as i64 / 2 - queries as i64 / 2),
            lengths: (kind % 4 == 2 || kind % 7 == 2).then(|| (0..rows).map(lengths).collect()),
            additive: (kind % 4 == 3)
                .then(|| (0..batch * queries * cols).map(|i| T::from_f32(additive(i))).collect()),
            x: values::<T>(rows * cols, 8, false)
                .into_iter()
                .map(|x| T::from_f32(x.to_f32() * 8.0))
                .collect(),
        }
    }

    fn mask(&self) -> AttentionMask<'_, T> {
        AttentionMask {
            causal: self.causal,
            lengths: self.lengths.as_deref(),
            additive: self.additive.as_deref(),
        }
    }
}

fn softmax<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (mask, x) = (a.mask(), &a.x);
    let (expected, expected_lse) = oracle::softmax_dropout(&call.dropout, &a.scores, &mask, x);
    let mut lse = Guarded::new(&vec![9.0f32; call.shape.rows], 0);
    let y = output(&vec![T::from_f32(5.0); x.len()], call, |y| {
        backend.softmax_dropout(call, &a.scores, &mask, Some(x), y, Some(lse.tensor()))
    })?;
    within("y", &y, &expected)?;
    for (r, (given, expected)) in lse.finish()?.into_iter().zip(&expected_lse).enumerate() {
        if !expected.admits(f64::from(given)) {
            return Err(format!("lse[{r}] is {given:e}, not {expected:?}"));
        }
    }
    let again =
        output(x, call, |y| backend.softmax_dropout(call, &a.scores, &mask, None, y, None))?;
    same("y in place, against y", &again, &y)
}

fn softmax_backward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let a = Attention::<T>::new(call);
    let (mask, x) = (a.mask(), &a.x);
    let dy = values::<T>(x.len(), 9, false);
    let (_, lse) = oracle::softmax_dropout(&call.dropout, &a.scores, &mask, x);
    let lse: Vec<f32> = lse.iter().map(|lse| lse.value as f32).collect();
    for saved in [false, true] {
        let lse = saved.then_some(&lse[..]);
        let expected =
            oracle::softmax_dropout_backward(&call.dropout, &a.scores, &mask, x, &dy, saved);
        let dx = output(&dy, call, |dx| {
            // In place for one of the two.
            let dy = saved.then_some(&dy[..]);
            backend.softmax_dropout_backward(call, &a.scores, &mask, x, lse, dy, dx)
        })?;
        within("dx", &dx, &expected)?;
    }
    Ok(())
}

fn mask_as_bytes<B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let expected = oracle::keep_mask(&call.dropout, call.shape);
    let mut out = vec![2; expected.len()];
    backend.keep_mask(call, false, &mut out).map_err(|error| error.to_string())?;
    match (0..out.len()).find(|&i| out[i] != u8::from(expected[i])) {
        Some(i) => Err(format!("byte {i} is {}", out[i])),
        None => Ok(()),
    }
}

fn mask_as_bits<B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let keep = oracle::keep_mask(&call.dropout, call.shape);
    let row = |row: &[bool]| -> Vec<u8> {
        let byte = |octet: &[bool]| {
            octet.iter().enumerate().fold(0, |byte, (j, &keep)| byte | u8::from(keep) << j)
        };
        row.chunks(8).map(byte).collect()
    };
    let expected: Vec<u8> = keep.chunks(call.shape.cols.max(1)).flat_map(row).collect();
    let mut out = vec![0xaa; fused_dropout::ops::keep_mask::bits_len(call.shape)];
    backend.keep_mask(call, true, &mut out).map_err(|error| error.to_string())?;
    match (0..out.len()).find(|&i| out[i] != expected[i]) {
        Some(i) => Err(format!("byte {i} is {:#010b}, not {:#010b}", out[i], expected[i])),
        None => Ok(()),
    }
}

/// A GPU: tensors as views into allocations with canaries.
#[cfg(feature = "cuda")]
mod cuda_lab {
    use crate::cases::kernels::Lab;
    use fused_dropout::Error;
    use fused_dropout::cuda::{self, Kernels};
    use fused_dropout::device::{Readable, Writable};

    pub struct Gpu(cuda::Gpu);

    /// Bytes of canary on each side of a tensor.
    const GUARD: usize = 64;
    const CANARY: u8 = 0xa5;

    impl Gpu {
        pub fn new() -> Result<Self, Error> {
            let context = cuda::context(0)?;
            let kernels = Kernels::load(&context)?;
            Ok(Self(cuda::Gpu::new(&kernels, context.default_stream())?))
        }

        /// `host` between canaries, `offset` elements behind an aligned address.
        fn padded<T: bytemuck::Pod>(host: &[T], offset: usize) -> (Vec<T>, usize) {
            let guard = GUARD / size_of::<T>();
            let canary = bytemuck::pod_read_unaligned(&vec![CANARY; size_of::<T>()]);
            let mut all = vec![canary; guard + offset];
            all.extend_from_slice(host);
            all.extend(std::iter::repeat_n(canary, guard));
            (all, guard + offset)
        }
    }

    // Everything but the operators is expected to work on the test's device: a failure there is no
    // case's result.
    impl Lab for Gpu {
        type D = cuda::Gpu;
        fn name(&self) -> String {
            "cuda".to_owned()
        }
        fn device(&self) -> &cuda::Gpu {
            &self.0
        }
        fn with<T: bytemuck::Pod>(
            &self,
            host: &mut [T],
            offset: usize,
            work: &mut dyn FnMut(&mut dyn Writable<T, Self::D>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            let (all, first) = Self::padded(host, offset);
            let bytes: &[u8] = bytemuck::cast_slice(&all);
            let mut memory = self.0.stream().clone_htod(bytes).unwrap();
            let mut memory_view = memory.as_view_mut();
            // SAFETY: any bytes are a T: it is plain data.
            let mut typed = unsafe { memory_view.transmute_mut::<T>(all.len()) }.unwrap();
            let result = work(&mut typed.slice_mut(first..first + host.len()));
            let back: Vec<u8> = self.0.stream().clone_dtoh(&memory).unwrap();
            let size = size_of::<T>();
            let inside = first * size..(first + host.len()) * size;
            bytemuck::cast_slice_mut(host).copy_from_slice(&back[inside.clone()]);
            let outside = |i: &usize| !inside.contains(i);
            assert!((0..back.len()).filter(outside).all(|i| back[i] == CANARY), "wrote outside");
            result
        }
        fn reading<T: bytemuck::Pod>(
            &self,
            host: &[T],
            offset: usize,
            work: &mut dyn FnMut(&dyn Readable<T, Self::D>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            let (all, first) = Self::padded(host, offset);
            let bytes: &[u8] = bytemuck::cast_slice(&all);
            let memory = self.0.stream().clone_htod(bytes).unwrap();
            let memory = memory.as_view();
            // SAFETY: any bytes are a T: it is plain data.
            let typed = unsafe { memory.transmute::<T>(all.len()) }.unwrap();
            work(&typed.slice(first..first + host.len()))
        }
    }
}
