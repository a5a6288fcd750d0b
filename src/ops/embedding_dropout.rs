//! `embedding_dropout`: y = D(token\[id\] + position\[pos\] + segment\[seg\]), a transformer's first layer.
//!
//! Each row (a token of the batch) takes one entry of each table, `[entries, cols]`; they are added in
//! f32, in the order of the tables. The gradient of a table is g = D(dy) summed over the rows that took
//! an entry:
//!
//! `gradient[e, c] = sum over r of (id[r] == e ? g[r, c] : +0)`
//!
//! The sum is that of [`sum_rows`](super::sum_rows) over all rows, so it is the same bits on every
//! backend, also where ids repeat. An entry that no row took is 0 where the gradient is written
//! ([`Gradient::Write`]), and left as it is where the gradient is added ([`Gradient::Add`]).
//!
//! BERT normalises the sum before it drops ([`norm`](super::norm)): y = D(norm(sum)), with the sum kept in
//! f32. With h = D(dy) and g = h · weight the gradient of the sum is that of the norm,
//! rstd · (g - E\[g\] - xhat · E\[g · xhat\]) (RMS: without E\[g\]), and takes the place of D(dy) above; those of
//! the norm's weight and bias are Σ h · xhat and Σ h over all rows, in the same order. The sum is computed
//! again from the tables.
//!
//! No tensor may be [`Strided`](crate::Strided): tables are parameters, and y and dy the first hidden state, which nobody
//! cuts out of another tensor.

use super::norm::{Norm, stats_len};
use super::{Check, Shape, check_tensor};
use crate::error::Error;
use crate::tensor::{Gradient, In, Memory, Out};

/// The operator's name in errors.
pub(crate) const NAME: &str = "embedding_dropout";

/// Which entry of a table each row takes.
///
/// `I` is how a backend takes the ids: a slice on the CPU, device memory on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids<I> {
    /// An id a row, `[rows]`, each below the table's entries.
    Given(I),
    /// Local row r takes entry `r % length`: the position in sequences of this length that follow each
    /// other. Where the rows are only a part of each sequence, give the ids.
    Sequence(usize),
}

/// The entries of a table, and which of them each row takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup<I> {
    /// Entries of the table.
    pub entries: usize,
    /// The entry of each row.
    pub ids: Ids<I>,
}

impl<I> Lookup<I> {
    fn try_map<J>(self, f: impl FnOnce(I) -> Result<J, Error>) -> Result<Lookup<J>, Error> {
        let ids = match self.ids {
            Ids::Given(ids) => Ids::Given(f(ids)?),
            Ids::Sequence(length) => Ids::Sequence(length),
        };
        Ok(Lookup { entries: self.entries, ids })
    }
}

impl Lookup<&[u32]> {
    /// The entry that a local row takes.
    #[inline(always)]
    pub(crate) fn entry(&self, row: usize) -> usize {
        match self.ids {
            Ids::Given(ids) => ids[row] as usize,
            Ids::Sequence(length) => row % length,
        }
    }
}

/// What each row looks up.
///
/// ```
/// use fused_dropout::ops::embedding_dropout::{Ids, Lookups};
/// let (tokens, segments) = ([17u32, 4, 4, 99], [0u32, 0, 1, 1]);
/// // GPT: two sequences of two tokens, a vocabulary of 100, at most 16 positions.
/// let gpt = Lookups::tokens(100, &tokens[..]).positions(16, Ids::Sequence(2));
/// // BERT: segments as well.
/// let bert = gpt.segments(2, &segments[..]);
/// # let _ = bert;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookups<I> {
    /// The token of each row.
    pub token: Lookup<I>,
    /// Its position, if there is a table of positions.
    pub position: Option<Lookup<I>>,
    /// Its segment, if there is a table of segments.
    pub segment: Option<Lookup<I>>,
}

impl<I> Lookups<I> {
    /// Row r takes entry `ids[r]` of a vocabulary of `entries` tokens.
    pub fn tokens(entries: usize, ids: I) -> Self {
        let token = Lookup { entries, ids: Ids::Given(ids) };
        Self { token, position: None, segment: None }
    }

