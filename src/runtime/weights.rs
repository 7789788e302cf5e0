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
        let bytes = file.tensor_bytes(info);
        // The file's bytes follow from its type; that they are as many as the plan's holds kernels to it.
        let at = Syms { t: 0, r: 0 };
        if has == weight.ty && bytes.len() as u64 == weight.ty.bytes(&at) {
            return Ok(bytes);
        }
        Err(WeightError::Type { name: weight.name.clone(), wants: weight.ty.clone(), has })
    };
    plan.weights.iter().map(find).collect()
}
