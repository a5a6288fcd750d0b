//! A batch of row-major products as the calls of cuBLAS, which are column-major.

use crate::error::Error;
use crate::transformer::matmul::{Layout, MatMul};
use cudarc::cublas::sys;

/// A number as cuBLAS takes it.
pub(super) fn int(argument: &'static str, value: usize) -> Result<i32, Error> {
    i32::try_from(value)
        .map_err(|_| Error::argument("matmul", argument, "numbers below 2^31", value))
}

/// How many products there are, and the strides between their matrices, where one stride each is enough.
pub(in crate::transformer::device) fn one_stride(what: &MatMul) -> Option<(usize, [usize; 3])> {
    let [outer, inner] = what.batch;
    let strides = |dimension: usize| [what.a, what.b, what.c].map(|l| l.batch[dimension]);
    let contiguous = [what.a, what.b, what.c].iter().all(|l| l.batch[0] == inner * l.batch[1]);
    if outer == 1 || contiguous {
        return Some((outer * inner, strides(1)));
    }
    (inner == 1).then(|| (outer, strides(0)))
}

/// Whether cuBLAS may be given the batch as a list of addresses: it does not look at them, and reads 16 bytes at once.
pub(in crate::transformer::device) fn listable(
    what: &MatMul,
    base: [u64; 3],
    size: [usize; 3],
) -> bool {
    let whole = |(base, (layout, size)): (u64, (Layout, usize))| {
        let [outer, inner] = layout.batch;
        let mut strides = [layout.offset, outer, inner].into_iter();
        base.is_multiple_of(16) && strides.all(|stride| (stride * size).is_multiple_of(16))
    };
    base.into_iter().zip([what.a, what.b, what.c].into_iter().zip(size)).all(whole)
}

/// Where the matrices of a batch begin, `[3, products]`: those of a, of b and of c, whose buffers begin at `base` and
/// have elements of `size` bytes. The batch was checked.
pub(in crate::transformer::device) fn addresses(
    what: &MatMul,
    base: [u64; 3],
    size: [usize; 3],
) -> Vec<u64> {
    let [outer, inner] = what.batch;
    let of = |((layout, base), size): ((Layout, u64), usize)| {
        let [of_outer, of_inner] = layout.batch;
        let first = move |o: usize, i: usize| layout.offset + o * of_outer + i * of_inner;
        let inner = move |o| (0..inner).map(move |i| base + (first(o, i) * size) as u64);
        (0..outer).flat_map(inner)
    };
    [what.a, what.b, what.c].into_iter().zip(base).zip(size).flat_map(of).collect()
}

/// A row-major product as a column-major one.
///
/// A row-major matrix is its transpose, column-major. So c = a · b, row-major, is cᵀ = bᵀ · aᵀ for cuBLAS: b
/// is its first matrix and a its second, and each is transposed where it is *not* row-major here. Where c is
/// column-major itself, it is a and b in this order, transposed where they are row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transformer::device) struct Gemm {
    /// cuBLAS's m, n, k.
    mnk: [usize; 3],
    /// Leading dimensions of cuBLAS's first and second matrix and of c.
    ld: [usize; 3],
    /// Whether cuBLAS transposes its first and its second matrix.
    transposed: [bool; 2],
    /// Whether cuBLAS's first matrix is b.
    swapped: bool,
    add: bool,
}

impl Gemm {
    /// # Errors
    /// [`Error::Argument`] where rows or columns overlap.
    pub(in crate::transformer::device) fn new(what: &MatMul) -> Result<Self, Error> {
        let [m, n, k] = what.mnk;
        let (c_row_major, ld_c) = order("c", &what.c, [m, n])?;
        let (a_row_major, ld_a) = order("a", &what.a, [m, k])?;
        let (b_row_major, ld_b) = order("b", &what.b, [k, n])?;
        let add = what.add;
        Ok(if c_row_major {
            let transposed = [!b_row_major, !a_row_major];
            Self { mnk: [n, m, k], ld: [ld_b, ld_a, ld_c], transposed, swapped: true, add }
        } else {
            let transposed = [a_row_major, b_row_major];
            Self { mnk: [m, n, k], ld: [ld_a, ld_b, ld_c], transposed, swapped: false, add }
        })
    }

