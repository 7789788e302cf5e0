//! `sinter trend`: draws a history of `sinter bench --history`.

use super::files;
use sinter::bench::{run::read_history, trend};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// The history: a file that `sinter bench --history` wrote.
    #[arg(value_name = "HISTORY")]
    history: PathBuf,
    /// Where to write the SVG; - is stdout.
    #[arg(short, long, default_value = "-", value_name = "SVG")]
    output: PathBuf,
}

pub fn run(args: Args) -> super::Outcome {
    let runs = read_history(&args.history)?;
    files::write_whole(&args.output, |to| to.write_all(trend(&runs).as_bytes()))
}
