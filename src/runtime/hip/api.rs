//! The functions of a GPU's driver, loaded at run time: one table for HIP's two platforms, whose calls are alike.
//!
//! Types are those that both have: handles are pointers, addresses of device memory are 64-bit numbers, and every call returns a
//! number that is 0 if it succeeded (`cuda.h`, `hip/hip_runtime_api.h`).

use super::HipError;
use libloading::Library;
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Whose driver it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// `libamdhip64`.
    Amd,
    /// The CUDA driver.
    Nvidia,
}

impl Platform {
    pub const fn name(self) -> &'static str {
        match self {
            Platform::Amd => "amd",
            Platform::Nvidia => "nvidia",
        }
    }
}

/// A handle of the driver.
pub type Handle = *mut c_void;
/// An address in the memory of a device.
pub type Address = u64;

/// A function of a library, and what it is called there.
pub struct Call<F> {
    pub function: F,
    pub name: &'static str,
}

impl<F> std::ops::Deref for Call<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.function
    }
}

/// Loads `$library` by the first of some names, and each function by its name there.
macro_rules! functions {
    ($(#[$about:meta])* $table:ident { $($field:ident($($arg:ty),*) = $cuda:literal, $hip:literal;)* }) => {
        $(#[$about])*
        pub struct $table {
            $(pub $field: Call<unsafe extern "C" fn($($arg),*) -> c_int>,)*
            #[allow(dead_code, reason = "only a driver has more functions than these")]
            library: &'static Library,
            /// The name that it was loaded by.
            #[allow(dead_code, reason = "only a driver has more functions than these")]
            library_name: String,
        }

        impl $table {
            /// # Errors
            /// If there is no such library here, or it lacks a function.
            pub fn load(platform: Platform, names: &[String]) -> Result<$table, HipError> {
                let (library, library_name) = open(names)?;
                $(
                    let name = match platform {
                        Platform::Nvidia => $cuda,
                        Platform::Amd => $hip,
                    };
                    // SAFETY: both libraries declare the function so.
                    let $field = unsafe {
                        symbol::<unsafe extern "C" fn($($arg),*) -> c_int>(library, &library_name, name)
                    }?;
                )*
                Ok($table { $($field,)* library, library_name })
            }
        }
    };
}

/// A function of a library.
///
/// # Safety
/// The library declares it of this type.
unsafe fn symbol<F: Copy>(library: &Library, of: &str, name: &'static str) -> Result<Call<F>, HipError> {
    // SAFETY: the caller's.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    let function = *found.map_err(|_| HipError::Symbol { library: of.into(), symbol: name })?;
    Ok(Call { function, name })
}

/// A library by its name, loaded once and for good: AMD's driver holds an LLVM, which ends the process where it is loaded a second time
/// after it was unloaded.
fn load(name: &str) -> Result<&'static Library, libloading::Error> {
    static LOADED: Mutex<BTreeMap<String, &'static Library>> = Mutex::new(BTreeMap::new());
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = loaded.get(name) {
        return Ok(library);
    }
    // SAFETY: a driver's library may be loaded at any time; its initialisers are the vendor's.
    let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(name) }?));
    loaded.insert(name.into(), library);
    Ok(library)
}

/// The first library of some names, and which it is.
fn open(names: &[String]) -> Result<(&'static Library, String), HipError> {
    let mut refused = None;
    for name in names {
        match load(name) {
            Ok(library) => return Ok((library, name.clone())),
            Err(e) => refused = refused.or_else(|| why_refused(name, &e)),
        }
    }
    let file = |name: &String| name.rsplit('/').next().unwrap_or_default().to_string();
    let missing = || format!("there is no {}", names.first().map(file).unwrap_or_default());
    Err(HipError::Library { why: refused.unwrap_or_else(missing) })
}

/// Why a library does not load that is there; none if there is none.
fn why_refused(name: &str, error: &libloading::Error) -> Option<String> {
    let reason = error.source().map(|reason| reason.to_string()).unwrap_or_else(|| error.to_string());
    // As dlopen has it: first what it is about, which may be a library that this one needs.
    let (of, what) = reason.split_once(": ").unwrap_or((name, &reason));
    let there = Path::new(name).is_file() || cfg!(unix) && (of != name || !what.contains("No such file"));
    let reason = if of == name { what } else { &reason };
    there.then(|| format!("{name} does not load: {reason}"))
}

