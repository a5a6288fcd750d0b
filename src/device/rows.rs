//! Kernels whose threads share a row: which shape of team a row takes, and how many blocks.

use super::{Device, Kernel, launch_threads};
use crate::error::Error;
use crate::ops::Shape;

/// A shape of team: `FD_ROW_SHAPES` and `FD_UNALIGNED_ROW_SHAPES` in `kernels/team.cuh`.
pub(crate) struct Team {
    /// Columns that its threads hold in registers.
    cols: usize,
    threads: u32,
    rows_a_block: usize,
}

impl Team {
    /// A warp, four of which are a block.
    pub const fn warp(cols: usize) -> Self {
        Self { cols, threads: 128, rows_a_block: 4 }
    }

    pub const fn block(threads: u32, cols: usize) -> Self {
        Self { cols, threads, rows_a_block: 1 }
    }

    /// Launches `kernel` on teams for `rows` rows.
    ///
    /// # Safety
    /// As [`launch_threads`].
    pub unsafe fn launch<D: Device, P>(
        &self,
        device: &D,
        kernel: Kernel,
        rows: usize,
        params: &P,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe {
            launch_threads(device, kernel, rows.div_ceil(self.rows_a_block), self.threads, params)
        }
    }
}

/// Of rows of whole octets, by their room; each with the kernel of the same place in [`Kernels`].
const TEAMS: [Team; 9] = [
    Team::warp(256),
    Team::warp(512),
    Team::warp(768),
    Team::warp(1024),
    Team::block(128, 2048),
    Team::block(256, 4096),
    Team::block(256, 8192),
    Team::block(512, 16384),
    Team::block(256, usize::MAX),
];

/// Of rows of any alignment.
const UNALIGNED_TEAMS: [Team; 3] =
    [Team::warp(1024), Team::block(256, 8192), Team::block(256, usize::MAX)];

/// The kernels of an operator's pass; f32 has none for the longest rows that other storage types hold.
#[derive(Clone, Copy)]
pub(crate) struct Kernels {
    pub aligned: [Option<Kernel>; TEAMS.len()],
    pub unaligned: [Kernel; UNALIGNED_TEAMS.len()],
}

/// The kernels `$name`, after `or` the unaligned ones, for the storage type `$T`.
macro_rules! kernels {
    ($operator:expr, $name:literal, $T:ty) => {
        $crate::device::rows::kernels!($operator, $name or $name, $T)
    };
    ($operator:expr, $name:literal or $unaligned:literal, $T:ty) => {
        $crate::device::rows::Kernels {
            aligned: [
                Some($crate::device::kernel!($operator, $name "_32x1", $T)),
                Some($crate::device::kernel!($operator, $name "_32x2", $T)),
                Some($crate::device::kernel!($operator, $name "_32x3", $T)),
                Some($crate::device::kernel!($operator, $name "_32x4", $T)),
                Some($crate::device::kernel!($operator, $name "_128x2", $T)),
                Some($crate::device::kernel!($operator, $name "_256x2", $T)),
                Some($crate::device::kernel!($operator, $name "_256x4", $T)),
                match <$T as $crate::Dtype>::ID {
                    $crate::DtypeId::F32 => None,
                    _ => Some($crate::device::kernel!($operator, $name "_512x4", $T)),
                },
                Some($crate::device::kernel!($operator, $name "_wide", $T)),
            ],
            unaligned: [
                $crate::device::kernel!($operator, $unaligned "_warp_unaligned", $T),
                $crate::device::kernel!($operator, $unaligned "_block_unaligned", $T),
                $crate::device::kernel!($operator, $unaligned "_wide_unaligned", $T),
            ],
        }
    };
}
pub(crate) use kernels;

impl Kernels {
    /// The kernel and the team for rows of `cols` columns.
    fn choose(&self, cols: usize, aligned: bool) -> (Kernel, &'static Team) {
        let unaligned = self.unaligned.map(Some);
        let (kernels, teams): (&[_], &'static [_]) = match aligned {
            true => (&self.aligned, &TEAMS),
            false => (&unaligned, &UNALIGNED_TEAMS),
        };
        let mut fitting = kernels.iter().zip(teams).filter(|(_, team)| cols <= team.cols);
        let chosen = fitting.find_map(|(kernel, team)| kernel.map(|kernel| (kernel, team)));
        chosen.expect("the last team takes rows of any length")
    }
}

/// Rows of one launch: blocks of a grid's first dimension.
const LAUNCH_ROWS: usize = 1 << 30;

/// Refuses more rows than a local row number has values, less one; rows without columns have no elements to number.
pub(crate) fn check(operator: &'static str, shape: Shape) -> Result<(), Error> {
    if shape.rows <= u32::MAX as usize || shape.cols == 0 {
        return Ok(());
    }
    Err(Error::argument(operator, "rows", "fewer than 2^32 rows", shape.rows))
}

/// Launches the kernel for `shape`, for whole octets where `aligned`, a part of the rows at a time: `params(first,
/// rows)` are those of `rows` rows from `first` on.
///
/// # Safety
/// As [`launch_threads`], for every part.
pub(crate) unsafe fn launch_rows<D: Device, P>(
    device: &D,
    kernels: Kernels,
    shape: Shape,
    aligned: bool,
    params: impl Fn(u32, u32) -> P,
) -> Result<(), Error> {
    let (kernel, team) = kernels.choose(shape.cols, aligned);
    for first in (0..shape.rows).step_by(LAUNCH_ROWS) {
        let rows = LAUNCH_ROWS.min(shape.rows - first);
        let params = params(first as u32, rows as u32);
        // SAFETY: the caller's promise.
        unsafe { team.launch(device, kernel, rows, &params)? };
    }
    Ok(())
}
