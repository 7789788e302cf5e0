//! Files that a command is told to read or write.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The text of a file, or of stdin for `-`.
pub fn read_text(path: &Path) -> Result<String, Error> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().lock().read_to_string(&mut text).map_err(|e| format!("stdin: {e}"))?;
        return Ok(text);
    }
    Ok(fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?)
}

/// Writes all or nothing: a failed write leaves the old file. `-` is stdout, and what is no plain file, such as a pipe, is
/// written to directly. A model is never overwritten.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    let name = path.display();
    let buffered = |to: &mut dyn Write| {
        let mut to = BufWriter::new(to);
        write(&mut to).and_then(|()| to.flush())
    };
    if path.as_os_str() == "-" {
        // As it is, so that a reader that has enough is known for one.
        return Ok(buffered(&mut io::stdout().lock())?);
    }
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        let written = OpenOptions::new().write(true).open(path).and_then(|mut to| buffered(&mut to));
        return written.map_err(|e| format!("cannot write {name}: {e}").into());
    }
    refuse_model(path)?;
    // A link to a file is followed, not replaced.
    let place = path.canonicalize().unwrap_or_else(|_| path.into());
    let mut partial = place.clone().into_os_string();
    partial.push(format!(".{}.partial", std::process::id()));
    let written = File::create(&partial).and_then(|mut to| {
        let written =
            buffered(&mut to).and_then(|()| to.sync_all()).and_then(|()| fs::rename(&partial, &place));
        written.inspect_err(|_| drop(fs::remove_file(&partial)))
    });
    written.map_err(|e| format!("cannot write {name}: {e}").into())
}

/// Whether a path stands for stdout.
pub fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// An error if more than one of these goes to stdout, each by the flag that sends it there.
pub fn one_on_stdout(outputs: &[(&str, bool)]) -> Result<(), Error> {
    let there: Vec<&str> = outputs.iter().filter(|(_, is)| *is).map(|(flag, _)| *flag).collect();
    match there[..] {
        [] | [_] => Ok(()),
        _ => {
            Err(format!("{} go to stdout, and only one can: name a file for the others", there.join(" and "))
                .into())
        }
    }
}

/// An error if a file cannot be written there, before there is something to write. What is there stays; what is no file is not opened.
pub fn check_writable(path: &Path) -> Result<(), Error> {
    if path.is_dir() {
        return Err(format!("cannot write {}: it is a folder", path.display()).into());
    }
    if is_stdout(path) || fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return Ok(());
    }
    refuse_model(path)?;
    let is_there = path.exists();
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened.map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    if !is_there {
        // It is made anew.
        _ = fs::remove_file(path);
    }
    Ok(())
}

/// An error if there is a model at `path`.
pub fn refuse_model(path: &Path) -> Result<(), Error> {
    let name = path.display();
    match is_model(path) {
        true => Err(format!("{name} is a model file, which is not overwritten; name another file").into()),
        false => Ok(()),
    }
}

/// Whether the file at `path` begins as a GGUF file does.
pub fn is_model(path: &Path) -> bool {
    let mut start = [0; 4];
    File::open(path).and_then(|mut f| f.read_exact(&mut start)).is_ok() && start == *b"GGUF"
}
