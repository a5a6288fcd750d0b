//! The settings of a run, and whether a checkpoint was made with the same.

use super::files::Folder;
use super::files::read;
use super::trainer::Record;
use anyhow::{Context, Result, bail};
use fused_dropout::transformer::Checkpoint;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a checkpoint holds besides tensors.
#[derive(Serialize, Deserialize)]
pub struct Notes<S> {
    pub settings: S,
    /// Threads that it was computed with: other numbers of threads add up in another order.
    pub threads: usize,
    pub record: Record,
}

impl<S: Serialize + DeserializeOwned> Notes<S> {
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("its notes are not this program's")
    }
}

/// A checkpoint's bytes and notes; `None` where the folder has none.
pub fn saved<S: Serialize + DeserializeOwned>(
    folder: &Folder,
) -> Result<Option<(Vec<u8>, Notes<S>)>> {
    let path = folder.checkpoint();
    if !path.exists() {
        return Ok(None);
    }
    let bytes = read(&path)?;
    let notes = Checkpoint::notes(&bytes).map_err(anyhow::Error::from);
    let notes = notes.and_then(|notes| Notes::from_json(&notes));
    let notes = notes.with_context(|| format!("cannot resume from {}", path.display()))?;
    Ok(Some((bytes, notes)))
}

/// The settings of the run that `folders` have checkpoints of, which must be one run.
pub fn of_saved_run<S: Serialize + DeserializeOwned>(folders: &[Folder]) -> Result<S> {
    let mut found: Option<S> = None;
    for folder in folders {
        let Some((_, notes)) = saved::<S>(folder)? else { continue };
        if let Some(first) = &found {
            check_same(first, &notes.settings)?;
        }
        found = Some(notes.settings);
    }
    let paths = || folders.iter().map(|f| f.checkpoint().display().to_string()).collect::<Vec<_>>();
    found.with_context(|| format!("nothing to resume: no {}", paths().join(" and no ")))
}

/// Refuses to go on with other settings, naming the first that differs.
pub fn check_same<S: Serialize>(saved: &S, wanted: &S) -> Result<()> {
    let (saved, wanted) = (serde_json::to_value(saved)?, serde_json::to_value(wanted)?);
    let (Value::Object(saved), Value::Object(wanted)) = (saved, wanted) else { return Ok(()) };
    for (name, value) in &wanted {
        if saved.get(name) != Some(value) {
            let saved = saved.get(name).unwrap_or(&Value::Null);
            bail!("cannot resume: the checkpoint has {name} = {saved}, not {value}");
        }
    }
    Ok(())
}
