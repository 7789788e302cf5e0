//! The verifier.
use super::graph::Graph;
#[derive(Clone, Debug)]
pub struct Verified(Graph);
impl std::ops::Deref for Verified {
    type Target = Graph;
    fn deref(&self) -> &Graph {
        &self.0
    }
}
#[derive(Debug)]
pub struct VerifyError;
pub fn verify(g: Graph) -> Result<Verified, VerifyError> {
    Ok(Verified(g))
}
pub fn check(_: &Graph) -> Result<(), VerifyError> {
    Ok(())
}
impl std::fmt::Display for VerifyError {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}