    /// And an entry of a table of `entries` positions.
    pub fn positions(self, entries: usize, ids: Ids<I>) -> Self {
        Self { position: Some(Lookup { entries, ids }), ..self }
    }

    /// And entry `ids[r]` of a table of `entries` segments (token types).
    pub fn segments(self, entries: usize, ids: I) -> Self {
        Self { segment: Some(Lookup { entries, ids: Ids::Given(ids) }), ..self }
    }

    /// The same lookups with their ids taken in another way.
    pub(crate) fn try_map<J>(
        self,
        mut f: impl FnMut(I) -> Result<J, Error>,
    ) -> Result<Lookups<J>, Error> {
        Ok(Lookups {
            token: self.token.try_map(&mut f)?,
            position: self.position.map(|lookup| lookup.try_map(&mut f)).transpose()?,
            segment: self.segment.map(|lookup| lookup.try_map(&mut f)).transpose()?,
        })
    }

    /// In the order in which the entries are added.
    pub(crate) fn all(self) -> [Option<Lookup<I>>; TABLES] {
        [Some(self.token), self.position, self.segment]
    }
}

/// The tables of embeddings, each `[entries, cols]`: one for each lookup.
///
/// `W` is how a backend takes them: a slice on the CPU, device memory on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables<W> {
    /// Embeddings of tokens.
    pub token: W,
    /// Embeddings of positions.
    pub position: Option<W>,
    /// Embeddings of segments.
    pub segment: Option<W>,
}

impl<W> Tables<W> {
    /// The same tables taken in another way.
    pub(crate) fn try_map<V>(
        self,
        mut f: impl FnMut(W) -> Result<V, Error>,
    ) -> Result<Tables<V>, Error> {
        Ok(Tables {
            token: f(self.token)?,
            position: self.position.map(&mut f).transpose()?,
            segment: self.segment.map(&mut f).transpose()?,
        })
    }

    /// In the order in which the entries are added.
    pub(crate) fn all(self) -> [Option<W>; TABLES] {
        [Some(self.token), self.position, self.segment]
    }
}

/// The gradients of the tables, each `[entries, cols]` in f32; any of them may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gradients<G> {
    /// Gradient of the table of tokens: also the one that a tied output projection adds to.
    pub token: Option<G>,
    /// Gradient of the table of positions.
    pub position: Option<G>,
    /// Gradient of the table of segments.
    pub segment: Option<G>,
}

impl<G> Gradients<G> {
    /// No gradient at all.
    pub const NONE: Self = Self { token: None, position: None, segment: None };

    /// In the order of the tables.
    pub(crate) fn all(self) -> [Option<G>; TABLES] {
        [self.token, self.position, self.segment]
    }
}

impl<G> Default for Gradients<G> {
    fn default() -> Self {
        Self::NONE
    }
}

/// y = D(token\[id\] + position\[pos\] + segment\[seg\]): the entries that a row looks up, added in f32 in this order,
/// times the scale, rounded once, where kept; +0 where dropped.
///
/// On the CPU an id that is not below its table's entries is refused, and its row named. The host does not see the ids of
/// a device: a row with such an id is zeros there, and is left in [`report`](Self::report).
pub struct Forward<'a, T, M: Memory> {
    /// Rows and columns of y.
    pub shape: Shape,
    /// Which entries each row takes; ids: `[rows]`.
    pub lookups: Lookups<In<'a, u32, M>>,
    /// A table for each lookup, `[entries, cols]`.
    pub tables: Tables<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
    /// One u32 that holds `u32::MAX` before the call: a device lowers it to the smallest local row with an id that is in
    /// no table. Read it back and give it to [`check_report`]. The CPU leaves it alone.
    pub report: Option<Out<'a, u32, M>>,
}

/// The gradients of the tables: g = D(dy), in f32, summed over the rows that took an entry in the order of
/// [`sum_rows`](super::sum_rows). At most 2^24 rows on a device, where a row with an id that is in no table adds nothing.
pub struct Backward<'a, T, M: Memory> {
    /// Rows and columns of dy.
    pub shape: Shape,
    /// As in the forward pass.
    pub lookups: Lookups<In<'a, u32, M>>,
    /// `[rows, cols]`.
    pub dy: In<'a, T, M>,
    /// `[entries, cols]` each.
    pub gradients: Gradients<Gradient<'a, M>>,
}

