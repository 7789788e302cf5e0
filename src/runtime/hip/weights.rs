//! Weights on their way to a GPU: from the mapped file, through pinned memory, in the layout that the plan has for each.

use super::HipError;
use super::context::{Buffer, Context, Pinned, Stream};
use super::planes::{fields, gather};
use crate::codegen::spec::Layout;
use crate::plan::Tensor;
use crate::runtime::progress::{Progress, Stage};
use std::sync::Arc;

/// Bytes that travel at once, of which two lots are under way.
const LOT: usize = 16 << 20;
/// Where weights begin.
const ALIGN: u64 = 256;

/// The weights of a plan on a device.
pub struct Weights {
    memory: Buffer,
    offsets: Vec<u64>,
}

impl Weights {
    /// Bytes that weights of these sizes take.
    pub fn bytes(sizes: impl Iterator<Item = u64>) -> u64 {
        sizes.fold(0u64, |sum, bytes| sum.saturating_add(bytes).next_multiple_of(ALIGN))
    }

    /// Copies `found`, as the file has the weights, to the device.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn load(
        context: &Arc<Context>,
        weights: &[Tensor],
        found: &[&[u8]],
        progress: &Progress,
    ) -> Result<Weights, HipError> {
        let all = Weights::bytes(found.iter().map(|bytes| bytes.len() as u64));
        let memory = Buffer::new(context, all)?;
        let mut lots = [Lot::new(context)?, Lot::new(context)?];
        let (mut at, mut offsets, mut turn, mut there) = (0, vec![], 0, 0);
        let bytes = found.iter().map(|bytes| bytes.len() as u64).sum();
        let mut send = |to: u64, len: usize, fill: &mut dyn FnMut(&mut [u8])| -> Result<(), HipError> {
            turn += 1;
            there += lots[turn % 2].send(to, len, fill)?;
            progress.tell(Stage::Weights, there, bytes);
            Ok(())
        };
        for (weight, bytes) in weights.iter().zip(found) {
            offsets.push(at);
            let base = memory.at + at;
            match weight.layout {
                Layout::Planes => {
                    let block = weight.ty.dtype.block_bytes();
                    let blocks = bytes.len() / block;
                    let mut before = 0;
                    for field in fields(weight.ty.dtype) {
                        let plane = base + (blocks * before) as u64;
                        let some = (LOT / field.1).min(blocks).max(1);
                        for (i, from) in bytes.chunks(some * block).enumerate() {
                            let to = plane + (i * some * field.1) as u64;
                            send(to, from.len() / block * field.1, &mut |to| {
                                gather(from, block, *field, to)
                            })?;
                        }
                        before += field.1;
                    }
                }
                Layout::RowMajor | Layout::Interleaved16 => {
                    for (i, from) in bytes.chunks(LOT).enumerate() {
                        send(base + (i * LOT) as u64, from.len(), &mut |to| to.copy_from_slice(from))?;
                    }
                }
            }
            at = (at + bytes.len() as u64).next_multiple_of(ALIGN);
        }
        for lot in &lots {
            lot.stream.wait()?;
        }
        progress.tell(Stage::Weights, bytes, bytes);
        Ok(Weights { memory, offsets })
    }

    /// Where a weight of the plan lies.
    pub fn at(&self, index: u32) -> u64 {
        self.memory.at + self.offsets[index as usize]
    }
}

/// Pinned memory with a stream of its own: while it travels, the other is filled.
struct Lot {
    /// Goes first, and waits for its work.
    stream: Stream,
    room: Pinned,
    /// Bytes that are under way.
    sent: u64,
}

impl Lot {
    fn new(context: &Arc<Context>) -> Result<Lot, HipError> {
        Ok(Lot { stream: Stream::new(context)?, room: Pinned::new(context, LOT)?, sent: 0 })
    }

    /// Waits for what it sent before, and returns how many bytes that was.
    fn send(&mut self, to: u64, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<u64, HipError> {
        self.stream.wait()?;
        let there = std::mem::replace(&mut self.sent, len as u64);
        let room = &mut self.room.bytes()[..len];
        fill(room);
        // SAFETY: the weight has as many bytes there; the room is not touched before the stream was waited for.
        unsafe { self.stream.write(to, room) }?;
        Ok(there)
    }
}
