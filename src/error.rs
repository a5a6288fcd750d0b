//! The one error type of the crate.

/// Why an operator refused to run, or failed while running.
///
/// An operator that returns [`Error::Argument`] or [`Error::Unavailable`] has written to none of its
/// outputs. After the other variants the contents of the outputs are unspecified.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument does not fit the operator.
    #[error("{operator}: {argument}: expected {expected}, got {given}")]
    Argument {
        /// The operator, as its module is called.
        operator: &'static str,
        /// The argument: the field's name in the pass or in the key.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        given: String,
    },
    /// A backend cannot be used on this machine.
    #[error("{backend} is not available: {reason}")]
    Unavailable {
        /// The backend.
        backend: &'static str,
        /// What is missing.
        reason: String,
    },
    /// The CUDA driver returned an error.
    #[error("{operation}: CUDA driver error {code}: {message}")]
    Driver {
        /// What the crate asked the driver to do.
        operation: &'static str,
        /// The driver's own code, a `CUresult`.
        code: u32,
        /// The driver's name and text for it.
        message: String,
    },
    /// A configuration has a setting that is unknown, missing, or does not fit the others.
    #[error("setting {name}: expected {expected}, got {given}")]
    Setting {
        /// The setting, as the file names it.
        name: String,
        /// What would have been accepted.
        expected: String,
        /// What was found.
        given: String,
    },
    /// A file lacks a tensor, has one too many, or one of another shape.
    #[error("tensor {name}: expected {expected}, got {given}")]
    Tensor {
        /// The tensor, as the file names it.
        name: String,
        /// What would have been accepted.
        expected: String,
        /// What was found.
        given: String,
    },
    /// A file cannot be read or written, or is not of its format.
    #[error("{path}: {reason}")]
    File {
        /// The file, or what it was to hold.
        path: String,
        /// What the system or the format said.
        reason: String,
    },
    /// An emulated kernel did something that no kernel may do (an access outside of its buffers, a
    /// barrier that not all threads reached).
    #[error("emulated kernel {kernel}: {fault}")]
    Fault {
        /// The kernel's name.
        kernel: &'static str,
        /// The first thing it did wrong, with block and thread.
        fault: String,
    },
    /// Another library returned an error.
    #[error("{operation}: {message}")]
    Library {
        /// What the crate asked it to do.
        operation: &'static str,
        /// Its own name for the error.
        message: String,
    },
}

impl Error {
    /// An [`Error::Argument`]; `expected` and `given` in words.
    pub(crate) fn argument(
        operator: &'static str,
        argument: &'static str,
        expected: impl ToString,
        given: impl ToString,
    ) -> Self {
        Error::Argument {
            operator,
            argument,
            expected: expected.to_string(),
            given: given.to_string(),
        }
    }
}
