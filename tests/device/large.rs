//! Tensors whose elements, or octets, no 32-bit index counts.
//!
//! Host memory holds a piece at a time: a piece of the mask is that of a shard, and the CPU draws it.

use crate::cases::trials::on;
use crate::{alone, gpu};
use fused_dropout::cpu::Cpu;
use fused_dropout::cuda::Gpu;
use fused_dropout::cuda::cudarc::driver::{CudaSlice, CudaView};
use fused_dropout::ops::{dropout, dropout_add};
use fused_dropout::{Dropout, Key, Probability, RowMap, Shape, Shard, Source};
use half::bf16;
use libtest_mimic::{Completion, Trial};
use rayon::prelude::*;

/// 2^31 elements and more, in octets that are aligned.
const ALIGNED: Shape = Shape { rows: (1 << 16) + 3, cols: 1 << 15 };
/// The same in rows of odd length.
const ODD: Shape = Shape { rows: (1 << 21) + 1, cols: 1031 };
/// More octets than a launch counts: 2^33 elements.
const PARTS: Shape = Shape { rows: (1 << 13) + 1, cols: 1 << 20 };

/// Elements of a piece, about.
const PIECE: usize = 1 << 25;

pub fn trials() -> Vec<Trial> {
    vec![
        large("2^31 elements: dropout", 2 * ALIGNED.rows * ALIGNED.cols, |gpu| {
            out_of_place(gpu, ALIGNED);
        }),
        large("2^31 elements: dropout, rows of odd length", 2 * ODD.rows * ODD.cols, |gpu| {
            out_of_place(gpu, ODD);
        }),
        large("2^31 elements: dropout_add", 2 * ALIGNED.rows * ALIGNED.cols, |gpu| {
            added(gpu, ALIGNED);
        }),
        large("2^33 elements: dropout in several launches", PARTS.rows * PARTS.cols, |gpu| {
            in_place(gpu, PARTS);
        }),
    ]
}

/// A check that needs device memory for so many elements.
fn large(name: &str, elements: usize, check: fn(&Gpu)) -> Trial {
    // Beside the tensors, something for the driver.
    let needed = elements * size_of::<bf16>() + (512 << 20);
    Trial::ignorable_test(name, move || {
        // Each takes much of the device's memory.
        let _turn = alone();
        on(gpu(), |gpu| {
            let (free, _) = gpu.stream().context().mem_get_info().unwrap();
            if free < needed {
                let (free, needed) = (free >> 20, needed >> 20);
                let reason = format!("{free} MB of device memory free, {needed} needed");
                return Ok(Completion::ignored_with(reason));
            }
            check(gpu);
            // Freed memory goes back to a pool at once, and from there to the next trial when the stream is done.
            gpu.stream().synchronize().unwrap();
            Ok(Completion::Completed)
        })
    })
}

fn drop() -> Dropout<'static> {
    Dropout::new(Key::new(42, 7), Probability::new(0.1).unwrap())
}

/// Memory of the device with anything in it.
fn allocate(gpu: &Gpu, elements: usize) -> CudaSlice<bf16> {
    // SAFETY: any bits are a bf16, and whoever reads them has written them before.
    unsafe { gpu.stream().alloc(elements) }.unwrap()
}

/// Rows `first ..` of the tensor, and how many, a piece at a time.
fn pieces(shape: Shape) -> impl Iterator<Item = (usize, usize)> {
    let height = (PIECE / shape.cols).max(1);
    (0..shape.rows).step_by(height).map(move |row| (row, height.min(shape.rows - row)))
}

/// What stands in rows `first ..` of an input: every bit pattern of a number in turn, another order a row.
fn values(first: usize, rows: usize, cols: usize, salt: usize) -> Vec<bf16> {
    let row = |row: usize| {
        let start = rand_philox::splitmix64((row + salt) as u64) as u16;
        (0..cols).map(move |col| {
            let bits = start.wrapping_add((col as u16).wrapping_mul(40_503));
            // Not the exponent of infinities and NaN.
            bf16::from_bits(if bits & 0x7f80 == 0x7f80 { bits & !0x4000 } else { bits })
        })
    };
    let mut all = vec![bf16::ZERO; rows * cols];
    all.par_chunks_mut(cols).enumerate().for_each(|(i, values)| {
        values.iter_mut().zip(row(first + i)).for_each(|(value, drawn)| *value = drawn);
    });
    all
}

