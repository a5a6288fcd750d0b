//! One application of dropout: which mask, and what is done with it.

use crate::error::Error;
use crate::mask::{Groups, Key, OCTET, Probability, RowMap, Shard};
use crate::ops::{Shape, check_tensor};
use crate::pass::Backend;
use crate::tensor::{Host, In, Memory, read};
use std::fmt;

/// Whether dropout acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Elements are dropped.
    #[default]
    Training,
    /// Nothing is dropped; the result is deterministic and equals the training result on average.
    Inference,
}

/// In which mode the scale is applied that makes both modes agree on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// Training multiplies kept values by `1 / (1 - p)`, inference is the identity. The usual one.
    #[default]
    Inverted,
    /// Training leaves kept values as they are, inference multiplies by `1 - p` (Srivastava et al.,
    /// JMLR 2014). At p = 1 inference gives zeros.
    Classic,
}

/// One application of dropout: its mask, its mode and its scaling.
///
/// `M` is the memory of those parts of the key that are read when a kernel runs. With [`Host`] there are none: the caller
/// gives the whole key. A structure that holds an application of either kind names its backend, `Dropout<'_, Cpu>`; `into()`
/// makes one of the host's numbers. Public fields may also be assigned.
///
/// ```
/// use fused_dropout::{Dropout, Key, Mode, Probability, RowMap, Shard, cpu::Cpu};
/// let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1)?);
/// // The same application on a shard that starts at column 1024 and row 64 of the whole tensor:
/// let shard = drop.shard(Shard { first_col: 1024, rows: RowMap::Contiguous { first: 64 } });
/// let evaluation = drop.mode(Mode::Inference);
/// let mut stored: Dropout<'_, Cpu> = drop.into();
/// stored.p = Probability::new(0.2)?;
/// # let _ = (shard, evaluation, stored);
/// # Ok::<(), fused_dropout::Error>(())
/// ```
#[non_exhaustive]
pub struct Dropout<'a, M: Memory = Host> {
    /// Which mask. `key.stream` is 0 where the stream number is resident.
    pub key: Key,
    /// Probability of dropping. Not looked at where it is resident.
    pub p: Probability,
    /// Training (the default) or inference.
    pub mode: Mode,
    /// Inverted (the default) or classic scaling.
    pub scaling: Scaling,
    /// Where the local tensor lies in the whole one; by default it is the whole one.
    pub shard: Shard<'a>,
    /// Which elements share a decision; by default none do.
    pub groups: Groups,
    stream: Option<In<'a, u64, M>>,
    resident_p: Option<In<'a, u64, M>>,
    row_list: Option<In<'a, u32, M>>,
}

impl Dropout<'static> {
    /// Dropout in training, inverted scaling, on a tensor that is not sharded.
    pub fn new(key: Key, p: Probability) -> Self {
        Self::of(key, p, None)
    }
}

// SAFETY: only `resident`, `resident_p` and `row_list` put tensors in, and `Host` is no `Backend`: there is none here.
unsafe impl Send for Dropout<'_> {}
// SAFETY: as above.
unsafe impl Sync for Dropout<'_> {}

impl<'a, M: Memory> Dropout<'a, M> {
    fn of(key: Key, p: Probability, stream: Option<In<'a, u64, M>>) -> Self {
        Self {
            key,
            p,
            mode: Mode::Training,
            scaling: Scaling::Inverted,
            shard: Shard::WHOLE,
            groups: Groups::NONE,
            stream,
            resident_p: None,
            row_list: None,
        }
    }

