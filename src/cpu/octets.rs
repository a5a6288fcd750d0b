//! Random lanes, several octets at a time, and the walk over a tensor octet by octet.

use crate::mask::{OCTET, RowMap};
use crate::ops::{Draw, Shape};
use std::ops::Range;

/// Philox blocks that are computed together: two AVX-512 vectors of each counter word, so that the
/// multiplications of one fill the latency of the other.
const LANES: usize = 16;

/// Octets of a block: what is drawn, and then used, while it lies in L1. Dropout on 2^24 f32, two cores of a
/// Zen 4: 6.5 ms with 2 or 4 steps, 6.1 to 6.8 with 8; 9.6 with 1.
///
/// Refuted, each on a Zen 4 in bias + ReLU + dropout, best of three alternating runs: a block that ends with
/// its row, so that counters come from one row, gained in bf16 rows of 768 (8.8 to 6.7 ms) and lost at 1024
/// (5.3 to 6.7 ms; f32 5.6 to 6.5); asking for elements a block earlier changed nothing beyond that. In
/// dropout_add_norm the same cost 0.5 to 1.8 ms of 11.
const BLOCK: usize = 4 * LANES;

/// Elements of a block.
pub(super) const ELEMENTS: usize = BLOCK * OCTET;

/// A counter word of each block. A vector that crosses a cache line costs two accesses, and is not
/// forwarded from a store to the next load.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Words([u64; LANES]);

/// Ten rounds of Philox4x32 (Salmon et al., SC'11) on `LANES` counters at once.
///
/// A word lies in the low half of a 64-bit lane, where the widening multiplication wants it; what is in
/// the high half is left there and means nothing, which saves every instruction that would clear it.
#[inline(always)]
fn philox(mut c: [Words; 4], mut key: [u32; 2]) -> [Words; 4] {
    const LOW: u64 = 0xffff_ffff;
    for _ in 0..10 {
        let mut next = [Words([0; LANES]); 4];
        for l in 0..LANES {
            let a = (c[0].0[l] & LOW) * 0xD251_1F53;
            let b = (c[2].0[l] & LOW) * 0xCD9E_8D57;
            next[0].0[l] = (b >> 32) ^ c[1].0[l] ^ u64::from(key[0]);
            next[1].0[l] = b;
            next[2].0[l] = (a >> 32) ^ c[3].0[l] ^ u64::from(key[1]);
            next[3].0[l] = a;
        }
        c = next;
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// The lanes of one block of octets, eight an octet, in order of the columns.
#[repr(align(64))]
pub(super) struct Lanes {
    words: [u64; BLOCK * 2],
}

/// A contiguous piece of one row.
pub(super) struct Segment {
    /// The elements, counted over the whole local tensor.
    pub elements: Range<usize>,
    /// The local column of the first element.
    pub col: usize,
}

/// Octets of `shape`, a row's last one counted whole.
pub(super) fn count(shape: Shape) -> usize {
    shape.rows * shape.cols.div_ceil(OCTET)
}

/// The first element of octet `octet`, counting octets row by row; the tensor's end for the last
/// octet's successor.
pub(super) fn first_element(shape: Shape, octet: usize) -> usize {
    let a_row = shape.cols.div_ceil(OCTET);
    octet / a_row * shape.cols + octet % a_row * OCTET
}

impl Lanes {
    pub fn new() -> Self {
        Self { words: [0; BLOCK * 2] }
    }

    /// The lanes, four in a word, lowest first.
    #[inline(always)]
    fn lanes(&self) -> &[u16] {
        bytemuck::cast_slice(&self.words)
    }

    /// Draws the lanes of octets (row, octet) `at(0) ..= at(count - 1)`.
    #[inline(always)]
    fn draw(&mut self, draw: &Draw<'_>, count: usize, mut at: impl FnMut(usize) -> (u32, u32)) {
        let key = draw.key.philox_key();
        let stream = draw.key.stream;
        for start in (0..count).step_by(LANES) {
            let mut c = [[0; LANES], [0; LANES], [stream; LANES], [stream >> 32; LANES]].map(Words);
            let [octets, rows, ..] = &mut c;
            for (i, (octet, row)) in (start..count).zip(octets.0.iter_mut().zip(&mut rows.0)) {
                let (r, o) = at(i);
                (*row, *octet) = (u64::from(r), u64::from(o));
            }
            let c = philox(c, key);
            let words = &mut self.words[2 * start..2 * (start + LANES)];
            for l in 0..LANES {
                words[2 * l] = (c[0].0[l] & 0xffff_ffff) | (c[1].0[l] << 32);
                words[2 * l + 1] = (c[2].0[l] & 0xffff_ffff) | (c[3].0[l] << 32);
            }
        }
        if draw.groups.columns_together {
            // Lane 0 for all of its octet.
            let lanes: &mut [[u16; OCTET]] = bytemuck::cast_slice_mut(&mut self.words);
            lanes.iter_mut().for_each(|octet| *octet = [octet[0]; OCTET]);
        }
    }
}

/// Walks octets `range` of a tensor, a block at a time, and gives `each` every row's piece of a block
/// with its lanes. `prefetch` is told the elements of a block before its lanes are drawn. Where nothing
/// random is asked for, the lanes are not drawn and mean nothing.
#[inline(always)]
pub(super) fn walk(
    draw: &Draw<'_>,
    shape: Shape,
    range: Range<usize>,
    prefetch: impl Fn(Range<usize>),
    mut each: impl FnMut(Segment, &[u16]),
) {
    let a_row = shape.cols.div_ceil(OCTET);
    let random = draw.threshold != 0 && draw.threshold != 65536;
    let mut lanes = Lanes::new();
    let mut start = range.start;
    let (mut row, mut octet) = (start / a_row.max(1), start % a_row.max(1));
    while start < range.end {
        let count = BLOCK.min(range.end - start);
        // The block's elements travel while its lanes are computed.
        let first = row * shape.cols + octet * OCTET;
        prefetch(first..(first + count * OCTET).min(shape.rows * shape.cols));
        if random && octet + count <= a_row {
            let logical = draw.row(row);
            lanes.draw(
                draw,
                count,
                #[inline(always)]
                |i| (logical, draw.octet(octet + i)),
            );
        } else if random {
            let (mut row, mut octet) = (row, octet);
            let mut logical = draw.row(row);
            lanes.draw(
                draw,
                count,
                #[inline(always)]
                |_| {
                    if octet == a_row {
                        (row, octet) = (row + 1, 0);
                        logical = next_row(draw, row, logical);
                    }
                    octet += 1;
                    (logical, draw.octet(octet - 1))
                },
            );
        }
        let mut done = 0;
        while done < count {
            let octets = (a_row - octet).min(count - done);
            let col = octet * OCTET;
            let end = (col + octets * OCTET).min(shape.cols);
            let segment = Segment { elements: row * shape.cols + col..row * shape.cols + end, col };
            each(segment, &lanes.lanes()[done * OCTET..done * OCTET + end - col]);
            done += octets;
            octet += octets;
            if octet == a_row {
                (row, octet) = (row + 1, 0);
            }
        }
        start += count;
    }
}

/// `draw.row(row)`, where that of the row before is `previous`: no division where rows follow each other.
#[inline(always)]
fn next_row(draw: &Draw<'_>, row: usize, previous: u32) -> u32 {
    match draw.rows {
        RowMap::Contiguous { .. } if draw.groups.rows == 1 => previous + 1,
        _ => draw.row(row),
    }
}
