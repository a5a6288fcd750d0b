//! What both models refuse: sizes that fit in no memory, tokens and labels out of range.

use crate::error::Error;
use crate::ops::check_len;

/// Refuses batches of nothing, sequences longer than the table of positions, and sizes whose tensors would be larger than
/// memory or have more rows than a mask: `widest` columns for each token, and for each head and token the scores of a
/// sequence.
pub(crate) fn check_size(
    model: &'static str,
    [batch, length]: [usize; 2],
    positions: usize,
    widest: usize,
    heads: usize,
) -> Result<(), Error> {
    if batch == 0 {
        return Err(Error::argument(model, "batch", "at least one sequence", batch));
    }
    if length == 0 || length > positions {
        return Err(Error::argument(model, "length", format!("1 to {positions} tokens"), length));
    }
    let rows = batch.checked_mul(length).and_then(|rows| rows.checked_mul(heads));
    let fits = rows.filter(|&rows| rows <= u32::MAX as usize).is_some_and(|rows| {
        let elements = rows.checked_mul(widest.max(length));
        elements.is_some_and(|elements| elements <= isize::MAX as usize / size_of::<f32>())
    });
    if fits {
        return Ok(());
    }
    let expected = format!("sequences of {length} tokens whose tensors fit in memory");
    Err(Error::argument(model, "batch", expected, batch))
}

/// Refuses tokens and labels of another number, or out of range.
pub(crate) fn check_tokens(
    model: &'static str,
    rows: usize,
    vocab: usize,
    ids: &[u32],
    labels: &[i32],
) -> Result<(), Error> {
    check_len(model, "ids", rows, ids.len())?;
    check_len(model, "labels", rows, labels.len())?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument(model, "ids", format!("below {vocab}"), id));
    }
    check_below(model, "labels", vocab, labels)
}

/// What makes the mean over the labels of a sum: the negative ones stand for none.
pub(crate) fn mean_factor(labels: &[i32]) -> f32 {
    1.0 / labels.iter().filter(|&&label| label >= 0).count().max(1) as f32
}

/// Refuses labels that are no class.
pub(crate) fn check_below(
    model: &'static str,
    name: &'static str,
    classes: usize,
    labels: &[i32],
) -> Result<(), Error> {
    match labels.iter().find(|&&label| label >= 0 && label as usize >= classes) {
        Some(label) => Err(Error::argument(model, name, format!("below {classes}"), label)),
        None => Ok(()),
    }
}
