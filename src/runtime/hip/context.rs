//! A GPU that is in use, and what lies on it. Everything gives back what it took when it goes, on whatever thread that is.

use super::HipError;
use super::api::{
    Address, Api, Call, GetProperties, Handle, LaunchAttribute, LaunchConfig, LaunchEx, Own, Platform,
    PropertiesR0000,
};
use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

/// A device of a platform that is here, and what it says of itself. Nothing of it is in use.
pub struct Found {
    api: Api,
    own: Own,
    pub platform: Platform,
    ordinal: c_int,
    device: c_int,
    pub name: String,
    /// The architecture, as compilers name it.
    pub arch: String,
}

/// A device in use, bound to whatever thread calls.
pub struct Context {
    found: Found,
    /// Of CUDA, the device's primary context, which this retains; of HIP, which has one for as long as the process lives, nothing.
    primary: Option<Handle>,
    /// Launches a kernel that may be made ready before the one before it is done; none where there is no such thing.
    launch_early: Option<LaunchEx>,
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const EARLY: c_uint = 6;

// SAFETY: drivers take calls from any thread; which device is meant is bound before each.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

type Result<T> = std::result::Result<T, HipError>;

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];

/// `CUDA_ERROR_OUT_OF_MEMORY`, `hipErrorOutOfMemory`.
const OUT_OF_MEMORY: c_int = 2;
/// `CUDA_ERROR_NO_DEVICE`, `hipErrorNoDevice`.
const NO_DEVICE: c_int = 100;

impl Found {
    /// The device of this number, of those of the platform.
    ///
    /// # Errors
    /// If there is no driver, or no such device.
    pub fn open(platform: Platform, ordinal: usize) -> Result<Found> {
        let api = Api::open(platform)?;
        let own = api.own(platform)?;
        let check = |code: c_int, call: &'static str| match code {
            0 => Ok(()),
            code => Err(HipError::Driver { call, name: api.error_name(platform, code) }),
        };
        let mut count = 0;
        // SAFETY: every pointer is to a variable of its type.
        let (init, counted) = unsafe { ((*api.init)(0), (*api.device_count)(&mut count)) };
        // Drivers say so rather than that there are none.
        if init == NO_DEVICE || init == 0 && counted == NO_DEVICE {
            return Err(HipError::NoDevice { ordinal, count: 0 });
        }
        check(init, api.init.name)?;
        check(counted, api.device_count.name)?;
        let wanted = c_int::try_from(ordinal).ok().filter(|n| *n < count);
        let ordinal = wanted.ok_or(HipError::NoDevice { ordinal, count: count.max(0) as usize })?;
        let (mut device, mut name) = (0, [0 as c_char; 256]);
        // SAFETY: as above; the name is cut to what there is room for.
        unsafe {
            check((*api.device_get)(&mut device, ordinal), api.device_get.name)?;
            check((*api.device_name)(name.as_mut_ptr(), 256, device), api.device_name.name)?;
        }
        let name = text(&name);
        let mut found = Found { api, own, platform, ordinal, device, name, arch: String::new() };
        found.arch = found.arch_of()?;
        Ok(found)
    }

    /// The version of the driver, as it counts them.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn driver(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: `version` is a variable.
        self.check(unsafe { (*self.api.driver_version)(&mut version) }, self.api.driver_version.name)?;
        Ok(version)
    }

    /// What the driver calls the architecture.
    fn arch_of(&self) -> Result<String> {
        match &self.own {
            Own::Nvidia { attribute, .. } => {
                let mut values = [0; 2];
                for (value, which) in values.iter_mut().zip(CAPABILITY) {
                    // SAFETY: `value` is a variable.
                    self.check(unsafe { (*attribute)(value, which, self.device) }, attribute.name)?;
                }
                Ok(format!("sm_{}{}", values[0], values[1]))
            }
            Own::Amd { properties, .. } => {
                let name = match properties {
                    GetProperties::R0600(get) => {
                        // SAFETY: a structure of numbers and arrays of them, for which all zeros are values.
                        let mut properties: Box<hip_sys::hipDeviceProp_tR0600> =
                            Box::new(unsafe { std::mem::zeroed() });
                        // SAFETY: the structure is the function's.
                        self.check(unsafe { (*get)(&mut *properties, self.device) }, get.name)?;
                        text(&properties.gcnArchName)
                    }
                    GetProperties::R0000(get) => {
                        // SAFETY: as above.
                        let mut properties: Box<PropertiesR0000> = Box::new(unsafe { std::mem::zeroed() });
                        // SAFETY: the structure is the function's, which writes less than it has.
                        self.check(unsafe { (*get)(&mut *properties, self.device) }, get.name)?;
                        text(&properties.arch_name)
                    }
                };
                // As gfx90a:sramecc+:xnack-.
                Ok(name.split(':').next().unwrap_or_default().to_string())
            }
        }
    }

    fn check(&self, code: c_int, call: &'static str) -> Result<()> {
        match code {
            0 => Ok(()),
            code => Err(HipError::Driver { call, name: self.api.error_name(self.platform, code) }),
        }
    }

    /// Uses it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn into_context(self) -> Result<Arc<Context>> {
        // Kernels wait for each other by themselves from this architecture on (`wait_for_previous` in kernels/device.h).
        let waits =
            self.arch.strip_prefix("sm_").and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n >= 90);
        let launch_early = match &self.own {
            Own::Nvidia { launch_early: Some(launch), .. } if waits => Some(launch.function),
            _ => None,
        };
        let mut context = Context { found: self, primary: None, launch_early };
        if let Own::Nvidia { retain, .. } = &context.own {
            let mut handle = std::ptr::null_mut();
            // SAFETY: `handle` is a variable.
            context.check(unsafe { (*retain)(&mut handle, context.device) }, retain.name)?;
            context.primary = Some(handle);
        }
        context.bind()?;
        Ok(Arc::new(context))
    }
}

