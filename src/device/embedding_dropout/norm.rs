//! `embedding_dropout` with a norm: y = D(norm(token + position + segment)), and its gradients; see
//! [`crate::ops::embedding_dropout`].

use super::{Embeddings, GivenTables, Held, TABLE_GRAD_ROWS, TableGradient, check_rows};
use crate::device::abi::{Mask, RowNorm};
use crate::device::rows::{Kernels, kernels, launch_rows};
use crate::device::{Device, Launch, aligned, pointer};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::embedding_dropout::{
    BackwardNorm, ForwardNorm, Ids, Lookup, Lookups, NAME, TABLES,
};
use crate::ops::norm::Norm;
use crate::tensor::{read, write};

/// The file of the kernels.
const KERNELS: &str = "embedding_dropout_norm";

/// `EmbeddingNormParams` in `kernels/embedding_dropout_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NormParams {
    mask: Mask,
    embeddings: Embeddings,
    weight: u64,
    norm_bias: u64,
    y: u64,
    stats_out: u64,
    report: u64,
    stats: u64,
    dy: u64,
    ds: u64,
    slopes: u64,
    norm: RowNorm,
    rows: u32,
}
const _: () = assert!(size_of::<NormParams>() == 384);

/// y = D(norm(token + position + segment)).
pub(crate) fn forward_norm<T: Dtype, D: Device>(
    pass: ForwardNorm<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    check_rows(shape, u32::MAX as usize)?;
    let mut held = Held(Vec::new());
    let lookups = held.lookups(&pass.lookups, device)?;
    let tables = held.tables(&pass.tables, device)?;
    let (weight, norm_bias) = (pass.weight.read(device)?, read(pass.norm_bias, device)?);
    let (y, stats) = (pass.y.write(device)?, write(pass.stats, device)?);
    let params = NormParams {
        weight: weight.pointer,
        norm_bias: pointer(&norm_bias),
        y: y.pointer,
        stats_out: pointer(&stats),
        report: held.report(pass.report, device)?,
        ..norm_params(mask, &pass.norm, shape, lookups, tables)
    };
    let kernels = kernels!(KERNELS, "embedding_dropout_norm_forward", T);
    // SAFETY: as in `forward`.
    unsafe { launch_norm(device, kernels, shape, params) }
}

/// The gradients of the tables and of the norm's parameters.
pub(crate) fn backward_norm<T: Dtype, D: Device>(
    pass: BackwardNorm<'_, T, D>,
    Launch { device, mask }: Launch<'_, D>,
) -> Result<(), Error> {
    let shape = pass.shape;
    check_rows(shape, TABLE_GRAD_ROWS)?;
    let mut held = Held(Vec::new());
    let lookups = held.lookups(&pass.lookups, device)?;
    let tables = held.tables(&pass.tables, device)?;
    let (weight, stats) = (pass.weight.read(device)?, pass.stats.read(device)?);
    let dy = held.hold(pass.dy.read(device))?;
    let gradients = TableGradient::all(lookups, pass.gradients, device)?;
    let of_parameter = |gradient| TableGradient::new(EVERY_ROW, gradient, device);
    let dweight = pass.dweight.map(of_parameter).transpose()?;
    let dnorm_bias = pass.dnorm_bias.map(of_parameter).transpose()?;
    // The gradient of the sum, h * xhat, and what the tables need: a device has one workspace at a time.
    let elements = shape.elements(NAME)?;
    let scratch = TableGradient::scratch(&gradients, shape);
    let workspace = device.workspace(elements.saturating_mul(2).saturating_add(scratch))?;
    let part = |i: usize| workspace.pointer + (i * elements * size_of::<f32>()) as u64;
    let [ds, slopes, scratch] = [part(0), part(1), part(2)];
    let params = NormParams {
        weight: weight.pointer,
        stats: stats.pointer,
        dy,
        ds,
        slopes: if dweight.is_some() { slopes } else { 0 },
        ..norm_params(mask, &pass.norm, shape, lookups, tables)
    };
    let kernels = kernels!(KERNELS, "embedding_dropout_norm_backward", T);
    // Everything is kept of what is a gradient already.
    let kept = mask.all_kept();
    let tables = GivenTables { device, shape, lookups, scratch };
    // SAFETY: as in `backward`; the kernels that read the workspace run behind the one that writes it, and read no row
    // that it left out.
    unsafe {
        launch_norm(device, kernels, shape, params)?;
        for gradient in &gradients {
            tables.gradient::<f32>(&kept, ds, gradient)?;
        }
        if let Some(gradient) = &dweight {
            tables.gradient::<f32>(&kept, slopes, gradient)?;
        }
        if let Some(gradient) = &dnorm_bias {
            tables.gradient::<T>(&mask, dy, gradient)?;
        }
    }
    Ok(())
}

/// A parameter is an entry that every row takes.
const EVERY_ROW: Lookup<u64> = Lookup { entries: 1, ids: Ids::Sequence(1) };

/// What both passes of the normalised form have; its tensors are still to be filled in.
fn norm_params(
    mask: Mask,
    norm: &Norm,
    shape: Shape,
    lookups: Lookups<u64>,
    tables: [u64; TABLES],
) -> NormParams {
    NormParams {
        mask,
        embeddings: Embeddings::new(lookups, tables, shape.cols),
        weight: 0,
        norm_bias: 0,
        y: 0,
        stats_out: 0,
        report: 0,
        stats: 0,
        dy: 0,
        ds: 0,
        slopes: 0,
        norm: RowNorm::new(norm, shape.cols),
        rows: 0,
    }
}

unsafe fn launch_norm<D: Device>(
    device: &D,
    kernels: Kernels,
    shape: Shape,
    params: NormParams,
) -> Result<(), Error> {
    // Rows without columns still have statistics.
    if shape.cols == 0 && params.stats_out == 0 {
        return Ok(());
    }
    let [token, position, segment] = params.embeddings.tables;
    let NormParams { weight, norm_bias, y, dy, ds, slopes, .. } = params;
    let tensors = [token, position, segment, weight, norm_bias, y, dy, ds, slopes];
    let part = |first, rows| NormParams { mask: params.mask.advanced(first, 0), rows, ..params };
    // SAFETY: the caller's promise.
    unsafe { launch_rows(device, kernels, shape, aligned(shape.cols, tensors), part) }
}
