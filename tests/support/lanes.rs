//! Kernels of AMD's GPUs on the CPU (`tests/host/lanes.cpp`): compiled by clang, with sanitizers where the process was begun with their
//! library, and a device that runs plans on them. Each buffer is an allocation of its own, of which a launch may touch what its step
//! has, and before `wait_for_previous` nothing that another kernel writes.

use sinter::codegen::spec::{Access, Code, HipCode, Layout};
use sinter::gguf::GgufFile;
use sinter::ir::{DType, StateRole, Syms};
use sinter::plan::{BufRef, LoadedPlan, PlannedProgram};
use sinter::runtime::device::{Device, DeviceError, Submission, Ticket, Timing};
use sinter::runtime::hip::HEADERS;
use sinter::runtime::hip::planes::{activations_from_planes, activations_to_planes, fields, gather};
use sinter::runtime::weights::find_weights;
use sinter::target::TargetKind;
use std::alloc::{Layout as Memory, alloc, dealloc};
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Where the sources of the lanes are.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/host")
}

/// The shared library of AddressSanitizer and UndefinedBehaviorSanitizer; none if there is no clang for this or it has none.
pub fn sanitizers() -> Result<PathBuf, String> {
    if cfg!(not(all(target_arch = "x86_64", target_os = "linux"))) {
        return Err("lanes run on Linux on x86-64".into());
    }
    let asked = Command::new("clang++-19")
        .arg("-print-file-name=libclang_rt.asan-x86_64.so")
        .env_remove("LD_PRELOAD")
        .output();
    let path = asked.map_err(|_| "there is no clang++-19 here")?.stdout;
    let path = PathBuf::from(String::from_utf8_lossy(&path).trim());
    if path.is_absolute() { Ok(path) } else { Err("clang-19 has no sanitizers here".into()) }
}

