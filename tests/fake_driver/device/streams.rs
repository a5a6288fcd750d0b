//! Streams: queues that wait until something needs them.

use super::events::Stamp;
use super::{Device, Op};
use crate::codes::*;
use crate::thread::Caller;
use std::collections::VecDeque;

pub struct Stream {
    pub(super) context: usize,
    /// Ordered with the default stream.
    pub(super) blocking: bool,
    pub(super) queue: VecDeque<Op>,
    /// Things that were ever submitted, and of them done.
    pub(super) submitted: u64,
    pub(super) done: u64,
    pub(super) capture: Option<usize>,
    /// A destroyed stream still does what was submitted.
    pub(super) destroyed: bool,
}

/// `CU_STREAM_LEGACY`: another name of the default stream.
const LEGACY: usize = 1;

impl Device {
    pub(super) fn add_stream(&mut self, key: usize, context: usize, blocking: bool) {
        self.streams.entry(key).or_insert_with(|| Stream {
            context,
            blocking,
            queue: VecDeque::new(),
            submitted: 0,
            done: 0,
            capture: None,
            destroyed: false,
        });
    }

    pub fn create_stream(&mut self, caller: Caller, blocking: bool) -> Result<usize> {
        self.check(caller)?;
        let key = self.handle();
        self.add_stream(key, caller.context, blocking);
        Ok(key)
    }

    pub fn destroy_stream(&mut self, caller: Caller, handle: usize) -> Result {
        self.check(caller)?;
        let key = self.any_stream(caller, handle)?;
        if self.contexts.contains_key(&key) {
            return Err(INVALID_HANDLE); // the default stream
        }
        if let Some(capture) = self.streams[&key].capture {
            self.invalidate(capture);
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.streams.get_mut(&key).expect("`any_stream` found it").destroyed = true;
        Ok(())
    }

    /// A stream of any context.
    pub(super) fn any_stream(&self, caller: Caller, handle: usize) -> Result<usize> {
        let key = if handle <= LEGACY { caller.context } else { handle };
        self.streams.get(&key).filter(|stream| !stream.destroyed).ok_or(INVALID_HANDLE)?;
        Ok(key)
    }

    /// A stream of the current context.
    pub(super) fn own_stream(&self, caller: Caller, handle: usize) -> Result<usize> {
        let key = self.any_stream(caller, handle)?;
        if self.streams[&key].context != caller.context {
            return Err(INVALID_HANDLE);
        }
        Ok(key)
    }

    /// Does something on a stream, later; in a capture it becomes part of the graph.
    pub fn submit(&mut self, caller: Caller, handle: usize, op: Op) -> Result {
        self.check(caller)?;
        let key = self.own_stream(caller, handle)?;
        self.no_implicit_dependency(key)?;
        let Some(id) = self.streams[&key].capture else {
            self.enqueue(key, op);
            return Ok(());
        };
        let capture = self.captures.get_mut(&id).expect("the stream is in it");
        if capture.invalid {
            return Err(CAPTURE_INVALIDATED);
        }
        if matches!(op, Op::Free { .. } | Op::Write { .. }) {
            capture.invalid = true;
            return Err(CAPTURE_UNSUPPORTED);
        }
        capture.ops.push(op);
        Ok(())
    }

    /// The default stream waits for all blocking streams, of which none may be in a capture.
    pub(super) fn no_implicit_dependency(&mut self, key: usize) -> Result {
        if !self.contexts.contains_key(&key) {
            return Ok(());
        }
        let blocking = |stream: &&Stream| stream.context == key && stream.blocking;
        let captures: Vec<_> =
            self.streams.values().filter(blocking).filter_map(|stream| stream.capture).collect();
        if captures.is_empty() {
            return Ok(());
        }
        captures.into_iter().for_each(|capture| self.invalidate(capture));
        Err(CAPTURE_IMPLICIT)
    }

    pub(super) fn enqueue(&mut self, key: usize, op: Op) {
        let (context, blocking) = (self.streams[&key].context, self.streams[&key].blocking);
        let ordered = |(&other, stream): (&usize, &Stream)| {
            let both = key == context || other == context;
            let matters = both && other != key && stream.context == context && stream.blocking;
            (matters && stream.done < stream.submitted).then_some((other, stream.submitted))
        };
        let waits: Vec<_> =
            if blocking { self.streams.iter().filter_map(ordered).collect() } else { Vec::new() };
        let stream = self.streams.get_mut(&key).expect("the caller has looked");
        let waits = waits.into_iter().map(|(stream, position)| Op::Wait { stream, position });
        for op in waits.chain([op]) {
            stream.queue.push_back(op);
            stream.submitted += 1;
        }
    }

    pub fn synchronize_stream(&mut self, caller: Caller, handle: usize) -> Result {
        self.check(caller)?;
        let key = self.any_stream(caller, handle)?;
        if let Some(capture) = self.streams[&key].capture {
            self.invalidate(capture);
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.no_implicit_dependency(key)?;
        if key == caller.context {
            // What waits for the default stream waits for the blocking ones before it.
            self.enqueue(key, Op::Stamp(Stamp::default()));
        }
        self.unsafe_call(caller)?;
        self.drain(key);
        self.sound()
    }

    /// Does all that a stream has to do.
    pub(super) fn drain(&mut self, key: usize) {
        self.run(key, self.streams[&key].submitted);
    }

    /// Lets a stream work until it has done `position` things.
    pub(super) fn run(&mut self, key: usize, position: u64) {
        while let Some(stream) = self.streams.get_mut(&key)
            && stream.done < position
            && let Some(op) = stream.queue.pop_front()
        {
            self.execute(op);
            if let Some(stream) = self.streams.get_mut(&key) {
                stream.done += 1;
            }
        }
    }
}