functions! {
    /// What the driver can do.
    Api {
        init(c_uint) = "cuInit", "hipInit";
        device_count(*mut c_int) = "cuDeviceGetCount", "hipGetDeviceCount";
        device_get(*mut c_int, c_int) = "cuDeviceGet", "hipDeviceGet";
        device_name(*mut c_char, c_int, c_int) = "cuDeviceGetName", "hipDeviceGetName";
        driver_version(*mut c_int) = "cuDriverGetVersion", "hipDriverGetVersion";
        memory_info(*mut usize, *mut usize) = "cuMemGetInfo_v2", "hipMemGetInfo";
        malloc(*mut Address, usize) = "cuMemAlloc_v2", "hipMalloc";
        free(Address) = "cuMemFree_v2", "hipFree";
        host_malloc(*mut *mut c_void, usize, c_uint) = "cuMemHostAlloc", "hipHostMalloc";
        host_free(*mut c_void) = "cuMemFreeHost", "hipHostFree";
        copy_to_device(Address, *const c_void, usize, Handle) = "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync";
        copy_to_host(*mut c_void, Address, usize, Handle) = "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync";
        copy_within(Address, Address, usize, Handle) = "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync";
        fill(Address, u8, usize, Handle) = "cuMemsetD8Async", "hipMemsetD8Async";
        stream_create(*mut Handle, c_uint) = "cuStreamCreate", "hipStreamCreateWithFlags";
        stream_destroy(Handle) = "cuStreamDestroy_v2", "hipStreamDestroy";
        stream_wait(Handle) = "cuStreamSynchronize", "hipStreamSynchronize";
        event_create(*mut Handle, c_uint) = "cuEventCreate", "hipEventCreateWithFlags";
        event_destroy(Handle) = "cuEventDestroy_v2", "hipEventDestroy";
        event_record(Handle, Handle) = "cuEventRecord", "hipEventRecord";
        event_wait(Handle) = "cuEventSynchronize", "hipEventSynchronize";
        event_elapsed(*mut f32, Handle, Handle) = "cuEventElapsedTime", "hipEventElapsedTime";
        stream_wait_event(Handle, Handle, c_uint) = "cuStreamWaitEvent", "hipStreamWaitEvent";
        module_load(*mut Handle, *const c_void) = "cuModuleLoadData", "hipModuleLoadData";
        module_unload(Handle) = "cuModuleUnload", "hipModuleUnload";
        module_function(*mut Handle, Handle, *const c_char) = "cuModuleGetFunction", "hipModuleGetFunction";
        launch(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void)
            = "cuLaunchKernel", "hipModuleLaunchKernel";
        capture_begin(Handle, c_int) = "cuStreamBeginCapture_v2", "hipStreamBeginCapture";
        capture_end(Handle, *mut Handle) = "cuStreamEndCapture", "hipStreamEndCapture";
        graph_instantiate(*mut Handle, Handle, u64) = "cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags";
        graph_launch(Handle, Handle) = "cuGraphLaunch", "hipGraphLaunch";
        graph_destroy(Handle) = "cuGraphDestroy", "hipGraphDestroy";
        graph_exec_destroy(Handle) = "cuGraphExecDestroy", "hipGraphExecDestroy";
    }
}

functions! {
    /// A compiler of HIP C++ in a library.
    Rtc {
        create(*mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char)
            = "nvrtcCreateProgram", "hiprtcCreateProgram";
        compile(Handle, c_int, *const *const c_char) = "nvrtcCompileProgram", "hiprtcCompileProgram";
        log_size(Handle, *mut usize) = "nvrtcGetProgramLogSize", "hiprtcGetProgramLogSize";
        log(Handle, *mut c_char) = "nvrtcGetProgramLog", "hiprtcGetProgramLog";
        code_size(Handle, *mut usize) = "nvrtcGetCUBINSize", "hiprtcGetCodeSize";
        code(Handle, *mut c_char) = "nvrtcGetCUBIN", "hiprtcGetCode";
        destroy(*mut Handle) = "nvrtcDestroyProgram", "hiprtcDestroyProgram";
        version_to(*mut c_int, *mut c_int) = "nvrtcVersion", "hiprtcVersion";
    }
}

