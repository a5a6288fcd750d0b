//! Instruction sets, and the one place that enters code compiled for one.

use crate::error::Error;
use crate::ops::AsDropout;
use crate::pass::{Backend, Pass};

/// An instruction set that the backend is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// What every machine of the target has (SSE2 on x86-64, NEON on AArch64).
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// The CPU with an instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    level: Level,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// The best instruction set of this machine.
    pub fn new() -> Self {
        [Level::Avx512, Level::Avx2].into_iter().find_map(Self::at).unwrap_or(Self::PORTABLE)
    }

    /// What every machine has.
    pub const PORTABLE: Self = Self { level: Level::Portable };

    /// `level`, where this machine has it.
    pub fn at(level: Level) -> Option<Self> {
        available(level).then_some(Self { level })
    }

    /// Every level that this machine has, the simplest first.
    pub fn levels() -> impl Iterator<Item = Self> {
        [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter_map(Self::at)
    }

    /// The instruction set.
    pub fn level(self) -> Level {
        self.level
    }

    /// Runs one pass of an operator: [`Backend::run`].
    ///
    /// # Errors
    /// As [`Backend::run`].
    pub fn run<'a, P: Pass<'a, Self>>(
        &self,
        dropout: &impl AsDropout<Self>,
        pass: P,
    ) -> Result<(), Error> {
        Backend::run(self, dropout, pass)
    }

    /// Runs `work` compiled for this level. `work` must be inlined into its caller for that, so it is
    /// a closure around `#[inline(always)]` functions.
    #[inline]
    pub(super) fn vectorised<R>(self, work: impl FnOnce() -> R) -> R {
        match self.level {
            Level::Portable => work(),
            // SAFETY: a `Cpu` of a level only comes from `at`, which found its features on this machine.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512(work) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => work(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn available(level: Level) -> bool {
    match level {
        Level::Portable => true,
        Level::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        Level::Avx512 => {
            available(Level::Avx2)
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn available(level: Level) -> bool {
    level == Level::Portable
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}
