//! Captures and graphs.

use super::{Device, Op};
use crate::codes::*;
use crate::thread::Caller;

pub struct Capture {
    pub(super) mode: Mode,
    pub(super) thread: usize,
    pub(super) ops: Vec<Op>,
    pub(super) invalid: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

impl Device {
    /// What may not happen in a thread that captures, nor in any while one captures globally.
    pub fn unsafe_call(&mut self, caller: Caller) -> Result {
        let forbids = |capture: &Capture| match capture.mode {
            Mode::Global => true,
            Mode::ThreadLocal => capture.thread == caller.thread,
            Mode::Relaxed => false,
        };
        let mut allowed = Ok(());
        for capture in self.captures.values_mut().filter(|capture| forbids(capture)) {
            capture.invalid = true;
            allowed = Err(CAPTURE_UNSUPPORTED);
        }
        allowed
    }

    pub(super) fn invalidate(&mut self, capture: usize) {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.invalid = true;
        }
    }

    pub fn begin_capture(&mut self, caller: Caller, handle: usize, mode: Mode) -> Result {
        self.check(caller)?;
        let key = self.own_stream(caller, handle)?;
        if self.contexts.contains_key(&key) {
            return Err(CAPTURE_UNSUPPORTED); // the default stream
        }
        if let Some(capture) = self.streams[&key].capture {
            self.invalidate(capture);
            return Err(CAPTURE_UNSUPPORTED);
        }
        let id = self.handle();
        let capture = Capture { mode, thread: caller.thread, ops: Vec::new(), invalid: false };
        self.captures.insert(id, capture);
        self.streams.get_mut(&key).expect("`own_stream` found it").capture = Some(id);
        Ok(())
    }

    pub fn end_capture(&mut self, caller: Caller, handle: usize) -> Result<usize> {
        self.check(caller)?;
        let key = self.own_stream(caller, handle)?;
        let id = self.streams[&key].capture.ok_or(CAPTURE_UNMATCHED)?;
        let capture = &self.captures[&id];
        if capture.thread != caller.thread && capture.mode != Mode::Relaxed {
            return Err(CAPTURE_WRONG_THREAD);
        }
        self.streams.get_mut(&key).expect("`own_stream` found it").capture = None;
        let capture = self.captures.remove(&id).expect("it was there above");
        if capture.invalid {
            return Err(CAPTURE_INVALIDATED);
        }
        let graph = self.handle();
        self.graphs.insert(graph, capture.ops.into());
        Ok(graph)
    }

    /// `CUstreamCaptureStatus`: none, active, invalidated.
    pub fn capture_status(&mut self, caller: Caller, handle: usize) -> Result<u32> {
        self.check(caller)?;
        let key = self.any_stream(caller, handle)?;
        self.no_implicit_dependency(key)?;
        let capture = self.streams[&key].capture;
        Ok(capture.map_or(0, |id| if self.captures[&id].invalid { 2 } else { 1 }))
    }

    pub fn instantiate(&mut self, caller: Caller, graph: usize) -> Result<usize> {
        self.check(caller)?;
        let ops = self.graphs.get(&graph).ok_or(INVALID_VALUE)?.clone();
        let exec = self.handle();
        self.execs.insert(exec, ops);
        Ok(exec)
    }

    pub fn destroy_graph(&mut self, graph: usize) -> Result {
        self.sound()?;
        self.graphs.remove(&graph).map(drop).ok_or(INVALID_VALUE)
    }

    pub fn destroy_exec(&mut self, exec: usize) -> Result {
        self.sound()?;
        self.execs.remove(&exec).map(drop).ok_or(INVALID_VALUE)
    }

    pub fn launch_graph(&mut self, caller: Caller, exec: usize, handle: usize) -> Result {
        self.check(caller)?;
        let key = self.own_stream(caller, handle)?;
        if let Some(capture) = self.streams[&key].capture {
            self.invalidate(capture); // a graph in a graph
            return Err(CAPTURE_UNSUPPORTED);
        }
        let ops = self.execs.get(&exec).ok_or(INVALID_VALUE)?.clone();
        ops.iter().try_for_each(|op| self.submit(caller, handle, op.clone()))
    }

    pub fn upload_graph(&mut self, caller: Caller, exec: usize, handle: usize) -> Result {
        self.check(caller)?;
        self.own_stream(caller, handle)?;
        self.execs.get(&exec).map(|_| ()).ok_or(INVALID_VALUE)
    }
}
