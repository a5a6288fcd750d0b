//! Throughput of every operator on a GPU, beside the copy bandwidth of the same run.
//!
//!     cargo bench --features cuda --bench device                     # everything
//!     cargo bench --features cuda --bench device -- 'dropout_add '   # a part, by criterion's filter
//!     cargo bench --features cuda --bench device -- --about          # the device, as JSON
//!     cargo bench --features cuda --bench device -- --serve          # a server: serve.rs
//!     cargo bench --features cuda --bench device -- --kernels DIR    # kernels of DIR (softmax_dropout.cubin) in place of ours
//!
//! bf16, f16 and f32; 2^16 to 2^28 elements in rows of 1,024, and rows of 512 to 16,384 at 2^24. Answers are checked
//! before the clock starts. `FUSED_DROPOUT_BENCH=FILE` writes the rows as JSON, anew after each one: an interrupted run
//! leaves what it measured. After `FUSED_DROPOUT_BENCH_SECONDS` (330) the other cases are skipped and listed. Without a GPU
//! the exit status is 3.

mod about;
#[path = "../../tests/device/backend.rs"]
mod backend;
#[path = "../../tests/cases/mod.rs"]
mod cases;
mod check;
#[allow(dead_code)] // the tests use the rest
mod operators;
#[path = "../../tests/oracle/mod.rs"]
mod oracle;
mod report;
#[path = "../common/results.rs"]
mod results;
mod serve;
mod timer;

use about::{About, clocks};
use anyhow::{Context, Result};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};
use fused_dropout::cuda::{self, Gpu, Kernels};
use operators::{Case, Data, PASSES, STORAGES};
use report::{Clocks, Report, Row, word};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use timer::{SAMPLE_SECONDS, Timer, copy_bandwidth};

/// Where there is no GPU.
const NO_GPU: u8 = 3;

/// Of each case. The standard error of a median of 30 is a 14th of the distance from the 5th to the 95th percentile, where
/// samples are normally distributed.
const SAMPLES: usize = 30;

/// What all cases may take: less than ten minutes of a GPU that is lent, with room for the checks before.
const SECONDS: u64 = 330;

fn main() -> ExitCode {
    let gpu = match open() {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("no GPU: {error}");
            return ExitCode::from(NO_GPU);
        }
    };
    match run(&gpu) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder whose kernels are timed in place of the crate's.
fn kernels_folder() -> Option<PathBuf> {
    let mut arguments = std::env::args_os().skip_while(|argument| argument != "--kernels");
    arguments.nth(1).map(PathBuf::from)
}

/// A stream of the first GPU.
fn open() -> Result<Gpu, fused_dropout::Error> {
    let context = cuda::context(0)?;
    // SAFETY: this program uses one stream for everything. A capture does not get on with cudarc's events.
    unsafe { context.disable_event_tracking() };
    let kernels = match kernels_folder() {
        // SAFETY: who names the folder vouches for what is in it; the answers are checked before the clock starts.
        Some(folder) => unsafe { Kernels::load_with(&context, &folder)? },
        None => Kernels::load(&context)?,
    };
    Gpu::new(&kernels, context.new_stream().expect("a stream"))
}

/// Criterion with what the command line says to it: beside `--kernels`, which it does not know, a filter alone.
fn criterion() -> Criterion {
    let criterion = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_secs_f64(SAMPLES as f64 * SAMPLE_SECONDS))
        .nresamples(1000); // its own intervals are not reported
    let Some(folder) = kernels_folder() else { return criterion.configure_from_args() };
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    match words.find(|word| folder.as_os_str() != word.as_str()) {
        Some(filter) => criterion.with_filter(filter),
        None => criterion,
    }
}

fn run(gpu: &Gpu) -> Result<()> {
    let about = About::of(gpu)?;
    let asked = |name: &str| std::env::args().any(|argument| argument == name);
    if asked("--about") {
        println!("{}", serde_json::to_string(&about)?);
        return Ok(());
    }
    let data = Data::new(gpu)?;
    check::check(gpu)?;
    if asked("--serve") {
        return serve::serve(gpu, &data, &about);
    }
    let before = clocks();
    let copy_bytes_per_second = copy_bandwidth(gpu, &data)?;
    let mut report = Report {
        device: about,
        clocks: Clocks { before, after: String::new() },
        copy_bytes_per_second,
        rows: Vec::new(),
        skipped: Vec::new(),
    };
    time_all(gpu, &data, &mut report)?;
    report.clocks.after = clocks();
    report.print();
    report.write()
}

/// Elements in rows of 1,024 columns, then 2^24 elements in rows of other lengths.
fn shapes() -> impl Iterator<Item = (usize, usize)> {
    let sizes = (16..=28).step_by(2).map(|log| (1 << (log - 10), 1 << 10));
    let lengths = [9, 11, 12, 13, 14].map(|log| (1 << (24 - log), 1 << log));
    sizes.chain(lengths)
}

fn time_all(gpu: &Gpu, data: &Data, report: &mut Report) -> Result<()> {
    let mut criterion = criterion();
    let seconds = std::env::var("FUSED_DROPOUT_BENCH_SECONDS").ok();
    let seconds =
        seconds.map_or(Ok(SECONDS), |text| text.parse()).context("FUSED_DROPOUT_BENCH_SECONDS")?;
    let end = Instant::now() + Duration::from_secs(seconds);
    for (operator, pass) in PASSES {
        for dtype in STORAGES {
            let name = format!("{} {} {}", word(&operator), word(&pass), word(&dtype));
            let mut group = criterion.benchmark_group(&name);
            // The same number of replays for each sample.
            group.sampling_mode(SamplingMode::Flat);
            for (rows, cols) in shapes() {
                let case = Case { operator, pass, dtype, rows, cols };
                if Instant::now() > end {
                    report.skipped.push(format!("{name} {rows}x{cols}: out of time"));
                    continue;
                }
                match time(&mut group, gpu, data, &case) {
                    Ok(false) => {}
                    Ok(true) => {
                        report.rows.push(Row::recorded(case, &name, &format!("{rows}x{cols}"))?);
                        report.write()?;
                    }
                    Err(error) => report.skipped.push(format!("{name} {rows}x{cols}: {error:#}")),
                }
            }
        }
    }
    criterion.final_summary();
    Ok(())
}

/// Fewer samples than this criterion does not take.
const FEWEST_SAMPLES: usize = 10;

/// Lets criterion time a case; whether it did (it may be asked for others, or only to try).
fn time(
    group: &mut BenchmarkGroup<'_, WallTime>,
    gpu: &Gpu,
    data: &Data,
    case: &Case,
) -> Result<bool> {
    let mut timer: Option<Result<Timer>> = None;
    let mut calls = 0;
    group.throughput(Throughput::Bytes(case.bytes() as u64));
    group.bench_function(format!("{}x{}", case.rows, case.cols), |bencher| {
        calls += 1;
        let timer = timer.get_or_insert_with(|| Timer::new(gpu, data, case, 0.1));
        bencher.iter_custom(|replays| {
            let seconds = timer.as_mut().ok().and_then(|timer| timer.seconds(replays).ok());
            // Of a call. Criterion takes no benchmark without an answer; this one is not reported.
            Duration::from_secs_f64(seconds.unwrap_or(1e-9) * replays as f64)
        });
    });
    // A failure of the device on the way shows here.
    gpu.stream().synchronize()?;
    timer.transpose()?;
    Ok(calls >= FEWEST_SAMPLES)
}
