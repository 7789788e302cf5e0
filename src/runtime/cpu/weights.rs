//! The weights of a plan as the kernels read them: where the model file is mapped, or repacked into memory of their own.

use super::blocks::bytes_of;
use super::formats::{Q4K, Q6K};
use super::interleaved::{Repack, STRIP_ROWS, with_interleaved};
use super::isa::Level;
use super::{Features, Threads, outline};
use crate::codegen::spec::Layout;
use crate::gguf::GgufFile;
use crate::ir::DType;
use crate::plan::LoadedPlan;
use crate::runtime::device::DeviceError;
use crate::runtime::progress::{Progress, Stage};
use crate::runtime::weights::find_weights;
use memmap2::{Mmap, MmapMut};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are repacked before their pages of the file are given back: so much of a model is in memory twice.
const AT_ONCE: usize = 1 << 20;
/// Where repacked weights begin, so that no vector of a panel of whole cache lines crosses one.
const ALIGN: usize = 64;

/// The weights of a plan, where they lie in memory.
pub struct Weights {
    at: Vec<*const u8>,
    /// What `at` points into.
    _repacked: Mmap,
    _model: Arc<GgufFile>,
}

// SAFETY: the addresses are of memory that is only read, and lives as long as this does.
unsafe impl Send for Weights {}

impl Weights {
    /// Finds the weights in the model file, and repacks on all threads those that are to lie otherwise than there.
    ///
    /// # Errors
    /// If the model's tensors are not those of the plan, or memory is short.
    pub fn load(
        plan: &LoadedPlan,
        model: Arc<GgufFile>,
        threads: &Threads,
        features: &Features,
        progress: &Progress,
    ) -> Result<Weights, DeviceError> {
        let found = find_weights(plan, &model)?;
        let mut room = Some(0usize);
        let mut places = vec![];
        for (weight, bytes) in plan.weights.iter().zip(&found) {
            let repacked = weight.layout != Layout::RowMajor;
            places.push(room.filter(|_| repacked));
            if repacked {
                room = room.and_then(|room| room.checked_add(bytes.len())?.checked_next_multiple_of(ALIGN));
            }
        }
        let short = |_| DeviceError::Weights { bytes: plan.repacked_bytes() };
        let room = room.ok_or(()).map_err(|()| DeviceError::Weights { bytes: plan.repacked_bytes() })?;
        let mut memory = MmapMut::map_anon(room.max(1)).map_err(short)?;
        // Large pages are found faster. Only a hint, so it may fail.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let (mut done, all) = (0, plan.repacked_bytes());
        for ((weight, bytes), place) in plan.weights.iter().zip(&found).zip(&places) {
            let (Some(place), Some(columns)) = (*place, weight.ty.last().as_const()) else { continue };
            let strip = STRIP_ROWS * bytes_of(weight.ty.dtype, columns as usize);
            let some = (AT_ONCE / strip).max(1) * strip;
            let to = &mut memory[place..place + bytes.len()];
            model.expect_one_reading(bytes);
            for (from, to) in bytes.chunks(some).zip(to.chunks_mut(some)) {
                progress.tell(Stage::Weights, done, all);
                repack(weight.ty.dtype, from, to, strip, threads, features.level());
                model.give_back(from);
                done += from.len() as u64;
            }
            // And the pages that two of those shared.
            model.give_back(bytes);
        }
        let repacked = memory.make_read_only().map_err(short)?;
        if all > 0 {
            progress.tell(Stage::Weights, all, all);
        }
        let at = found.iter().zip(places).map(|(bytes, place)| match place {
            Some(place) => repacked[place..].as_ptr(),
            None => bytes.as_ptr(),
        });
        Ok(Weights { at: at.collect(), _repacked: repacked, _model: model })
    }

    /// Where the weight of this index of the plan lies.
    pub fn at(&self, index: u32) -> *const u8 {
        self.at[index as usize]
    }
}

/// Repacks whole strips of `strip` bytes.
fn repack(dtype: DType, from: &[u8], to: &mut [u8], strip: usize, threads: &Threads, level: Level) {
    let strips = Mutex::new(from.chunks_exact(strip).zip(to.chunks_exact_mut(strip)));
    let next = || strips.lock().unwrap_or_else(PoisonError::into_inner).next();
    threads.run(&|_| {
        while let Some((rows, strip)) = next() {
            macro_rules! go {
                ($format:ty) => {
                    outline(level, Repack::<$format> { rows, strip, format: PhantomData })
                };
            }
            with_interleaved!(dtype, go, ());
        }
    });
}
