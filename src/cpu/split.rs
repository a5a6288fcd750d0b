//! Work for threads, and stores that go past the caches.

use super::{Cpu, Level, octets};
use crate::dtype::{Dtype, DtypeId};
use crate::ops::Shape;
use rayon::prelude::*;
use std::ops::Range;

/// Octets that are worth a thread's while: 2^16 elements take a few microseconds.
const MIN_PIECE: usize = 8192;

/// Outputs of at least this many bytes are not read back from the caches soon, so their stores go
/// past them: the line is not read before it is written, which saves a third of a copy's traffic.
const STREAMING_BYTES: usize = 8 << 20;

/// Splits a tensor into pieces of whole octets and gives each, with its part of `out`, to a thread.
/// `before(octet)` elements of `out` lie before octet `octet`.
pub(super) fn pieces<T: Send>(
    shape: Shape,
    out: &mut [T],
    before: impl Fn(usize) -> usize,
    each: impl Fn(Range<usize>, &mut [T]) + Sync,
) {
    let total = octets::count(shape);
    let piece = total.div_ceil(4 * rayon::current_num_threads()).max(MIN_PIECE);
    if total <= piece {
        if total > 0 {
            each(0..total, out);
        }
        return;
    }
    let mut rest = out;
    let mut work = Vec::with_capacity(total.div_ceil(piece));
    for start in (0..total).step_by(piece) {
        let end = (start + piece).min(total);
        let (part, behind) = rest.split_at_mut(before(end) - before(start));
        rest = behind;
        work.push((start..end, part));
    }
    work.into_par_iter().for_each(|(range, part)| each(range, part));
}

/// The `count` chunks of `len` elements of an output, nothing `count` times where there is no output.
pub(super) fn optional_chunks<T>(
    out: Option<&mut [T]>,
    len: usize,
    count: usize,
) -> Vec<Option<&mut [T]>> {
    match out {
        Some(out) => out.chunks_mut(len).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// Whether `out` is written past the caches: it is large, and there are stores of a whole line. Two cores
/// of a Zen 4, dropout on 2^24 elements, ms past the caches and through them: with stores of 32 bytes (AVX2)
/// 7.7 and 6.0 in f32, 11.3 and 5.6 in bf16; with stores of 16 bytes (portable) 10.0 and 8.8 in f32. A line
/// that is not written at once leaves its buffer in parts.
pub(super) fn streaming<T>(cpu: Cpu, out: &[T]) -> bool {
    cpu.level() == Level::Avx512 && size_of_val(out) >= STREAMING_BYTES
}

/// Rounds `from` into the storage type of `to`; past the caches where `streaming` said so of all of the
/// output.
#[inline(always)]
pub(super) fn emit<T: Dtype>(from: &[f32], to: &mut [T], streaming: bool) {
    if !streaming {
        return super::convert::store(from, to);
    }
    if T::ID == DtypeId::F32 {
        return copy_past_caches(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    }
    const CHUNK: usize = 256;
    let mut rounded = [T::from_f32(0.0); CHUNK];
    for (from, to) in from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)) {
        let rounded = &mut rounded[..from.len()];
        super::convert::store(from, rounded);
        copy_past_caches(bytemuck::cast_slice(rounded), bytemuck::cast_slice_mut(to));
    }
}

/// Copies `from` to `to`, of the same length, leaving no line in a cache: only where [`streaming`] said so.
#[inline(always)]
fn copy_past_caches(from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `streaming` asks for the level Avx512 of a `Cpu`, which found its features on this machine.
    unsafe {
        copy_lines(from, to)
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// Copies `from` to `to`, whole lines of it with non-temporal stores.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn copy_lines(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    const LINE: usize = 64;
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let (first, from) = from.split_at(head);
    to[..head].copy_from_slice(first);
    let to = &mut to[head..];
    let body = to.len() / LINE * LINE;
    for i in (0..body).step_by(LINE) {
        // SAFETY: `i + LINE <= body`, which is at most the length of both; `align_offset` made `to` aligned
        // where there is a body.
        unsafe {
            let line = _mm512_loadu_si512(from.as_ptr().add(i).cast());
            _mm512_stream_si512(to.as_mut_ptr().add(i).cast(), line);
        }
    }
    to[body..].copy_from_slice(&from[body..]);
}

/// Asks for a tensor's elements ahead of their use. Without it, dropout on 2^24 f32 takes 9.4 ms, the
/// sum of the copy (5.7 ms) and of the random numbers (3.8 ms), on two cores of a Zen 4; with it the
/// memory works while the numbers are computed.
#[inline(always)]
pub(super) fn prefetch<T>(tensor: &[T], elements: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    for line in tensor[elements].chunks(64 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address lies within a slice; SSE belongs to x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (tensor, elements);
}

/// Orders streaming stores before whatever tells another thread that they are done.
#[inline(always)]
pub(super) fn fence() {
    // SAFETY: SSE belongs to x86-64.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
