//! A point of a training run to continue from: weights, what AdamW keeps of them, and the trainer's own notes, in one
//! `safetensors` file.

use super::optim::OptimizerState;
use super::params::{Specs, not_safetensors};
use super::refuse;
use crate::error::Error;
use safetensors::tensor::{SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Everything that a run continues with. Batches and masks need no state: they follow from the seed and the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Weights in f32, in the order of the tensors.
    pub weights: Vec<Vec<f32>>,
    /// Moments and the number of steps.
    pub optimizer: OptimizerState,
    /// Text of the trainer's: settings, losses so far.
    pub notes: String,
}

/// What is no tensor, under one key of the file's metadata.
#[derive(Serialize, Deserialize)]
struct Rest {
    steps: u64,
    notes: String,
}

const KEY: &str = "checkpoint";
const WEIGHTS: &str = "weights.";
const MEANS: &str = "adamw.m.";
const SQUARES: &str = "adamw.v.";

impl Checkpoint {
    /// The bytes of a file.
    ///
    /// # Errors
    /// [`Error::File`] where the format refuses the values.
    pub fn serialize(&self, specs: &Specs) -> Result<Vec<u8>, Error> {
        let OptimizerState { steps, m, v } = &self.optimizer;
        let tensors = specs.entries(WEIGHTS, &self.weights);
        let tensors = tensors.chain(specs.entries(MEANS, m)).chain(specs.entries(SQUARES, v));
        let rest = Rest { steps: *steps, notes: self.notes.clone() };
        let rest = serde_json::to_string(&rest).map_err(not_a_checkpoint)?;
        let metadata = HashMap::from([(KEY.to_owned(), rest)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(not_safetensors)
    }

    /// From the bytes of a file of the same model.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the tensor that is missing, unknown, or of another shape or type; [`Error::File`] where the
    /// bytes are no checkpoint.
    pub fn parse(specs: &Specs, bytes: &[u8]) -> Result<Self, Error> {
        let Rest { steps, notes } = rest(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
        let known = |name: &str| [WEIGHTS, MEANS, SQUARES].iter().any(|p| name.starts_with(p));
        if let Some((name, _)) = file.iter().find(|(name, _)| !known(name)) {
            return Err(refuse::tensor(name, "a tensor of a checkpoint", "an unknown one"));
        }
        let (m, v) = (part(specs, &file, MEANS)?, part(specs, &file, SQUARES)?);
        let weights = part(specs, &file, WEIGHTS)?;
        Ok(Self { weights, optimizer: OptimizerState { steps, m, v }, notes })
    }

    /// The notes alone, before it is known of which model the file is.
    ///
    /// # Errors
    /// [`Error::File`] where the bytes are no checkpoint.
    pub fn notes(bytes: &[u8]) -> Result<String, Error> {
        Ok(rest(bytes)?.notes)
    }
}

fn rest(bytes: &[u8]) -> Result<Rest, Error> {
    // Reading all of it finds a file that ends early.
    SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(not_safetensors)?;
    let rest = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
    let rest = rest.ok_or_else(|| not_a_checkpoint("no steps and notes among its metadata"))?;
    serde_json::from_str(rest).map_err(not_a_checkpoint)
}

/// The tensors whose names begin with `prefix`, which [`Specs::parse`] knows without it.
fn part(specs: &Specs, file: &SafeTensors<'_>, prefix: &str) -> Result<Vec<Vec<f32>>, Error> {
    let tensors: Vec<(&str, TensorView<'_>)> =
        file.iter().filter_map(|(name, view)| Some((name.strip_prefix(prefix)?, view))).collect();
    let bytes = safetensors::serialize(tensors, None).map_err(not_safetensors)?;
    specs.parse(&bytes).map_err(|error| match error {
        Error::Tensor { name, expected, given } => {
            Error::Tensor { name: format!("{prefix}{name}"), expected, given }
        }
        other => other,
    })
}

fn not_a_checkpoint(reason: impl ToString) -> Error {
    Error::File { path: "checkpoint".into(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transformer::Init;

    fn specs(width: usize) -> Specs {
        let mut specs = Specs::default();
        specs.add("table".into(), &[3, width], Init::Normal(1.0));
        specs.add("bias".into(), &[width], Init::Zeros);
        specs
    }

    fn checkpoint() -> Checkpoint {
        let [weights, m, v] = [1, 2, 3].map(|seed| specs(4).init(seed));
        let notes = "{\"settings\": \"é\"}".to_owned();
        Checkpoint { weights, optimizer: OptimizerState { steps: u64::MAX, m, v }, notes }
    }

    #[test]
    fn a_checkpoint_comes_back() {
        let bytes = checkpoint().serialize(&specs(4)).unwrap();
        assert_eq!(Checkpoint::parse(&specs(4), &bytes).unwrap(), checkpoint());
        assert_eq!(Checkpoint::notes(&bytes).unwrap(), checkpoint().notes);
    }

    #[test]
    fn whatever_is_none_is_refused_by_name() {
        let bytes = checkpoint().serialize(&specs(4)).unwrap();
        let name = |result: Result<Checkpoint, Error>| match result.unwrap_err() {
            Error::Tensor { name, .. } => name,
            Error::File { path, .. } => path,
            other => panic!("{other}"),
        };
        assert_eq!(name(Checkpoint::parse(&specs(5), &bytes)), "adamw.m.table");
        let mut larger = specs(4);
        larger.add("more".into(), &[1], Init::Zeros);
        assert_eq!(name(Checkpoint::parse(&larger, &bytes)), "adamw.m.more");
        assert_eq!(name(Checkpoint::parse(&specs(4), &bytes[..bytes.len() - 1])), "safetensors");
        let weights = specs(4).serialize(&checkpoint().weights).unwrap();
        assert_eq!(name(Checkpoint::parse(&specs(4), &weights)), "checkpoint");
    }
}
