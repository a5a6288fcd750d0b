//! What a model asks of the place where it runs: buffers, this crate's operators, matrix products, and the
//! little that a training step needs besides. The models are written once, over this trait.

use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add_norm::{Inputs, ParamGrads, Saved};
use crate::ops::embedding_dropout::{Gradients, Lookups, NormGradients, Tables};
use crate::ops::{Dropout, Shape};
use crate::{Activation, Affine, AttentionMask, Norm, Scores};
use std::ops::Range;

/// A type of the values in a buffer: f32, f16, bf16, u32, i32, u64. Sealed.
#[cfg(not(feature = "cuda"))]
pub trait Element: bytemuck::Pod + Default + Send + Sync + sealed::Sealed {}
/// A type of the values in a buffer: f32, f16, bf16, u32, i32, u64. Sealed.
#[cfg(feature = "cuda")]
pub trait Element:
    bytemuck::Pod
    + Default
    + Send
    + Sync
    + sealed::Sealed
    + cudarc::driver::DeviceRepr
    + cudarc::driver::ValidAsZeroBits
{
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($element:ty),*) => {$(
        impl sealed::Sealed for $element {}
        impl Element for $element {}
    )*};
}
elements!(f32, half::f16, half::bf16, u32, i32, u64);

/// Activations, and the weights as the operators read them.
pub type Act<B> = <B as Backend>::Buffer<<B as Backend>::Elem>;
/// Gradients of weights, statistics, losses.
pub type F32<B> = <B as Backend>::Buffer<f32>;
/// Ids.
pub type U32<B> = <B as Backend>::Buffer<u32>;

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

/// The numbers of one AdamW step, in the order in which they lie in a buffer: the learning rate, beta1,
/// beta2, epsilon, 1 / (1 - beta1^t), 1 / (1 - beta2^t).
pub const ADAMW_NUMBERS: usize = 6;

/// A weight and what AdamW keeps of it, all of the same length.
pub struct Weight<'a, B: Backend + ?Sized> {
    /// What the operators read.
    pub weight: &'a mut Act<B>,
    /// The weight in f32, where the operators' is not: it is updated, and rounded into `weight`.
    pub master: Option<&'a mut F32<B>>,
    /// Its gradient.
    pub grad: &'a F32<B>,
    /// Running mean of the gradient.
    pub m: &'a mut F32<B>,
    /// Running mean of its square.
    pub v: &'a mut F32<B>,
    /// Decoupled weight decay; 0 for none.
    pub decay: f32,
}

/// A place where models run.
///
/// Operators are those of the crate under the same names, with the same arguments: `crate::cpu` and
/// `crate::device` say what each computes. Where memory on a device is asked for, it belongs to the backend.
pub trait Backend {
    /// Storage type of activations and weights.
    type Elem: Dtype + Element;
    /// Memory of the backend.
    type Buffer<E: Element>;
    /// What the backend keeps of a step that it repeats.
    type Recorded;

