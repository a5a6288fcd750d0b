//! Trains a small BERT on texts of two classes: as a masked language model first, then as a classifier.
//!
//!     cargo run --release --features transformer --example train_bert -- --positive FILE --negative FILE
//!
//! `model.rs` has the calls of a training step, `../common/trainer.rs` those around it.

#[path = "../common/mod.rs"]
mod common;
mod model;
mod options;
mod report;
mod reviews;
mod tokenizer;

use anyhow::Result;
use clap::Parser;
use common::device::Job;
use common::files::{Folder, Place};
use common::interrupt;
use common::output::{Output, Start};
use common::say;
use common::session::{self, Outcome, Session, show_how_to_resume};
use common::settings::{check_same_run, of_saved_run};
use common::trainer::{Plan, Record};
use fused_dropout::transformer::{Backend, Bert, BertTask};
use model::{Model, inherit};
use options::{Arguments, Settings};
use reviews::Reviews;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(Outcome::Finished) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::STATUS),
        Err(error) => {
            say::warn(format_args!("train_bert: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Looks at everything that can be refused, and then trains.
fn run(arguments: &Arguments) -> Result<Outcome> {
    let out = Folder::new(arguments.out.clone());
    let folders = options::folders(&out);
    let settings = match arguments.resume {
        true => {
            let saved: Settings = of_saved_run(&out, &folders)?;
            let wanted = arguments.over(saved.clone());
            check_same_run(&saved, &wanted)?;
            wanted
        }
        false => arguments.settings(),
    };
    settings.device.check()?;
    let bytes = [settings.negative.read()?, settings.positive.read()?];
    let mut settings = settings.with_texts(&bytes)?;
    let decode = |place: &Place, bytes| place.decode(bytes, settings.encoding);
    let negative = decode(&settings.negative, &bytes[0])?;
    let positive = decode(&settings.positive, &bytes[1])?;
    let reviews = Reviews::new(&negative, &positive, settings.size.length, settings.seed)?;
    let epoch = reviews.train.len().div_ceil(settings.size.batch) as u64;
    let start = Start::new(arguments.resume, arguments.overwrite);
    let output = Output::claim(&folders, &folders, start)?;
    settings.negative = settings.negative.lasting(&out, "negative", &bytes[0])?;
    settings.positive = settings.positive.lasting(&out, "positive", &bytes[1])?;
    settings.device.run(Training { folders, output, settings: settings.clone(), reviews, epoch })
}

/// The training of both models.
struct Training {
    /// Of the masked language model, and of the classifier.
    folders: [Folder; 2],
    output: Output,
    settings: Settings,
    reviews: Reviews,
    /// Steps of an epoch.
    epoch: u64,
}

/// What a model has become.
struct Trained {
    bert: Bert,
    weights: Vec<Vec<f32>>,
    record: Record,
}

impl Job for Training {
    type Output = Outcome;

    fn run<B: Backend>(self, backend: &B, _: &str) -> Result<Outcome> {
        interrupt::listen()?;
        let masked = self.masked_language_model(backend)?;
        let classifier = match &masked {
            Some(masked) => self.classifier(backend, masked)?,
            None => None,
        };
        let (Some(masked), Some(classifier)) = (masked, classifier) else {
            show_how_to_resume(self.folders[1].as_path(), &[])?;
            return Ok(Outcome::Interrupted);
        };
        report::write(&self, &masked, &classifier)?;
        Ok(Outcome::Finished)
    }
}

impl Training {
    fn masked_language_model<B: Backend>(&self, backend: &B) -> Result<Option<Trained>> {
        let plan = self.settings.masked_plan(self.epoch);
        let title = "Masked language model";
        self.train(backend, title, BertTask::MaskedLanguageModel, plan, 0, None)
    }

    fn classifier<B: Backend>(&self, backend: &B, masked: &Trained) -> Result<Option<Trained>> {
        let plan = self.settings.plan(self.epoch);
        let first = masked.record.steps();
        self.train(backend, "Classifier", BertTask::Classification, plan, first, Some(masked))
    }

    /// Trains a model, from new weights but for those that `from` has, and keeps it; `None` where Ctrl-C came in between.
    fn train<B: Backend>(
        &self,
        backend: &B,
        name: &str,
        task: BertTask,
        plan: Plan,
        first_step: u64,
        from: Option<&Trained>,
    ) -> Result<Option<Trained>> {
        let Self { settings, reviews, .. } = self;
        let (size, seed) = (settings.size, settings.seed);
        let config = settings.config(reviews.tokenizer.vocabulary.len())?;
        let model = Model::new(backend, config, task, reviews, size.batch, seed, first_step)?;
        let [masked, classifier] = &self.folders;
        let folder = if task == BertTask::Classification { classifier } else { masked };
        let session = Session {
            folder: folder.clone(),
            settings: settings.clone(),
            title: report::title(name, self, model.bert()),
            name: name.to_owned(),
            tokens: size.batch * size.length,
        };
        let init = |model: &Model<'_, B>| match from {
            Some(from) => inherit(&from.bert, &from.weights, model.bert(), seed),
            None => Ok(model.bert().specs().init(seed)),
        };
        let mut run = session.open(backend, model, plan, self.output.start, init)?;
        if session::train(std::slice::from_mut(&mut run), &self.output)? == Outcome::Interrupted {
            return Ok(None);
        }
        let trainer = run.trainer;
        let bert = trainer.task.bert().clone();
        let weights = trainer.params.download(backend)?;
        folder.write_model(&bert.config().to_json(), bert.specs(), &weights)?;
        Ok(Some(Trained { bert, weights, record: trainer.record }))
    }
}
