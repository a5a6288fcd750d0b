//! Host memory: slices, arrays and vectors as the CPU's tensors.

use super::Cpu;
use crate::error::Error;
use crate::tensor::{Memory, Readable, Writable, host_tensors};

impl Memory for Cpu {
    type In<'a, T: 'a> = &'a [T];
    type Out<'a, T: 'a> = &'a mut [T];
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
