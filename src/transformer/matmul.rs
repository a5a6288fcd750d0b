//! Matrix products as a backend takes them: sizes, and where the elements lie.

use crate::error::Error;

/// Where elements of a matrix, or of a batch of them, lie in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The first element.
    pub offset: usize,
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one column to the next. One of `row` and `col` is 1.
    pub col: usize,
    /// Elements from one matrix to the next, along both dimensions of the batch.
    pub batch: [usize; 2],
}

impl Layout {
    /// One matrix of `cols` columns, row-major.
    pub fn rows(cols: usize) -> Self {
        Self { offset: 0, row: cols, col: 1, batch: [0, 0] }
    }

    /// The transposed matrix.
    pub fn transposed(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }
}

/// A batch of matrix products, c = a · b, or c += a · b.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatMul {
    /// Rows of c, columns of c, and the length of the sums.
    pub mnk: [usize; 3],
    /// How many products, along two dimensions.
    pub batch: [usize; 2],
    /// `[m, k]`.
    pub a: Layout,
    /// `[k, n]`.
    pub b: Layout,
    /// `[m, n]`.
    pub c: Layout,
    /// Whether the product is added to c.
    pub add: bool,
}

impl MatMul {
    /// Checks that the matrices lie within buffers of `lens` = (a, b, c) elements, and that no two elements of c are
    /// the same: what every backend needs before it writes through bare addresses. Answers the same products without
    /// the strides that no element needs, so that no address overflows; `None` where c has no element.
    ///
    /// # Errors
    /// [`Error::Argument`] with the matrix.
    pub fn check(&self, lens: [usize; 3]) -> Result<Option<Self>, Error> {
        let [m, n, k] = self.mnk;
        let matrices = [("a", self.a, [m, k]), ("b", self.b, [k, n]), ("c", self.c, [m, n])];
        for ((name, layout, size), len) in matrices.into_iter().zip(lens) {
            let end = layout.end(size, self.batch);
            if end.is_none_or(|end| end > len) {
                let given = format!("{layout:?} of {size:?}, batch {:?}", self.batch);
                return Err(Error::argument("matmul", name, format!("{len} elements"), given));
            }
            if ![layout.row, layout.col].contains(&1) {
                return Err(Error::argument("matmul", name, "rows or columns without gaps", len));
            }
        }
        if !self.c.distinct([m, n], self.batch) {
            let given = format!("{:?}", self.c);
            return Err(Error::argument("matmul", "c", "elements that do not overlap", given));
        }
        if m == 0 || n == 0 || self.batch.contains(&0) {
            return Ok(None);
        }
        let [a, b, c] = matrices.map(|(_, layout, size)| layout.reduced(size, self.batch));
        Ok(Some(Self { a, b, c, ..*self }))
    }
}

impl Layout {
    /// Strides with the number of steps along each.
    fn dimensions(&self, [rows, cols]: [usize; 2], batch: [usize; 2]) -> [(usize, usize); 4] {
        [(self.row, rows), (self.col, cols), (self.batch[0], batch[0]), (self.batch[1], batch[1])]
    }

    /// One past the last element; `None` where it is no usize.
    fn end(&self, size: [usize; 2], batch: [usize; 2]) -> Option<usize> {
        let dimensions = self.dimensions(size, batch);
        if dimensions.iter().any(|&(_, steps)| steps == 0) {
            return Some(0);
        }
        dimensions.iter().try_fold(self.offset.checked_add(1)?, |end, &(stride, steps)| {
            stride.checked_mul(steps - 1).and_then(|last| last.checked_add(end))
        })
    }

    /// The same elements without the strides along dimensions of one step: between neighbours they are 1, or a row.
    fn reduced(self, [rows, cols]: [usize; 2], batch: [usize; 2]) -> Self {
        if rows == 0 || cols == 0 {
            return Self::rows(cols);
        }
        let row = if rows == 1 && self.col == 1 { cols } else { self.row };
        let col = if cols == 1 && self.row == 1 { rows } else { self.col };
        let of = |d: usize| if batch[d] == 1 { 0 } else { self.batch[d] };
        let one = rows == 1 && cols == 1;
        let [row, col] = if one { [1, 1] } else { [row, col] };
        Self { offset: self.offset, row, col, batch: [of(0), of(1)] }
    }

    /// Whether each stride steps over all that the smaller ones reach.
    fn distinct(&self, size: [usize; 2], batch: [usize; 2]) -> bool {
        let mut dimensions = self.dimensions(size, batch);
        dimensions.sort_unstable();
        let mut reach = 1;
        dimensions.iter().filter(|&&(_, steps)| steps > 1).all(|&(stride, steps)| {
            let over = stride >= reach;
            reach = stride.saturating_mul(steps);
            over
        })
    }
}
