//! Host memory: slices, arrays and vectors as the CPU's tensors.

use super::octets::Segment;
use super::{Cpu, split};
use crate::error::Error;
use crate::tensor::{Matrix, Memory, Readable, Writable, host_tensors};
use std::ops::Range;

impl Memory for Cpu {
    type In<'a, T: 'a> = &'a [T];
    type Out<'a, T: 'a> = &'a mut [T];

    fn skip<'a, T: 'a>(tensor: &'a [T], first: usize) -> &'a [T] {
        &tensor[first..]
    }

    fn skip_mut<'a, T: 'a>(tensor: &'a mut [T], first: usize) -> &'a mut [T] {
        &mut tensor[first..]
    }
}

/// Implements [`Readable`], and after `mut` [`Writable`], for a type that dereferences to `[T]`.
macro_rules! host_tensor {
    ([$($generics:tt)*] $tensor:ty) => {
        // SAFETY: a slice is what its type says.
        unsafe impl<T, $($generics)*> Readable<T, Cpu> for $tensor {
            fn elements(&self) -> usize {
                self.len()
            }
            fn read<'a>(&'a self, _: &'a Cpu) -> Result<&'a [T], Error> {
                Ok(&self[..])
            }
        }
    };
    (mut [$($generics:tt)*] $tensor:ty) => {
        host_tensor!([$($generics)*] $tensor);
        // SAFETY: as above, borrowed exclusively.
        unsafe impl<T, $($generics)*> Writable<T, Cpu> for $tensor {
            fn write<'a>(&'a mut self, _: &'a Cpu) -> Result<&'a mut [T], Error> {
                Ok(&mut self[..])
            }
        }
    };
}

host_tensors!(host_tensor);

impl<'a, T> Matrix<&'a [T]> {
    /// A segment of a row.
    #[inline(always)]
    pub(super) fn at(&self, segment: &Segment) -> &'a [T] {
        &self.data[segment.elements(self.stride)]
    }

    /// Columns of a row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, cols: Range<usize>) -> &'a [T] {
        &self.data[row * self.stride + cols.start..row * self.stride + cols.end]
    }

    /// Asks for a block of octets ahead of its use. Where it is of several rows with a stride, gaps are asked for in place of
    /// the later ones: row by row took more time from contiguous rows than it saved (dropout on 2^24 f32, two cores: 4.4 ms
    /// in place of 3.9).
    #[inline(always)]
    pub(super) fn prefetch(&self, block: &Segment) {
        let Range { start, end } = block.elements(self.stride);
        split::prefetch(self.data, start..end.min(self.data.len()));
    }
}
