//! Trains a small GPT on a text, every character a token.
//!
//!     cargo run --release --features transformer --example train_gpt
//!     cargo run --release --features transformer --example train_gpt -- --data FILE --preset nanogpt-cpu
//!
//! `language_model.rs` has the calls of a training step, `../common/trainer.rs` those around it.

#[path = "../common/mod.rs"]
mod common;
mod language_model;
mod options;
mod report;
mod text;

use anyhow::Result;
use clap::Parser;
use common::device::Job;
use common::files::{Folder, read, to_text};
use common::interrupt;
use common::session::{Outcome, Session};
use common::settings::{check_same, of_saved_run};
use fused_dropout::transformer::Backend;
use language_model::LanguageModel;
use options::{Arguments, Settings};
use report::Run;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use text::Text;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(Outcome::Finished) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::STATUS),
        Err(error) => {
            eprintln!("train_gpt: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Looks at everything that can be refused, and then trains.
fn run(arguments: &Arguments) -> Result<Outcome> {
    let out = Folder::new(arguments.out.clone());
    let settings = match arguments.resume {
        true => {
            let saved: Settings = of_saved_run(&options::folders(&out))?;
            check_same(&saved, &arguments.over(saved.clone())?)?;
            saved
        }
        false => arguments.settings()?,
    };
    let bytes = match &settings.data {
        Some(path) => read(path)?,
        None => text::own_documents()?.into_bytes(),
    };
    let settings = settings.with_text(&bytes)?;
    let text = Text::new(&to_text(bytes), settings.size.context)?;
    let (resume, sample) = (arguments.resume, arguments.sample);
    settings.device.run(Training { out, resume, sample, settings: settings.clone(), text })
}

/// The training of one model, or of one without and one with dropout.
struct Training {
    out: Folder,
    resume: bool,
    /// Characters to write at the end.
    sample: usize,
    settings: Settings,
    text: Text,
}

impl Job for Training {
    type Output = Outcome;

    fn run<B: Backend>(self, backend: &B, name: &str) -> Result<Outcome> {
        interrupt::listen()?;
        let folders = self.settings.folders(&self.out);
        if !self.resume {
            // Those of an earlier run are not this one's.
            folders.iter().try_for_each(Folder::remove_checkpoint)?;
        }
        let mut runs = Vec::new();
        for (folder, &dropout) in folders.iter().zip(&self.settings.dropouts) {
            match self.train(backend, folder.clone(), dropout)? {
                Some(run) => runs.push(run),
                None => {
                    println!("{}", self.how_to_resume());
                    return Ok(Outcome::Interrupted);
                }
            }
        }
        report::write(&self.out, &self.settings, name, &self.text, &runs)?;
        Ok(Outcome::Finished)
    }
}

impl Training {
    /// Trains a model, shows what it writes, and keeps it; `None` where Ctrl-C came in between.
    fn train<B: Backend>(&self, backend: &B, folder: Folder, dropout: f64) -> Result<Option<Run>> {
        let Self { settings, text, .. } = self;
        let config = settings.config(text.vocabulary.len(), dropout)?;
        let model = LanguageModel::new(backend, config, text, settings.size.batch, settings.seed)?;
        folder.create()?;
        let session = Session {
            folder,
            settings: settings.clone(),
            title: report::title(settings, text, dropout, &model),
            tokens: settings.size.batch * settings.size.context,
            deadline: settings.seconds.map(|s| Instant::now() + Duration::from_secs(s)),
        };
        let init = |model: &LanguageModel<'_, B>| Ok(model.gpt().specs().init(settings.seed));
        let mut trainer = session.open(backend, model, settings.plan(), self.resume, init)?;
        if session.train(&mut trainer)? == Outcome::Interrupted {
            return Ok(None);
        }
        let gpt = trainer.task.gpt();
        let weights = trainer.params.download(backend)?;
        session.folder.write_model(&gpt.config().to_json(), gpt.specs(), &weights)?;
        if self.sample > 0 {
            let written = trainer.task.write(backend, &trainer.params, self.sample)?;
            println!("\nIt writes:\n\n{written}");
        }
        Ok(Some(Run::new(dropout, gpt.config(), trainer.record, session.tokens)?))
    }

    fn how_to_resume(&self) -> String {
        format!(
            "\nstopped; to continue: cargo run --release --features transformer --example train_gpt -- --resume --out {}",
            self.out
        )
    }
}
