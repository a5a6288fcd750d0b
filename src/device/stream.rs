//! Kernels that take a tensor octet by octet, `stream` in `kernels/kernel.cuh`: the parts of a large tensor, and how many
//! blocks.

use super::abi::{IndexDivisor, Mask, Matrix, Octets};
use super::{Device, Kernel, THREADS, launch};
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::Shape;

/// Launches `kernel` for tensors of `shape`, an octet a thread and a part at a time: `params(part, mask)` are those of a
/// part, whose mask is `mask`.
///
/// # Safety
/// As [`launch`], for every part.
pub(super) unsafe fn launch_stream<D: Device, P>(
    device: &D,
    kernel: Kernel,
    mask: &Mask,
    shape: Shape,
    params: impl Fn(&Part, Mask) -> P,
) -> Result<(), Error> {
    for part in parts(shape) {
        let params = params(&part, mask.advanced(part.row, part.octet));
        let blocks = part.octets.count.div_ceil(THREADS) as usize;
        // SAFETY: the caller's promise.
        unsafe { launch(device, kernel, blocks, &params)? };
    }
    Ok(())
}

/// Part of a tensor that one launch of a streaming kernel covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub octets: Octets,
    /// Its first row and octet of columns.
    pub row: u32,
    pub octet: u32,
    /// Index of its first element, and of its first octet, in the whole tensor.
    pub first_element: u64,
    pub first_octet: u64,
}

impl Part {
    /// What the part has of a contiguous tensor of `T` at `address`.
    pub fn of_tensor<T>(&self, address: u64) -> u64 {
        address + self.first_element * size_of::<T>() as u64
    }

    /// What the part has of a matrix of `T`.
    pub fn of_matrix<T>(&self, Matrix { pointer, stride }: Matrix) -> Matrix {
        let first = u64::from(self.row) * stride + OCTET as u64 * u64::from(self.octet);
        Matrix { pointer: pointer + first * size_of::<T>() as u64, stride }
    }

    /// Where the part's columns begin in a row of `T` at `address`; 0 where there is none.
    pub fn of_row<T>(&self, address: u64) -> u64 {
        let columns = (OCTET * size_of::<T>()) as u64 * u64::from(self.octet);
        if address == 0 { 0 } else { address + columns }
    }
}

/// Octets of the largest part: kernels count them in 31 bits, with room for a last block that is not
/// full.
const PART_OCTETS: usize = 1 << 30;

/// Splits a tensor into parts: whole rows, or stretches of one row where a row is longer than a part.
fn parts(shape: Shape) -> impl Iterator<Item = Part> {
    parts_of(shape, PART_OCTETS)
}

fn parts_of(shape: Shape, octets: usize) -> impl Iterator<Item = Part> {
    let Shape { rows, cols: row_elements } = shape;
    let row_octets = row_elements.div_ceil(OCTET);
    let width = row_octets.clamp(1, octets);
    let height = if width < row_octets { 1 } else { octets / width };
    (0..rows).step_by(height).flat_map(move |row| {
        let rows = height.min(rows - row);
        (0..row_octets).step_by(width).map(move |octet| {
            let cols = (row_elements - octet * OCTET).min(width * OCTET);
            let per_row = cols.div_ceil(OCTET);
            Part {
                octets: Octets {
                    count: (rows * per_row) as u32,
                    per_row: IndexDivisor::new(per_row as u32),
                    cols: cols as u64,
                },
                row: row as u32,
                octet: octet as u32,
                first_element: (row * row_elements + octet * OCTET) as u64,
                first_octet: (row * row_octets + octet) as u64,
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_octet_once() {
        for (rows, cols, octets) in [(5, 24, 7), (5, 20, 3), (3, 100, 4), (4, 1, 3), (0, 9, 2)] {
            let mut seen = Vec::new();
            for part in parts_of(Shape::new(rows, cols), octets) {
                assert!(part.octets.count as usize <= octets);
                for index in 0..part.octets.count {
                    let per_row = part.octets.per_row;
                    let (row, octet) = (per_row.quotient(index), per_row.remainder(index));
                    let (r, o) = (part.row + row, part.octet + octet);
                    let element = part.first_element + u64::from(row) * part.octets.cols;
                    assert_eq!(
                        element + 8 * u64::from(octet),
                        u64::from(r) * cols as u64 + 8 * u64::from(o)
                    );
                    seen.push((r as usize, o as usize));
                }
            }
            let all: Vec<_> =
                (0..rows).flat_map(|r| (0..cols.div_ceil(8)).map(move |o| (r, o))).collect();
            assert_eq!(seen, all);
        }
    }
}
