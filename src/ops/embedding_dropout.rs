//! `embedding_dropout`: y = D(token\[id\] + position\[pos\] + segment\[seg\]), a transformer's first layer.
//!
//! Each row (a token of the batch) takes one entry of each table, `[entries, cols]`; they are added in
//! f32, in the order of the tables. The gradient of a table is g = D(dy) summed over the rows that took
//! an entry, and is **added** to what the caller's table of gradients holds:
//!
//! `gradient[e, c] += sum over r of (id[r] == e ? g[r, c] : +0)`
//!
//! The sum is that of [`sum_rows`](super::sum_rows) over all rows, so it is the same bits on every
//! backend, also where ids repeat. An entry that no row took is left as it is.
//!
//! BERT normalises the sum before it drops ([`norm`](super::norm)): y = D(norm(sum)), with the sum kept in
//! f32. With h = D(dy) and g = h · weight the gradient of the sum is that of the norm,
//! rstd · (g - E\[g\] - xhat · E\[g · xhat\]) (RMS: without E\[g\]), and takes the place of D(dy) above; those of
//! the norm's weight and bias are Σ h · xhat and Σ h over all rows, in the same order, and are added to what
//! is there too. The sum is computed again from the tables.

use super::norm::{Affine, Norm, check_affine, check_stats};
use super::{Draw, Dropout, Shape, check_len};
use crate::error::Error;

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

/// Where the tables' gradients are added up, each `[entries, cols]` in f32; any of them may be left out.
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

    /// The same gradients taken in another way.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn try_map<H>(
        self,
        mut f: impl FnMut(G) -> Result<H, Error>,
    ) -> Result<Gradients<H>, Error> {
        Ok(Gradients {
            token: self.token.map(&mut f).transpose()?,
            position: self.position.map(&mut f).transpose()?,
            segment: self.segment.map(&mut f).transpose()?,
        })
    }

    /// The lengths that `len` gives, in the order of the tables.
    pub(crate) fn lens(&self, len: impl Fn(&G) -> usize) -> [Option<usize>; TABLES] {
        [&self.token, &self.position, &self.segment].map(|gradient| gradient.as_ref().map(&len))
    }

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

/// Where the gradients of a norm's parameters are added up, each `[cols]` in f32; any may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormGradients<G> {
    /// Gradient of the weight.
    pub weight: Option<G>,
    /// Gradient of the bias.
    pub bias: Option<G>,
}

impl<G> NormGradients<G> {
    /// No gradient at all.
    pub const NONE: Self = Self { weight: None, bias: None };

    /// The same gradients taken in another way.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn try_map<H>(
        self,
        mut f: impl FnMut(G) -> Result<H, Error>,
    ) -> Result<NormGradients<H>, Error> {
        let weight = self.weight.map(&mut f).transpose()?;
        Ok(NormGradients { weight, bias: self.bias.map(f).transpose()? })
    }

    /// The lengths that `len` gives.
    pub(crate) fn lens(&self, len: impl Fn(&G) -> usize) -> NormGradients<usize> {
        NormGradients { weight: self.weight.as_ref().map(&len), bias: self.bias.as_ref().map(len) }
    }
}

impl<G> Default for NormGradients<G> {
    fn default() -> Self {
        Self::NONE
    }
}

/// f32 elements of scratch memory that the backward pass of the normalised form needs on a device: the
/// gradient of the sum, and h · xhat.
pub fn workspace_len(shape: Shape) -> usize {
    shape.rows.saturating_mul(shape.cols).saturating_mul(2)
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

/// Lengths of the tensors of a call, in elements.
pub(crate) struct Lens {
    pub lookups: Lookups<usize>,
    /// The tables, where the call reads them.
    pub tables: Option<Tables<usize>>,
    pub gradients: [Option<usize>; TABLES],
    /// The name of y or dy, and its elements.
    pub values: (&'static str, usize),
}

/// Checks a call, forward or backward. What the ids are is left to [`check_ids`].
pub(crate) fn check<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    lens: &Lens,
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    let (lookups, tables) = (lens.lookups.all(), lens.tables.map(Tables::all));
    for (i, names) in NAMES.iter().enumerate() {
        let table = tables.map(|tables| tables[i]);
        check_table(shape, names, lookups[i], table, lens.gradients[i])?;
    }
    check_len(NAME, lens.values.0, elements, lens.values.1)?;
    dropout.draw(NAME, shape)
}

/// Checks what the normalised form has more.
pub(crate) fn check_norm(
    norm: &Norm,
    shape: Shape,
    affine: &Affine<usize>,
    stats: Option<usize>,
    gradients: &NormGradients<usize>,
) -> Result<(), Error> {
    norm.check(NAME)?;
    check_affine(NAME, shape.cols, affine)?;
    if let Some(stats) = stats {
        check_stats(NAME, shape.rows, stats)?;
    }
    if let Some(weight) = gradients.weight {
        check_len(NAME, "weight_gradient", shape.cols, weight)?;
    }
    gradients.bias.map_or(Ok(()), |bias| check_len(NAME, "bias_gradient", shape.cols, bias))
}

/// Checks what belongs to one table; `table` is `None` where the call reads no tables.
fn check_table(
    shape: Shape,
    names: &Names,
    lookup: Option<Lookup<usize>>,
    table: Option<Option<usize>>,
    gradient: Option<usize>,
) -> Result<(), Error> {
    let Some(Lookup { entries, ids }) = lookup else {
        if table.flatten().or(gradient).is_none() {
            return Ok(());
        }
        return Err(Error::argument(NAME, names.ids, "ids for the table that is given", "none"));
    };
    if entries > u32::MAX as usize {
        return Err(Error::argument(NAME, names.table, "fewer than 2^32 entries", entries));
    }
    match ids {
        Ids::Given(len) => check_len(NAME, names.ids, shape.rows, len)?,
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
        Some(Some(table)) => check_len(NAME, names.table, elements, table)?,
        None => {}
    }
    gradient.map_or(Ok(()), |given| check_len(NAME, names.gradient, elements, given))
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
