//! The verifier.
use super::graph::Graph;
#[derive(Clone, Debug)]
pub struct Verified(Graph);
#[derive(Debug)]
pub struct VerifyError;
pub fn verify(g: Graph) -> Result<Verified, VerifyError> {
    Ok(Verified(g))
}