/// What only the driver of one platform has.
pub enum Own {
    Amd {
        set_device: Call<unsafe extern "C" fn(c_int) -> c_int>,
        properties: GetProperties,
    },
    Nvidia {
        set_context: Call<unsafe extern "C" fn(Handle) -> c_int>,
        retain: Call<unsafe extern "C" fn(*mut Handle, c_int) -> c_int>,
        release: Call<unsafe extern "C" fn(c_int) -> c_int>,
        attribute: Call<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int>,
        /// Launches a kernel that may be made ready before the one before it is done. Older drivers have none.
        launch_early: Option<Call<LaunchEx>>,
    },
}

/// What tells of a GPU of AMD's. Drivers from ROCm 6 on have both.
pub enum GetProperties {
    R0600(Call<unsafe extern "C" fn(*mut hip_sys::hipDeviceProp_tR0600, c_int) -> c_int>),
    R0000(Call<unsafe extern "C" fn(*mut PropertiesR0000, c_int) -> c_int>),
}

/// `hipDeviceProp_t` of ROCm 4 and 5, of which one array is read.
#[repr(C, align(8))]
pub struct PropertiesR0000 {
    before: [u8; 396],
    pub arch_name: [c_char; 256],
    /// More than there is.
    after: [u8; 1396],
}

/// `CUlaunchConfig` of cuda.h.
#[repr(C)]
pub struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared: c_uint,
    pub stream: Handle,
    pub attributes: *mut LaunchAttribute,
    pub count: c_uint,
}

/// `CUlaunchAttribute` of cuda.h: a number, padding, and a union of 64 bytes.
#[repr(C)]
pub struct LaunchAttribute {
    pub id: c_uint,
    pub padding: c_uint,
    pub value: [c_int; 16],
}

