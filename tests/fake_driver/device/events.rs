//! Events: places in streams.

use super::{Device, Op};
use crate::codes::*;
use crate::thread::Caller;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

/// When an event was reached.
pub type Stamp = Rc<Cell<Option<Instant>>>;

pub struct Event {
    pub(super) context: usize,
    timing: bool,
    recorded: Recorded,
}

#[derive(Clone)]
enum Recorded {
    Never,
    At { stream: usize, position: u64, stamp: Stamp },
    Captured(usize),
}

impl Device {
    pub fn create_event(&mut self, caller: Caller, timing: bool) -> Result<usize> {
        self.check(caller)?;
        let key = self.handle();
        self.events
            .insert(key, Event { context: caller.context, timing, recorded: Recorded::Never });
        Ok(key)
    }

    pub fn destroy_event(&mut self, caller: Caller, key: usize) -> Result {
        self.check(caller)?;
        self.events.remove(&key).map(drop).ok_or(INVALID_HANDLE)
    }

    fn event(&self, key: usize) -> Result<&Event> {
        self.events.get(&key).ok_or(INVALID_HANDLE)
    }

    pub fn record(&mut self, caller: Caller, event: usize, handle: usize) -> Result {
        self.check(caller)?;
        let key = self.any_stream(caller, handle)?;
        if self.event(event)?.context != self.streams[&key].context {
            return Err(INVALID_HANDLE);
        }
        self.no_implicit_dependency(key)?;
        let recorded = match self.streams[&key].capture {
            Some(id) if self.captures[&id].invalid => return Err(CAPTURE_INVALIDATED),
            Some(id) => Recorded::Captured(id),
            None => {
                let stamp = Stamp::default();
                self.enqueue(key, Op::Stamp(stamp.clone()));
                Recorded::At { stream: key, position: self.streams[&key].submitted, stamp }
            }
        };
        self.events.get_mut(&event).expect("it was there above").recorded = recorded;
        Ok(())
    }

    pub fn wait(&mut self, caller: Caller, handle: usize, event: usize) -> Result {
        self.check(caller)?;
        let key = self.any_stream(caller, handle)?;
        let (capture, recorded) = (self.streams[&key].capture, self.event(event)?.recorded.clone());
        if capture.is_some_and(|id| self.captures[&id].invalid) {
            return Err(CAPTURE_INVALIDATED);
        }
        match (capture, recorded) {
            (Some(own), Recorded::Captured(other)) if own == other => Ok(()),
            (Some(own), _) => {
                self.invalidate(own);
                Err(CAPTURE_ISOLATION)
            }
            (None, Recorded::Never) => Ok(()),
            (None, Recorded::At { stream, position, .. }) => {
                self.no_implicit_dependency(key)?;
                self.enqueue(key, Op::Wait { stream, position });
                Ok(())
            }
            // It would join the capture while that goes on.
            (None, Recorded::Captured(id)) if self.captures.contains_key(&id) => Err(NOT_SUPPORTED),
            (None, Recorded::Captured(_)) => Err(CAPTURED_EVENT),
        }
    }

    /// Where an event stands, for who asks or waits: `None` if it was never recorded.
    fn position(&mut self, caller: Caller, event: usize) -> Result<Option<(usize, u64)>> {
        self.check(caller)?;
        match self.event(event)?.recorded.clone() {
            Recorded::Captured(capture) => {
                self.invalidate(capture);
                Err(CAPTURED_EVENT)
            }
            Recorded::Never => self.unsafe_call(caller).map(|()| None),
            Recorded::At { stream, position, .. } => {
                self.unsafe_call(caller).map(|()| Some((stream, position)))
            }
        }
    }

    pub fn synchronize_event(&mut self, caller: Caller, event: usize) -> Result {
        if let Some((stream, position)) = self.position(caller, event)? {
            self.run(stream, position);
        }
        self.sound()
    }

    /// Every question lets the stream do one thing, so that asking again and again comes to an end.
    pub fn query_event(&mut self, caller: Caller, event: usize) -> Result {
        let Some((stream, position)) = self.position(caller, event)? else { return Ok(()) };
        let Some(done) = self.streams.get(&stream).map(|stream| stream.done) else { return Ok(()) };
        if done >= position {
            return self.sound();
        }
        self.run(stream, done + 1);
        self.sound()?;
        Err(NOT_READY)
    }

    pub fn elapsed(&mut self, caller: Caller, events: [usize; 2]) -> Result<f32> {
        self.check(caller)?;
        let mut times = [Instant::now(); 2];
        for (time, key) in times.iter_mut().zip(events) {
            let event = self.event(key)?;
            let Recorded::At { stamp, .. } = &event.recorded else { return Err(INVALID_HANDLE) };
            if !event.timing {
                return Err(INVALID_HANDLE);
            }
            *time = stamp.get().ok_or(NOT_READY)?;
        }
        Ok(times[1].saturating_duration_since(times[0]).as_secs_f32() * 1e3)
    }
}
