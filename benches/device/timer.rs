//! The time of a call: a CUDA graph of calls on sets of tensors in turn, replayed between two events.
//!
//! A copy is the faster of two: the driver's memcpy outside of a graph, and a kernel in one. (As a node of a graph memcpy took
//! 1.5 times as long, at 2^28 elements of bf16 on an H200.)
//!
//! The sets together are larger than any L2, so that memory answers. A graph has many calls and a sample lasts
//! long, so that what lies between replays, and between an event and the first kernel, does not count.

use crate::operators::{Case, Data, Operator, Work};
use anyhow::{Context, Result, ensure};
use fused_dropout::cuda::Gpu;
use fused_dropout::cuda::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use fused_dropout::cuda::cudarc::driver::{CudaEvent, CudaGraph};
use fused_dropout::{Dropout, Key, Mode, Probability};

/// What the sets move together, at least: some L2s have 150 MB.
const ROTATED: usize = 256 << 20;
const SETS: std::ops::RangeInclusive<usize> = 2..=1024;

/// What the calls of a graph move together, about: two milliseconds of memory that moves 4 TB/s. Small calls need
/// no more than so many to hide the gap between two replays.
const MOVED: usize = 8 << 30;
const CALLS: usize = 32;

/// What a sample lasts at least.
pub const SAMPLE_SECONDS: f64 = 2e-3;

/// A case, ready to be timed.
pub struct Timer {
    gpu: Gpu,
    round: Round,
    /// Of one round.
    calls: usize,
    start: CudaEvent,
    end: CudaEvent,
    /// Whose memory the round works on.
    work: Box<dyn Work>,
    sets: usize,
    drop: Dropout<'static>,
}

/// How the calls are made.
enum Round {
    Graph(CudaGraph),
    Calls,
}

impl Timer {
    /// Allocates the tensors of `case`, runs it once on each set, and captures it.
    ///
    /// # Errors
    /// What the driver says: above all that there is no memory.
    pub fn new(gpu: &Gpu, data: &Data, case: &Case, p: f64) -> Result<Self> {
        let drop = Dropout::new(Key::new(42, 0), Probability::nonvanishing(p)?);
        if case.operator != Operator::Copy {
            return Self::of(gpu, data, case, drop)?.captured();
        }
        let kernel = Case { operator: Operator::Dropout, ..*case };
        let mut kernel = Self::of(gpu, data, &kernel, drop.mode(Mode::Inference))?.captured()?;
        let mut driver = Self::of(gpu, data, case, drop)?;
        let of_kernel = Spread::of(kernel.samples(5)?).median;
        let of_driver = Spread::of(driver.samples(5)?).median;
        Ok(if of_kernel < of_driver { kernel } else { driver })
    }

    /// Allocates, and runs once on each set.
    fn of(gpu: &Gpu, data: &Data, case: &Case, drop: Dropout<'static>) -> Result<Self> {
        let sets = ROTATED.div_ceil(case.bytes()).clamp(*SETS.start(), *SETS.end());
        let work = case.prepare(data, gpu, sets).context("preparing its tensors")?;
        // Every set as often as the others.
        let calls = MOVED.div_ceil(case.bytes()).min(CALLS).div_ceil(sets) * sets;
        let event = || gpu.stream().context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        let gpu = gpu.clone();
        let mut timer = Self { gpu, round: Round::Calls, calls, start, end, work, sets, drop };
        timer.call()?;
        timer.gpu.stream().synchronize()?;
        Ok(timer)
    }

    /// The same as a graph.
    fn captured(mut self) -> Result<Self> {
        let gpu = self.gpu.clone();
        let stream = gpu.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let captured = self.call();
        // Ended in any case: the stream would stay in capture.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        captured?;
        let graph = graph?.context("an empty graph")?;
        graph.upload()?;
        Ok(Self { round: Round::Graph(graph), ..self })
    }

    /// One round, call by call.
    fn call(&mut self) -> Result<()> {
        let mut drop = self.drop;
        for call in 0..self.calls {
            // Another mask for each call, as in training.
            drop.key = Key::new(42, call as u64);
            self.work.launch(&self.gpu, call % self.sets, &drop.into())?;
        }
        Ok(())
    }

    fn replay(&mut self) -> Result<()> {
        match &self.round {
            Round::Graph(graph) => Ok(graph.launch()?),
            Round::Calls => self.call(),
        }
    }

    /// Seconds of one call, the mean over `replays` of the round.
    pub fn seconds(&mut self, replays: u64) -> Result<f64> {
        // Ahead of the first event, so that the device is at work when it comes to it, and not waiting for the host.
        self.replay()?;
        self.start.record(self.gpu.stream())?;
        for _ in 0..replays {
            self.replay()?;
        }
        self.end.record(self.gpu.stream())?;
        let seconds = f64::from(self.start.elapsed_ms(&self.end)?) / 1e3;
        Ok(seconds / (replays * self.calls as u64) as f64)
    }

    /// So many samples, after a warm-up.
    pub fn samples(&mut self, count: usize) -> Result<Vec<f64>> {
        let replays = self.replays()?;
        (0..count).map(|_| self.seconds(replays)).collect()
    }

    /// Rounds that last [`SAMPLE_SECONDS`].
    fn replays(&mut self) -> Result<u64> {
        self.seconds(1)?;
        let once = self.seconds(2)? * self.calls as f64;
        ensure!(once > 0.0, "the device's events measure no time");
        Ok((SAMPLE_SECONDS / once).ceil().clamp(1.0, 1e6) as u64)
    }
}

/// Bytes a second that a copy of a gibibyte moves, reads and writes together: the limit.
///
/// # Errors
/// What the driver says.
pub fn copy_bandwidth(gpu: &Gpu, data: &Data) -> Result<f64> {
    use crate::operators::{Pass, Storage};
    let (operator, pass, dtype) = (Operator::Copy, Pass::Forward, Storage::F32);
    let case = Case { operator, pass, dtype, rows: 1 << 18, cols: 1 << 10 };
    let seconds = Timer::new(gpu, data, &case, 0.1)?.samples(20)?;
    Ok(case.bytes() as f64 / Spread::of(seconds).median)
}

/// The middle of samples, and where nine tenths of them lie.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Spread {
    pub median: f64,
    pub p5: f64,
    pub p95: f64,
}

impl Spread {
    /// # Panics
    /// Without a sample.
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| samples[((samples.len() - 1) as f64 * share).round() as usize];
        Self { median: at(0.5), p5: at(0.05), p95: at(0.95) }
    }
}
