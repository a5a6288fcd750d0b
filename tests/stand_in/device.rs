//! The device: contexts, streams, events, captures and graphs. Only its own thread comes here.

use crate::blas::Product;
use crate::codes::*;
use crate::memory::Memory;
use crate::thread::Caller;
use fused_dropout::device::{Device as _, Kernel};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::c_void;
use std::rc::Rc;
use std::time::Instant;

/// Something that a stream does.
#[derive(Clone)]
pub enum Op {
    Kernel {
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: Rc<[u128]>,
    },
    Product(Rc<Product>),
    Set {
        to: u64,
        value: u8,
        bytes: usize,
    },
    /// From bytes that were taken at the call.
    Write {
        to: u64,
        values: Rc<[u8]>,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    /// From and to pinned memory of the host.
    FromHost {
        to: u64,
        host: usize,
        bytes: usize,
    },
    ToHost {
        host: usize,
        from: u64,
        bytes: usize,
    },
    Free {
        address: u64,
    },
    HostFunction {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    /// Waits until a stream has done so many things.
    Wait {
        stream: usize,
        position: u64,
    },
    Stamp(Stamp),
}

/// When an event was reached.
type Stamp = Rc<Cell<Option<Instant>>>;

struct Stream {
    context: usize,
    /// Ordered with the default stream.
    blocking: bool,
    queue: VecDeque<Op>,
    /// Things that were ever submitted, and of them done.
    submitted: u64,
    done: u64,
    capture: Option<usize>,
    /// A destroyed stream still does what was submitted.
    destroyed: bool,
}

struct Event {
    context: usize,
    timing: bool,
    recorded: Recorded,
}

#[derive(Clone)]
enum Recorded {
    Never,
    At { stream: usize, position: u64, stamp: Stamp },
    Captured(usize),
}

struct Capture {
    mode: Mode,
    thread: usize,
    ops: Vec<Op>,
    invalid: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

#[derive(Default)]
pub struct Device {
    pub memory: Memory,
    pub initialised: bool,
    /// After a fault: for as long as the process lives.
    broken: bool,
    /// Uses of a primary context; 1 of another.
    contexts: HashMap<usize, usize>,
    /// The default stream of a context has the context's number.
    streams: BTreeMap<usize, Stream>,
    events: HashMap<usize, Event>,
    captures: HashMap<usize, Capture>,
    /// The context of each module, and of each function with its kernel.
    modules: HashMap<usize, usize>,
    functions: HashMap<usize, (usize, Kernel)>,
    graphs: HashMap<usize, Rc<[Op]>>,
    execs: HashMap<usize, Rc<[Op]>>,
    /// Page-locked host memory, by address.
    pinned: HashMap<usize, Box<[u128]>>,
    handles: usize,
}

/// The one primary context.
const PRIMARY: usize = 0x10;
/// `CU_STREAM_LEGACY`: another name of the default stream.
const LEGACY: usize = 1;

unsafe extern "C" {
    // The emulator's own registry: the size of a kernel's parameters, which a launch does not say.
    fn fused_dropout_emulator_find(name: *const std::ffi::c_char) -> *const c_void;
    fn fused_dropout_emulator_params(kernel: *const c_void) -> usize;
}

/// A kernel of the emulator, and the size of its parameters.
fn params_of(name: &std::ffi::CStr) -> Option<usize> {
    // SAFETY: a C string; the registry's entries live for ever.
    unsafe {
        let kernel = fused_dropout_emulator_find(name.as_ptr());
        (!kernel.is_null()).then(|| fused_dropout_emulator_params(kernel))
    }
}

impl Device {
    /// A handle of its own, whatever it is for: one of the wrong kind is noticed.
    fn handle(&mut self) -> usize {
        self.handles += 0x10;
        PRIMARY + self.handles
    }

    /// What every call asks first.
    pub fn check(&self, caller: Caller) -> Result {
        self.check_initialised()?;
        if !self.contexts.contains_key(&caller.context) {
            return Err(INVALID_CONTEXT);
        }
        self.sound()
    }

    pub fn check_initialised(&self) -> Result {
        if self.initialised { Ok(()) } else { Err(NOT_INITIALIZED) }
    }

    fn sound(&self) -> Result {
        if self.broken { Err(ILLEGAL_ADDRESS) } else { Ok(()) }
    }

    // ---- contexts ----------------------------------------------------------------------------

    pub fn retain_primary(&mut self) -> Result<usize> {
        self.check_initialised()?;
        self.sound()?;
        *self.contexts.entry(PRIMARY).or_insert_with(|| 0) += 1;
        self.add_stream(PRIMARY, PRIMARY, true);
        Ok(PRIMARY)
    }

    pub fn release_primary(&mut self) -> Result {
        let uses = self.contexts.get_mut(&PRIMARY).ok_or(INVALID_CONTEXT)?;
        *uses -= 1;
        if *uses == 0 {
            self.end_context(PRIMARY);
        }
        Ok(())
    }

    pub fn create_context(&mut self) -> Result<usize> {
        self.check_initialised()?;
        self.sound()?;
        let context = self.handle();
        self.contexts.insert(context, 1);
        self.add_stream(context, context, true);
        Ok(context)
    }

    pub fn destroy_context(&mut self, context: usize) -> Result {
        if context == PRIMARY || !self.contexts.contains_key(&context) {
            return Err(INVALID_CONTEXT);
        }
        self.end_context(context);
        Ok(())
    }

    /// With a context goes everything that was made in it.
    fn end_context(&mut self, context: usize) {
        self.drain_context(context);
        self.contexts.remove(&context);
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.modules.retain(|_, of| *of != context);
        self.functions.retain(|_, (of, _)| *of != context);
        self.memory.free_all_of(context);
    }

    pub fn synchronize_context(&mut self, caller: Caller) -> Result {
        self.check(caller)?;
        let capturing: Vec<_> = (self.streams.values())
            .filter(|stream| stream.context == caller.context)
            .filter_map(|stream| stream.capture)
            .collect();
        if !capturing.is_empty() {
            capturing.into_iter().for_each(|capture| self.invalidate(capture));
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.drain_context(caller.context);
        self.sound()
    }

    fn drain_context(&mut self, context: usize) {
        let streams = self.streams.iter().filter(|(_, stream)| stream.context == context);
        let streams: Vec<_> = streams.map(|(&key, _)| key).collect();
        streams.into_iter().for_each(|stream| self.drain(stream));
    }

    // ---- streams -----------------------------------------------------------------------------

    fn add_stream(&mut self, key: usize, context: usize, blocking: bool) {
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
    fn any_stream(&self, caller: Caller, handle: usize) -> Result<usize> {
        let key = if handle <= LEGACY { caller.context } else { handle };
        self.streams.get(&key).filter(|stream| !stream.destroyed).ok_or(INVALID_HANDLE)?;
        Ok(key)
    }

    /// A stream of the current context.
    fn own_stream(&self, caller: Caller, handle: usize) -> Result<usize> {
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
    fn no_implicit_dependency(&mut self, key: usize) -> Result {
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

    fn enqueue(&mut self, key: usize, op: Op) {
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
    fn drain(&mut self, key: usize) {
        self.run(key, self.streams[&key].submitted);
    }

    /// Lets a stream work until it has done `position` things.
    fn run(&mut self, key: usize, position: u64) {
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

    fn execute(&mut self, op: Op) {
        if self.broken {
            return;
        }
        if let Err(fault) = self.try_execute(op) {
            eprintln!("stand-in for the CUDA driver: {fault}");
            self.broken = true;
        }
    }

    fn try_execute(&mut self, op: Op) -> std::result::Result<(), String> {
        let memory = &mut self.memory;
        let outside = |what: &'static str| move |_: Code| format!("{what} outside of allocations");
        match op {
            Op::Kernel { kernel, blocks, threads, params } => {
                let params = params.as_ptr().cast();
                // SAFETY: `launch` copied as many bytes as the kernel declares; accesses are checked.
                let launched = unsafe { memory.emulator.launch(kernel, blocks, threads, params) };
                launched.map_err(|error| error.to_string())?;
            }
            Op::Product(product) => product.run(memory)?,
            Op::Set { to, value, bytes } => {
                memory.bytes_mut(to, bytes).map_err(outside("a memset"))?.fill(value);
            }
            Op::Write { to, values } => {
                let to = memory.bytes_mut(to, values.len());
                to.map_err(outside("a copy from the host"))?.copy_from_slice(&values);
            }
            Op::Copy { to, from, bytes } => {
                let values = memory.bytes(from, bytes).map_err(outside("a copy from"))?.to_vec();
                memory.bytes_mut(to, bytes).map_err(outside("a copy to"))?.copy_from_slice(&values);
            }
            Op::FromHost { to, host, bytes } => {
                let to = memory.bytes_mut(to, bytes).map_err(outside("a copy from the host"))?;
                // SAFETY: the caller gave `bytes` bytes of page-locked memory, which it keeps.
                to.copy_from_slice(unsafe { std::slice::from_raw_parts(host as *const u8, bytes) });
            }
            Op::ToHost { host, from, bytes } => {
                let from = memory.bytes(from, bytes).map_err(outside("a copy to the host"))?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host as *mut u8, bytes) };
            }
            Op::Free { address } => memory.free(address).map_err(outside("a free"))?,
            // SAFETY: the promise of whoever gave the function to the driver.
            Op::HostFunction { function, data } => unsafe { function(data as *mut c_void) },
            Op::Wait { stream, position } => self.run(stream, position),
            Op::Stamp(stamp) => stamp.set(Some(Instant::now())),
        }
        Ok(())
    }

    // ---- events ------------------------------------------------------------------------------

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

    // ---- captures and graphs -----------------------------------------------------------------

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

    fn invalidate(&mut self, capture: usize) {
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

    // ---- modules and kernels -----------------------------------------------------------------

    pub fn load_module(&mut self, caller: Caller) -> Result<usize> {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        let module = self.handle();
        self.modules.insert(module, caller.context);
        Ok(module)
    }

    pub fn unload_module(&mut self, caller: Caller, module: usize) -> Result {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.modules.remove(&module).map(drop).ok_or(INVALID_HANDLE)
    }

    /// Any kernel of the crate, whatever the module: the images are not looked into.
    pub fn function(&mut self, caller: Caller, module: usize, name: &str) -> Result<usize> {
        self.check(caller)?;
        let context = *self.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let c_name = std::ffi::CString::new(name).map_err(|_| INVALID_VALUE)?;
        params_of(&c_name).ok_or(NOT_FOUND)?;
        let function = self.handle();
        let name = String::leak(name.to_owned());
        self.functions.insert(function, (context, Kernel { operator: "kernels", name }));
        Ok(function)
    }

    pub fn launch(
        &mut self,
        caller: Caller,
        function: usize,
        [blocks, threads]: [u32; 2],
        stream: usize,
        params: impl FnOnce(usize) -> Rc<[u128]>,
    ) -> Result {
        self.check(caller)?;
        let &(context, kernel) = self.functions.get(&function).ok_or(INVALID_HANDLE)?;
        if context != caller.context {
            return Err(INVALID_HANDLE);
        }
        let too_many = blocks == 0 || blocks > i32::MAX as u32 || threads == 0 || threads > 1024;
        if too_many {
            return Err(INVALID_VALUE);
        }
        let name = std::ffi::CString::new(kernel.name).map_err(|_| INVALID_VALUE)?;
        let params = params(params_of(&name).ok_or(NOT_FOUND)?);
        self.submit(caller, stream, Op::Kernel { kernel, blocks, threads, params })
    }

    // ---- memory ------------------------------------------------------------------------------

    /// Memory, now; what was freed and waits for its stream is freed first where there is not enough.
    fn allocate_now(&mut self, caller: Caller, bytes: usize) -> Result<u64> {
        if bytes > self.memory.free_bytes() {
            self.drain_context(caller.context);
            self.sound()?;
        }
        self.memory.allocate(caller.context, bytes)
    }

    pub fn allocate(&mut self, caller: Caller, bytes: usize) -> Result<u64> {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.allocate_now(caller, bytes)
    }

    pub fn allocate_on(&mut self, caller: Caller, bytes: usize, handle: usize) -> Result<u64> {
        self.check(caller)?;
        let key = self.own_stream(caller, handle)?;
        if let Some(capture) = self.streams[&key].capture {
            self.invalidate(capture); // it would make an allocation of the graph's own
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.no_implicit_dependency(key)?;
        self.allocate_now(caller, bytes)
    }

    /// Waits for the device, as the driver does.
    pub fn free(&mut self, caller: Caller, address: u64) -> Result {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.drain_context(caller.context);
        self.sound()?;
        self.memory.free(address)
    }

    pub fn free_on(&mut self, caller: Caller, address: u64, handle: usize) -> Result {
        self.check(caller)?;
        if !self.memory.starts_at(address) {
            return Err(INVALID_VALUE);
        }
        self.submit(caller, handle, Op::Free { address })
    }

    pub fn allocate_host(&mut self, caller: Caller, bytes: usize) -> Result<usize> {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        let memory = vec![u128::MAX; bytes.div_ceil(16).max(1)].into_boxed_slice();
        let address = memory.as_ptr() as usize;
        self.pinned.insert(address, memory);
        Ok(address)
    }

    pub fn free_host(&mut self, caller: Caller, address: usize) -> Result {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.drain_context(caller.context);
        self.pinned.remove(&address).map(drop).ok_or(INVALID_VALUE)
    }

    fn is_pinned(&self, host: usize, bytes: usize) -> bool {
        self.pinned.iter().any(|(&start, memory)| {
            host >= start && host + bytes <= start + size_of_val(&memory[..])
        })
    }

    /// A copy from the host. Pageable memory is read now, page-locked memory when the stream gets there.
    pub fn write(
        &mut self,
        caller: Caller,
        to: u64,
        host: usize,
        bytes: usize,
        stream: usize,
    ) -> Result {
        self.check(caller)?;
        if !self.memory.holds(to, bytes) {
            return Err(INVALID_VALUE);
        }
        if self.is_pinned(host, bytes) {
            return self.submit(caller, stream, Op::FromHost { to, host, bytes });
        }
        // SAFETY: the caller of the driver waits for this answer, and gave so many bytes to read.
        let values = unsafe { std::slice::from_raw_parts(host as *const u8, bytes) };
        self.submit(caller, stream, Op::Write { to, values: values.into() })
    }

    /// A copy to the host. One to pageable memory is done when this returns.
    pub fn read(
        &mut self,
        caller: Caller,
        host: usize,
        from: u64,
        bytes: usize,
        stream: usize,
    ) -> Result {
        self.check(caller)?;
        if !self.memory.holds(from, bytes) {
            return Err(INVALID_VALUE);
        }
        let pinned = self.is_pinned(host, bytes);
        let key = self.own_stream(caller, stream)?;
        if let (Some(capture), false) = (self.streams[&key].capture, pinned) {
            self.invalidate(capture);
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.submit(caller, stream, Op::ToHost { host, from, bytes })?;
        if !pinned {
            self.drain(key);
        }
        self.sound()
    }
}
