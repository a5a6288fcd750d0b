//! The settings of a run, and whether a checkpoint was made with the same.

use super::files::Folder;
use super::files::read;
use super::trainer::Record;
use anyhow::{Context, Result, bail};
use fused_dropout::Probability;
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
}

impl<S: Settings> Notes<S> {
    fn from_json(text: &str) -> Result<Self> {
        let notes: Self = serde_json::from_str(text).context("its notes are not this program's")?;
        notes.settings.check()?;
        notes.record.check()?;
        Ok(notes)
    }
}

/// A checkpoint's bytes and notes; `None` where the folder has none.
pub fn saved<S: Settings>(folder: &Folder) -> Result<Option<(Vec<u8>, Notes<S>)>> {
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

/// A drop probability and, where it is no multiple of 1/65536, the one that is realised.
pub fn realised(p: f64) -> String {
    match Probability::new(p).map(Probability::effective) {
        Ok(effective) if effective != p => format!("{p} (realised: {effective:.6})"),
        _ => p.to_string(),
    }
}

/// The settings of a program's runs.
pub trait Settings: Serialize + DeserializeOwned + Clone {
    /// Those that say where the data lie. They may move: what they are is said by their SHA-256, a setting as well.
    const PLACES: &[&str];

    /// Refuses what no options give.
    fn check(&self) -> Result<()>;

    /// The folders of the run below `out`; the last one's checkpoint says what run it is.
    fn folders(&self, out: &Folder) -> Vec<Folder>;
}

/// The settings of the run that `out`, or a folder that its program may make below it, has a checkpoint of.
pub fn of_saved_run<S: Settings>(out: &Folder, known: &[Folder]) -> Result<S> {
    let Some(settings) = first_saved::<S>(known)? else {
        let paths: Vec<_> = known.iter().map(|f| f.checkpoint().display().to_string()).collect();
        bail!("nothing to resume: no {}", paths.join(" and no "));
    };
    // Others than the run's own are of an earlier one.
    for folder in settings.folders(out) {
        if let Some((_, notes)) = saved::<S>(&folder)? {
            check_same_run(&notes.settings, &settings)?;
        }
    }
    Ok(settings)
}

fn first_saved<S: Settings>(known: &[Folder]) -> Result<Option<S>> {
    for folder in known.iter().rev() {
        if let Some((_, notes)) = saved(folder)? {
            return Ok(Some(notes.settings));
        }
    }
    Ok(None)
}

/// Refuses to go on with other settings, naming the first that differs. The data may have moved.
pub fn check_same_run<S: Settings>(saved: &S, wanted: &S) -> Result<()> {
    let what = |settings: &S| -> Result<Value> {
        let mut value = serde_json::to_value(settings)?;
        if let Some(fields) = value.as_object_mut() {
            fields.retain(|name, _| !S::PLACES.contains(&name.as_str()));
        }
        Ok(value)
    };
    check_same(&what(saved)?, &what(wanted)?)
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
