//! Random lanes, several octets at a time, and the walk over a tensor octet by octet.

use crate::mask::OCTET;
use crate::ops::{MaskParams, Shape};
use std::ops::Range;

/// Lanes are drawn for a multiple of so many octets, which every vector width divides: the loop over them has
/// no rest.
const LANES: usize = 16;

/// Octets of a block: what is drawn, and then used, while it lies in L1. Dropout on 2^24 f32, two cores of a
/// Zen 4: 6.5 ms with 32 or 64, 6.1 to 6.8 with 128; 9.6 with 16.
///
/// A block takes no notice of rows: its counters are written first, then drawn in one loop. Before, 16 blocks
/// of Philox were unrolled, with counters from one row or across rows, and on a Zen 2 dropout in L2 took 15 %
/// longer. Refuted there, times in µs for 2^17 elements against 117: the body for two octets an iteration, which
/// the compiler vectorises badly (154).
const BLOCK: usize = 4 * LANES;

/// Elements of a block.
pub(super) const ELEMENTS: usize = BLOCK * OCTET;

/// Ten rounds of Philox4x32 (Salmon et al., SC'11), for a loop over counters that the compiler vectorises.
///
/// A word lies in the low half of a 64-bit one, where the widening multiplication wants it; what is in
/// the high half is left there and means nothing, which saves every instruction that would clear it.
#[inline(always)]
fn philox(mut c: [u64; 4], mut key: [u32; 2]) -> [u64; 4] {
    const LOW: u64 = 0xffff_ffff;
    for _ in 0..10 {
        let a = (c[0] & LOW) * 0xD251_1F53;
        let b = (c[2] & LOW) * 0xCD9E_8D57;
        c = [(b >> 32) ^ c[1] ^ u64::from(key[0]), b, (a >> 32) ^ c[3] ^ u64::from(key[1]), a];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// The lanes of one block of octets, eight an octet, in order of the columns.
#[repr(align(64))]
pub(super) struct Lanes {
    words: [u64; BLOCK * 2],
    /// The counters that they are drawn from.
    octets: [u32; BLOCK],
    rows: [u32; BLOCK],
}

/// A contiguous piece of one row.
pub(super) struct Segment {
    /// The local row.
    pub row: usize,
    /// The local columns.
    pub cols: Range<usize>,
    /// Whether the block ends with it.
    pub last: bool,
}

impl Segment {
    /// Its elements in a tensor whose rows begin `stride` elements apart.
    #[inline(always)]
    pub fn elements(&self, stride: usize) -> Range<usize> {
        self.row * stride + self.cols.start..self.row * stride + self.cols.end
    }
}

/// Octets of `shape`, a row's last one counted whole.
pub(super) fn count(shape: Shape) -> usize {
    shape.rows * shape.cols.div_ceil(OCTET)
}

/// The first element of octet `octet`, counting octets row by row, in a tensor whose rows begin `stride` elements apart;
/// the end of the last row's stride for the last octet's successor.
pub(super) fn first_element(shape: Shape, stride: usize, octet: usize) -> usize {
    let a_row = shape.cols.div_ceil(OCTET);
    octet / a_row * stride + octet % a_row * OCTET
}

impl Lanes {
    pub fn new() -> Self {
        Self { words: [0; BLOCK * 2], octets: [0; BLOCK], rows: [0; BLOCK] }
    }

    /// The lanes, four in a word, lowest first.
    #[inline(always)]
    fn lanes(&self) -> &[u16] {
        bytemuck::cast_slice(&self.words)
    }

    /// Counters `at` are those of a row's octets from `octet` on.
    #[inline(always)]
    fn count(&mut self, params: &MaskParams<'_>, row: usize, octet: usize, at: Range<usize>) {
        self.rows[at.clone()].fill(params.row(row));
        self.octets[at].iter_mut().zip(octet..).for_each(|(c, octet)| *c = params.octet(octet));
    }

    /// Draws the lanes of the first `count` counters.
    #[inline(always)]
    fn draw(&mut self, params: &MaskParams<'_>, count: usize) {
        let key = params.key.philox_key();
        let stream = params.key.stream;
        let count = count.next_multiple_of(LANES);
        let (words, _) = self.words.as_chunks_mut::<2>();
        let counters = self.octets[..count].iter().zip(&self.rows[..count]);
        for (words, (&octet, &row)) in words[..count].iter_mut().zip(counters) {
            let c = philox([u64::from(octet), u64::from(row), stream, stream >> 32], key);
            *words = [(c[0] & 0xffff_ffff) | (c[1] << 32), (c[2] & 0xffff_ffff) | (c[3] << 32)];
        }
        if params.groups.columns_together {
            // Lane 0 for all of its octet.
            let lanes: &mut [[u16; OCTET]] = bytemuck::cast_slice_mut(&mut self.words);
            lanes.iter_mut().for_each(|octet| *octet = [octet[0]; OCTET]);
        }
    }
}

/// The lanes of several short rows, drawn together: those of one do not fill the vectors of a draw.
pub(super) struct RowLanes {
    lanes: Lanes,
    first_row: usize,
    /// The first octet of each row.
    starts: [usize; BLOCK],
}

impl RowLanes {
    pub fn new() -> Self {
        Self { lanes: Lanes::new(), first_row: 0, starts: [0; BLOCK] }
    }

    /// How many rows are drawn together; 1: rows so long that [`walk`] draws them.
    pub fn rows(shape: Shape) -> usize {
        (BLOCK / shape.cols.div_ceil(OCTET).max(1)).max(1)
    }

    /// Draws `cols(row)` lanes of every one of `rows`, at most as many as [`rows`](Self::rows) says.
    #[inline(always)]
    pub fn draw(
        &mut self,
        params: &MaskParams<'_>,
        rows: Range<usize>,
        cols: impl Fn(usize) -> usize,
    ) {
        self.first_row = rows.start;
        let mut count = 0;
        for (row, start) in rows.zip(&mut self.starts) {
            let octets = cols(row).div_ceil(OCTET);
            self.lanes.count(params, row, 0, count..count + octets);
            *start = count;
            count += octets;
        }
        if params.threshold != 0 && params.threshold != 65536 {
            self.lanes.draw(params, count);
        }
    }

    /// The lanes of a row, from its first column on.
    #[inline(always)]
    pub fn of(&self, row: usize) -> &[u16] {
        &self.lanes.lanes()[self.starts[row - self.first_row] * OCTET..]
    }
}

/// Walks octets `range` of a tensor, a block at a time, and gives `body` every row's piece of a block
/// with its lanes. `prefetch` is told a block, as if all of it were in its first row, before its lanes are drawn.
/// Where nothing random is asked for, the lanes are not drawn and mean nothing.
#[inline(always)]
pub(super) fn walk(
    params: &MaskParams<'_>,
    shape: Shape,
    range: Range<usize>,
    prefetch: impl Fn(Segment),
    mut body: impl FnMut(Segment, &[u16]),
) {
    let a_row = shape.cols.div_ceil(OCTET);
    let random = params.threshold != 0 && params.threshold != 65536;
    let mut lanes = Lanes::new();
    let mut start = range.start;
    let (mut row, mut octet) = (start / a_row.max(1), start % a_row.max(1));
    while start < range.end {
        let count = BLOCK.min(range.end - start);
        // The block's elements travel while its lanes are computed.
        let col = octet * OCTET;
        prefetch(Segment { row, cols: col..col + count * OCTET, last: true });
        if random {
            let (mut row, mut octet, mut done) = (row, octet, 0);
            while done < count {
                let octets = (a_row - octet).min(count - done);
                lanes.count(params, row, octet, done..done + octets);
                done += octets;
                (row, octet) = (row + 1, 0);
            }
            lanes.draw(params, count);
        }
        let mut done = 0;
        while done < count {
            let octets = (a_row - octet).min(count - done);
            let col = octet * OCTET;
            let end = (col + octets * OCTET).min(shape.cols);
            let segment = Segment { row, cols: col..end, last: done + octets == count };
            body(segment, &lanes.lanes()[done * OCTET..done * OCTET + end - col]);
            done += octets;
            octet += octets;
            if octet == a_row {
                (row, octet) = (row + 1, 0);
            }
        }
        start += count;
    }
}
