//! Work for threads, and stores that go past the caches.

use super::octets;
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

/// Whether an output of `bytes` bytes is written past the caches.
pub(super) fn streams<T>(out: &[T]) -> bool {
    size_of_val(out) >= STREAMING_BYTES
}

/// Rounds `from` into the storage type of `to`; `streaming` goes past the caches.
#[inline(always)]
pub(super) fn emit<T: Dtype>(from: &[f32], to: &mut [T], streaming: bool) {
    if !streaming || cfg!(not(target_arch = "x86_64")) {
        return super::convert::store(from, to);
    }
    if T::ID == DtypeId::F32 {
        return copy_streaming(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    }
    let mut rounded = [T::from_f32(0.0); 64];
    for (from, to) in from.chunks(64).zip(to.chunks_mut(64)) {
        let rounded = &mut rounded[..from.len()];
        super::convert::store(from, rounded);
        copy_streaming(bytemuck::cast_slice(rounded), bytemuck::cast_slice_mut(to));
    }
}

/// Copies `from` to `to`, of the same length; 16-byte stores that leave no line in a cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn copy_streaming(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    let head = to.as_ptr().align_offset(16).min(to.len());
    let (first, from) = from.split_at(head);
    to[..head].copy_from_slice(first);
    let to = &mut to[head..];
    let body = to.len() / 16 * 16;
    for i in (0..body).step_by(16) {
        // SAFETY: `i + 16 <= body <= from.len() == to.len()`; `align_offset` made `to` 16-byte
        // aligned, for a body of at least 16 bytes; SSE2 belongs to x86-64.
        unsafe {
            let word = _mm_loadu_si128(from.as_ptr().add(i).cast::<__m128i>());
            _mm_stream_si128(to.as_mut_ptr().add(i).cast::<__m128i>(), word);
        }
    }
    to[body..].copy_from_slice(&from[body..]);
}

#[cfg(not(target_arch = "x86_64"))]
fn copy_streaming(_: &[u8], _: &mut [u8]) {
    unreachable!("only x86-64 streams")
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
