//! The driver's functions, as C calls them. Their meaning is the driver's; what is left to say is in
//! `device`. Where C gives a pointer for the answer, these take a reference: null is `None`.

use crate::codes::*;
use crate::device::{Mode, Op};
use crate::thread::{ask, caller, set_context};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::rc::Rc;

/// What a fatbin begins with.
const FATBIN: u32 = 0xba55_ed50;
/// A cubin is an ELF file.
const CUBIN: u32 = 0x464c_457f;

fn status(result: Result) -> u32 {
    result.map_or_else(|code| code.0, |()| 0)
}

/// Writes an answer where it is wanted.
fn put<T>(out: Option<&mut T>, answer: impl FnOnce() -> Result<T>) -> u32 {
    let Some(out) = out else { return INVALID_VALUE.0 };
    status(answer().map(|answer| *out = answer))
}

/// A function without an answer.
macro_rules! calls {
    ($($name:ident($($argument:ident: $type:ty),*) =
        |$device:ident, $caller:pat_param| $work:expr;)*) => {
        $(#[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> u32 {
            status(ask(move |$device, $caller| $work))
        })*
    };
}

/// A function that answers through its first argument.
macro_rules! questions {
    ($($name:ident($out:ty $(, $argument:ident: $type:ty)*) =
        |$device:ident, $caller:pat_param| $work:expr;)*) => {
        $(#[unsafe(no_mangle)]
        extern "C" fn $name(out: Option<&mut $out> $(, $argument: $type)*) -> u32 {
            put(out, || ask(move |$device, $caller| $work))
        })*
    };
}

/// The compute capability that the device pretends to, `FUSED_DROPOUT_FAKE_DRIVER_CAPABILITY`.
fn capability() -> (u8, u8) {
    let given = std::env::var("FUSED_DROPOUT_FAKE_DRIVER_CAPABILITY").ok();
    let parsed = given.as_deref().and_then(|given| given.split_once('.'));
    parsed
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .unwrap_or((9, 0))
}

/// The first compute capability that the kernels are compiled for.
const OLDEST: (u8, u8) = (8, 0);

// ---- the driver and the device ---------------------------------------------------------------

calls! {
    cuInit(flags: c_uint) = |device, _| {
        device.initialised = true;
        if flags == 0 { Ok(()) } else { Err(INVALID_VALUE) }
    };
}

questions! {
    cuDriverGetVersion(c_int) = |_device, _| Ok(13000);
    cuDeviceGetCount(c_int) = |device, _| device.check_initialised().map(|()| 1);
    cuDeviceGet(c_int, ordinal: c_int) =
        |_device, _| if ordinal == 0 { Ok(0) } else { Err(INVALID_DEVICE) };
    cuDeviceTotalMem_v2(usize, _ordinal: c_int) = |device, _| Ok(device.memory.total());
    cuDeviceGetAttribute(c_int, attribute: c_uint, _ordinal: c_int) =
        |_device, _| Ok(match attribute {
            1 | 2 => 1024, // threads a block
            5 => i32::MAX, // blocks a grid
            10 => 32,      // threads a warp
            16 => 1,       // multiprocessors
            75 => i32::from(capability().0),
            76 => i32::from(capability().1),
            115 => 1,      // memory pools
            _ => 0,
        });
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _ordinal: c_int) -> u32 {
    let text = c"fused-dropout emulator (no GPU)".to_bytes_with_nul();
    if (len as usize) < text.len() {
        return INVALID_VALUE.0;
    }
    // SAFETY: `name` has room for `len` characters.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len()) };
    0
}

