//! The rows of a tensor in the order of the table's entry that they take: `kernels/sort_rows.cu`.

use super::{Address, Device, Kernel, THREADS, launch, launch_threads};
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

/// Rows in the order of the entries that they take, in a workspace.
pub(super) struct Sorted<'a, D: Device + 'a> {
    /// Their entries, in order; the number of entries for a row that takes none.
    pub keys: u64,
    pub rows: u64,
    _workspace: Address<'a, D>,
}

impl<'a, D: Device> Sorted<'a, D> {
    /// Sorts the `rows` rows by the `ids` of a table of `entries`.
    ///
    /// # Safety
    /// There are as many ids in the device's memory, which the kernels may read until the device has run them.
    pub unsafe fn new(device: &'a D, ids: u64, rows: u32, entries: u32) -> Result<Self, Error> {
        let count = rows as usize;
        let chunk = count.div_ceil(CHUNKS).next_multiple_of(32).max(CHUNK_ROWS);
        let chunks = count.div_ceil(chunk);
        // Twice keys and rows, to and from; the counts.
        let elements = 4 * count + chunks * DIGITS;
        let workspace = device.workspace(elements)?;
        let part = |i: usize| workspace.pointer + (i * size_of::<u32>()) as u64;
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
        // SAFETY: the caller's promise; the parts of the workspace do not overlap, and a pass writes what the one before
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
        Ok(Self { keys: from[0], rows: from[1], _workspace: workspace })
    }
}

fn kernel(name: &'static str) -> Kernel {
    Kernel { operator: KERNELS, name }
}