impl std::ops::Deref for Context {
    type Target = Found;

    fn deref(&self) -> &Found {
        &self.found
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let (Own::Nvidia { release, .. }, Some(_)) = (&self.own, self.primary) else { return };
        // SAFETY: retained once, and nothing is left that uses it: all that does holds this.
        let code = unsafe { (*release)(self.device) };
        if let Err(e) = self.check(code, release.name) {
            tracing::warn!("something of the GPU's was not given back: {e}");
        }
    }
}

impl Context {
    /// Makes the device that of the calling thread.
    fn bind(&self) -> Result<()> {
        match &self.own {
            Own::Nvidia { set_context, .. } => {
                let primary = self.primary.unwrap_or(std::ptr::null_mut());
                // SAFETY: the context lives until this is dropped.
                self.check(unsafe { (*set_context)(primary) }, set_context.name)
            }
            Own::Amd { set_device, .. } => {
                // SAFETY: there is a device of this number.
                self.check(unsafe { (*set_device)(self.ordinal) }, set_device.name)
            }
        }
    }

    /// Gives something back; if that fails, nobody is there to be told, so it is logged. It is tried even if the device cannot be
    /// made the thread's: most drivers find what it is without.
    fn give_back<F>(&self, call: &Call<F>, with: impl FnOnce(&F) -> c_int) {
        let bound = self.bind();
        let given = self.check(with(&call.function), call.name);
        if let Err(e) = bound.and(given) {
            tracing::warn!("something of the GPU's was not given back: {e}");
        }
    }

    /// Bytes of memory that are free, and all.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut all) = (0, 0);
        self.bind()?;
        // SAFETY: both are variables.
        self.check(unsafe { (*self.api.memory_info)(&mut free, &mut all) }, self.api.memory_info.name)?;
        Ok((free as u64, all as u64))
    }
}

fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Memory of a device.
pub struct Buffer {
    context: Arc<Context>,
    pub at: Address,
    pub bytes: u64,
}

impl Buffer {
    /// # Errors
    /// If there is not as much memory.
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<Buffer> {
        let mut at = 0;
        context.bind()?;
        let size = usize::try_from(bytes.max(1)).map_err(|_| HipError::Size(bytes))?;
        // SAFETY: `at` is a variable.
        match (unsafe { (*context.api.malloc)(&mut at, size) }, context.api.malloc.name) {
            (code @ OUT_OF_MEMORY, call) => {
                let name = context.api.error_name(context.platform, code);
                return Err(HipError::OutOfMemory { call, name, bytes });
            }
            (code, call) => context.check(code, call)?,
        }
        Ok(Buffer { context: Arc::clone(context), at, bytes })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and given back once. Streams that use it are waited for before.
        self.context.give_back(&self.context.api.free, |free| unsafe { free(self.at) });
    }
}

