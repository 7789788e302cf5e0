//! The weights of a plan, where they lie in the model file.

use crate::gguf::{GgufError, GgufFile};
use crate::ir::{Syms, TensorType};
use crate::plan::Plan;

/// A tensor of the file that is not what the plan was compiled for.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    #[error(transparent)]
    File(#[from] GgufError),
    #[error("the plan needs tensor {name:?} as {wants}, the file has {has}")]
    Type { name: String, wants: TensorType, has: TensorType },
}

/// The bytes of each of [`Plan::weights`], in that order. Nothing is copied.
///
/// # Errors
/// If the file lacks a tensor, or has it with another element type or shape; the error names it.
pub fn find_weights<'f>(plan: &Plan, file: &'f GgufFile) -> Result<Vec<&'f [u8]>, WeightError> {
    let find = |weight: &crate::plan::Tensor| {
        let info = file.gguf().tensor(&weight.name)?;
        let has = TensorType::new(info.dtype()?, info.shape.iter().copied());
        // What the plan takes the whole tensor to be.
        let wants = weight.rows.map_or_else(|| weight.ty.clone(), |rows| rows.whole(&weight.ty));
        // The file's bytes follow from its type; that they are as many as the plan's holds kernels to it.
        let (bytes, at) = (file.tensor_bytes(info), Syms { t: 0, r: 0 });
        let row = wants.bytes(&at) / wants.first().c.max(1);
        let first = weight.rows.map_or(0, |rows| rows.first.saturating_mul(row));
        let end = first.saturating_add(weight.ty.bytes(&at));
        let slice = usize::try_from(first).ok().zip(usize::try_from(end).ok());
        let found = slice.and_then(|(first, end)| bytes.get(first..end));
        match found.filter(|_| has == wants && bytes.len() as u64 == wants.bytes(&at)) {
            Some(found) => Ok(found),
            None => Err(WeightError::Type { name: weight.name.clone(), wants, has }),
        }
    };
    plan.weights.iter().map(find).collect()
}
