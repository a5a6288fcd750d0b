//! The emulator as a device with memory: the host's, and matrix products by the crate `gemm`.

use super::Runtime;
use crate::dtype::Dtype;
use crate::emulator::Emulator;
use crate::error::Error;
use crate::transformer::CpuBackend;
use crate::transformer::backend::{Backend, Element};
use crate::transformer::matmul::{Layout, MatMul};
use std::convert::Infallible;
use std::ops::Range;

impl Runtime for Emulator {
    type Buffer<E: Element> = Vec<E>;
    type Graph = Infallible;

    fn record(&self, _: impl FnOnce() -> Result<(), Error>) -> Result<Option<Infallible>, Error> {
        Ok(None)
    }

    fn replay(&self, graph: &Infallible) -> Result<(), Error> {
        match *graph {}
    }

    fn zeros<E: Element>(&self, len: usize) -> Result<Vec<E>, Error> {
        CpuBackend::new().zeros(len)
    }

    fn write<E: Element>(&self, buffer: &mut Vec<E>, values: &[E]) -> Result<(), Error> {
        CpuBackend::new().write(buffer, values)
    }

    fn read<E: Element>(&self, buffer: &Vec<E>) -> Result<Vec<E>, Error> {
        CpuBackend::new().read(buffer)
    }

    fn copy(
        &self,
        from: &Vec<f32>,
        part: Range<usize>,
        to: &mut Vec<f32>,
        at: usize,
    ) -> Result<(), Error> {
        CpuBackend::new().copy(from, part, to, at)
    }

    fn clear<E: Element>(&self, buffer: &mut Vec<E>) -> Result<(), Error> {
        CpuBackend::new().clear(buffer)
    }

    fn matmul<T: Dtype + Element, C: Dtype + Element>(
        &self,
        what: &MatMul,
        a: &Vec<T>,
        b: &Vec<T>,
        c: &mut Vec<C>,
    ) -> Result<(), Error> {
        let Some(what) = &what.check([a.len(), b.len(), c.len()])? else { return Ok(()) };
        for outer in 0..what.batch[0] {
            for inner in 0..what.batch[1] {
                product(what, [outer, inner], a, b, c);
            }
        }
        Ok(())
    }
}

/// The product at `at` of the batch, in f32 and rounded once. The layouts were checked.
fn product<T: Dtype, C: Dtype>(what: &MatMul, at: [usize; 2], a: &[T], b: &[T], c: &mut [C]) {
    let [m, n, k] = what.mnk;
    let (a, b) = (gather(&what.a, at, [m, k], a), gather(&what.b, at, [k, n], b));
    let mut sums = if what.add { gather(&what.c, at, [m, n], c) } else { vec![0.0; m * n] };
    // SAFETY: the three matrices are m x k, k x n and m x n, row by row, in vectors of these lengths.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            sums.as_mut_ptr(),
            1,
            n as isize,
            true,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            1,
            n as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    for (index, at) in indices(&what.c, at, [m, n]).enumerate() {
        c[at] = C::from_f32(sums[index]);
    }
}

/// A matrix in f32, row by row.
fn gather<T: Dtype>(layout: &Layout, at: [usize; 2], size: [usize; 2], values: &[T]) -> Vec<f32> {
    indices(layout, at, size).map(|index| values[index].to_f32()).collect()
}

/// Where the elements of a matrix lie, row by row.
fn indices(
    layout: &Layout,
    at: [usize; 2],
    [rows, cols]: [usize; 2],
) -> impl Iterator<Item = usize> {
    let Layout { offset, row, col, batch } = *layout;
    let first = offset + at[0] * batch[0] + at[1] * batch[1];
    (0..rows).flat_map(move |r| (0..cols).map(move |c| first + r * row + c * col))
}