/// Memory of the host that the device copies from and to by itself.
pub struct Pinned {
    context: Arc<Context>,
    at: *mut u8,
    len: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    /// # Errors
    /// If there is not as much memory.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Pinned> {
        let mut at = std::ptr::null_mut();
        context.bind()?;
        // SAFETY: `at` is a variable.
        context.check(
            unsafe { (*context.api.host_malloc)(&mut at, len.max(1), 0) },
            context.api.host_malloc.name,
        )?;
        // SAFETY: so many bytes were allocated.
        unsafe { at.cast::<u8>().write_bytes(0, len) };
        Ok(Pinned { context: Arc::clone(context), at: at.cast(), len })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated and initialised in `new`. Copies that read or write it are waited for before it is asked for.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and given back once.
        self.context.give_back(&self.context.api.host_free, |free| unsafe { free(self.at.cast()) });
    }
}

/// Work in order.
pub struct Stream {
    context: Arc<Context>,
    handle: Handle,
    /// Whether it was made to wait for an event since the last launch.
    waits: Cell<bool>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}

/// Not ordered with the default stream.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`, `hipEventDisableTiming`.
const UNTIMED: c_uint = 2;
/// Other threads' calls do not end a capture.
const THREAD_LOCAL: c_int = 1;

impl Stream {
    /// # Errors
    /// If the driver fails.
    pub fn new(context: &Arc<Context>) -> Result<Stream> {
        let mut handle = std::ptr::null_mut();
        context.bind()?;
        // SAFETY: `handle` is a variable.
        context.check(
            unsafe { (*context.api.stream_create)(&mut handle, NON_BLOCKING) },
            context.api.stream_create.name,
        )?;
        Ok(Stream { context: Arc::clone(context), handle, waits: Cell::new(false) })
    }

    /// Waits until all its work is done.
    ///
    /// # Errors
    /// If the work failed.
    pub fn wait(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the stream lives.
        self.context
            .check(unsafe { (*self.context.api.stream_wait)(self.handle) }, self.context.api.stream_wait.name)
    }

