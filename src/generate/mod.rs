//! Text generation: text to tokens and back, and the choice of the next token.

mod sampler;
mod tokenizer;

pub use sampler::{Sampler, Sampling, SamplingError, greedy};
pub use tokenizer::{EncodeOptions, StreamDecoder, TokenKind, Tokenizer, TokenizerError, Vocab};
