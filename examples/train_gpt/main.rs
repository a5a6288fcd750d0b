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
use common::files::Folder;
use common::interrupt;
use common::output::{Output, Start};
use common::say;
use common::session::{self, Outcome, Session, show_how_to_resume};
use common::settings::{Settings as _, check_same_run, of_saved_run};
use fused_dropout::transformer::Backend;
use language_model::LanguageModel;
use options::{Arguments, Settings};
use report::Run;
use std::process::ExitCode;
use text::{Text, printable};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(Outcome::Finished) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::STATUS),
        Err(error) => {
            say::warn(format_args!("train_gpt: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Looks at everything that can be refused, and then trains.
fn run(arguments: &Arguments) -> Result<Outcome> {
    let out = Folder::new(arguments.out.clone());
    let known = options::folders(&out);
    let settings = match arguments.resume {
        true => {
            let saved: Settings = of_saved_run(&out, &known)?;
            let wanted = arguments.over(saved.clone());
            check_same_run(&saved, &wanted)?;
            wanted
        }
        false => arguments.settings(),
    };
    settings.check()?;
    settings.device.check()?;
    let bytes = match &settings.data {
        Some(place) => place.read()?,
        None => text::OWN_DOCUMENTS.into(),
    };
    let mut settings = settings.with_text(&bytes)?;
    let text = match &settings.data {
        Some(place) => &place.decode(&bytes, settings.encoding)?,
        None => text::OWN_DOCUMENTS,
    };
    let text = Text::new(text, settings.size.context)?;
    let start = Start::new(arguments.resume, arguments.overwrite);
    let output = Output::claim(&settings.folders(&out), &known, start)?;
    if let Some(place) = settings.data {
        settings.data = Some(place.lasting(&out, "text", &bytes)?);
    }
    let sample = arguments.sample;
    settings.device.run(Training { out, output, sample, settings: settings.clone(), text })
}

/// The training of one model, or of one without and one with dropout.
struct Training {
    out: Folder,
    output: Output,
    /// Characters to write at the end.
    sample: usize,
    settings: Settings,
    text: Text,
}

/// A model's run, before and after its training.
type Opened<'a, B> = session::Run<'a, B, LanguageModel<'a, B>, Settings>;

impl Job for Training {
    type Output = Outcome;

    fn run<B: Backend>(self, backend: &B, name: &str) -> Result<Outcome> {
        interrupt::listen()?;
        let folders = self.settings.folders(&self.out);
        let models = folders.into_iter().zip(&self.settings.dropouts);
        let runs = models.map(|(folder, &dropout)| self.open(backend, folder, dropout));
        let mut runs = runs.collect::<Result<Vec<_>>>()?;
        if session::train(&mut runs, &self.output)? == Outcome::Interrupted {
            show_how_to_resume(self.out.as_path(), &[format!("--sample={}", self.sample)])?;
            return Ok(Outcome::Interrupted);
        }
        let dropouts = self.settings.dropouts.iter();
        let runs = runs.into_iter().zip(dropouts).map(|(run, &p)| self.finish(backend, run, p));
        let runs = runs.collect::<Result<Vec<_>>>()?;
        report::write(&self.out, &self.settings, name, &self.text, &runs)?;
        Ok(Outcome::Finished)
    }
}

impl Training {
    fn open<'a, B: Backend>(
        &'a self,
        backend: &'a B,
        folder: Folder,
        dropout: f64,
    ) -> Result<Opened<'a, B>> {
        let Self { settings, text, .. } = self;
        let config = settings.config(text.vocabulary.len(), dropout)?;
        let model = LanguageModel::new(backend, config, text, settings.size.batch, settings.seed)?
            .scheduled(settings.schedule());
        let session = Session {
            folder,
            settings: settings.clone(),
            title: report::title(settings, text, dropout, &model),
            name: format!("dropout {dropout}"),
            tokens: settings.size.batch * settings.size.context,
        };
        let init = |model: &LanguageModel<'_, B>| Ok(model.gpt().specs().init(settings.seed));
        session.open(backend, model, settings.plan(), self.output.start, init)
    }

    /// Keeps a model, and shows what it writes.
    fn finish<B: Backend>(&self, backend: &B, run: Opened<'_, B>, dropout: f64) -> Result<Run> {
        let session::Run { session, trainer } = run;
        let gpt = trainer.task.gpt();
        let weights = trainer.params.download(backend)?;
        session.folder.write_model(&gpt.config().to_json(), gpt.specs(), &weights)?;
        if self.sample > 0 {
            let written = trainer.task.write(backend, &trainer.params, self.sample)?;
            say::say!("\nWith dropout {dropout} it writes:\n\n{}", printable(&written));
        }
        Run::new(dropout, gpt.config(), trainer.record, session.tokens)
    }
}
