//! The emulator's C++ runtime, `kernels/emulator/runtime.cpp`, as Rust calls it.

use std::ffi::{CStr, c_char, c_void};

/// A kernel in the C++ registry.
#[repr(C)]
pub(super) struct Kernel {
    _opaque: [u8; 0],
}

/// A tensor's copy between guard zones.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Guarded {
    base: *mut u8,
    mapped: usize,
    pub start: *mut u8,
    bytes: usize,
    writable: u32,
    reserved: u32,
}

// SAFETY: a `Guarded` is the address of a mapping that belongs to no thread. Who frees it or looks
// into it is the business of the `Hold` that made it.
unsafe impl Send for Guarded {}

/// Accesses of 1, 2, 4, 8 and 16 bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Counts {
    pub reads: [u64; 5],
    pub writes: [u64; 5],
}

/// A launch, and what came of it.
#[repr(C)]
pub(super) struct Launch {
    pub kernel: *const Kernel,
    pub params: *const c_void,
    pub blocks: u32,
    pub threads: u32,
    pub tensors: *const Guarded,
    pub tensor_count: usize,
    pub order: u64,
    pub counts: Counts,
    pub message: [c_char; 512],
}

unsafe extern "C" {
    pub(super) fn fused_dropout_emulator_find(name: *const c_char) -> *const Kernel;
    pub(super) fn fused_dropout_emulator_launch(launch: *mut Launch) -> bool;
    fn fused_dropout_emulator_guard(
        source: *const u8,
        bytes: usize,
        writable: bool,
        guarded: *mut Guarded,
    ) -> bool;
    fn fused_dropout_emulator_unguard(guarded: *const Guarded);
    // Only referred to: this is what brings the kernels' object files into the program.
    static fused_dropout_emulator_units: [unsafe extern "C" fn(); 1];
}

impl Guarded {
    /// A copy of `source` between guard zones; `None` without memory.
    pub fn new<T: bytemuck::Pod>(source: &[T], writable: bool) -> Option<Self> {
        let mut guarded = std::mem::MaybeUninit::uninit();
        let bytes = size_of_val(source);
        // SAFETY: `source` is `bytes` readable bytes; `guarded` is written when true comes back.
        unsafe {
            fused_dropout_emulator_guard(
                source.as_ptr().cast(),
                bytes,
                writable,
                guarded.as_mut_ptr(),
            )
            .then(|| guarded.assume_init())
        }
    }

    /// Unmaps the copy.
    ///
    /// # Safety
    /// Nobody uses the copy or a copy of this value afterwards.
    pub unsafe fn free(self) {
        // SAFETY: `self` came from `fused_dropout_emulator_guard`; the rest is the caller's promise.
        unsafe { fused_dropout_emulator_unguard(&self) }
    }
}

/// The kernel called `name`.
pub(super) fn find(name: &str) -> Option<*const Kernel> {
    let name = std::ffi::CString::new(name).ok()?;
    std::hint::black_box(&raw const fused_dropout_emulator_units);
    // SAFETY: `name` is a C string that outlives the call.
    let kernel = unsafe { fused_dropout_emulator_find(name.as_ptr()) };
    (!kernel.is_null()).then_some(kernel)
}

/// The fault's text.
pub(super) fn message(launch: &Launch) -> String {
    // SAFETY: the runtime ends the text with a zero within the array.
    unsafe { CStr::from_ptr(launch.message.as_ptr()) }.to_string_lossy().into_owned()
}
