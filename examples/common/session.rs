//! Runs as their user sees them: a progress bar, a table of evaluations, checkpoints.

use super::files::Folder;
use super::interrupt;
use super::output::{Output, Start};
use super::say::{self, say};
use super::settings::{Notes, Settings, check_same_run, saved};
use super::trainer::{Evaluation, Plan, Record, Task, Trainer};
use anyhow::{Context, Result};
use fused_dropout::transformer::{Backend, Checkpoint};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;

/// Where a run is shown and kept.
pub struct Session<S> {
    pub folder: Folder,
    pub settings: S,
    /// What it is called.
    pub title: String,
    /// The same in a word, for the rows of a table of several.
    pub name: String,
    /// Tokens of a step.
    pub tokens: usize,
}

/// A run, and where it is shown and kept.
pub struct Run<'a, B: Backend, T, S> {
    pub session: Session<S>,
    pub trainer: Trainer<'a, B, T>,
}

/// How runs ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With the last step.
    Finished,
    /// By Ctrl-C. The checkpoints are written.
    Interrupted,
}

impl<S: Settings> Session<S> {
    /// The run that the folder has a checkpoint of, if it is to be resumed; otherwise a new one with the weights that
    /// `init` makes.
    pub fn open<'a, B: Backend, T: Task<B>>(
        self,
        backend: &'a B,
        task: T,
        plan: Plan,
        start: Start,
        init: impl FnOnce(&T) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Run<'a, B, T, S>> {
        let saved = if start == Start::Resume { saved::<S>(&self.folder)? } else { None };
        let trainer = match saved {
            Some((bytes, notes)) => self.resume(backend, task, plan, &bytes, notes)?,
            None => {
                let weights = init(&task)?;
                Trainer::new(backend, task, plan, &weights)?
            }
        };
        Ok(Run { session: self, trainer })
    }

    fn resume<'a, B: Backend, T: Task<B>>(
        &self,
        backend: &'a B,
        task: T,
        plan: Plan,
        bytes: &[u8],
        notes: Notes<S>,
    ) -> Result<Trainer<'a, B, T>> {
        check_same_run(&notes.settings, &self.settings)?;
        let checkpoint = Checkpoint::parse(task.specs(), bytes).with_context(|| {
            format!("cannot resume from {}", self.folder.checkpoint().display())
        })?;
        let threads = rayon::current_num_threads();
        if notes.threads != threads {
            say!(
                "resumed with {threads} threads after {}: the last bits may differ",
                notes.threads
            );
        }
        Trainer::resume(backend, task, plan, &checkpoint, notes.record)
    }

    /// Loss and speed of the last steps.
    fn speed(&self, record: &Record) -> String {
        let last = |values: &[f32]| mean(&values[values.len().saturating_sub(50)..]);
        let (loss, ms) = (last(&record.step_losses), last(&record.step_ms));
        let speed = self.tokens as f32 / ms * 1e3;
        format!("loss {loss:.4}  {ms:.2} ms/step  {speed:.0} tokens/s")
    }
}

impl<B: Backend, T: Task<B>, S: Settings> Run<'_, B, T, S> {
    /// Evaluates where that is due, and keeps the result.
    fn look(&mut self, output: &Output, table: &mut Table, bar: &ProgressBar) -> Result<()> {
        if !self.trainer.evaluation_due() {
            return Ok(());
        }
        self.trainer.evaluate()?;
        let record = &self.trainer.record;
        bar.suspend(|| table.show(&self.session.name, record, record.evaluations.len() - 1));
        self.save(output)
    }

    /// Replaces the checkpoint, by a better one or not at all.
    fn save(&mut self, output: &Output) -> Result<()> {
        let Self { session, trainer } = self;
        let notes = |record: &Record| {
            let (settings, threads) = (session.settings.clone(), rayon::current_num_threads());
            Notes { settings, threads, record: record.clone() }.to_json()
        };
        let checkpoint = trainer.checkpoint(notes)?.serialize(trainer.task.specs())?;
        session.folder.write(Folder::CHECKPOINT, &checkpoint)?;
        output.has_saved(&session.folder)
    }
}

