//! Tensors as the operators take them: anything that a backend can read or write, behind one pair of traits.

use crate::error::Error;
use std::ops::Range;

/// A kind of memory, and what reading and writing a tensor in it gives: slices for the CPU, addresses for a device.
pub trait Memory {
    /// What is read of a tensor of `T`.
    type In<'a, T: 'a>
    where
        Self: 'a;
    /// What is written of a tensor of `T`.
    type Out<'a, T: 'a>
    where
        Self: 'a;

    /// What is read of a tensor behind its first `first` elements, of which it has at least so many.
    fn skip<'a, T: 'a>(tensor: Self::In<'a, T>, first: usize) -> Self::In<'a, T>
    where
        Self: 'a;
    /// What is written of a tensor behind its first `first` elements, of which it has at least so many.
    fn skip_mut<'a, T: 'a>(tensor: Self::Out<'a, T>, first: usize) -> Self::Out<'a, T>
    where
        Self: 'a;
}

/// Columns of a whole tensor, as [`Strided::columns`] takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The columns.
    pub range: Range<usize>,
    /// Elements of the whole tensor.
    pub whole: usize,
}

/// A tensor of `T` that lies in memory `M`, for reading.
///
/// Implemented for slices, arrays and vectors on the CPU and the emulator, for cudarc's slices and views on a GPU, and for
/// references to what implements it. A field of a pass takes a reference to one of these: `&x` of a vector. A part of a
/// vector is a slice, `&x[a..b]`, and a reference to it is `&&x[a..b]`, or `&mut &mut y[a..b]` where it is written.
///
/// # Safety
/// As long as it is held, what [`read`](Self::read) gives refers to [`elements`](Self::elements) values of `T` that can be
/// read, aligned to `T`. Where [`columns`](Self::columns) answers, these are the elements of the whole tensor from the first
/// column's start on. What the functions answer stays the same through a call. Nothing else is checked before kernels are
/// launched.
pub unsafe trait Readable<T, M: Memory> {
    /// Length in elements.
    fn elements(&self) -> usize;
    /// Elements from one row's start to the next one's, where the rows are not contiguous: see [`Strided`].
    fn row_stride(&self) -> Option<usize> {
        None
    }
    /// Which columns of a whole tensor these rows are, where that is known: see [`Strided::columns`].
    fn columns(&self) -> Option<Columns> {
        None
    }
    /// Gives the tensor to an operator that reads it.
    ///
    /// # Errors
    /// Whatever a device says while it orders the read behind earlier writes.
    fn read<'a>(&'a self, memory: &'a M) -> Result<M::In<'a, T>, Error>;
}

/// A tensor of `T` that lies in memory `M`, for reading and writing.
///
/// # Safety
/// As [`Readable`], for writes too: what [`write`](Self::write) gives is this tensor's alone while it is held,
/// and any bits that a kernel leaves there are a `T`.
pub unsafe trait Writable<T, M: Memory>: Readable<T, M> {
    /// Gives the tensor to an operator that writes it.
    ///
    /// # Errors
    /// Whatever a device says while it orders the write behind earlier uses.
    fn write<'a>(&'a mut self, memory: &'a M) -> Result<M::Out<'a, T>, Error>;
}

// SAFETY: the tensor is one.
unsafe impl<T, M: Memory, R: Readable<T, M> + ?Sized> Readable<T, M> for &R {
    fn elements(&self) -> usize {
        (**self).elements()
    }

    fn row_stride(&self) -> Option<usize> {
        (**self).row_stride()
    }

    fn columns(&self) -> Option<Columns> {
        (**self).columns()
    }

    fn read<'a>(&'a self, memory: &'a M) -> Result<M::In<'a, T>, Error> {
        (**self).read(memory)
    }
}

// SAFETY: as above.
unsafe impl<T, M: Memory, R: Readable<T, M> + ?Sized> Readable<T, M> for &mut R {
    fn elements(&self) -> usize {
        (**self).elements()
    }

    fn row_stride(&self) -> Option<usize> {
        (**self).row_stride()
    }

    fn columns(&self) -> Option<Columns> {
        (**self).columns()
    }

