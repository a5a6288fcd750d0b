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

/// How an output is written: past the caches, with the stores of a level, or as usual.
pub(super) type Streaming = Option<Level>;

/// How `out` is written.
pub(super) fn streaming<T>(cpu: Cpu, out: &[T]) -> Streaming {
    (size_of_val(out) >= STREAMING_BYTES).then_some(cpu.level())
}

/// Rounds `from` into the storage type of `to`.
#[inline(always)]
pub(super) fn emit<T: Dtype>(from: &[f32], to: &mut [T], streaming: Streaming) {
    let Some(level) = streaming else {
        return super::convert::store(from, to);
    };
    if T::ID == DtypeId::F32 {
        return copy_past_caches(level, bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    }
    const CHUNK: usize = 256;
    let mut rounded = [T::from_f32(0.0); CHUNK];
    for (from, to) in from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)) {
        let rounded = &mut rounded[..from.len()];
        super::convert::store(from, rounded);
        copy_past_caches(level, bytemuck::cast_slice(rounded), bytemuck::cast_slice_mut(to));
    }
}

/// Copies `from` to `to`, of the same length, leaving no line in a cache. The wider the store, the
/// fewer of them fill the processor's queue, so the more of a block drains while the next one is
/// computed.
#[inline(always)]
fn copy_past_caches(level: Level, from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a level other than the portable one comes from a `Cpu`, which found its features on this
    // machine; SSE2 belongs to x86-64.
    unsafe {
        match level {
            Level::Avx512 => x86::copy_512(from, to),
            Level::Avx2 => x86::copy_256(from, to),
            Level::Portable => x86::copy_128(from, to),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        to.copy_from_slice(from);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Defines a copy with one width of store, aligned to it.
    macro_rules! copy {
        ($name:ident, $feature:literal, $vector:ty, $load:ident, $store:ident) => {
            #[target_feature(enable = $feature)]
            pub fn $name(from: &[u8], to: &mut [u8]) {
                const WIDTH: usize = size_of::<$vector>();
                let head = to.as_ptr().align_offset(WIDTH).min(to.len());
                let (first, from) = from.split_at(head);
                to[..head].copy_from_slice(first);
                let to = &mut to[head..];
                let body = to.len() / WIDTH * WIDTH;
                for i in (0..body).step_by(WIDTH) {
                    // SAFETY: `i + WIDTH <= body`, which is at most the length of both; `align_offset`
                    // made `to` aligned where there is a body.
                    unsafe {
                        let vector = $load(from.as_ptr().add(i).cast());
                        $store(to.as_mut_ptr().add(i).cast(), vector);
                    }
                }
                to[body..].copy_from_slice(&from[body..]);
            }
        };
    }

    copy!(copy_512, "avx512f", __m512i, _mm512_loadu_si512, _mm512_stream_si512);
    copy!(copy_256, "avx", __m256i, _mm256_loadu_si256, _mm256_stream_si256);
    copy!(copy_128, "sse2", __m128i, _mm_loadu_si128, _mm_stream_si128);
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