    /// What belongs to (a, b, c), as cuBLAS takes it.
    pub(super) fn in_order<V: Copy>(&self, [a, b, c]: [V; 3]) -> [V; 3] {
        if self.swapped { [b, a, c] } else { [a, b, c] }
    }

    pub(super) fn beta(&self) -> f32 {
        if self.add { 1.0 } else { 0.0 }
    }

    #[allow(clippy::type_complexity)] // cuBLAS's own arguments
    pub(super) fn arguments(
        &self,
    ) -> Result<([i32; 3], [i32; 3], [sys::cublasOperation_t; 2]), Error> {
        let [m, n, k] = self.mnk;
        let [a, b, c] = self.ld;
        let mnk = [int("mnk", m)?, int("mnk", n)?, int("mnk", k)?];
        let ld = [int("a", a)?, int("b", b)?, int("c", c)?];
        let operation = |transposed| match transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        Ok((mnk, ld, self.transposed.map(operation)))
    }
}

/// Whether a matrix is row-major, and its leading dimension, which cuBLAS wants to be at least the length of
/// a row (a column), also where there is only one.
fn order(
    argument: &'static str,
    layout: &Layout,
    [rows, cols]: [usize; 2],
) -> Result<(bool, usize), Error> {
    let fits = |stride: usize, lines: usize, length: usize| lines <= 1 || stride >= length;
    if layout.col == 1 && fits(layout.row, rows, cols) {
        return Ok((true, layout.row.max(cols).max(1)));
    }
    if layout.row == 1 && fits(layout.col, cols, rows) {
        return Ok((false, layout.col.max(rows).max(1)));
    }
    // A single row may have any stride between its columns where it is one column long, and the like.
    let expected = "rows or columns without gaps that do not overlap";
    let given = format!("{layout:?} of {rows} x {cols}");
    Err(Error::argument("matmul", argument, expected, given))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `cublasGemmEx` documents: column-major, C = op(A) op(B) + beta C.
    fn gemm(g: &Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
        let ([m, n, k], [ld_a, ld_b, ld_c]) = (g.mnk, g.ld);
        // The conditions that cuBLAS refuses a call by.
        assert!(ld_a >= if g.transposed[0] { k } else { m });
        assert!(ld_b >= if g.transposed[1] { n } else { k });
        assert!(ld_c >= m);
        let at = |ld: usize, transposed: bool, row: usize, col: usize| match transposed {
            true => row * ld + col,
            false => col * ld + row,
        };
        for row in 0..m {
            for col in 0..n {
                let term =
                    |i| a[at(ld_a, g.transposed[0], row, i)] * b[at(ld_b, g.transposed[1], i, col)];
                let sum: f32 = (0..k).map(term).sum();
                let c = &mut c[col * ld_c + row];
                *c = sum + g.beta() * *c;
            }
        }
    }

    /// Small integers, so that every sum is exact.
    fn values(len: usize, salt: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + salt * 5) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn a_layout_becomes_the_call_that_computes_it() {
        let mut tried = 0;
        for [m, n, k] in [[3, 4, 5], [1, 4, 5], [3, 1, 5], [3, 4, 1], [1, 1, 1], [2, 2, 2]] {
            for choice in 0..32 {
                let bit = |i: usize| choice >> i & 1 == 1;
                let gap = if bit(4) { 3 } else { 0 };
                let layout = |transposed: bool, rows: usize, cols: usize| match transposed {
                    true => Layout { row: 1, col: rows + gap, ..Layout::rows(0) },
                    false => Layout::rows(cols + gap),
                };
                let what = MatMul {
                    mnk: [m, n, k],
                    batch: [1, 1],
                    a: layout(bit(0), m, k),
                    b: layout(bit(1), k, n),
                    c: layout(bit(2), m, n),
                    add: bit(3),
                };
                let (a, b, before) = (values(64, 1), values(64, 2), values(64, 3));
                let mut expected = before.clone();
                for row in 0..m {
                    for col in 0..n {
                        let c = row * what.c.row + col * what.c.col;
                        let term = |i: usize| {
                            a[row * what.a.row + i * what.a.col]
                                * b[i * what.b.row + col * what.b.col]
                        };
                        let sum: f32 = (0..k).map(term).sum();
                        expected[c] = sum + if what.add { before[c] } else { 0.0 };
                    }
                }
                let call = Gemm::new(&what).unwrap();
                let [first, second, _] = call.in_order([&a[..], &b[..], &[]]);
                let mut c = before;
                gemm(&call, first, second, &mut c);
                assert_eq!(c, expected, "{what:?} as {call:?}");
                tried += 1;
            }
        }
        assert_eq!(tried, 6 * 32);
    }

    #[test]
    fn overlapping_rows_are_refused() {
        let layout = Layout::rows(5);
        let mut what =
            MatMul { mnk: [3, 5, 5], batch: [1, 1], a: layout, b: layout, c: layout, add: false };
        assert!(Gemm::new(&what).is_ok());
        what.b.row = 4;
        let error = Gemm::new(&what).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "b", .. }), "{error}");
    }

    #[test]
    fn two_dimensions_of_a_batch_are_one_where_their_strides_allow_it() {
        let of = |batch, a: [usize; 2], b: [usize; 2]| {
            let layout = |batch| Layout { batch, ..Layout::rows(2) };
            let (a, b) = (layout(a), layout(b));
            one_stride(&MatMul { mnk: [2, 2, 2], batch, a, b, c: a, add: false })
        };
        assert_eq!(of([2, 3], [12, 4], [15, 5]), Some((6, [4, 5, 4])));
        assert_eq!(of([2, 3], [12, 4], [0, 0]), Some((6, [4, 0, 4])));
        assert_eq!(of([1, 3], [99, 4], [7, 5]), Some((3, [4, 5, 4])));
        assert_eq!(of([2, 1], [99, 4], [7, 5]), Some((2, [99, 7, 99])));
        assert_eq!(of([2, 3], [12, 4], [16, 5]), None);
        assert_eq!(of([2, 3], [12, 4], [0, 5]), None);
    }

    #[test]
    fn a_list_has_the_addresses_of_all_matrices() {
        let layout = |offset, batch| Layout { offset, batch, ..Layout::rows(2) };
        let (a, b, c) = (layout(8, [1000, 16]), layout(0, [0, 24]), layout(4, [12, 1 << 30]));
        let what = MatMul { mnk: [2, 2, 2], batch: [40, 3], a, b, c, add: false };
        let (base, size) = ([1 << 40, 3 << 33, 64], [2, 2, 4]);
        let list = addresses(&what, base, size);
        assert_eq!(list.len(), 3 * 120);
        for (x, matrix) in [a, b, c].into_iter().enumerate() {
            for i in 0..120 {
                let elements = matrix.offset + i / 3 * matrix.batch[0] + i % 3 * matrix.batch[1];
                assert_eq!(list[x * 120 + i], base[x] + (elements * size[x]) as u64);
            }
        }
        assert!(listable(&what, base, size));
        assert!(!listable(&what, [8, 16, 16], size));
        for a in [layout(4, [1000, 16]), layout(8, [1004, 16]), layout(8, [1000, 4])] {
            assert!(!listable(&MatMul { a, ..what }, base, size), "{a:?}");
        }
        assert!(list.iter().all(|address| address.is_multiple_of(16)));
    }
}