/// Trains all to the end, or to Ctrl-C. They take turns of a few steps, whoever is behind the next, so that the machine is
/// as busy with other things for one as for the other: only then do their times compare.
pub fn train<B: Backend, T: Task<B>, S: Settings>(
    runs: &mut [Run<'_, B, T, S>],
    output: &Output,
) -> Result<Outcome> {
    runs.iter().for_each(|run| say!("\n{}", run.session.title));
    let mut table = Table { named: runs.len() > 1, begun: false };
    for Run { session, trainer } in &*runs {
        let evaluations = 0..trainer.record.evaluations.len();
        evaluations.for_each(|index| table.show(&session.name, &trainer.record, index));
    }
    let bar = progress_bar(steps_taken(runs), runs.iter().map(|run| run.trainer.steps()).sum());
    let outcome = take_turns(runs, output, &mut table, &bar);
    bar.finish_and_clear();
    outcome
}

fn take_turns<B: Backend, T: Task<B>, S: Settings>(
    runs: &mut [Run<'_, B, T, S>],
    output: &Output,
    table: &mut Table,
    bar: &ProgressBar,
) -> Result<Outcome> {
    loop {
        runs.iter_mut().try_for_each(|run| run.look(output, table, bar))?;
        let left = runs.iter_mut().filter(|run| !run.trainer.finished());
        let Some(next) = left.min_by_key(|run| run.trainer.steps_taken()) else {
            return Ok(Outcome::Finished);
        };
        if interrupt::asked() {
            runs.iter_mut().try_for_each(|run| run.save(output))?;
            return Ok(Outcome::Interrupted);
        }
        next.trainer.turn()?;
        let message = next.session.speed(&next.trainer.record);
        bar.set_position(steps_taken(runs));
        bar.set_message(message);
    }
}

fn steps_taken<B: Backend, T: Task<B>, S>(runs: &[Run<'_, B, T, S>]) -> u64 {
    runs.iter().map(|run| run.trainer.steps_taken()).sum()
}

/// The evaluations of runs, a row each.
struct Table {
    /// Whether a row says of which run it is.
    named: bool,
    /// Whether the names of the columns are printed.
    begun: bool,
}

impl Table {
    fn show(&mut self, run: &str, record: &Record, index: usize) {
        let Evaluation { step, scores } = record.evaluations[index];
        let (mut names, mut row) = (String::new(), String::new());
        let mut column = |name: &str, value: String| {
            names += &format!("{name:>12}");
            row += &format!("{value:>12}");
        };
        if self.named {
            column("run", run.to_owned());
        }
        column("step", step.to_string());
        column("train loss", format!("{:.4}", scores.train_loss));
        column("val loss", format!("{:.4}", scores.val_loss));
        if let Some(accuracy) = scores.accuracy {
            column("accuracy", format!("{:.2} %", 100.0 * accuracy));
        }
        let before = index.checked_sub(1).map_or(0, |before| record.evaluations[before].step);
        let since = &record.step_ms[before as usize..step as usize];
        let ms = if since.is_empty() { "-".to_owned() } else { format!("{:.2}", mean(since)) };
        column("ms/step", ms);
        if !self.begun {
            say!("{names}");
            self.begun = true;
        }
        say!("{row}");
    }
}

/// Prints the command that continues a run: this program as it was called, with the folder and what no checkpoint knows.
pub fn show_how_to_resume(out: &Path, more: &[String]) -> Result<()> {
    let program = std::env::args_os().next().unwrap_or_default();
    let quoted = |text: &std::ffi::OsStr| {
        let quoted = shlex::bytes::try_quote(text.as_encoded_bytes()).map(|text| text.into_owned());
        quoted.context("a zero byte in a path")
    };
    // The name and the folder in one word: the folder's may begin with a dash.
    let mut command =
        [&quoted(&program)?, &b" --resume --out="[..], &quoted(out.as_os_str())?].concat();
    more.iter().for_each(|more| command.extend_from_slice(format!(" {more}").as_bytes()));
    // A path need not be text.
    say::bytes(&[b"\nstopped; to continue: ", &command[..], b"\n"].concat());
    Ok(())
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len() as f32
}

fn progress_bar(done: u64, steps: u64) -> ProgressBar {
    let form = "{bar:25} {pos}/{len}  {msg}  {eta} left";
    let style = ProgressStyle::with_template(form).expect("a template that indicatif knows");
    let bar = ProgressBar::new(steps).with_style(style).with_position(done);
    bar.reset_eta();
    bar
}
