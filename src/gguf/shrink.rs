//! Model files that shrink while they are mapped.
//!
//! Reading a page that its file no longer has is a SIGBUS, which kills the process without a word, and no check of ours
//! can come before every read of a kernel. So each mapped file is listed here with the sentence that tells of its loss,
//! and [`exit_when_a_file_shrinks`] installs a handler that writes it and exits.
//!
//! Programs ask for the handler, as `sinter` does; opening a file does not install it. Signals belong to the process, and
//! whether it ends is for the program to decide, which may have a handler of its own.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A mapped file. As a handler may look at it at any time it is never freed, but serves the next map of that file.
struct Region {
    /// What to say when it is lost, whole and with its newline: a handler cannot allocate.
    sentence: Box<[u8]>,
    taken: AtomicBool,
    /// The addresses `start..end`; none while nothing is mapped.
    start: AtomicUsize,
    end: AtomicUsize,
    next: OnceLock<Box<Region>>,
}

/// The first of all regions. A `OnceLock` is read without a lock, so a handler may walk the list.
static FIRST: OnceLock<Box<Region>> = OnceLock::new();

/// Keeps a map listed. It must be dropped before the map is.
#[derive(Debug)]
pub(super) struct Listed(&'static Region);

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.sentence))
    }
}

/// Lists the map of the file at `path`.
pub(super) fn list(path: &Path, addresses: Range<*const u8>) -> Listed {
    let mut sentence = b"error: ".to_vec();
    sentence.extend(path.as_os_str().as_encoded_bytes());
    sentence.extend(b": the file became shorter while it was in use, or its disk failed; leave a model as it is while it runs\n");
    let mut link = &FIRST;
    loop {
        let region = link.get_or_init(|| Box::new(Region::new(&sentence)));
        let free = *region.sentence == *sentence && !region.taken.swap(true, Ordering::AcqRel);
        if free {
            region.start.store(addresses.start.addr(), Ordering::Release);
            region.end.store(addresses.end.addr(), Ordering::Release);
            return Listed(region);
        }
        link = &region.next;
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

impl Region {
    fn new(sentence: &[u8]) -> Region {
        Region {
            sentence: sentence.into(),
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            next: OnceLock::new(),
        }
    }

    /// The region with this address.
    fn at(address: usize) -> Option<&'static Region> {
        let mut link = &FIRST;
        while let Some(region) = link.get() {
            let (start, end) = (region.start.load(Ordering::Acquire), region.end.load(Ordering::Acquire));
            if (start..end).contains(&address) {
                return Some(region);
            }
            link = &region.next;
        }
        None
    }
}

/// From now on, a mapped model file that becomes shorter than it was ends the process with a sentence on stderr and exit
/// status 1, instead of a SIGBUS. A SIGBUS for any other reason goes where it went before. On systems that are no Unix
/// this does nothing.
///
/// # Errors
/// If the system refuses a handler.
pub fn exit_when_a_file_shrinks() -> io::Result<()> {
    #[cfg(unix)]
    handler::install()?;
    Ok(())
}

#[cfg(unix)]
mod handler {
    use super::Region;
    use std::mem::MaybeUninit;
    use std::sync::OnceLock;
    use std::{io, ptr};

    /// What SIGBUS did before.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    pub fn install() -> io::Result<()> {
        // SAFETY: a zeroed sigaction is a valid one, and both pointers are to values that outlive the calls. The handler has
        // the signature that SA_SIGINFO asks for and keeps to what is safe in a handler (see there).
        unsafe {
            let mut before = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            check(libc::sigaction(libc::SIGBUS, ptr::null(), &mut before))?;
            if BEFORE.set(before).is_err() {
                return Ok(());
            }
            let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            let on_bus: extern "C" fn(_, _, _) = on_bus;
            action.sa_sigaction = on_bus as libc::sighandler_t;
            // The standard library gives its threads a stack for handlers; without one this is the thread's own.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            check(libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()))
        }
    }

    fn check(status: libc::c_int) -> io::Result<()> {
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Only async-signal-safe calls: atomics, `write`, `_exit`, `sigaction`, `raise`.
    extern "C" fn on_bus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: with SA_SIGINFO the system passes a valid siginfo_t, which for a SIGBUS of the kernel's has an address.
        let (raised_by_kernel, address) = unsafe { ((*info).si_code > 0, (*info).si_addr().addr()) };
        if raised_by_kernel && let Some(region) = Region::at(address) {
            let mut rest = &region.sentence[..];
            while !rest.is_empty() {
                // SAFETY: the pointer and length are those of a slice.
                let written = unsafe { libc::write(libc::STDERR_FILENO, rest.as_ptr().cast(), rest.len()) };
                match usize::try_from(written) {
                    Ok(n) if n > 0 => rest = rest.get(n..).unwrap_or_default(),
                    // Nobody reads it, which is no reason to go on.
                    _ => break,
                }
            }
            // SAFETY: it takes any status and does not return. Destructors must not run: this may be the middle of anything.
            unsafe { libc::_exit(1) };
        }
        if let Some(before) = BEFORE.get() {
            // SAFETY: the pointer is to a sigaction that the system gave us.
            unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
        }
        // An instruction that faulted does so again and meets the handler from before; a signal that was sent does not.
        if !raised_by_kernel {
            // SAFETY: the signal is blocked while its handler runs, so this delivers it when the handler has returned.
            unsafe { libc::raise(signal) };
        }
    }
}
