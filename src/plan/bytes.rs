//! The byte form of plans: `SINTERPL`, the format's version (u32), the length of the payload (u64, both little
//! endian), its BLAKE3, and the payload in postcard's encoding.

use super::{Plan, PlanError};
use std::ops::Deref;

/// Version of the byte form and of all types in it.
pub const FORMAT: u32 = 7;

const MAGIC: &[u8; 8] = b"SINTERPL";
const HEADER: usize = 8 + 4 + 8 + 32;

/// A plan that came out of its byte form and was validated: the only kind that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedPlan(Plan);

impl Deref for LoadedPlan {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.0
    }
}

impl Plan {
    /// The byte form, the same for the same plan.
    ///
    /// # Errors
    /// [`PlanError::Encode`], which no plan that was built here runs into.
    pub fn to_bytes(&self) -> Result<Vec<u8>, PlanError> {
        let payload = postcard::to_stdvec(self).map_err(PlanError::Encode)?;
        Ok(frame(&payload))
    }
}

pub(super) fn frame(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(blake3::hash(payload).as_bytes());
    bytes.extend(payload);
    bytes
}

impl LoadedPlan {
    /// Whether `bytes` begin as a plan does.
    pub fn is_plan(bytes: &[u8]) -> bool {
        bytes.starts_with(MAGIC)
    }

    /// Reads and validates a plan.
    ///
    /// # Errors
    /// If `bytes` are not a whole, undamaged plan of this format, or it breaks a rule of [`super`].
    pub fn from_bytes(bytes: &[u8]) -> Result<LoadedPlan, PlanError> {
        if !Self::is_plan(bytes) {
            return Err(PlanError::Foreign);
        }
        let (have, rest) = (bytes.len() as u64, &bytes[MAGIC.len()..]);
        let short = |want: u64| PlanError::Truncated { have, want };
        let (format, rest) = rest.split_first_chunk().ok_or_else(|| short(HEADER as u64))?;
        let found = u32::from_le_bytes(*format);
        if found != FORMAT {
            return Err(PlanError::Format { found });
        }
        let (len, rest) = rest.split_first_chunk().ok_or_else(|| short(HEADER as u64))?;
        let (hash, payload) = rest.split_first_chunk::<32>().ok_or_else(|| short(HEADER as u64))?;
        let (len, has) = (u64::from_le_bytes(*len), payload.len() as u64);
        if has < len {
            return Err(short(len.saturating_add(HEADER as u64)));
        }
        if has > len {
            return Err(PlanError::Trailing { extra: has - len });
        }
        if blake3::hash(payload) != blake3::Hash::from_bytes(*hash) {
            return Err(PlanError::Checksum);
        }
        let (plan, left): (Plan, _) = postcard::take_from_bytes(payload).map_err(PlanError::Decode)?;
        if !left.is_empty() {
            return Err(PlanError::Trailing { extra: left.len() as u64 });
        }
        plan.validate()?;
        Ok(LoadedPlan(plan))
    }
}