    /// Copies to the device.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Safety
    /// `to` has as many bytes. `from` stays as it is until the stream was waited for.
    pub unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the caller's.
        let code =
            unsafe { (*self.context.api.copy_to_device)(to, from.as_ptr().cast(), from.len(), self.handle) };
        self.context.check(code, self.context.api.copy_to_device.name)
    }

    /// Copies from the device.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Safety
    /// `from` has as many bytes. `to` is not touched until the stream was waited for.
    pub unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the caller's.
        let code =
            unsafe { (*self.context.api.copy_to_host)(to.as_mut_ptr().cast(), from, to.len(), self.handle) };
        self.context.check(code, self.context.api.copy_to_host.name)
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Safety
    /// Both have as many bytes, and do not overlap.
    pub unsafe fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the caller's.
        self.context.check(
            unsafe { (*self.context.api.copy_within)(to, from, bytes, self.handle) },
            self.context.api.copy_within.name,
        )
    }

    /// Fills memory of the device.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Safety
    /// `at` has as many bytes.
    pub unsafe fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the caller's.
        self.context.check(
            unsafe { (*self.context.api.fill)(at, byte, bytes, self.handle) },
            self.context.api.fill.name,
        )
    }

    /// Launches a function on a grid of blocks.
    ///
    /// # Errors
    /// If the driver refuses it.
    ///
    /// # Safety
    /// The function takes these arguments, and touches no memory that it must not.
    pub unsafe fn launch(
        &self,
        function: &Function,
        grid: [u32; 3],
        threads: u32,
        args: &mut LaunchArgs,
    ) -> Result<()> {
        self.context.bind()?;
        let pointers = args.pointers.as_mut_ptr();
        let [x, y, z] = grid;
        // A kernel that is made ready early waits for the launch before it. What the stream waits for besides is waited for before an
        // ordinary launch; those that follow it early come after that too, as none ends before the one that it waits for.
        let early = self.context.launch_early.filter(|_| !self.waits.take());
        // SAFETY: the caller's; the driver copies the arguments, but for a graph's, which that keeps.
        let code = unsafe {
            match early {
                Some(launch) => {
                    let mut value = [0; 16];
                    value[0] = 1;
                    let mut attribute = LaunchAttribute { id: EARLY, padding: 0, value };
                    let config = LaunchConfig {
                        grid,
                        block: [threads, 1, 1],
                        shared: 0,
                        stream: self.handle,
                        attributes: &mut attribute,
                        count: 1,
                    };
                    launch(&config, function.handle, pointers, std::ptr::null_mut())
                }
                None => (*self.context.api.launch)(
                    function.handle,
                    x,
                    y,
                    z,
                    threads,
                    1,
                    1,
                    0,
                    self.handle,
                    pointers,
                    std::ptr::null_mut(),
                ),
            }
        };
        self.context.check(code, early.map_or(self.context.api.launch.name, |_| "cuLaunchKernelEx"))
    }

    /// From now on, what is put on the stream is captured, not done.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn begin_capture(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the stream lives.
        let code = unsafe { (*self.context.api.capture_begin)(self.handle, THREAD_LOCAL) };
        self.context.check(code, self.context.api.capture_begin.name)
    }

    /// What was captured, as a graph, which keeps the arguments of its launches.
    ///
    /// # Errors
    /// If something was put on the stream that cannot be captured.
    pub fn end_capture(&self, args: Vec<LaunchArgs>) -> Result<Graph> {
        self.context.bind()?;
        let api = &self.context.api;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream lives; `graph` is a variable.
        self.context.check(unsafe { (*api.capture_end)(self.handle, &mut graph) }, api.capture_end.name)?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was captured; it is not needed beyond this, and destroyed once.
        let made = unsafe { (*api.graph_instantiate)(&mut exec, graph, 0) };
        // SAFETY: as above.
        self.context.give_back(&api.graph_destroy, |destroy| unsafe { destroy(graph) });
        self.context.check(made, api.graph_instantiate.name)?;
        Ok(Graph { context: Arc::clone(&self.context), handle: exec, _args: args })
    }

    /// Replays a graph.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        self.context.bind()?;
        // SAFETY: both live.
        self.context.check(
            unsafe { (*self.context.api.graph_launch)(graph.handle, self.handle) },
            self.context.api.graph_launch.name,
        )
    }

    /// A moment in the stream's work.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn moment(&self) -> Result<Event> {
        let event = Event::new(&self.context)?;
        self.record(&event)?;
        Ok(event)
    }

    /// Makes an event this moment in the stream's work.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.context.bind()?;
        // SAFETY: both live.
        let code = unsafe { (*self.context.api.event_record)(event.handle, self.handle) };
        self.context.check(code, self.context.api.event_record.name)
    }

    /// What comes on the stream from now on comes after the moment that an event was made last. In a capture that moment is of it, and
    /// the stream becomes part of it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        self.context.bind()?;
        self.waits.set(true);
        // SAFETY: both live.
        let code = unsafe { (*self.context.api.stream_wait_event)(self.handle, event.handle, 0) };
        self.context.check(code, self.context.api.stream_wait_event.name)
    }

    /// What comes on the stream from now on comes after all that is on another, by an event that is made for this.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn follow(&self, other: &Stream, by: &Event) -> Result<()> {
        other.record(by)?;
        self.wait_for(by)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it lives; then, created by `new`, it is destroyed once, when its work is done.
        self.context.give_back(&self.context.api.stream_wait, |wait| unsafe { wait(self.handle) });
        self.context.give_back(&self.context.api.stream_destroy, |destroy| unsafe { destroy(self.handle) });
    }
}

/// Launches that can be replayed. What it was captured from lives as long.
pub struct Graph {
    context: Arc<Context>,
    handle: Handle,
    /// Of its launches: a driver may read them at each replay.
    _args: Vec<LaunchArgs>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `end_capture`, and destroyed once.
        self.context.give_back(&self.context.api.graph_exec_destroy, |give| unsafe { give(self.handle) });
    }
}

