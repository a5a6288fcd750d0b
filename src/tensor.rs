//! Tensors as the operators take them: anything that a backend can read or write, behind one pair of traits.

use crate::error::Error;

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
}

/// A tensor of `T` that lies in memory `M`, for reading.
///
/// Implemented for slices, arrays and vectors on the CPU and the emulator, and for cudarc's slices and views on a GPU.
///
/// # Safety
/// As long as it is held, what [`read`](Self::read) gives refers to [`elements`](Self::elements) values of `T` that can be
/// read, aligned to `T`. Both answers stay the same through a call. Nothing else is checked before kernels are launched.
pub unsafe trait Readable<T, M: Memory> {
    /// Length in elements.
    fn elements(&self) -> usize;
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

/// A tensor of `T` that a pass reads.
pub type In<'a, T, M> = &'a (dyn Readable<T, M> + 'a);

/// A tensor of `T` that a pass writes.
pub type Out<'a, T, M> = &'a mut (dyn Writable<T, M> + 'a);

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

/// Where the gradient of a parameter (f32) goes, and whether it is written or added. Both give the same bits in every run.
pub enum Gradient<'a, M: Memory> {
    /// The gradient is written.
    Write(Out<'a, f32, M>),
    /// The gradient is added to what is there, in one addition an element: micro-batches, tied weights.
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

/// [`Readable::read`] of an input: `None` where it lies in the output.
pub(crate) fn source<'a, T, M: Memory>(
    source: Source<In<'a, T, M>>,
    memory: &'a M,
) -> Result<Option<M::In<'a, T>>, Error> {
    read(source.tensor(), memory)
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
        $implement!([] &[T]);
        $implement!(mut [] &mut [T]);
    };
}
pub(crate) use host_tensors;

/// The memory of a [`Dropout`](crate::Dropout) whose numbers are all given by the host. No tensor lies in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Host {}

impl Memory for Host {
    type In<'a, T: 'a> = std::convert::Infallible;
    type Out<'a, T: 'a> = std::convert::Infallible;
}
