//! The byte form of plans: `SINTERPL`, the format's version (u32), the length of the payload (u64, both little
//! endian), its BLAKE3, and the payload: a list of plans in postcard's encoding.

use super::{Plan, PlanError};
use std::ops::Deref;

/// Version of the byte form and of all types in it.
pub const FORMAT: u32 = 15;

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
        to_bytes(std::slice::from_ref(self))
    }
}

/// The byte form of several plans together: one file that runs on any of their targets.
///
/// # Errors
/// If there is none, two are for the same target, or they are of different models.
pub fn to_bytes(plans: &[Plan]) -> Result<Vec<u8>, PlanError> {
    go_together(plans)?;
    let payload = postcard::to_stdvec(plans).map_err(PlanError::Encode)?;
    Ok(frame(&payload))
}

/// Whether plans may be in one file: which of them a device takes must not be in doubt, nor where their weights are.
fn go_together(plans: &[Plan]) -> Result<(), PlanError> {
    let first = plans.first().ok_or(PlanError::NoPlan)?;
    for (i, plan) in plans.iter().enumerate() {
        let same =
            |other: &&Plan| (other.target.kind, &other.target.arch) == (plan.target.kind, &plan.target.arch);
        if plans.iter().take(i).any(|other| same(&other)) {
            return Err(PlanError::SameTarget { target: plan.target.name.clone() });
        }
        let (a, b) = (&first.model, &plan.model);
        if a.identity != b.identity {
            return Err(PlanError::Models { a: a.identity.into(), b: b.identity.into() });
        }
    }
    Ok(())
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

    /// Reads and validates the one plan that there is.
    ///
    /// # Errors
    /// As [`LoadedPlan::all_from_bytes`], or if there are several.
    pub fn from_bytes(bytes: &[u8]) -> Result<LoadedPlan, PlanError> {
        let mut plans = Self::all_from_bytes(bytes)?;
        if plans.len() > 1 {
            let targets = plans.iter().map(|plan| plan.target.name.clone()).collect();
            return Err(PlanError::Several { targets });
        }
        plans.pop().ok_or(PlanError::NoPlan)
    }

    /// Reads and validates all plans of a file: at least one.
    ///
    /// # Errors
    /// If `bytes` are not whole, undamaged plans of this format that go together, or one breaks a rule of [`super`].
    pub fn all_from_bytes(bytes: &[u8]) -> Result<Vec<LoadedPlan>, PlanError> {
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
        let (plans, left): (Vec<Plan>, _) = postcard::take_from_bytes(payload).map_err(PlanError::Decode)?;
        if !left.is_empty() {
            return Err(PlanError::Trailing { extra: left.len() as u64 });
        }
        go_together(&plans)?;
        plans.iter().try_for_each(Plan::validate)?;
        Ok(plans.into_iter().map(LoadedPlan).collect())
    }
}