    /// As [`new`](Dropout::new), with a key whose stream number is read from memory when the operator runs: a tensor of one
    /// u64, such as `&[7u64]` on the CPU.
    ///
    /// A captured CUDA graph replays its parameters as they were captured. With a resident stream number each replay
    /// draws a fresh mask. On the CPU the result borrows the number, so it is made anew after the number has changed;
    /// [`new`](Dropout::new) with each step's key does the same there. `p` is not looked at where
    /// [`resident_p`](Self::resident_p) follows.
    pub fn resident(seed: u64, stream: In<'a, u64, M>, p: Probability) -> Self
    where
        M: Backend,
    {
        Self::of(Key::new(seed, 0), p, Some(stream))
    }

    /// The same in another mode.
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// The same with another scaling.
    pub fn scaling(self, scaling: Scaling) -> Self {
        Self { scaling, ..self }
    }

    /// The same on a shard.
    pub fn shard(self, shard: Shard<'a>) -> Self {
        Self { shard, ..self }
    }

    /// The same with decisions that several elements share.
    pub fn groups(self, groups: Groups) -> Self {
        Self { groups, ..self }
    }

    /// The logical row of each local row (one u32 a row) from a backend's memory: the explicit row map, for devices. The
    /// shard's rows stay [`RowMap::WHOLE`].
    pub fn row_list<N: Backend>(self, list: In<'a, u32, N>) -> Dropout<'a, N>
    where
        Self: Into<Dropout<'a, N>>,
    {
        Dropout { row_list: Some(list), ..self.into() }
    }

    /// The same with a probability that is read from a backend's memory when the operator runs: a tensor of one u64, which
    /// [`Probability::packed`] made. [`p`](Self::p) is not looked at; the results have the bits that they have with the same
    /// p from the host.
    ///
    /// A captured CUDA graph follows a schedule of dropout: early dropout, late dropout (Liu et al., ICML 2023), a curriculum.
    ///
    /// In [`Mode::Inference`] nothing is dropped, and the resident p is not read. [`Scaling::Classic`] beside it is refused
    /// in both modes: its inference would have to multiply by 1 - p. The CPU refuses a u64 that `packed` did not make. A device sees it too
    /// late to refuse it: which elements are dropped, and what the others are multiplied by, is unspecified then.
    pub fn resident_p<N: Backend>(self, p: In<'a, u64, N>) -> Dropout<'a, N>
    where
        Self: Into<Dropout<'a, N>>,
    {
        Dropout { resident_p: Some(p), ..self.into() }
    }

    /// Takes the parts that are not the host's from their memory.
    pub(crate) fn resident_parts<'m>(
        &'m self,
        operator: &'static str,
        rows: usize,
        memory: &'m M,
    ) -> Result<Resident<'m, M>, Error> {
        if let Some(stream) = self.stream {
            check_tensor(operator, "stream", 1, stream)?;
        }
        if let Some(p) = self.resident_p {
            check_tensor(operator, "p", 1, p)?;
            if self.scaling == Scaling::Classic {
                let expected = "inverted scaling beside a resident p";
                return Err(Error::argument(operator, "scaling", expected, "classic"));
            }
        }
        let p = self.resident_p.filter(|_| self.mode == Mode::Training);
        if let Some(list) = self.row_list {
            check_tensor(operator, "row_list", rows, list)?;
            if self.shard.rows != RowMap::WHOLE {
                let expected = "no other row map beside a row list";
                return Err(Error::argument(
                    operator,
                    "rows",
                    expected,
                    format!("{:?}", self.shard.rows),
                ));
            }
        }
        Ok(Resident {
            stream: read(self.stream, memory)?,
            p: read(p, memory)?,
            row_list: read(self.row_list, memory)?,
        })
    }

    /// Checks the shard against `shape`, and resolves mode and scaling.
    pub(crate) fn mask_params(
        &self,
        operator: &'static str,
        shape: Shape,
    ) -> Result<MaskParams<'a>, Error> {
        self.shard.check(operator, shape.rows, shape.cols)?;
        self.groups.check(operator)?;
        let (p, scale) = match (self.mode, self.scaling) {
            (Mode::Training, Scaling::Inverted) => (self.p, self.p.scale()),
            (Mode::Training, Scaling::Classic) => (self.p, 1.0),
            (Mode::Inference, Scaling::Inverted) => (Probability::ZERO, 1.0),
            // Selected to be zero, like everything that is dropped: 0 * NaN would not be zero.
            (Mode::Inference, Scaling::Classic) if self.p == Probability::ONE => (self.p, 0.0),
            (Mode::Inference, Scaling::Classic) => (Probability::ZERO, self.p.keep()),
        };
        Ok(MaskParams {
            key: self.key,
            threshold: p.threshold(),
            scale,
            // Below 2^32: the shard was checked against 2^35 columns. The one first column that is
            // not, 2^35 itself, belongs to a tensor without columns, which draws nothing.
            first_octet: (self.shard.first_col / OCTET as u64) as u32,
            rows: self.shard.rows,
            groups: self.groups,
        })
    }
}

impl<M: Memory> Clone for Dropout<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Memory> Copy for Dropout<'_, M> {}

impl<M: Memory> fmt::Debug for Dropout<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dropout")
            .field("key", &self.key)
            .field("p", &self.p)
            .field("mode", &self.mode)
            .field("scaling", &self.scaling)
            .field("shard", &self.shard)
            .field("groups", &self.groups)
            .field("resident_stream", &self.stream.is_some())
            .field("resident_p", &self.resident_p.is_some())
            .field("resident_row_list", &self.row_list.is_some())
            .finish()
    }
}

impl<'a, M: Backend> From<Dropout<'a>> for Dropout<'a, M> {
    fn from(host: Dropout<'a>) -> Self {
        let Dropout { key, p, mode, scaling, shard, groups, .. } = host;
        let (stream, resident_p, row_list) = (None, None, None);
        Self { key, p, mode, scaling, shard, groups, stream, resident_p, row_list }
    }
}

/// What tells [`Backend::run`] which mask to draw: a [`Dropout`] of the host's numbers on every backend, one with resident
/// numbers on the backend in whose memory they lie.
pub trait AsDropout<M: Memory> {
    /// The application, as one of this memory.
    fn of_memory(&self) -> Dropout<'_, M>;
}

impl<M: Backend> AsDropout<M> for Dropout<'_> {
    fn of_memory(&self) -> Dropout<'_, M> {
        Dropout::from(*self)
    }
}

impl<M: Backend> AsDropout<M> for Dropout<'_, M> {
    fn of_memory(&self) -> Dropout<'_, M> {
        *self
    }
}

/// The parts of an application that lie in a backend's memory, held for one call.
pub(crate) struct Resident<'a, M: Memory + 'a> {
    pub stream: Option<M::In<'a, u64>>,
    /// [`Probability::packed`].
    pub p: Option<M::In<'a, u64>>,
    pub row_list: Option<M::In<'a, u32>>,
}

/// A checked application of dropout, reduced to what every backend computes from: an element is kept
/// where its lane is at least `threshold`, and a kept value is multiplied by `scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MaskParams<'a> {
    pub key: Key,
    /// 0 (nothing is dropped: no random numbers are needed) ..= 65536 (everything is: none either).
    pub threshold: u32,
    pub scale: f32,
    /// Octet of local column 0.
    pub first_octet: u32,
    pub rows: RowMap<'a>,
    pub groups: Groups,
}

impl MaskParams<'_> {
    /// The row whose lanes decide about local row `local`.
    pub fn row(&self, local: usize) -> u32 {
        self.rows.logical(local) / self.groups.rows
    }

    /// The octet whose lanes decide about local octet `local`; all of them are lane 0 where columns are
    /// together.
    pub fn octet(&self, local: usize) -> u32 {
        if self.groups.columns_together { 0 } else { self.first_octet + local as u32 }
    }
}
