//! Work for threads, and stores that go past the caches.

use super::octets::{self, Segment};
use super::{Cpu, Level};
use crate::dtype::{Dtype, DtypeId};
use crate::ops::Shape;
use crate::tensor::Matrix;
use rayon::prelude::*;
use std::ops::Range;

/// Octets that are worth a thread's while: 2^16 elements take a few microseconds.
const MIN_PIECE: usize = 8192;

/// Outputs of at least this many bytes are not read back from the caches soon, so their stores go
/// past them: the line is not read before it is written, which saves a third of a copy's traffic.
const STREAMING_BYTES: usize = 8 << 20;

/// A part of an output matrix: its elements from `first` on.
pub(super) struct Part<'a, T> {
    pub data: &'a mut [T],
    pub stride: usize,
    first: usize,
}

impl<'a, T> Part<'a, T> {
    /// All of a matrix.
    pub fn whole(Matrix { data, stride }: Matrix<&'a mut [T]>) -> Self {
        Self { data, stride, first: 0 }
    }

    /// What a segment has there.
    #[inline(always)]
    pub fn at(&self, segment: &Segment) -> &[T] {
        let Range { start, end } = segment.elements(self.stride);
        &self.data[start - self.first..end - self.first]
    }

    /// Where `count` elements up to a segment's end go.
    #[inline(always)]
    pub fn up_to(&mut self, segment: &Segment, count: usize) -> &mut [T] {
        let end = segment.elements(self.stride).end - self.first;
        &mut self.data[end - count..end]
    }

    /// Its rows, `cols` columns of each.
    #[inline(always)]
    pub fn rows(&mut self, cols: usize) -> impl ExactSizeIterator<Item = &mut [T]> {
        self.data.chunks_mut(self.stride).map(move |row| &mut row[..cols])
    }

    /// Parts of `rows` rows, where this one begins with a row.
    #[inline(always)]
    pub fn chunks(self, rows: usize) -> impl ExactSizeIterator<Item = Self> {
        let Self { data, stride, first } = self;
        // Saturating: a single row may have any stride.
        let len = rows.saturating_mul(stride);
        let chunks = data.chunks_mut(len).enumerate();
        chunks.map(move |(i, data)| Self { data, stride, first: first + i * len })
    }
}

/// What is split at octets of a shape.
pub(super) trait Outputs: Send + Sized {
    /// What lies before octet `octet` of a `shape`, and from there on.
    fn split(self, shape: Shape, octet: usize) -> (Self, Self);
}

impl<T: Send> Outputs for Part<'_, T> {
    fn split(self, shape: Shape, octet: usize) -> (Self, Self) {
        let Self { data, stride, first } = self;
        let at = octets::first_element(shape, stride, octet);
        let (before, behind) = data.split_at_mut(at - first);
        (Self { data: before, stride, first }, Self { data: behind, stride, first: at })
    }
}

impl<O: Outputs> Outputs for [O; 2] {
    fn split(self, shape: Shape, octet: usize) -> (Self, Self) {
        let [(a, behind_a), (b, behind_b)] = self.map(|output| output.split(shape, octet));
        ([a, b], [behind_a, behind_b])
    }
}

