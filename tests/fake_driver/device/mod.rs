//! The device: its contexts, modules and kernels. Only its own thread comes here.

use crate::codes::*;
use crate::memory::Memory;
use crate::thread::Caller;
use events::Event;
use fused_dropout::device::Kernel;
use graphs::Capture;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_void};
use std::rc::Rc;
use streams::Stream;

mod copies;
mod events;
mod graphs;
mod ops;
mod streams;

pub use graphs::Mode;
pub use ops::Op;

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

unsafe extern "C" {
    // The emulator's own registry: the size of a kernel's parameters, which a launch does not say.
    fn fused_dropout_emulator_find(name: *const c_char) -> *const c_void;
    fn fused_dropout_emulator_params(kernel: *const c_void) -> usize;
}

/// A kernel of the emulator, and the size of its parameters.
fn params_of(name: &CStr) -> Option<usize> {
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
        let c_name = CString::new(name).map_err(|_| INVALID_VALUE)?;
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
        let name = CString::new(kernel.name).map_err(|_| INVALID_VALUE)?;
        let params = params(params_of(&name).ok_or(NOT_FOUND)?);
        self.submit(caller, stream, Op::Kernel { kernel, blocks, threads, params })
    }
}
