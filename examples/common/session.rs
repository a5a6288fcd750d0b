//! A run as its user sees it: a progress bar, a table of evaluations, checkpoints.

use super::files::Folder;
use super::interrupt;
use super::settings::{Notes, saved};
use super::trainer::{Evaluation, Plan, Record, Task, Trainer};
use anyhow::{Context, Result};
use fused_dropout::transformer::{Backend, Checkpoint};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Instant;

/// Where a run is shown and kept.
pub struct Session<S> {
    pub folder: Folder,
    pub settings: S,
    /// What it is called.
    pub title: String,
    /// Tokens of a step.
    pub tokens: usize,
    /// When it must be over, whether it has taken all steps or not.
    pub deadline: Option<Instant>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With its last step, or with the time.
    Finished,
    /// By Ctrl-C. The checkpoint is written.
    Interrupted,
}

impl<S: Serialize + DeserializeOwned + Clone> Session<S> {
    /// The run that the folder has a checkpoint of, if `resume`; otherwise a new one with the weights that `init` makes.
    pub fn open<'a, B: Backend, T: Task<B>>(
        &self,
        backend: &'a B,
        task: T,
        plan: Plan,
        resume: bool,
        init: impl FnOnce(&T) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Trainer<'a, B, T>> {
        let saved = if resume { saved::<S>(&self.folder)? } else { None };
        let Some((bytes, notes)) = saved else {
            let weights = init(&task)?;
            return Trainer::new(backend, task, plan, &weights);
        };
        let checkpoint = Checkpoint::parse(task.specs(), &bytes).with_context(|| {
            format!("cannot resume from {}", self.folder.checkpoint().display())
        })?;
        let threads = rayon::current_num_threads();
        if notes.threads != threads {
            println!(
                "resumed with {threads} threads after {}: the last bits may differ",
                notes.threads
            );
        }
        Trainer::resume(backend, task, plan, &checkpoint, notes.record)
    }

    /// Trains to the end, or to Ctrl-C.
    pub fn train<B: Backend, T: Task<B>>(
        &self,
        trainer: &mut Trainer<'_, B, T>,
    ) -> Result<Outcome> {
        println!("\n{}", self.title);
        (0..trainer.record.evaluations.len()).for_each(|index| show(&trainer.record, index));
        let bar = progress_bar(trainer.record.steps(), trainer.steps());
        let outcome = self.steps(trainer, &bar);
        bar.finish_and_clear();
        outcome
    }

    fn steps<B: Backend, T: Task<B>>(
        &self,
        trainer: &mut Trainer<'_, B, T>,
        bar: &ProgressBar,
    ) -> Result<Outcome> {
        loop {
            if trainer.evaluation_due() {
                evaluate(trainer, bar)?;
                self.save(trainer)?;
            }
            if trainer.finished() {
                return Ok(Outcome::Finished);
            }
            if interrupt::asked() {
                self.save(trainer)?;
                return Ok(Outcome::Interrupted);
            }
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                // The checkpoint knows nothing of an evaluation that a run with more time does not make here.
                self.save(trainer)?;
                evaluate(trainer, bar)?;
                bar.suspend(|| println!("out of time after {} steps", trainer.record.steps()));
                return Ok(Outcome::Finished);
            }
            trainer.step()?;
            // The steps that were waited for.
            bar.set_position(trainer.record.steps());
            bar.set_message(self.speed(&trainer.record));
        }
    }

    fn save<B: Backend, T: Task<B>>(&self, trainer: &mut Trainer<'_, B, T>) -> Result<()> {
        let notes = |record: &Record| {
            let (settings, threads) = (self.settings.clone(), rayon::current_num_threads());
            Notes { settings, threads, record: record.clone() }.to_json()
        };
        let checkpoint = trainer.checkpoint(notes)?;
        self.folder.write(Folder::CHECKPOINT, &checkpoint.serialize(trainer.task.specs())?)
    }

    /// Loss and speed of the last steps.
    fn speed(&self, record: &Record) -> String {
        let last = |values: &[f32]| mean(&values[values.len().saturating_sub(50)..]);
        let (loss, ms) = (last(&record.step_losses), last(&record.step_ms));
        let speed = self.tokens as f32 / ms * 1e3;
        format!("loss {loss:.4}  {ms:.2} ms/step  {speed:.0} tokens/s")
    }
}

fn evaluate<B: Backend, T: Task<B>>(
    trainer: &mut Trainer<'_, B, T>,
    bar: &ProgressBar,
) -> Result<()> {
    trainer.evaluate()?;
    let record = &trainer.record;
    bar.suspend(|| show(record, record.evaluations.len() - 1));
    Ok(())
}

/// Prints a row of the table of evaluations, above the first one the names of the columns.
fn show(record: &Record, index: usize) {
    let Evaluation { step, scores } = record.evaluations[index];
    let (mut names, mut row) = (String::new(), String::new());
    let mut column = |name: &str, value: String| {
        names += &format!("{name:>12}");
        row += &format!("{value:>12}");
    };
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
    if index == 0 {
        println!("{names}");
    }
    println!("{row}");
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
