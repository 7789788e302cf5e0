//! `sinter tokenize`: text to token ids.

use super::args::ModelArgs;
use super::files;
use sinter::generate::{EncodeOptions, Tokenizer};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Model file (GGUF) and text, or the text alone for the embedded model.
    #[arg(value_name = "[MODEL] TEXT", num_args = 0..=2)]
    words: Vec<String>,
    /// Model file (GGUF).
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Reads the text from a file instead; - from stdin.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Without the start token.
    #[arg(long)]
    no_bos: bool,
    /// Text such as <|endoftext|> becomes the token of that name.
    #[arg(long)]
    special: bool,
    /// An id and its piece, as the vocabulary spells it, on each line instead of a list of ids.
    #[arg(long)]
    pieces: bool,
}

pub fn run(args: Args) -> super::Outcome {
    let mut words = args.words;
    // The text is the last word, unless a file has it; what stands before it is the model.
    let text = match &args.file {
        Some(file) => files::read_text(file)?,
        None => words.pop().ok_or("no text: give it as an argument, or a file with -f")?,
    };
    let positional = words.pop().map(PathBuf::from);
    if !words.is_empty() || (positional.is_some() && args.model.is_some()) {
        return Err("more than one model is given".into());
    }
    let model = ModelArgs { model: positional, model_flag: args.model };
    let tokenizer = Tokenizer::from_gguf(model.open()?.gguf())?;
    let ids = tokenizer.encode(&text, EncodeOptions { bos: !args.no_bos, special: args.special });
    let mut out = std::io::stdout().lock();
    if args.pieces {
        for id in ids {
            writeln!(out, "{id}\t{:?}", tokenizer.token_text(id).unwrap_or_default())?;
        }
    } else {
        writeln!(out, "{ids:?}")?;
    }
    Ok(())
}
