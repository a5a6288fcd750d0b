//! The errors that models and their files have.

use crate::error::Error;

/// A setting of a configuration that does not fit.
pub(super) fn setting(name: impl ToString, expected: impl ToString, given: impl ToString) -> Error {
    Error::Setting {
        name: name.to_string(),
        expected: expected.to_string(),
        given: given.to_string(),
    }
}

/// A tensor of a file that does not fit.
pub(super) fn tensor(name: impl ToString, expected: impl ToString, given: impl ToString) -> Error {
    Error::Tensor {
        name: name.to_string(),
        expected: expected.to_string(),
        given: given.to_string(),
    }
}