fn upload(gpu: &Gpu, shape: Shape, tensor: &mut CudaSlice<bf16>, salt: usize) {
    for (row, rows) in pieces(shape) {
        let host = values(row, rows, shape.cols, salt);
        let mut view = tensor.slice_mut(row * shape.cols..(row + rows) * shape.cols);
        gpu.stream().memcpy_htod(&host, &mut view).unwrap();
    }
}

/// Compares every piece of the tensor with what `expected` computes on the CPU for it, as a shard.
fn compare(
    gpu: &Gpu,
    shape: Shape,
    tensor: &CudaSlice<bf16>,
    expected: impl Fn(&Cpu, &Dropout<'_>, Shape, usize, &mut [bf16]),
) {
    let cpu = Cpu::new();
    for (row, rows) in pieces(shape) {
        let piece = Shape::new(rows, shape.cols);
        let shard = Shard { rows: RowMap::Contiguous { first: row as u32 }, ..Shard::WHOLE };
        let mut wanted = vec![bf16::ZERO; rows * shape.cols];
        expected(&cpu, &drop().shard(shard), piece, row, &mut wanted);
        let given = download(gpu, tensor.slice(row * shape.cols..(row + rows) * shape.cols));
        let differs = |i: &usize| given[*i].to_bits() != wanted[*i].to_bits();
        if let Some(i) = (0..wanted.len()).into_par_iter().find_first(differs) {
            let (row, col) = (row + i / shape.cols, i % shape.cols);
            panic!("row {row}, column {col}: {:?}, not {:?}", given[i], wanted[i]);
        }
    }
}

fn download(gpu: &Gpu, view: CudaView<'_, bf16>) -> Vec<bf16> {
    let host = gpu.stream().clone_dtoh(&view).unwrap();
    gpu.stream().synchronize().unwrap();
    host
}

fn out_of_place(gpu: &Gpu, shape: Shape) {
    let elements = shape.rows * shape.cols;
    let (mut x, mut y) = (allocate(gpu, elements), allocate(gpu, elements));
    upload(gpu, shape, &mut x, 1);
    gpu.run(&drop(), dropout::Forward { shape, x: Source::Tensor(&x), y: &mut y }).unwrap();
    compare(gpu, shape, &y, |cpu, drop, shape, row, mut y| {
        let x = values(row, shape.rows, shape.cols, 1);
        cpu.run(drop, dropout::Forward { shape, x: Source::Tensor(&x), y: &mut y }).unwrap();
    });
}

/// In place of the residual: two tensors are enough.
fn added(gpu: &Gpu, shape: Shape) {
    let elements = shape.rows * shape.cols;
    let (mut x, mut y) = (allocate(gpu, elements), allocate(gpu, elements));
    upload(gpu, shape, &mut x, 1);
    upload(gpu, shape, &mut y, 2);
    let pass =
        dropout_add::Forward { shape, x: &x, bias: None, residual: Source::InPlace, y: &mut y };
    gpu.run(&drop(), pass).unwrap();
    compare(gpu, shape, &y, |cpu, drop, shape, row, mut y| {
        let x = values(row, shape.rows, shape.cols, 1);
        y.copy_from_slice(&values(row, shape.rows, shape.cols, 2));
        let residual = Source::InPlace;
        let pass = dropout_add::Forward { shape, x: &x, bias: None, residual, y: &mut y };
        cpu.run(drop, pass).unwrap();
    });
}

fn in_place(gpu: &Gpu, shape: Shape) {
    let mut x = allocate(gpu, shape.rows * shape.cols);
    upload(gpu, shape, &mut x, 1);
    gpu.run(&drop(), dropout::Forward { shape, x: Source::InPlace, y: &mut x }).unwrap();
    compare(gpu, shape, &x, |cpu, drop, shape, row, mut y| {
        y.copy_from_slice(&values(row, shape.rows, shape.cols, 1));
        cpu.run(drop, dropout::Forward { shape, x: Source::InPlace, y: &mut y }).unwrap();
    });
}