/// A moment in a stream's work.
pub struct Event {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}

impl Event {
    /// # Errors
    /// If the driver fails.
    pub fn new(context: &Arc<Context>) -> Result<Event> {
        Event::with(context, 0)
    }

    /// One that streams wait for, of which nobody asks when it was.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn untimed(context: &Arc<Context>) -> Result<Event> {
        Event::with(context, UNTIMED)
    }

    fn with(context: &Arc<Context>, flags: c_uint) -> Result<Event> {
        context.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a variable.
        let code = unsafe { (*context.api.event_create)(&mut handle, flags) };
        context.check(code, context.api.event_create.name)?;
        Ok(Event { context: Arc::clone(context), handle })
    }

    /// Waits for the moment that it was made last.
    ///
    /// # Errors
    /// If the work before it failed.
    pub fn wait(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: it lives.
        self.context
            .check(unsafe { (*self.context.api.event_wait)(self.handle) }, self.context.api.event_wait.name)
    }

    /// Milliseconds from this to a later one; both must have been.
    ///
    /// # Errors
    /// If one has not been.
    pub fn until(&self, later: &Event) -> Result<f32> {
        let mut ms = 0.0;
        self.context.bind()?;
        // SAFETY: both live; `ms` is a variable.
        self.context.check(
            unsafe { (*self.context.api.event_elapsed)(&mut ms, self.handle, later.handle) },
            self.context.api.event_elapsed.name,
        )?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed once.
        self.context.give_back(&self.context.api.event_destroy, |give| unsafe { give(self.handle) });
    }
}

/// Machine code on a device.
pub struct Module {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: as for `Context`.
unsafe impl Send for Module {}

/// A kernel of a [`Module`], which must live as long.
#[derive(Clone, Copy)]
pub struct Function {
    handle: Handle,
}

// SAFETY: as for `Context`.
unsafe impl Send for Function {}

impl Module {
    /// # Errors
    /// If it is no code for this device.
    pub fn new(context: &Arc<Context>, code: &[u8]) -> Result<Module> {
        context.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: code objects say how long they are; these bytes are of a compiler, and a plan that they came in is undamaged and
        // trusted, as what runs on the GPU is up to it.
        context.check(
            unsafe { (*context.api.module_load)(&mut handle, code.as_ptr().cast()) },
            context.api.module_load.name,
        )?;
        Ok(Module { context: Arc::clone(context), handle })
    }

    /// # Errors
    /// If there is no such kernel in it.
    pub fn function(&self, entry: &str) -> Result<Function> {
        self.context.bind()?;
        let mut handle = std::ptr::null_mut();
        let name = CString::new(entry).map_err(|_| HipError::Entry(entry.into()))?;
        // SAFETY: the name ends in 0; `handle` is a variable.
        let code = unsafe { (*self.context.api.module_function)(&mut handle, self.handle, name.as_ptr()) };
        self.context.check(code, self.context.api.module_function.name)?;
        Ok(Function { handle })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded by `new`, and unloaded once.
        self.context.give_back(&self.context.api.module_unload, |give| unsafe { give(self.handle) });
    }
}

/// The arguments of a launch, addresses and then the sizes of the step, and where each lies: on the heap, so they stay there.
pub struct LaunchArgs {
    _addresses: Box<[Address]>,
    _sizes: Box<[i32; 2]>,
    pointers: Box<[*mut c_void]>,
}

// SAFETY: the pointers are to what it owns.
unsafe impl Send for LaunchArgs {}

impl LaunchArgs {
    pub fn new(addresses: &[Address], sizes: [i32; 2]) -> LaunchArgs {
        let (mut addresses, mut sizes): (Box<[Address]>, _) = (addresses.into(), Box::new(sizes));
        let of_addresses = addresses.iter_mut().map(|a| std::ptr::from_mut(a).cast());
        let pointers = of_addresses.chain(sizes.iter_mut().map(|s| std::ptr::from_mut(s).cast())).collect();
        LaunchArgs { _addresses: addresses, _sizes: sizes, pointers }
    }
}
