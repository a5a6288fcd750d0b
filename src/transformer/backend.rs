//! What a model asks of the place where it runs: buffers, this crate's operators, matrix products, and the
//! little that a training step needs besides. The models are written once, over this trait.

use super::matmul::MatMul;
use super::streams::Drops;
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::tensor::Writable;
use std::cell::RefMut;
use std::ops::Range;

/// A type of the values in a buffer: f32, f16, bf16, u32, i32, u64. Sealed.
pub trait Element: bytemuck::Pod + Default + Send + Sync + sealed::Sealed {}

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
pub trait Backend {
    /// Storage type of activations and weights.
    type Elem: Dtype + Element;
    /// Where the buffers lie, and what runs the operators on them.
    type Memory: crate::Backend;
    /// Memory of the backend.
    type Buffer<E: Element>: Writable<E, Self::Memory>;
    /// What the backend keeps of a step that it repeats.
    type Recorded;

    /// Does the work of training step `step`: what a step submits once its batch and the numbers of the optimiser are
    /// on the backend.
    ///
    /// A backend may keep in `recorded` what `work` submitted at the first call, and submit it again at later calls in
    /// place of calling `work`. So `work` is the same at every step, with the same buffers: what differs from step to
    /// step lies in buffers that are written in between, and every pass is one of step `step`, with the same schedule. It
    /// reads nothing back, writes nothing from the host and makes no buffer. At the first call `work` may be called twice,
    /// though its effects are those of one call.
    ///
    /// # Errors
    /// What `work` says; [`Error::Argument`] where it does what cannot be repeated; what the backend says.
    fn repeat(
        &self,
        recorded: &mut Option<Self::Recorded>,
        step: u64,
        work: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error>;

    /// Runs a pass of an operator that drops `drops`.
    ///
    /// # Errors
    /// What the operator says.
    fn run<'a, P: crate::Pass<'a, Self::Memory>>(&self, drops: Drops, pass: P) -> Result<(), Error>
    where
        Self::Memory: 'a;

    /// Where a lookup reports an id that is in no table, on a backend that does not refuse it.
    fn report(&self) -> Option<RefMut<'_, Self::Buffer<u32>>>;

    /// A buffer of `len` zeros.
    fn zeros<E: Element>(&self, len: usize) -> Result<Self::Buffer<E>, Error>;

    /// Copies `values` to the start of a buffer at least as long.
    fn write<E: Element>(&self, buffer: &mut Self::Buffer<E>, values: &[E]) -> Result<(), Error>;

    /// The contents of a buffer.
    fn read<E: Element>(&self, buffer: &Self::Buffer<E>) -> Result<Vec<E>, Error>;

    /// Copies part `part` of `from` to another buffer, from its element `at` on.
    fn copy(
        &self,
        from: &F32<Self>,
        part: Range<usize>,
        to: &mut F32<Self>,
        at: usize,
    ) -> Result<(), Error>;

    /// Sets every value to zero.
    fn clear<E: Element>(&self, buffer: &mut Self::Buffer<E>) -> Result<(), Error>;

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
