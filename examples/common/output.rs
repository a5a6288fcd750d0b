//! The folders of a run: nobody else writes there meanwhile, and what an earlier run left is replaced only when asked for.

use super::files::Folder;
use anyhow::{Result, bail};
use std::cell::Cell;
use std::fs::File;

/// What happens to the checkpoints that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// There must be none.
    New,
    /// They go, once this run has one of its own.
    Overwrite,
    /// They are continued.
    Resume,
}

impl Start {
    pub fn new(resume: bool, overwrite: bool) -> Self {
        match (resume, overwrite) {
            (true, _) => Start::Resume,
            (false, true) => Start::Overwrite,
            (false, false) => Start::New,
        }
    }
}

/// The folders of a run, which are its own until this is dropped or its process ends.
pub struct Output {
    pub start: Start,
    /// Folders with checkpoints of an earlier run.
    earlier: Cell<Vec<Folder>>,
    _locks: Vec<File>,
}

impl Output {
    /// Takes the folders of a run, and those of `known`, all that its program may write to, that hold a checkpoint.
    pub fn claim(run: &[Folder], known: &[Folder], start: Start) -> Result<Self> {
        run.iter().try_for_each(Folder::create)?;
        let held = known.iter().filter(|folder| run.contains(folder) || folder.has_checkpoint());
        let locks = held.map(Folder::lock).collect::<Result<_>>()?;
        let saved = known.iter().filter(|folder| folder.has_checkpoint());
        let earlier = match start {
            Start::Resume => Vec::new(),
            Start::New | Start::Overwrite => saved.cloned().collect(),
        };
        if let (Start::New, Some(folder)) = (start, earlier.first()) {
            bail!(
                "{} is of an earlier run: --resume continues it, --overwrite replaces it, --out DIR leaves it alone",
                folder.checkpoint().display()
            );
        }
        if let (Start::New, Some(folder)) = (start, known.iter().find(|folder| folder.has_model()))
        {
            bail!(
                "{folder} has a model already: --overwrite replaces it, --out DIR leaves it alone"
            );
        }
        Ok(Self { start, earlier: Cell::new(earlier), _locks: locks })
    }

    /// To be called when the run has written a checkpoint to `folder`: those of an earlier run go, or they would be taken
    /// for this one's.
    pub fn has_saved(&self, folder: &Folder) -> Result<()> {
        let earlier = self.earlier.take();
        earlier.iter().filter(|other| *other != folder).try_for_each(Folder::remove_checkpoint)
    }
}