pub type LaunchEx =
    unsafe extern "C" fn(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> c_int;

impl Api {
    /// What the driver has beside the table.
    ///
    /// # Errors
    /// If it lacks a function.
    pub fn own(&self, platform: Platform) -> Result<Own, HipError> {
        let (library, of) = (self.library, self.library_name.as_str());
        // SAFETY: so hip_runtime_api.h and cuda.h declare them.
        unsafe {
            Ok(match platform {
                Platform::Amd => Own::Amd {
                    set_device: symbol(library, of, "hipSetDevice")?,
                    properties: match symbol(library, of, "hipGetDevicePropertiesR0600") {
                        Ok(get) => GetProperties::R0600(get),
                        Err(newer) => {
                            let older = symbol(library, of, "hipGetDeviceProperties");
                            GetProperties::R0000(older.map_err(|_| newer)?)
                        }
                    },
                },
                Platform::Nvidia => Own::Nvidia {
                    set_context: symbol(library, of, "cuCtxSetCurrent")?,
                    retain: symbol(library, of, "cuDevicePrimaryCtxRetain")?,
                    release: symbol(library, of, "cuDevicePrimaryCtxRelease_v2")?,
                    attribute: symbol(library, of, "cuDeviceGetAttribute")?,
                    launch_early: symbol(library, of, "cuLaunchKernelEx").ok(),
                },
            })
        }
    }

    /// The driver of a platform.
    ///
    /// # Errors
    /// If there is none here, or it lacks a function.
    pub fn open(platform: Platform) -> Result<Api, HipError> {
        let names: &[&str] = match platform {
            Platform::Nvidia if cfg!(windows) => &["nvcuda.dll"],
            Platform::Nvidia => &["libcuda.so.1", "libcuda.so"],
            Platform::Amd if cfg!(windows) => &["amdhip64_7.dll", "amdhip64_6.dll"],
            Platform::Amd => &["libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"],
        };
        let mut all = in_folders(platform, names);
        all.extend(names.iter().map(|name| name.to_string()));
        Api::load(platform, &all)
    }

    /// What the driver calls an error.
    pub fn error_name(&self, platform: Platform, code: c_int) -> String {
        let named: *const c_char = match platform {
            Platform::Nvidia => {
                let mut name = std::ptr::null();
                type Named = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
                // SAFETY: so cuda.h declares it; the name is written before it returns 0, else left null.
                unsafe {
                    if let Ok(named) = self.library.get::<Named>("cuGetErrorName") {
                        named(code, &mut name);
                    }
                }
                name
            }
            Platform::Amd => {
                type Named = unsafe extern "C" fn(c_int) -> *const c_char;
                // SAFETY: so hip_runtime_api.h declares it.
                unsafe {
                    self.library.get::<Named>("hipGetErrorName").map_or(std::ptr::null(), |named| named(code))
                }
            }
        };
        if named.is_null() {
            return format!("error {code}");
        }
        // SAFETY: the driver's names are constant strings that end in 0.
        unsafe { CStr::from_ptr(named) }.to_string_lossy().into_owned()
    }
}

impl Rtc {
    /// The version of the compiler: of what it makes, one version may differ from another.
    ///
    /// # Errors
    /// If it does not say.
    pub fn version(&self) -> Result<[c_int; 2], HipError> {
        let mut version = [0; 2];
        let [major, minor] = &mut version;
        // SAFETY: both are variables.
        match unsafe { (*self.version_to)(major, minor) } {
            0 => Ok(version),
            answer => Err(HipError::Driver { call: self.version_to.name, name: format!("error {answer}") }),
        }
    }

    /// The compiler of a platform.
    ///
    /// # Errors
    /// If there is none here, or it lacks a function.
    pub fn open(platform: Platform) -> Result<Rtc, HipError> {
        let names: &[&str] = match platform {
            Platform::Nvidia => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Platform::Amd => {
                &["libhiprtc.so", "libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so.5", "libamdhip64.so"]
            }
        };
        // As the driver is looked for, so that both are of one version.
        let mut all = in_folders(platform, names);
        all.extend(names.iter().map(|name| name.to_string()));
        Rtc::load(platform, &all).map_err(|e| match e {
            HipError::Library { why } => HipError::NoCompiler { why },
            other => other,
        })
    }
}

/// Libraries in the folders that variables of the environment name, or where installers put them.
fn in_folders(platform: Platform, names: &[&str]) -> Vec<String> {
    let (variables, usual, folders) = match platform {
        Platform::Nvidia => (["CUDA_HOME", "CUDA_PATH"], "/usr/local/cuda", ["lib64", "lib"]),
        Platform::Amd => (["ROCM_PATH", "HIP_PATH"], "/opt/rocm", ["lib", "lib64"]),
    };
    let roots = variables.iter().filter_map(|v| std::env::var(v).ok()).chain([usual.to_string()]);
    let all = roots.flat_map(|root| folders.map(|folder| format!("{root}/{folder}")));
    all.flat_map(|folder| names.iter().map(move |name| format!("{folder}/{name}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library that is there and does not load says why, whichever name comes after; one that is not there is said to be missing.
    #[test]
    fn why_a_library_does_not_load_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let [broken, missing] =
            ["libbroken.so", "libmissing.so"].map(|name| format!("{}/{name}", folder.path().display()));
        std::fs::write(&broken, "no library, though it has its name and is as long as a header is: 64 bytes")
            .unwrap();
        let why = |names: &[&String]| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            open(&names).map(|(_, name)| name).unwrap_err().to_string()
        };
        let start = "no library of a GPU's driver can be loaded: ";
        assert_eq!(why(&[&missing]), format!("{start}there is no libmissing.so"));
        for names in [[&broken, &missing], [&missing, &broken]] {
            let said = why(&names);
            assert!(said.starts_with(&format!("{start}{broken} does not load: ")), "{said}");
            assert!(
                !said.contains('\n') && !said.contains("dlopen") && said.matches(&broken).count() == 1,
                "{said}"
            );
        }
    }
}
