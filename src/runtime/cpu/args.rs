//! Arguments as memory, touched only within their bounds.

use crate::codegen::spec::ArgId;
use bytemuck::{Pod, Zeroable};
use std::marker::PhantomData;

/// An argument as it lies in memory at this step: exactly `ty.bytes(syms)` bytes.
#[derive(Clone, Copy, Debug)]
pub struct RawArg {
    pub ptr: *mut u8,
    pub len: usize,
}

// SAFETY: a `RawArg` is an address and a length; those who dereference it answer for that.
unsafe impl Send for RawArg {}
// SAFETY: as above.
unsafe impl Sync for RawArg {}

/// An `f32` at any address.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, packed)]
pub(super) struct F32(pub f32);

/// A block of [`crate::ir::DType::Q8Act`] at any address.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, packed)]
pub(super) struct Q8Block {
    pub d: f32,
    pub s: f32,
    pub q: [i8; 32],
}

/// The arguments of a launch.
///
/// Every access is checked against the argument's length and works at any alignment.
#[derive(Clone, Copy)]
pub(super) struct Args<'a> {
    raw: &'a [RawArg],
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Args<'a> {
    /// # Safety
    /// As [`super::CpuKernel::run`] says. The kernel must write only to arguments bound as written, only what its work items own,
    /// and take slices only of arguments that no alias of its spec names. An item owns the rows that it finds by values that
    /// the caller promised to be distinct and within bounds; clamping leaves those as they are.
    pub unsafe fn new(raw: &'a [RawArg]) -> Args<'a> {
        Args { raw, memory: PhantomData }
    }

    /// The address of `len` elements from element `start` on.
    #[inline(always)]
    fn at<E: Pod>(self, id: ArgId, start: usize, len: usize) -> *mut E {
        let arg = &self.raw[usize::from(id)];
        let size = size_of::<E>();
        let fits =
            start.checked_add(len).and_then(|end| end.checked_mul(size)).is_some_and(|end| end <= arg.len);
        assert!(fits, "argument {id} of {} bytes has no elements {start}..+{len} of {size} bytes", arg.len);
        arg.ptr.wrapping_add(start * size).cast()
    }

    /// Elements of an argument that nothing writes during the launch.
    #[inline(always)]
    pub fn slice<E: Pod>(self, id: ArgId, start: usize, len: usize) -> &'a [E] {
        const { assert!(align_of::<E>() == 1) };
        let ptr = self.at::<E>(id, start, len);
        // SAFETY: in bounds as checked, of any bytes, aligned to 1, and not written as the caller of `new` promised.
        unsafe { std::slice::from_raw_parts(ptr, len) }
    }

    /// Copies elements out of an argument, which may alias one that is written.
    #[inline(always)]
    pub fn load<E: Pod>(self, id: ArgId, start: usize, to: &mut [E]) {
        let from = self.at::<E>(id, start, to.len());
        // SAFETY: in bounds as checked; `to` is the kernel's own memory. Bytes have no alignment.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.as_mut_ptr().cast(), size_of_val(to)) }
    }

    /// Value `i` of an argument of integers.
    #[inline(always)]
    pub fn integer(self, id: ArgId, i: usize) -> i32 {
        let mut value = [0i32];
        self.load(id, i, &mut value);
        value[0]
    }

    /// What value `i` of an argument leads to, of `below` there are, which is at least one. Values beside those lead to the first or
    /// the last.
    #[inline(always)]
    pub fn index(self, id: ArgId, i: usize, below: usize) -> usize {
        usize::try_from(self.integer(id, i)).unwrap_or(0).min(below - 1)
    }

    /// Writes elements that the running work item owns.
    #[inline(always)]
    pub fn store<E: Pod>(self, id: ArgId, start: usize, from: &[E]) {
        let to = self.at::<E>(id, start, from.len());
        // SAFETY: in bounds as checked; the item owns these bytes. Bytes have no alignment.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to.cast(), size_of_val(from)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(bytes: &mut [u8]) -> [RawArg; 1] {
        [RawArg { ptr: bytes.as_mut_ptr(), len: bytes.len() }]
    }

    #[test]
    fn reads_and_writes_at_any_alignment() {
        let mut bytes = [0u8; 13];
        let raw = raw(&mut bytes[1..]);
        // SAFETY: `raw` points to twelve bytes that nobody else uses.
        let args = unsafe { Args::new(&raw) };
        args.store(0, 1, &[1.5f32, -2.0]);
        let mut back = [0f32; 3];
        args.load(0, 0, &mut back);
        assert_eq!(back, [0.0, 1.5, -2.0]);
        assert_eq!({ args.slice::<F32>(0, 2, 1)[0].0 }, -2.0);
    }

    #[test]
    fn indices_beside_what_is_there_are_clamped() {
        let mut bytes: Vec<u8> = [7i32, 2, 3, -1, i32::MIN].iter().flat_map(|x| x.to_le_bytes()).collect();
        let raw = raw(&mut bytes);
        // SAFETY: `raw` points to twenty bytes that nobody else uses.
        let args = unsafe { Args::new(&raw) };
        assert_eq!([0, 1, 2, 3, 4].map(|i| args.index(0, i, 3)), [2, 2, 2, 0, 0]);
        assert_eq!([args.index(0, 0, 1), args.index(0, 0, 100)], [0, 7]);
        assert_eq!(args.integer(0, 3), -1);
    }

    #[test]
    #[should_panic(expected = "has no elements 2..+2 of 4 bytes")]
    fn refuses_to_leave_an_argument() {
        let mut bytes = [0u8; 12];
        let raw = raw(&mut bytes);
        // SAFETY: `raw` points to twelve bytes that nobody else uses.
        unsafe { Args::new(&raw) }.store(0, 2, &[0f32; 2]);
    }

    #[test]
    #[should_panic(expected = "has no elements")]
    fn refuses_ranges_that_wrap() {
        let mut bytes = [0u8; 12];
        let raw = raw(&mut bytes);
        // SAFETY: `raw` points to twelve bytes that nobody else uses.
        unsafe { Args::new(&raw) }.slice::<F32>(0, usize::MAX / 4 + 2, 1);
    }
}