/// Splits a tensor into pieces of whole octets and gives each, with its part of `out`, to a thread.
pub(super) fn pieces<O: Outputs>(shape: Shape, out: O, body: impl Fn(Range<usize>, O) + Sync) {
    let total = octets::count(shape);
    let piece = total.div_ceil(4 * rayon::current_num_threads()).max(MIN_PIECE);
    if total <= piece {
        if total > 0 {
            body(0..total, out);
        }
        return;
    }
    let (mut start, mut rest) = (0, out);
    let mut work = Vec::with_capacity(total.div_ceil(piece));
    while start + piece < total {
        let (part, behind) = rest.split(shape, start + piece);
        work.push((start..start + piece, part));
        (start, rest) = (start + piece, behind);
    }
    work.push((start..total, rest));
    work.into_par_iter().for_each(|(range, part)| body(range, part));
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

/// The `count` parts of `rows` rows of an output, nothing `count` times where there is no output.
pub(super) fn optional_rows<T>(
    out: Option<Matrix<&mut [T]>>,
    rows: usize,
    count: usize,
) -> Vec<Option<Part<'_, T>>> {
    match out {
        Some(out) => Part::whole(out).chunks(rows).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// Stores of a line that go past the caches.
#[derive(Clone, Copy)]
pub(super) enum Line {
    /// Two stores of 32 bytes.
    Halves,
    /// One store.
    Whole,
}

/// How an output of `shape` is written past the caches, where it is: it is large, and the stores pay. 2^24 elements, ms
/// past the caches and through them:
/// - Zen 4, two threads, dropout: 32 bytes (AVX2) 7.7 and 6.0 in f32, 11.3 and 5.6 in bf16; 16 bytes (portable)
///   10.0 and 8.8 in f32: a line that is not written at once leaves its buffer in parts;
/// - Zen 2, one thread: 32 bytes 13.9 and 16.9 in f32, dropout_add_norm 23.5 and 30.5; bias + ReLU + dropout in
///   bf16 17.1 and 16.3.
pub(super) fn streaming<T: Dtype>(cpu: Cpu, shape: Shape) -> Option<Line> {
    let line = match cpu.level() {
        Level::Avx512 => Some(Line::Whole),
        // A processor without AVX-512 is more like a Zen 2 than like a Zen 4.
        Level::Avx2 if T::ID == DtypeId::F32 => Some(Line::Halves),
        _ => None,
    };
    line.filter(|_| shape.rows * shape.cols * size_of::<T>() >= STREAMING_BYTES)
}

/// Rounds `from` into the storage type of `to`; past the caches where `streaming` said so of all of the
/// output.
#[inline(always)]
pub(super) fn emit<T: Dtype>(from: &[f32], to: &mut [T], streaming: Option<Line>) {
    let Some(line) = streaming else {
        return super::convert::store(from, to);
    };
    if T::ID == DtypeId::F32 {
        return copy_past_caches(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to), line);
    }
    const CHUNK: usize = 256;
    let mut rounded = [T::from_f32(0.0); CHUNK];
    for (from, to) in from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)) {
        let rounded = &mut rounded[..from.len()];
        super::convert::store(from, rounded);
        copy_past_caches(bytemuck::cast_slice(rounded), bytemuck::cast_slice_mut(to), line);
    }
}

/// Copies `from` to `to`, of the same length, whole lines of it past the caches. `line` comes from
/// [`streaming`].
#[inline(always)]
fn copy_past_caches(from: &[u8], to: &mut [u8], line: Line) {
    #[cfg(target_arch = "x86_64")]
    match line {
        // SAFETY: `streaming` asks for the level Avx2 of a `Cpu`, which found its features on this machine.
        Line::Halves => copy_lines(from, to, |from, to| unsafe { store_halves(from, to) }),
        // SAFETY: as above, for Avx512.
        Line::Whole => copy_lines(from, to, |from, to| unsafe { store_whole(from, to) }),
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = line;
        to.copy_from_slice(from);
    }
}

#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// A line of memory.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct Aligned([u8; LINE]);

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn store_halves(from: &[u8; LINE], to: &mut Aligned) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm256_stream_si256};
    let (from, to) = (from.as_ptr(), to.0.as_mut_ptr());
    for half in [0, 32] {
        // SAFETY: both halves lie within the line, and those of `to` are aligned.
        unsafe {
            let value = _mm256_loadu_si256(from.add(half).cast());
            _mm256_stream_si256(to.add(half).cast(), value);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn store_whole(from: &[u8; LINE], to: &mut Aligned) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    // SAFETY: both are a line, and `to` is aligned.
    unsafe {
        let value = _mm512_loadu_si512(from.as_ptr().cast());
        _mm512_stream_si512(to.0.as_mut_ptr().cast(), value);
    }
}

/// Copies `from` to `to`, whole lines of it by `store`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn copy_lines(from: &[u8], to: &mut [u8], store: impl Fn(&[u8; LINE], &mut Aligned)) {
    // SAFETY: `Aligned` is bytes: any are valid.
    let (head, body, tail) = unsafe { to.align_to_mut::<Aligned>() };
    let (first, from) = from.split_at(head.len());
    head.copy_from_slice(first);
    let (lines, last) = from.split_at(size_of_val(body));
    lines.as_chunks().0.iter().zip(body).for_each(|(from, to)| store(from, to));
    tail.copy_from_slice(last);
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