    /// Does the work of training step `step`: what a step submits once its batch and the numbers of the optimiser are
    /// on the backend.
    ///
    /// A backend may keep in `recorded` what `work` submitted at the first call, and submit it again at later calls in
    /// place of calling `work`. So `work` is the same at every step, with the same buffers: what differs from step to
    /// step lies in buffers that are written in between, and the number of the step is `step` in all its stream
    /// numbers. It reads nothing back, writes nothing from the host and makes no buffer. It may be called once more
    /// than it acts.
    ///
    /// # Errors
    /// What `work` says; [`Error::Argument`] where it does what cannot be repeated; what the backend says.
    fn repeat(
        &self,
        recorded: &mut Option<Self::Recorded>,
        step: u64,
        work: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error>;

    /// A buffer of `len` zeros.
    fn zeros<E: Element>(&self, len: usize) -> Result<Self::Buffer<E>, Error>;

    /// Copies `values` to the start of a buffer at least as long.
    fn write<E: Element>(&self, buffer: &mut Self::Buffer<E>, values: &[E]) -> Result<(), Error>;

    /// The contents of a buffer.
    fn read<E: Element>(&self, buffer: &Self::Buffer<E>) -> Result<Vec<E>, Error>;

    /// Copies `from` to another buffer, from its element `at` on.
    fn copy(&self, from: &F32<Self>, to: &mut F32<Self>, at: usize) -> Result<(), Error>;

    /// Sets every value to zero.
    fn clear<E: Element>(&self, buffer: &mut Self::Buffer<E>) -> Result<(), Error>;

    /// Sets a part of a buffer to zero.
    fn clear_part(&self, buffer: &mut F32<Self>, part: Range<usize>) -> Result<(), Error>;

    /// A buffer with these contents.
    fn upload<E: Element>(&self, values: &[E]) -> Result<Self::Buffer<E>, Error> {
        let mut buffer = self.zeros(values.len())?;
        self.write(&mut buffer, values)?;
        Ok(buffer)
    }

    /// c = a · b, accumulated in f32.
    fn matmul(
        &self,
        what: &MatMul,
        a: &Act<Self>,
        b: &Act<Self>,
        c: &mut Act<Self>,
    ) -> Result<(), Error>;

    /// The same into f32: the gradients of weights.
    fn matmul_f32(
        &self,
        what: &MatMul,
        a: &Act<Self>,
        b: &Act<Self>,
        c: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// y = D(token + position + segment).
    fn embedding(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        lookups: &Lookups<&U32<Self>>,
        tables: &Tables<&Act<Self>>,
        y: &mut Act<Self>,
    ) -> Result<(), Error>;

    /// Adds the gradients of the tables.
    fn embedding_backward(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        lookups: &Lookups<&U32<Self>>,
        dy: &Act<Self>,
        gradients: Gradients<&mut F32<Self>>,
    ) -> Result<(), Error>;

    /// y = D(norm(token + position + segment)).
    fn embedding_norm(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        lookups: &Lookups<&U32<Self>>,
        tables: &Tables<&Act<Self>>,
        affine: &Affine<&Act<Self>>,
        y: &mut Act<Self>,
        stats: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// Adds the gradients of the tables and of the norm's parameters.
    fn embedding_norm_backward(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        lookups: &Lookups<&U32<Self>>,
        tables: &Tables<&Act<Self>>,
        weight: &Act<Self>,
        stats: &F32<Self>,
        dy: &Act<Self>,
        gradients: Gradients<&mut F32<Self>>,
        norm_gradients: NormGradients<&mut F32<Self>>,
    ) -> Result<(), Error>;

    /// y = D(act(x + bias)).
    fn bias_act_dropout(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        activation: Activation,
        x: &Act<Self>,
        bias: &Act<Self>,
        y: &mut Act<Self>,
    ) -> Result<(), Error>;

    /// dx, in place of dy, and dbias.
    fn bias_act_dropout_backward(
        &self,
        dropout: &Dropout<'_>,
        shape: Shape,
        activation: Activation,
        x: &Act<Self>,
        bias: &Act<Self>,
        dy: &mut Act<Self>,
        dbias: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// x += bias, in every row: the bias of a projection that no operator follows.
    fn add_bias(&self, shape: Shape, x: &mut Act<Self>, bias: &Act<Self>) -> Result<(), Error>;

    /// dbias = dy summed over the rows.
    fn bias_grad(
        &self,
        shape: Shape,
        dy: &mut Act<Self>,
        dbias: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// s = residual + D(x + bias), y = norm(s).
    fn dropout_add_norm(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        inputs: &Inputs<&Act<Self>>,
        affine: &Affine<&Act<Self>>,
        s: Option<&mut Act<Self>>,
        y: &mut Act<Self>,
        stats: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// dresidual, dx and the parameters' gradients.
    fn dropout_add_norm_backward(
        &self,
        dropout: &Dropout<'_>,
        norm: &Norm,
        shape: Shape,
        saved: &Saved<&Act<Self>>,
        weight: &Act<Self>,
        stats: &F32<Self>,
        dy: &Act<Self>,
        ds: Option<&Act<Self>>,
        dresidual: &mut Act<Self>,
        dx: &mut Act<Self>,
        grads: ParamGrads<&mut F32<Self>>,
    ) -> Result<(), Error>;

    /// y = D(softmax(scale · x + mask)), and the statistics of each row, `[rows, 2]`.
    fn softmax_dropout(
        &self,
        dropout: &Dropout<'_>,
        scores: &Scores,
        mask: &AttentionMask<&U32<Self>, &Act<Self>>,
        x: &Act<Self>,
        y: &mut Act<Self>,
        statistics: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// dx, in place of dy.
    fn softmax_dropout_backward(
        &self,
        dropout: &Dropout<'_>,
        scores: &Scores,
        mask: &AttentionMask<&U32<Self>, &Act<Self>>,
        x: &Act<Self>,
        statistics: &F32<Self>,
        dy: &mut Act<Self>,
    ) -> Result<(), Error>;

    /// Cross-entropy with class numbers: loss\[0\] = factor · Σ (lse(row) - row\[label\]) over the rows whose label
    /// is not negative, and its gradient in place of the logits (+0 in the other rows).
    ///
    /// `logits`: `[rows, cols]`; `labels`: `[rows]`, each below `cols`; `factor`, `loss`: one value. The sum has a fixed
    /// order.
    fn cross_entropy(
        &self,
        shape: Shape,
        factor: &F32<Self>,
        labels: &Self::Buffer<i32>,
        logits: &mut Act<Self>,
        loss: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// to += from.
    fn accumulate(&self, from: &F32<Self>, to: &mut Act<Self>) -> Result<(), Error>;

    /// norm = (‖grads‖₂, what clips it to `max_norm`: min(1, max_norm / (‖grads‖₂ + 1e-6))). The sum has a fixed order,
    /// and no square overflows. Gradients that are not finite clip to NaN, and the weights with them: they do not go
    /// unseen.
    fn gradient_norm(
        &self,
        grads: &[F32<Self>],
        max_norm: f32,
        norm: &mut F32<Self>,
    ) -> Result<(), Error>;

    /// One step of AdamW (Loshchilov and Hutter, ICLR 2019) on every weight, with g = grad · norm\[1\]:
    ///
    /// ```text
    ///     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g²
    ///     w = w - lr · decay · w - lr · (m / (1 - beta1^t)) / (√(v / (1 - beta2^t)) + epsilon)
    /// ```
    ///
    /// `numbers` as [`ADAMW_NUMBERS`] says.
    fn adamw(
        &self,
        numbers: &F32<Self>,
        norm: &F32<Self>,
        weights: Vec<Weight<'_, Self>>,
    ) -> Result<(), Error>;
}
