//! The rows of a tensor in the order of the table's entry that they take: `kernels/sort_rows.cu`.

use super::{Device, Kernel, THREADS, launch, launch_threads};
use crate::error::Error;

/// The file of the kernels.
const KERNELS: &str = "sort_rows";

/// `DIGITS` and `OFFSETS_THREADS` in `kernels/sort_rows.cu`, and the bits of a digit.
const DIGITS: usize = 256;
const OFFSETS_THREADS: u32 = 1024;
const DIGIT_BITS: u32 = 8;

/// Chunks that the rows are cut into, at most: the counts of all of them are added up by one block.
const CHUNKS: usize = 256;

/// Rows of a chunk, at least: two rounds of its warp.
const CHUNK_ROWS: usize = 64;

/// `SortParams` in `kernels/sort_rows.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Params {
    ids: u64,
    keys: u64,
    rows: u64,
    keys_out: u64,
    rows_out: u64,
    counts: u64,
    counts_out: u64,
    count: u32,
    entries: u32,
    chunk: u32,
    chunks: u32,
    shift: u32,
    padding: u32,
}
const _: () = assert!(size_of::<Params>() == 80);

/// Rows in the order of the entries that they take, in scratch memory.
pub(super) struct Sorted {
    /// Their entries, in order; the number of entries for a row that takes none.
    pub keys: u64,
    pub rows: u64,
}

/// Rows of a chunk.
fn chunk(rows: usize) -> usize {
    rows.div_ceil(CHUNKS).next_multiple_of(32).max(CHUNK_ROWS)
}

impl Sorted {
    /// Elements of scratch memory that a sort of so many rows needs: twice keys and rows, to and from; the counts.
    pub fn elements(rows: usize) -> usize {
        let counts = rows.div_ceil(chunk(rows)) * DIGITS;
        rows.saturating_mul(4).saturating_add(counts)
    }

    /// Sorts the `rows` rows by the `ids` of a table of `entries`.
    ///
    /// # Safety
    /// On the device there are as many ids, and [`elements`](Self::elements) at `scratch`, which the kernels may use until the
    /// device has run them.
    pub unsafe fn new<D: Device>(
        device: &D,
        scratch: u64,
        ids: u64,
        rows: u32,
        entries: u32,
    ) -> Result<Self, Error> {
        let count = rows as usize;
        let chunk = chunk(count);
        let chunks = count.div_ceil(chunk);
        let part = |i: usize| scratch + (i * size_of::<u32>()) as u64;
        let [mut from, mut to] = [[0, count], [2 * count, 3 * count]].map(|pair| pair.map(part));
        let counts = part(4 * count);
        let all = Params {
            count: rows,
            entries,
            chunk: chunk as u32,
            chunks: chunks as u32,
            counts,
            counts_out: counts,
            ..Params::default()
        };
        let warps = chunks.div_ceil(THREADS as usize / 32);
        // SAFETY: the caller's promise; the parts of the scratch memory do not overlap, and a pass writes what the one before
        // read.
        unsafe {
            for shift in (0..u32::BITS - entries.leading_zeros()).step_by(DIGIT_BITS as usize) {
                let source = match shift {
                    0 => Params { ids, ..all },
                    _ => Params { keys: from[0], rows: from[1], ..all },
                };
                let pass = Params { keys_out: to[0], rows_out: to[1], shift, ..source };
                launch(device, kernel("sort_rows_count"), warps, &pass)?;
                launch_threads(device, kernel("sort_rows_offsets"), 1, OFFSETS_THREADS, &pass)?;
                launch(device, kernel("sort_rows_scatter"), warps, &pass)?;
                (from, to) = (to, from);
            }
        }
        Ok(Self { keys: from[0], rows: from[1] })
    }
}

fn kernel(name: &'static str) -> Kernel {
    Kernel { operator: KERNELS, name }
}
