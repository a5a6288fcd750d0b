//! The storage types: f32, f16 and bf16. Arithmetic is always in f32.

use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A storage type, as a value: what a type parameter `T: Dtype` says at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DtypeId {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

/// A type in which tensors are stored. Sealed: [`f32`], [`half::f16`], [`half::bf16`].
pub trait Dtype:
    sealed::Sealed + bytemuck::Pod + PartialEq + Send + Sync + std::fmt::Debug
{
    /// The type as a value.
    const ID: DtypeId;
    /// The type's name as in kernel names: `"f32"`, `"f16"`, `"bf16"`.
    const NAME: &'static str;
    /// The exact value in f32.
    fn to_f32(self) -> f32;
    /// The nearest value of this type, ties to even; overflow gives an infinity.
    fn from_f32(value: f32) -> Self;
}

impl Dtype for f32 {
    const ID: DtypeId = DtypeId::F32;
    const NAME: &'static str = "f32";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Dtype for f16 {
    const ID: DtypeId = DtypeId::F16;
    const NAME: &'static str = "f16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Dtype for bf16 {
    const ID: DtypeId = DtypeId::Bf16;
    const NAME: &'static str = "bf16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}
