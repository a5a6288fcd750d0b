//! A drop probability on a command line.

use fused_dropout::{Error, Probability};

/// The number that an option has. One that would be realised as 0 or 1, and is neither, is refused.
pub fn probability(text: &str) -> Result<f64, String> {
    let p = text.parse().map_err(|_| "expected a number".to_owned())?;
    match Probability::nonvanishing(p) {
        Ok(_) => Ok(p),
        Err(Error::Argument { expected, .. }) => Err(format!("expected {expected}")),
        Err(error) => Err(error.to_string()),
    }
}