fn text(code: u32, out: Option<&mut *const c_char>, which: usize) -> u32 {
    put(out, || texts(code).map(|texts| texts[which].as_ptr()).ok_or(INVALID_VALUE))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: u32, out: Option<&mut *const c_char>) -> u32 {
    text(code, out, 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(code: u32, out: Option<&mut *const c_char>) -> u32 {
    text(code, out, 1)
}

// ---- contexts --------------------------------------------------------------------------------

questions! {
    cuDevicePrimaryCtxRetain(usize, _ordinal: c_int) = |device, _| device.retain_primary();
}

calls! {
    cuDevicePrimaryCtxRelease_v2(_ordinal: c_int) = |device, _| device.release_primary();
    cuCtxSynchronize() = |device, caller| device.synchronize_context(caller);
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Option<&mut usize>, total: Option<&mut usize>) -> u32 {
    let (Some(free), Some(total)) = (free, total) else { return INVALID_VALUE.0 };
    let info = ask(|device, caller| {
        device.check(caller)?;
        Ok((device.memory.free_bytes(), device.memory.total()))
    });
    status(info.map(|info| (*free, *total) = info))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxCreate_v4(
    out: Option<&mut usize>,
    _params: *mut c_void,
    _flags: c_uint,
    _ordinal: c_int,
) -> u32 {
    put(out, || ask(|device, _| device.create_context()).inspect(|&context| set_context(context)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxDestroy_v2(context: usize) -> u32 {
    if caller().context == context {
        set_context(0);
    }
    status(ask(move |device, _| device.destroy_context(context)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(out: Option<&mut usize>) -> u32 {
    put(out, || Ok(caller().context))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: usize) -> u32 {
    set_context(context);
    0
}

// ---- streams and events ----------------------------------------------------------------------

questions! {
    cuStreamCreate(usize, flags: c_uint) =
        |device, caller| device.create_stream(caller, flags & 1 == 0);
    cuStreamCreateWithPriority(usize, flags: c_uint, _priority: c_int) =
        |device, caller| device.create_stream(caller, flags & 1 == 0);
    cuEventCreate(usize, flags: c_uint) =
        |device, caller| device.create_event(caller, flags & 2 == 0);
    cuEventElapsedTime_v2(f32, start: usize, end: usize) =
        |device, caller| device.elapsed(caller, [start, end]);
}

calls! {
    cuStreamDestroy_v2(stream: usize) = |device, caller| device.destroy_stream(caller, stream);
    cuStreamSynchronize(stream: usize) = |device, caller| device.synchronize_stream(caller, stream);
    cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) =
        |device, caller| device.wait(caller, stream, event);
    cuEventRecord(event: usize, stream: usize) =
        |device, caller| device.record(caller, event, stream);
    cuEventSynchronize(event: usize) = |device, caller| device.synchronize_event(caller, event);
    cuEventQuery(event: usize) = |device, caller| device.query_event(caller, event);
    cuEventDestroy_v2(event: usize) = |device, caller| device.destroy_event(caller, event);
    cuLaunchHostFunc(stream: usize, function: unsafe extern "C" fn(*mut c_void), data: usize) =
        |device, caller| device.submit(caller, stream, Op::HostFunction { function, data });
}

// ---- captures and graphs ---------------------------------------------------------------------

/// The one question whose answer is the last argument.
#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: usize, out: Option<&mut u32>) -> u32 {
    put(out, || ask(move |device, caller| device.capture_status(caller, stream)))
}

questions! {
    cuGraphInstantiateWithFlags(usize, graph: usize, _flags: u64) =
        |device, caller| device.instantiate(caller, graph);
}

calls! {
    cuStreamBeginCapture_v2(stream: usize, mode: c_uint) = |device, caller| {
        let mode = match mode {
            0 => Mode::Global,
            1 => Mode::ThreadLocal,
            2 => Mode::Relaxed,
            _ => return Err(INVALID_VALUE),
        };
        device.begin_capture(caller, stream, mode)
    };
    cuGraphDestroy(graph: usize) = |device, _| device.destroy_graph(graph);
    cuGraphExecDestroy(exec: usize) = |device, _| device.destroy_exec(exec);
    cuGraphLaunch(exec: usize, stream: usize) =
        |device, caller| device.launch_graph(caller, exec, stream);
    cuGraphUpload(exec: usize, stream: usize) =
        |device, caller| device.upload_graph(caller, exec, stream);
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: usize, out: Option<&mut usize>) -> u32 {
    let Some(out) = out else { return INVALID_VALUE.0 };
    *out = 0;
    put(Some(out), || ask(move |device, caller| device.end_capture(caller, stream)))
}

// ---- modules and kernels ---------------------------------------------------------------------

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(out: Option<&mut usize>, image: Option<&u32>) -> u32 {
    if image != Some(&FATBIN) && image != Some(&CUBIN) {
        return INVALID_IMAGE.0;
    }
    if capability() < OLDEST {
        return NO_BINARY_FOR_GPU.0;
    }
    put(out, || ask(|device, caller| device.load_module(caller)))
}

calls! {
    cuModuleUnload(module: usize) = |device, caller| device.unload_module(caller, module);
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(
    out: Option<&mut usize>,
    module: usize,
    name: *const c_char,
) -> u32 {
    // SAFETY: the driver is given a C string.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    put(out, || ask(move |device, caller| device.function(caller, module, &name)))
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: usize,
    blocks: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    stream: usize,
    params: Option<&usize>,
    _extra: *mut *mut c_void,
) -> u32 {
    // What this crate's kernels are launched with; the emulator knows no more.
    let flat = [blocks_y, blocks_z, threads_y, threads_z] == [1; 4] && shared == 0;
    let (true, Some(&params)) = (flat, params) else { return INVALID_VALUE.0 };
    let copied = move |bytes: usize| {
        let mut copy = vec![0u128; bytes.div_ceil(16)];
        // SAFETY: the caller waits, and gave the structure that the kernel declares, of so many bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(params as *const u8, copy.as_mut_ptr().cast(), bytes);
        }
        Rc::from(copy)
    };
    status(ask(move |device, caller| {
        device.launch(caller, function, [blocks, threads], stream, copied)
    }))
}

// ---- memory ----------------------------------------------------------------------------------

questions! {
    cuMemAlloc_v2(u64, bytes: usize) = |device, caller| device.allocate(caller, bytes);
    cuMemAllocAsync(u64, bytes: usize, stream: usize) =
        |device, caller| device.allocate_on(caller, bytes, stream);
    cuMemHostAlloc(usize, bytes: usize, _flags: c_uint) =
        |device, caller| device.allocate_host(caller, bytes);
}

calls! {
    cuMemFree_v2(address: u64) = |device, caller| device.free(caller, address);
    cuMemFreeAsync(address: u64, stream: usize) =
        |device, caller| device.free_on(caller, address, stream);
    cuMemFreeHost(host: usize) = |device, caller| device.free_host(caller, host);
    cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: usize) =
        |device, caller| device.submit(caller, stream, Op::Set { to, value, bytes });
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) =
        |device, caller| device.submit(caller, stream, Op::Copy { to, from, bytes });
    cuMemcpyPeerAsync(to: u64, _there: usize, from: u64, _here: usize, bytes: usize, stream: usize) =
        |device, caller| device.submit(caller, stream, Op::Copy { to, from, bytes });
    cuMemcpyHtoDAsync_v2(to: u64, host: usize, bytes: usize, stream: usize) =
        |device, caller| device.write(caller, to, host, bytes, stream);
    cuMemcpyDtoHAsync_v2(host: usize, from: u64, bytes: usize, stream: usize) =
        |device, caller| device.read(caller, host, from, bytes, stream);
    // The synchronous ones work on the default stream.
    cuMemcpyHtoD_v2(to: u64, host: usize, bytes: usize) = |device, caller| {
        device.check(caller)?;
        device.unsafe_call(caller)?;
        device.write(caller, to, host, bytes, 0)?;
        device.synchronize_stream(caller, 0)
    };
    cuMemcpyDtoH_v2(host: usize, from: u64, bytes: usize) = |device, caller| {
        device.check(caller)?;
        device.unsafe_call(caller)?;
        device.read(caller, host, from, bytes, 0)?;
        device.synchronize_stream(caller, 0)
    };
}