/// y = D(norm(token + position + segment)), the sum in f32, as BERT has it. See [`Forward`] for ids outside of their
/// table; the statistics of such a row are 0 on a device.
///
/// y is within the bound that CONTRACT.md states of the exact one. A row whose deviation and epsilon are 0 gives D(bias).
pub struct ForwardNorm<'a, T, M: Memory> {
    /// Rows and columns of y.
    pub shape: Shape,
    /// LayerNorm or RMSNorm.
    pub norm: Norm,
    /// Which entries each row takes; ids: `[rows]`.
    pub lookups: Lookups<In<'a, u32, M>>,
    /// A table for each lookup, `[entries, cols]`.
    pub tables: Tables<In<'a, T, M>>,
    /// Of the norm, `[cols]`.
    pub weight: In<'a, T, M>,
    /// Of the norm, `[cols]`.
    pub norm_bias: Option<In<'a, T, M>>,
    /// `[rows, cols]`.
    pub y: Out<'a, T, M>,
    /// For the backward pass, `[rows, 2]`: the mean (0 for RMS) and the reciprocal deviation of each row.
    pub stats: Option<Out<'a, f32, M>>,
    /// As in [`Forward`].
    pub report: Option<Out<'a, u32, M>>,
}

/// The gradients of the tables and of the norm's parameters, in f32, each in the order of [`sum_rows`](super::sum_rows).
/// The sum is computed again. On the CPU the pass takes up to 8 bytes of memory an element of dy.
pub struct BackwardNorm<'a, T, M: Memory> {
    /// Rows and columns of dy.
    pub shape: Shape,
    /// As in the forward pass.
    pub norm: Norm,
    /// As in the forward pass.
    pub lookups: Lookups<In<'a, u32, M>>,
    /// As in the forward pass.
    pub tables: Tables<In<'a, T, M>>,
    /// As in the forward pass.
    pub weight: In<'a, T, M>,
    /// The forward pass's, `[rows, 2]`.
    pub stats: In<'a, f32, M>,
    /// `[rows, cols]`.
    pub dy: In<'a, T, M>,
    /// `[entries, cols]` each.
    pub gradients: Gradients<Gradient<'a, M>>,
    /// Of the norm's weight, `[cols]`.
    pub dweight: Option<Gradient<'a, M>>,
    /// Of the norm's bias, `[cols]`.
    pub dnorm_bias: Option<Gradient<'a, M>>,
}

/// What a device reported about the ids of a call: `report`, read back after the kernels have run.
/// Before the call it must be `u32::MAX`, which stands for no fault.
///
/// # Errors
/// [`Error::Argument`] with the first local row one of whose ids is not below its table's entries. That row
/// of the output is zeros, as is every such row.
pub fn check_report(report: u32) -> Result<(), Error> {
    if report == u32::MAX {
        return Ok(());
    }
    let given = format!("a larger one in row {report}");
    Err(Error::argument(NAME, "lookups", "ids below their table's entries", given))
}

/// Tables that a row can look up: token, position, segment.
pub(crate) const TABLES: usize = 3;

/// What errors call the parts of a table.
struct Names {
    ids: &'static str,
    table: &'static str,
    gradient: &'static str,
}

const NAMES: [Names; TABLES] = [
    Names { ids: "token_ids", table: "token_table", gradient: "token_gradient" },
    Names { ids: "position_ids", table: "position_table", gradient: "position_gradient" },
    Names { ids: "segment_ids", table: "segment_table", gradient: "segment_gradient" },
];