    fn read<'a>(&'a self, memory: &'a M) -> Result<M::In<'a, T>, Error> {
        (**self).read(memory)
    }
}

// SAFETY: as above, borrowed exclusively.
unsafe impl<T, M: Memory, W: Writable<T, M> + ?Sized> Writable<T, M> for &mut W {
    fn write<'a>(&'a mut self, memory: &'a M) -> Result<M::Out<'a, T>, Error> {
        (**self).write(memory)
    }
}

/// A tensor of `T` that a pass reads.
pub type In<'a, T, M> = &'a (dyn Readable<T, M> + 'a);

/// A tensor of `T` that a pass writes.
pub type Out<'a, T, M> = &'a mut (dyn Writable<T, M> + 'a);

/// A matrix whose rows begin `stride` elements apart: a head's columns in a fused QKV tensor, a shard's columns in the
/// whole tensor, rows that are padded. What lies between the rows is not touched.
///
/// Each `[rows, cols]` tensor of `dropout`, `dropout_add`, `dropout_add_norm`, `bias_act_dropout`, `swiglu_dropout` and
/// `softmax_dropout` may be one, each with a stride of its own; every other tensor is contiguous, and a stride is refused
/// there. A mask knows nothing of strides: columns of a whole tensor draw its mask where
/// [`Shard::first_col`](crate::Shard::first_col) says which they are.
///
/// On a device rows are read and written in whole vectors where their columns and strides are multiples of 8 and their
/// addresses of 16 bytes, as in contiguous tensors. Two outputs of one pass may be columns of one tensor there, as
/// [`Pointer`](crate::device::Pointer)s; on the CPU a slice is one output's alone.
///
/// [`columns`](Self::columns) takes the whole tensor, and every length but the right one is refused. [`new`](Self::new) takes a
/// tensor that begins with the first element, and may end anywhere in the last stride: a stride that is a little too large can
/// fit it.
///
/// ```
/// use fused_dropout::{Backend, Dropout, Key, Probability, Shape, Source, Strided, cpu::Cpu, ops::dropout};
/// // The values of a fused QKV tensor, two tokens of 3 * 8 columns, in place.
/// let mut qkv = vec![1.0f32; 2 * 24];
/// let drop = Dropout::new(Key::new(42, 7), Probability::ONE);
/// let mut values = Strided::columns(&mut qkv, 16..24, 24);
/// Cpu::new().run(&drop, dropout::Forward { shape: Shape::new(2, 8), x: Source::InPlace, y: &mut values })?;
/// assert_eq!(qkv.iter().sum::<f32>(), 32.0);
/// # Ok::<(), fused_dropout::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strided<X> {
    tensor: X,
    stride: usize,
    columns: Option<Range<usize>>,
}

impl<X> Strided<X> {
    /// Rows that begin `stride` elements apart, the first of them where `tensor` begins. The tensor ends anywhere between the
    /// last row's last element and the end of its stride.
    pub fn new(tensor: X, stride: usize) -> Self {
        Self { tensor, stride, columns: None }
    }

    /// Columns of a whole tensor, whose rows have `stride` elements, in any backend's memory. An operator asks for `cols`
    /// columns, and for a tensor of exactly `rows * stride` elements.
    pub fn columns(whole: X, columns: Range<usize>, stride: usize) -> Self {
        Self { tensor: whole, stride, columns: Some(columns) }
    }

    /// Elements of a tensor of `whole` before the first row's first one.
    fn first(&self, whole: usize) -> usize {
        self.columns.as_ref().map_or(0, |columns| columns.start.min(whole))
    }
}

// SAFETY: the tensor is one.
unsafe impl<T, M: Memory, X: Readable<T, M>> Readable<T, M> for Strided<X> {
    fn elements(&self) -> usize {
        let whole = self.tensor.elements();
        whole - self.first(whole)
    }

    fn row_stride(&self) -> Option<usize> {
        Some(self.stride)
    }

    fn columns(&self) -> Option<Columns> {
        let whole = self.tensor.elements();
        self.columns.clone().map(|range| Columns { range, whole })
    }

    fn read<'a>(&'a self, memory: &'a M) -> Result<M::In<'a, T>, Error> {
        let first = self.first(self.tensor.elements());
        Ok(M::skip(self.tensor.read(memory)?, first))
    }
}

// SAFETY: as above.
unsafe impl<T, M: Memory, X: Writable<T, M>> Writable<T, M> for Strided<X> {
    fn write<'a>(&'a mut self, memory: &'a M) -> Result<M::Out<'a, T>, Error> {
        let first = self.first(self.tensor.elements());
        Ok(M::skip_mut(self.tensor.write(memory)?, first))
    }
}

/// An input that the output may overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<I> {
    /// A tensor of its own.
    Tensor(I),
    /// It lies where the output goes, and is overwritten.
    InPlace,
}

impl<I> Source<I> {
    /// The tensor, where it is one of its own.
    pub fn tensor(self) -> Option<I> {
        match self {
            Source::Tensor(tensor) => Some(tensor),
            Source::InPlace => None,
        }
    }
}

/// Where the gradient of a parameter (f32) goes, and whether it is written or added. Each is deterministic: the same calls give
/// the same bits in every run. Adding the parts of a batch sums in another order than the whole batch does: the two agree
/// within rounding.
pub enum Gradient<'a, M: Memory> {
    /// The gradient is written.
    Write(Out<'a, f32, M>),
    /// The gradient is added to what is there, in one addition an element: micro-batches, tied weights. The caller zeroes the
    /// tensor before the first of them, or writes that one.
    Add(Out<'a, f32, M>),
}

impl<'a, M: Memory> Gradient<'a, M> {
    /// The same for a shorter time: what a function was given, beside tensors of its own.
    pub fn reborrow(&mut self) -> Gradient<'_, M> {
        match self {
            Gradient::Write(tensor) => Gradient::Write(&mut **tensor),
            Gradient::Add(tensor) => Gradient::Add(&mut **tensor),
        }
    }

    /// The tensor.
    pub(crate) fn tensor(&self) -> &(dyn Writable<f32, M> + 'a) {
        match self {
            Gradient::Write(tensor) | Gradient::Add(tensor) => &**tensor,
        }
    }

    /// The same tensor, added to.
    #[cfg(feature = "transformer")]
    pub(crate) fn adding(self) -> Self {
        Gradient::Add(self.into_parts().0)
    }

    /// The tensor, and whether the gradient is added to it.
    pub(crate) fn into_parts(self) -> (Out<'a, f32, M>, bool) {
        match self {
            Gradient::Write(tensor) => (tensor, false),
            Gradient::Add(tensor) => (tensor, true),
        }
    }
}

/// A parameter's gradient in its memory.
pub(crate) struct Sum<'a, M: Memory + 'a> {
    pub to: M::Out<'a, f32>,
    /// Whether the gradient is added to what is there.
    pub add: bool,
}

impl<'a, M: Memory> Sum<'a, M> {
    pub fn of<'g: 'a>(gradient: Gradient<'g, M>, memory: &'a M) -> Result<Self, Error> {
        let (tensor, add) = gradient.into_parts();
        Ok(Self { to: tensor.write(memory)?, add })
    }
}

/// [`Readable::read`] of an optional tensor.
pub(crate) fn read<'a, T, M: Memory>(
    tensor: Option<In<'a, T, M>>,
    memory: &'a M,
) -> Result<Option<M::In<'a, T>>, Error> {
    tensor.map(|tensor| tensor.read(memory)).transpose()
}