/// Runs clang on a file of C++ that becomes a library.
pub fn clang(what: &[&str], sanitized: bool) -> Result<(), String> {
    let mut command = Command::new("clang++-19");
    command.args(["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi"]);
    if sanitized {
        command.args([
            "-fsanitize=address,undefined,float-cast-overflow",
            "-fno-sanitize-recover=all",
            "-fsanitize-address-use-after-return=never",
            "-shared-libasan",
            "-gline-tables-only",
        ]);
    }
    let out = command.args(what).env_remove("LD_PRELOAD").output().map_err(|e| format!("clang++-19: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
}

/// Builds `liblanes.so` in a folder, beside the header that kernels include.
pub fn build_lanes(folder: &Path, sanitized: bool) -> Result<(), String> {
    std::fs::copy(sources().join("lanes.h"), folder.join("lanes.h")).map_err(|e| e.to_string())?;
    let source = sources().join("lanes.cpp");
    let out = folder.join("liblanes.so");
    let args = ["-O2", "-Wl,-soname,liblanes.so", "-fvisibility=default", &text(&source), "-o", &text(&out)];
    clang(&args, sanitized)
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// Macros that a compiler for an architecture of AMD's defines.
fn macros(arch: &str) -> [String; 3] {
    let family = if arch.starts_with("gfx9") { "9" } else { &arch[3..5] };
    ["-DSINTER_HOST=1".into(), format!("-D__{arch}__"), format!("-D__GFX{family}__")]
}

type Run = unsafe extern "C" fn(
    *mut c_void,
    *const c_void,
    *const c_char,
    *mut *mut c_void,
    *const c_uint,
    c_uint,
    c_int,
    u64,
);
type Region = unsafe extern "C" fn(*mut c_void, usize);

/// A kernel that can be launched: the library that it is in, and it.
#[derive(Clone)]
struct Kernel {
    module: usize,
    kernel: usize,
    name: CString,
}

/// Kernels of one architecture, each compiled once.
pub struct Lanes {
    arch: String,
    wave: c_int,
    seed: u64,
    folder: tempfile::TempDir,
    library: libloading::Library,
    /// Makes memory one that must not be touched, and undoes it; none without AddressSanitizer.
    poison: Option<[Region; 2]>,
    kernels: Mutex<HashMap<String, Kernel>>,
}

impl Lanes {
    pub fn new(arch: &str, seed: u64) -> Lanes {
        let folder = tempfile::tempdir().unwrap();
        let sanitized = std::env::var_os("LD_PRELOAD").is_some();
        build_lanes(folder.path(), sanitized).unwrap();
        write_headers(folder.path());
        // SAFETY: it has no initialisers.
        let library = unsafe { libloading::Library::new(folder.path().join("liblanes.so")) }.unwrap();
        let this = libloading::os::unix::Library::this();
        // SAFETY: so sanitizer/asan_interface.h declares them; the library stays.
        let poison = ["__asan_poison_memory_region", "__asan_unpoison_memory_region"]
            .map(|name| unsafe { this.get::<Region>(name.as_bytes()) }.ok().map(|f| *f));
        let poison = match poison {
            [Some(poison), Some(unpoison)] => Some([poison, unpoison]),
            _ => None,
        };
        assert_eq!(poison.is_some(), sanitized);
        let wave = if arch.starts_with("gfx9") { 64 } else { 32 };
        Lanes { arch: arch.into(), wave, seed, folder, library, poison, kernels: Mutex::default() }
    }

    fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: callers name types as lanes.cpp declares them; the library stays as long as this.
        *unsafe { self.library.get::<F>(name.as_bytes()) }.unwrap()
    }

    /// Compiles what is new of some sources, on all cores.
    pub fn compile(&self, codes: &[HipCode]) {
        let mut known = self.kernels.lock().unwrap();
        let new: Vec<HipCode> = codes.iter().filter(|c| !known.contains_key(&c.source)).cloned().collect();
        type Open = unsafe extern "C" fn(*const c_char) -> *mut c_void;
        type Find = unsafe extern "C" fn(*mut c_void, *const c_char) -> *const c_void;
        for (code, path, unit) in compile(self.folder.path(), &self.arch, self.poison.is_some(), &new) {
            let [path, unit, name] = [text(&path), unit, code.entry].map(|text| CString::new(text).unwrap());
            // SAFETY: the path ends in 0.
            let module = unsafe { self.function::<Open>("lanes_open")(path.as_ptr()) };
            assert!(!module.is_null(), "{path:?} is no library");
            // SAFETY: the name ends in 0.
            let kernel = unsafe { self.function::<Find>("lanes_find")(module, unit.as_ptr()) };
            assert!(!kernel.is_null(), "{name:?} is not in its library");
            known.insert(code.source, Kernel { module: module as usize, kernel: kernel as usize, name });
        }
    }

    /// Launches a kernel with the addresses of its arguments: one launch at a time in a process.
    fn launch(
        &self,
        what: &Kernel,
        arguments: &mut [*mut c_void],
        grid: [c_uint; 3],
        threads: u32,
        seed: u64,
    ) {
        let run: Run = self.function("lanes_launch");
        let (module, kernel) = (what.module as *mut c_void, what.kernel as *const c_void);
        let (arguments, grid) = (arguments.as_mut_ptr(), grid.as_ptr());
        // SAFETY: the kernel takes these arguments; whether it touches what it must not is what the sanitizers say.
        unsafe { run(module, kernel, what.name.as_ptr(), arguments, grid, threads, self.wave, seed) };
    }

    /// Runs one block of a kernel whose arguments are buffers.
    pub fn run_block(&self, code: &HipCode, buffers: &mut [Vec<u8>]) {
        self.compile(std::slice::from_ref(code));
        let kernel = self.kernels.lock().unwrap()[&code.source].clone();
        let mut blocks: Vec<Block> = buffers.iter().map(|bytes| Block::new(bytes.len() as u64)).collect();
        blocks.iter_mut().zip(&*buffers).for_each(|(block, bytes)| block.bytes().copy_from_slice(bytes));
        let mut addresses: Vec<*mut u8> = blocks.iter().map(|block| block.at).collect();
        let mut arguments: Vec<*mut c_void> =
            addresses.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
        self.launch(&kernel, &mut arguments, [1; 3], code.threads, self.seed);
        blocks.iter_mut().zip(buffers).for_each(|(block, bytes)| bytes.copy_from_slice(block.bytes()));
    }
}

/// Compiles some sources in a folder that has the headers and the lanes, each once, on all cores: in which library each is, and by what
/// name there.
pub fn compile(
    folder: &Path,
    arch: &str,
    sanitized: bool,
    codes: &[HipCode],
) -> Vec<(HipCode, PathBuf, String)> {
    /// Kernels of a library: each has the headers to parse.
    const AT_ONCE: usize = 24;
    static LIBRARIES: AtomicUsize = AtomicUsize::new(0);
    let mut new: Vec<&HipCode> = vec![];
    for code in codes {
        if !new.iter().any(|other| other.source == code.source) {
            new.push(code);
        }
    }
    let (first, next) = (LIBRARIES.fetch_add(new.len(), Ordering::Relaxed), AtomicUsize::new(0));
    let lots: Vec<&[&HipCode]> = new.chunks(AT_ONCE).collect();
    let path = |lot: usize| folder.join(format!("kernels_{}.so", first + lot));
    std::thread::scope(|scope| {
        let work = || {
            while let Some((lot, codes)) = lots.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
                library_of(folder, arch, sanitized, &path(lot), codes);
            }
        };
        (0..std::thread::available_parallelism().map_or(1, |n| n.get())).for_each(|_| _ = scope.spawn(work));
    });
    let place =
        |(i, code): (usize, &&HipCode)| ((*code).clone(), path(i / AT_ONCE), format!("unit_{}", i % AT_ONCE));
    new.iter().enumerate().map(place).collect()
}

/// Compiles some sources as one library, each in a namespace of its own.
fn library_of(folder: &Path, arch: &str, sanitized: bool, path: &Path, codes: &[&HipCode]) {
    let mut all = String::new();
    for (header, _) in HEADERS {
        all += &format!("#include \"{header}\"\n");
    }
    for (i, code) in codes.iter().enumerate() {
        let entry = &code.entry;
        all += &format!("namespace unit_{i} {{\n{}}}\n", code.source);
        all += &format!("LANES_EXPORT(unit_{i}, unit_{i}::kernel_{entry})\n");
    }
    let source = path.with_extension("cpp");
    std::fs::write(&source, all).unwrap();
    let [host, arch, family] = macros(arch);
    let [source, path, lanes] = [source, path.into(), folder.join("liblanes.so")].map(|path| text(&path));
    // With sanitizers, what is not optimised compiles in a fifth of the time.
    let speed = if sanitized { "-O0" } else { "-O1" };
    let flags = [
        speed,
        "-mllvm",
        "-pragma-unroll-threshold=1",
        "-Wno-pass-failed",
        "-Wno-unused",
        &host,
        &arch,
        &family,
    ];
    let folder = text(folder);
    let args = [&flags[..], &["-I", &folder, &source, "-o", &path, &lanes]].concat();
    clang(&args, sanitized).unwrap_or_else(|e| panic!("{arch}: {e}"));
}

/// Writes the headers of kernels to a folder.
pub fn write_headers(folder: &Path) {
    for (name, text) in HEADERS {
        std::fs::write(folder.join(name), text).unwrap();
    }
}

/// Where some bytes begin, and how many they are.
type Span = (usize, usize);

/// Bytes of a buffer, and no more.
struct Block {
    at: *mut u8,
    len: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Block {}

impl Block {
    /// As GPUs align it.
    const ALIGN: usize = 256;

    fn new(len: u64) -> Block {
        let len = usize::try_from(len).unwrap().max(1);
        // SAFETY: it is not empty. What nobody wrote is no number.
        let at = unsafe { alloc(Memory::from_size_align(len, Block::ALIGN).unwrap()) };
        assert!(!at.is_null());
        // SAFETY: so many bytes were allocated.
        unsafe { at.write_bytes(0xff, len) };
        Block { at, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated and written in `new`; kernels that write it are done.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated so by `new`.
        unsafe { dealloc(self.at, Memory::from_size_align(self.len, Block::ALIGN).unwrap()) };
    }
}

/// A plan for AMD's GPUs on lanes.
pub struct LaneDevice {
    lanes: Arc<Lanes>,
    plan: Arc<LoadedPlan>,
    kernels: Vec<Vec<Kernel>>,
    weights: Vec<Block>,
    states: Vec<Block>,
    /// Of each program, and which of them a buffer is: those that the plan puts in one place for a call are one.
    arenas: Vec<(Vec<Block>, Vec<usize>)>,
    launches: Vec<u64>,
    submitted: u64,
}

impl LaneDevice {
    pub fn open(
        lanes: &Arc<Lanes>,
        plan: &Arc<LoadedPlan>,
        model: &GgufFile,
    ) -> Result<Box<dyn Device>, DeviceError> {
        // Those that are NVIDIA's alone run here too, as what they need of a device has a body of plain loops.
        assert_ne!(plan.target.kind, TargetKind::Cpu);
        assert_eq!(plan.target.arch, lanes.arch);
        lanes.compile(&codes(plan).concat());
        let known = lanes.kernels.lock().unwrap();
        let kernel = |code: &HipCode| known[&code.source].clone();
        let kernels = codes(plan).iter().map(|codes| codes.iter().map(kernel).collect()).collect();
        drop(known);
        let found = find_weights(plan, model)?;
        let weights = plan.weights.iter().zip(found).map(|(weight, bytes)| {
            let mut block = Block::new(bytes.len() as u64);
            arrange(weight.ty.dtype, weight.layout, bytes, block.bytes());
            block
        });
        let states = plan.states.iter().map(|state| {
            let mut block = Block::new(state.ty.bytes(&Syms { t: 0, r: 0 }));
            block.bytes().fill(0);
            block
        });
        Ok(Box::new(LaneDevice {
            kernels,
            weights: weights.collect(),
            states: states.collect(),
            arenas: plan.programs.iter().map(arena).collect(),
            launches: vec![0; plan.kernels.len()],
            submitted: 0,
            lanes: Arc::clone(lanes),
            plan: Arc::clone(plan),
        }))
    }

    fn block(&mut self, program: usize, place: BufRef) -> &mut Block {
        match place {
            BufRef::Arena(i) => {
                let (blocks, which) = &mut self.arenas[program];
                &mut blocks[which[i as usize]]
            }
            BufRef::State(i) => &mut self.states[i as usize],
            BufRef::Weight(i) => &mut self.weights[i as usize],
        }
    }

    /// How many bytes a buffer has whose activations lie in planes.
    fn planes(&self, program: usize, place: BufRef) -> Option<(usize, DType)> {
        let BufRef::Arena(i) = place else { return None };
        let program = &self.plan.programs[program];
        let ty = &program.buffers[i as usize].ty;
        let bytes = || ty.bytes(&program.bounds) as usize;
        ty.dtype.is_activations().then(|| (bytes(), ty.dtype))
    }

    /// Makes one call of a program. What its kernel only reads is as before.
    fn call(&mut self, program: usize, index: usize, at: Syms) {
        let plan = Arc::clone(&self.plan);
        let planned = &plan.programs[program];
        let call = &planned.calls[index];
        let kernel = &plan.kernels[call.kernel as usize];
        let written = written(&plan, planned);
        let is_read = |access| access == Access::Read;
        let changes: HashSet<usize> = kernel
            .args()
            .zip(&call.args)
            .filter(|(arg, _)| !is_read(arg.access))
            .map(|(_, place)| self.block(program, *place).at as usize)
            .collect();
        let (mut arguments, mut held, mut before): (Vec<u64>, Vec<Span>, Vec<_>) = Default::default();
        // Of each block, how much this step has of it, and its length. Of two arguments in one block the longer counts.
        let mut used: HashMap<usize, (usize, usize)> = HashMap::new();
        for (arg, place) in kernel.args().zip(&call.args) {
            // Scales of activations lie behind all rows of the bounds, and so do parts in scratch memory.
            let is_whole = arg.ty.dtype.is_activations() || arg.access == Access::Scratch;
            let block = self.block(program, *place);
            let (start, len) = (block.at as usize, block.len);
            let has = if is_whole { len } else { len.min(arg.ty.bytes(&at) as usize) };
            if arg.access == Access::Scratch {
                block.bytes().fill(0xff);
            }
            if is_read(arg.access) && !changes.contains(&start) && !matches!(place, BufRef::Weight(_)) {
                before.push((*place, block.bytes().to_vec()));
            }
            arguments.push(start as u64);
            if written.contains(place) {
                held.push((start, has));
            }
            let most = used.entry(start).or_insert((0, len));
            most.0 = has.max(most.0);
        }
        let tails: Vec<Span> = used.iter().map(|(start, (has, len))| (start + has, len - has)).collect();
        let [t, r] = [at.t as i32, at.r as i32];
        for (i, launch) in kernel.launches.iter().enumerate() {
            let mut grid = [1; 3];
            launch.grid.iter().rev().zip(&mut grid).for_each(|(extent, to)| *to = extent.eval(&at) as c_uint);
            if grid.contains(&0) {
                continue;
            }
            let Code::Hip(code) = &launch.code else { unreachable!() };
            let compiled = &self.kernels[call.kernel as usize][i];
            let mut pointers: Vec<*mut c_void> =
                arguments.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
            let (mut t, mut r) = (t, r);
            pointers.extend([std::ptr::from_mut(&mut t).cast(), std::ptr::from_mut(&mut r).cast::<c_void>()]);
            // One launch at a time in a process.
            static TURN: Mutex<()> = Mutex::new(());
            let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let [poison, unpoison] = [0, 1].map(|which| {
                move |lanes: &Lanes, (start, len): Span| {
                    if let Some(regions) = lanes.poison {
                        // SAFETY: part of a block that lives.
                        unsafe { regions[which](start as *mut c_void, len) };
                    }
                }
            });
            tails.iter().for_each(|tail| poison(&self.lanes, *tail));
            for (start, len) in &held {
                let hold: Region = self.lanes.function("lanes_hold");
                // SAFETY: part of a block that lives.
                unsafe { hold(*start as *mut c_void, *len) };
            }
            let seed = self.lanes.seed + 1000 * index as u64 + i as u64;
            self.lanes.launch(compiled, &mut pointers, grid, code.threads, seed);
            tails.iter().for_each(|tail| unpoison(&self.lanes, *tail));
            self.launches[call.kernel as usize] += 1;
        }
        for (place, before) in before {
            assert!(self.block(program, place).bytes() == before, "{} writes what it reads", call.label);
        }
    }
}

/// The sources of each kernel of a plan.
pub fn codes(plan: &LoadedPlan) -> Vec<Vec<HipCode>> {
    let code = |code: &Code| match code {
        Code::Hip(code) => code.clone(),
        Code::Cpu(_) => panic!("a kernel of another device"),
    };
    plan.kernels.iter().map(|k| k.launches.iter().map(|l| code(&l.code)).collect()).collect()
}

/// What some kernel of a program writes.
fn written(plan: &LoadedPlan, program: &PlannedProgram) -> HashSet<BufRef> {
    let of = |call: &sinter::plan::PlannedCall| -> Vec<BufRef> {
        let kernel = &plan.kernels[call.kernel as usize];
        let args = kernel.args().zip(&call.args).filter(|(arg, _)| arg.access != Access::Read);
        args.map(|(_, place)| *place).collect()
    };
    program.calls.iter().flat_map(of).collect()
}

/// Memory for the buffers of a program.
fn arena(program: &PlannedProgram) -> (Vec<Block>, Vec<usize>) {
    let buffers = &program.buffers;
    let mut which: Vec<usize> = (0..buffers.len()).collect();
    for call in &program.calls {
        let places = call.args.iter().filter_map(|place| match place {
            BufRef::Arena(i) => Some(*i as usize),
            _ => None,
        });
        let places: Vec<usize> = places.collect();
        for (n, &a) in places.iter().enumerate() {
            for &b in &places[n + 1..] {
                if buffers[a].offset == buffers[b].offset {
                    let (from, to) = (which[b], which[a]);
                    which.iter_mut().filter(|w| **w == from).for_each(|w| *w = to);
                }
            }
        }
    }
    let size = |i: usize| {
        let same = buffers.iter().zip(&which).filter(|(_, w)| **w == which[i]);
        same.map(|(buffer, _)| buffer.ty.bytes(&program.bounds)).max().unwrap()
    };
    ((0..buffers.len()).map(|i| Block::new(if which[i] == i { size(i) } else { 1 })).collect(), which)
}

/// A weight as GPUs have it.
fn arrange(dtype: DType, layout: Layout, bytes: &[u8], to: &mut [u8]) {
    match layout {
        Layout::Planes => {
            let (block, mut before) = (dtype.block_bytes(), 0);
            let blocks = bytes.len() / block;
            for field in fields(dtype) {
                gather(bytes, block, *field, &mut to[blocks * before..blocks * (before + field.1)]);
                before += field.1;
            }
        }
        Layout::RowMajor => to.copy_from_slice(bytes),
        Layout::Interleaved16 => panic!("no layout of GPUs"),
    }
}

impl Device for LaneDevice {
    fn kind(&self) -> TargetKind {
        TargetKind::HipAmd
    }

    fn isa(&self) -> &str {
        &self.lanes.arch
    }

    fn submit(&mut self, work: &Submission) -> Result<Ticket, DeviceError> {
        work.calls.clone().for_each(|index| self.call(work.program, index, work.at));
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, _: Ticket) -> Result<(), DeviceError> {
        Ok(())
    }

    fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError> {
        let planes = self.planes(program, to);
        let block = self.block(program, to).bytes();
        if let Some((len, dtype)) = planes {
            activations_to_planes(bytes, dtype, &mut block[..len]);
        } else {
            block[..bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn read(
        &mut self,
        program: usize,
        from: BufRef,
        first: u64,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        let planes = self.planes(program, from);
        let block = self.block(program, from).bytes();
        let mut all = block.to_vec();
        if let Some((len, dtype)) = planes {
            activations_from_planes(&block[..len], dtype, &mut all[..len]);
        }
        bytes.copy_from_slice(&all[first as usize..][..bytes.len()]);
        Ok(())
    }

    fn copy_rows(&mut self, _: StateRole, _: u64, _: u64, _: u64) -> Result<(), DeviceError> {
        unimplemented!("no test copies rows")
    }

    fn fill_rows(&mut self, _: StateRole, _: u64, _: u64, _: u8) -> Result<(), DeviceError> {
        unimplemented!("no test fills rows")
    }

    fn launch_counts(&self) -> Vec<u64> {
        self.launches.clone()
    }

    fn timings(&mut self) -> Result<Vec<Timing>, DeviceError> {
        Ok(vec![])
    }
}