impl<T, M: Memory> Forward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check_tables(self.shape, &self.lookups, Some(&self.tables), &Gradients::NONE)?;
        check.contiguous("y", &*self.y)?;
        check_report_len(&self.report)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> Backward<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        check_tables::<T, M>(self.shape, &self.lookups, None, &self.gradients)?;
        check.contiguous("dy", self.dy)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> ForwardNorm<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        self.norm.check(NAME)?;
        check_tables(self.shape, &self.lookups, Some(&self.tables), &Gradients::NONE)?;
        check.row("weight", self.weight)?;
        self.norm_bias.map_or(Ok(()), |bias| check.row("norm_bias", bias))?;
        check.contiguous("y", &*self.y)?;
        self.stats
            .as_ref()
            .map_or(Ok(()), |stats| check.len("stats", stats_len(self.shape.rows), &**stats))?;
        check_report_len(&self.report)?;
        Ok(self.shape)
    }
}

impl<T, M: Memory> BackwardNorm<'_, T, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        let check = Check::new(NAME, self.shape)?;
        self.norm.check(NAME)?;
        check_tables(self.shape, &self.lookups, Some(&self.tables), &self.gradients)?;
        check.row("weight", self.weight)?;
        check.len("stats", stats_len(self.shape.rows), self.stats)?;
        check.contiguous("dy", self.dy)?;
        check.gradient("dweight", &self.dweight)?;
        check.gradient("dnorm_bias", &self.dnorm_bias)?;
        Ok(self.shape)
    }
}

fn check_report_len<M: Memory>(report: &Option<Out<'_, u32, M>>) -> Result<(), Error> {
    report.as_ref().map_or(Ok(()), |report| check_tensor(NAME, "report", 1, &**report))
}

/// Checks lookups, tables and gradients against each other. What the ids are is left to [`check_ids`].
fn check_tables<T, M: Memory>(
    shape: Shape,
    lookups: &Lookups<In<'_, u32, M>>,
    tables: Option<&Tables<In<'_, T, M>>>,
    gradients: &Gradients<Gradient<'_, M>>,
) -> Result<(), Error> {
    let lookups = lookups.all();
    let tables = tables.map(|tables| tables.all());
    let gradients = [&gradients.token, &gradients.position, &gradients.segment];
    for (i, names) in NAMES.iter().enumerate() {
        let table = tables.map(|tables| tables[i]);
        check_table(shape, names, lookups[i], table, gradients[i].as_ref())?;
    }
    Ok(())
}

/// Checks what belongs to one table; `table` is `None` where the call reads no tables.
fn check_table<T, M: Memory>(
    shape: Shape,
    names: &Names,
    lookup: Option<Lookup<In<'_, u32, M>>>,
    table: Option<Option<In<'_, T, M>>>,
    gradient: Option<&Gradient<'_, M>>,
) -> Result<(), Error> {
    let Some(Lookup { entries, ids }) = lookup else {
        if table.flatten().is_none() && gradient.is_none() {
            return Ok(());
        }
        return Err(Error::argument(NAME, names.ids, "ids for the table that is given", "none"));
    };
    if entries > u32::MAX as usize {
        return Err(Error::argument(NAME, names.table, "fewer than 2^32 entries", entries));
    }
    match ids {
        Ids::Given(ids) => check_tensor(NAME, names.ids, shape.rows, ids)?,
        Ids::Sequence(length) if !(1..=entries).contains(&length) => {
            let expected = format!("sequences of 1 to {entries} rows");
            return Err(Error::argument(NAME, names.ids, expected, length));
        }
        Ids::Sequence(_) => {}
    }
    let elements = entries.saturating_mul(shape.cols);
    match table {
        Some(None) => {
            return Err(Error::argument(NAME, names.table, "a table for the ids", "none"));
        }
        Some(Some(table)) => check_tensor(NAME, names.table, elements, table)?,
        None => {}
    }
    gradient.map_or(Ok(()), |given| check_tensor(NAME, names.gradient, elements, given.tensor()))
}

/// Refuses ids that are in no table.
pub(crate) fn check_ids(lookups: &Lookups<&[u32]>) -> Result<(), Error> {
    for (lookup, names) in lookups.all().into_iter().zip(&NAMES) {
        let Some(Lookup { entries, ids: Ids::Given(ids) }) = lookup else { continue };
        if let Some(row) = ids.iter().position(|&id| id as usize >= entries) {
            let given = format!("{} in row {row}", ids[row]);
            return Err(Error::argument(NAME, names.ids, format!("ids below {entries}"), given));
        }
    }
    Ok(())
}