/// A `[rows, cols]` tensor in its memory: its elements, and how many lie between the starts of two rows.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<X> {
    pub data: X,
    pub stride: usize,
}

/// A matrix of `cols` columns that is read.
pub(crate) fn matrix<'a, T, M: Memory>(
    tensor: In<'a, T, M>,
    cols: usize,
    memory: &'a M,
) -> Result<Matrix<M::In<'a, T>>, Error> {
    Ok(Matrix { stride: tensor.row_stride().unwrap_or(cols), data: tensor.read(memory)? })
}

/// A matrix of `cols` columns that is written.
pub(crate) fn matrix_mut<'a, 't, T, M: Memory>(
    tensor: &'a mut (dyn Writable<T, M> + 't),
    cols: usize,
    memory: &'a M,
) -> Result<Matrix<M::Out<'a, T>>, Error> {
    Ok(Matrix { stride: tensor.row_stride().unwrap_or(cols), data: tensor.write(memory)? })
}

/// [`matrix`] of an input: `None` where it lies in the output.
pub(crate) fn source<'a, T, M: Memory>(
    source: Source<In<'a, T, M>>,
    cols: usize,
    memory: &'a M,
) -> Result<Option<Matrix<M::In<'a, T>>>, Error> {
    source.tensor().map(|tensor| matrix(tensor, cols, memory)).transpose()
}

/// [`Writable::write`] of an optional tensor.
pub(crate) fn write<'a, 't, T, M: Memory>(
    tensor: Option<&'a mut (dyn Writable<T, M> + 't)>,
    memory: &'a M,
) -> Result<Option<M::Out<'a, T>>, Error> {
    tensor.map(|tensor| tensor.write(memory)).transpose()
}

/// Gives each kind of host tensor to the macro `$implement`, those that can be written after `mut`.
macro_rules! host_tensors {
    ($implement:ident) => {
        $implement!(mut [] Vec<T>);
        $implement!(mut [] Box<[T]>);
        $implement!(mut [const N: usize] [T; N]);
        $implement!(mut [] [T]);
    };
}
pub(crate) use host_tensors;

/// The memory of a [`Dropout`](crate::Dropout) whose numbers are all given by the host. No tensor lies in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Host {}

impl Memory for Host {
    type In<'a, T: 'a> = std::convert::Infallible;
    type Out<'a, T: 'a> = std::convert::Infallible;

    fn skip<'a, T: 'a>(none: Self::In<'a, T>, _: usize) -> Self::In<'a, T> {
        none
    }

    fn skip_mut<'a, T: 'a>(none: Self::Out<'a, T>, _: usize) -> Self::Out<'a, T> {
        none
    }
}
