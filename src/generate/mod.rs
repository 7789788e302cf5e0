//! Text generation: text to tokens and back, the choice of the next token, and the loop around a plan.

mod perplexity;
mod sampler;
mod scheduler;
mod session;
mod tokenizer;
mod vocab;

pub use perplexity::Perplexity;
pub use sampler::{Sampler, Sampling, SamplingError, greedy};
pub use scheduler::{Event, Request, RequestId, Scheduler};
pub use session::{Session, SessionError, Stop};
pub use tokenizer::{EncodeOptions, StreamDecoder, TokenKind, Tokenizer, TokenizerError, Vocab};
pub use vocab::VocabError;
