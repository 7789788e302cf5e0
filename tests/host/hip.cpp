// libamdhip64 without a GPU: memory of the host, kernels that hiprtc.cpp compiled for the CPU (lanes.cpp runs them), and the calls that
// src/runtime/hip makes. It forgives nothing: what is on a stream is done when somebody waits for it and not before, what other streams
// have only as far as that waits for their events, memory is garbage until it is written and after it is freed, addresses must lie in what was
// allocated, and whatever is of a device is used on threads that have that device (a driver would take the first where none is set).
//
//   SINTER_STUB_ARCH=gfx942     the architecture, gfx1100 unless told; those of gfx9 have waves of 64
//   SINTER_STUB_MEMORY=BYTES    the memory that there is
//   SINTER_STUB_OTHERS=BYTES    that others take of it when it was asked for how much is free
//   SINTER_STUB_DEVICES=N       how many devices, 1 unless told; 0 is an error of its own, as drivers have it
//   SINTER_STUB_SEED=N          permutes the order of lanes
//   SINTER_STUB_FIRST=N         whatever is waited for, what stream N has comes first, as soon as events allow; they count from 0. So
//                               that what misses an event, of any stream, comes too early for one of these
//   SINTER_STUB_REPLAY=N        graphs replay without their launch N
//   SINTER_STUB_REPLAY=stale    graphs replay on what the host wrote before it wrote last, for small copies
//   SINTER_STUB_LATE_ARGUMENTS=1  graphs read the arguments of their launches at each replay, where those were at the capture
#include "lanes.h"
#include "stub.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#ifndef DRIVER_VERSION
#define DRIVER_VERSION 60443484
#endif

extern "C" {
void* lanes_open(const char* path);
void lanes_close(void* module);
const LanesKernel* lanes_find(void* module, const char* name);
void lanes_launch(void* module, const LanesKernel* what, const char* name, void** with, const unsigned* grid, unsigned block, int of_wave,
                  uint64_t seed);
}

namespace {

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILURE = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    UNKNOWN = 999,
};

typedef std::function<int()> Work;

// A step of work, which comes after others. Events are steps without work.
struct Task {
    Work work;
    int stream;
    // Of a capture, which it is; such a task is not done, but its copies are.
    uint64_t capture;
    std::vector<std::shared_ptr<Task>> after;
    bool is_done = false;
    std::chrono::steady_clock::time_point at;
};
typedef std::shared_ptr<Task> TaskPtr;

struct Stream {
    // As they were created.
    int number;
    // What the next task comes after: the one before it, and events that were waited for since.
    std::vector<TaskPtr> ends;
    // The capture that it is part of, and what it had before.
    uint64_t capture = 0;
    std::vector<TaskPtr> ends_before;
};
struct Graph {
    // That the capture began with.
    Stream* origin;
    std::vector<TaskPtr> tasks;
    // What comes after a replay comes after these.
    std::vector<TaskPtr> ends;
};
struct Event {
    TaskPtr task;
};
struct Function {
    void* module;
    const LanesKernel* kernel;
    std::string name;
};
struct Module {
    void* lanes;
    // The kernel in it, as the library and as its source call it.
    std::string symbol, name;
    std::vector<Function*> functions;
};

// The device of the thread.
thread_local int current = -1;

struct Handle {
    const char* what;
    int device;
};
std::map<uint64_t, size_t> device_memory, pinned;
// The device of each part of `device_memory`.
std::map<uint64_t, int> device_of;
std::map<void*, Handle> handles;
size_t used = 0;
// What others take from now on, of what is there.
size_t others = 0;
// The last two small copies to each address.
std::map<uint64_t, std::vector<uint8_t>> written, written_before;
uint64_t launched = 0;
int streams_made = 0;
// What is not done, as it was asked for.
std::vector<TaskPtr> pending;
// Those under way.
std::map<uint64_t, Graph> captures;
uint64_t last_capture = 0;

const char* told(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}
const char* arch() { return told("SINTER_STUB_ARCH", "gfx1100"); }
size_t all_memory() { return strtoull(told("SINTER_STUB_MEMORY", "8589934592"), nullptr, 10); }

template <class T>
T* made(const char* what, T* handle) {
    record.live[what]++;
    handles[handle] = {what, current};
    return handle;
}
// Whether it is one of these, on the thread's device.
bool is(const char* what, void* handle) {
    auto found = handles.find(handle);
    return found != handles.end() && !strcmp(found->second.what, what) && found->second.device == current;
}
template <class T>
void gone(T* handle) {
    record.live[handles[handle].what]--;
    handles.erase(handle);
    delete handle;
}

bool within(const std::map<uint64_t, size_t>& all, uint64_t at, size_t bytes) {
    auto next = all.upper_bound(at);
    if (next == all.begin()) return false;
    auto [first, size] = *--next;
    return at - first <= size && bytes <= size - (at - first);
}
// Whether an address lies in memory of the thread's device.
bool is_here(uint64_t at) {
    auto next = device_of.upper_bound(at);
    return next != device_of.begin() && (--next)->second == current;
}
// Memory of the host may be anything; but if it begins in a pinned part, it ends there.
bool is_of_host(const void* at, size_t bytes) {
    return at && (!within(pinned, (uint64_t)at, 0) || within(pinned, (uint64_t)at, bytes));
}

// Does a task, and what it comes after. It may be a long way back to what is not done, so that is not left to recursion.
int finish(const TaskPtr& wanted) {
    std::vector<TaskPtr> path{wanted};
    while (!path.empty()) {
        const TaskPtr task = path.back();
        TaskPtr earlier;
        for (const TaskPtr& other : task->after) {
            if (!other->is_done) earlier = other;
        }
        if (earlier) {
            path.push_back(earlier);
            continue;
        }
        path.pop_back();
        if (task->is_done) continue;
        task->is_done = true, task->at = std::chrono::steady_clock::now();
        task->after.clear();
        const Work work = std::move(task->work);
        if (int code = work ? work() : OK) return code;
    }
    return OK;
}
// Waits for tasks: before them come those of the stream that goes first, and each of those as early as it may.
int wait(const std::vector<TaskPtr>& wanted) {
    static const int first = atoi(told("SINTER_STUB_FIRST", "-1"));
    for (const TaskPtr& task : pending) {
        if (task->stream != first) continue;
        if (int code = finish(task)) return code;
    }
    for (const TaskPtr& task : wanted) {
        if (int code = finish(task)) return code;
    }
    auto is_done = [](const TaskPtr& task) { return task->is_done; };
    pending.erase(std::remove_if(pending.begin(), pending.end(), is_done), pending.end());
    return OK;
}
// What drivers wait for before memory goes.
void run_all() { wait(pending); }

// Puts a task behind what a stream has.
TaskPtr add(Stream* stream, Work work) {
    const TaskPtr task(new Task{std::move(work), stream->number, stream->capture, stream->ends, false, {}});
    stream->ends = {task};
    (stream->capture ? captures[stream->capture].tasks : pending).push_back(task);
    return task;
}
int put(void* handle, Work work) {
    if (!is("streams", handle)) return INVALID_HANDLE;
    add((Stream*)handle, std::move(work));
    return OK;
}

// A copy whose ends are looked at when it is asked for, and again when it is made.
int copy(void* stream, std::function<bool()> is_right, void* to, const void* from, size_t bytes) {
    if (!is_right()) return INVALID_VALUE;
    return put(stream, [=] {
        if (!is_right()) return (int)INVALID_VALUE;
        memcpy(to, from, bytes);
        return (int)OK;
    });
}

}  // namespace

// Begins a call that the thread needs a device for.
#define CALL_ON_DEVICE(code) \
    CALL(code);              \
    if (current < 0) return INVALID_CONTEXT

API hipInit(unsigned) {
    CALL(UNKNOWN);
    return OK;
}
API hipGetDeviceCount(int* count) {
    CALL(UNKNOWN);
    *count = atoi(told("SINTER_STUB_DEVICES", "1"));
    return *count > 0 ? OK : NO_DEVICE;
}
API hipDeviceGet(int* device, int ordinal) {
    CALL(INVALID_DEVICE);
    *device = ordinal;
    return OK;
}
API hipDeviceGetName(char* name, int bytes, int) {
    CALL(INVALID_DEVICE);
    snprintf(name, (size_t)bytes, "a CPU that stands in for %s", arch());
    return OK;
}
API hipSetDevice(int device) {
    CALL(INVALID_DEVICE);
    if (device < 0 || device >= atoi(told("SINTER_STUB_DEVICES", "1"))) return INVALID_DEVICE;
    current = device;
    return OK;
}
API hipDriverGetVersion(int* version) {
    CALL(UNKNOWN);
    *version = DRIVER_VERSION;
    return OK;
}
// Where the name of the architecture lies in the structure is told by who compiles this.
API hipGetDevicePropertiesR0600(char* properties, int) {
    CALL(INVALID_DEVICE);
    memset(properties, 0, PROPERTIES_BYTES);
    snprintf(properties + PROPERTIES_ARCH, 256, "%s:sramecc+:xnack-", arch());
    return OK;
}
// As ROCm 4 and 5 had it.
struct PropertiesR0000 {
    char name[256];
    size_t memory, shared_of_block;
    int registers_of_block, warp, threads_of_block, threads[3], grid[3], clock, memory_clock, memory_bus;
    size_t constants;
    int major, minor, multiprocessors, l2, threads_of_multiprocessor, compute_mode, timer;
    unsigned features;
    int concurrent_kernels, domain, bus, device;
    size_t shared_of_multiprocessor;
    int is_multi_gpu_board, can_map, arch;
    char arch_name[256];
    int rest[100];
};
API hipGetDeviceProperties(PropertiesR0000* properties, int) {
    CALL(INVALID_DEVICE);
    memset(properties, 0, sizeof *properties);
    snprintf(properties->arch_name, sizeof properties->arch_name, "%s:sramecc+:xnack-", arch());
    return OK;
}
extern "C" __attribute__((visibility("default"))) const char* hipGetErrorName(int code) {
    switch (code) {
        case OK: return "hipSuccess";
        case INVALID_VALUE: return "hipErrorInvalidValue";
        case OUT_OF_MEMORY: return "hipErrorOutOfMemory";
        case INVALID_DEVICE: return "hipErrorInvalidDevice";
        case INVALID_CONTEXT: return "hipErrorInvalidContext";
        case INVALID_IMAGE: return "hipErrorInvalidImage";
        case INVALID_HANDLE: return "hipErrorInvalidHandle";
        case NOT_FOUND: return "hipErrorNotFound";
        case NOT_READY: return "hipErrorNotReady";
        case LAUNCH_FAILURE: return "hipErrorLaunchFailure";
        case CAPTURE_UNSUPPORTED: return "hipErrorStreamCaptureUnsupported";
        case CAPTURE_INVALIDATED: return "hipErrorStreamCaptureInvalidated";
        case CAPTURE_UNJOINED: return "hipErrorStreamCaptureUnjoined";
        case CAPTURE_ISOLATION: return "hipErrorStreamCaptureIsolation";
        case CAPTURED_EVENT: return "hipErrorCapturedEvent";
        default: return "hipErrorUnknown";
    }
}

API hipMemGetInfo(size_t* free, size_t* all) {
    CALL_ON_DEVICE(UNKNOWN);
    *all = all_memory(), *free = *all - used - others;
    others = strtoull(told("SINTER_STUB_OTHERS", "0"), nullptr, 10);
    return OK;
}
API hipMalloc(uint64_t* at, size_t bytes) {
    CALL_ON_DEVICE(OUT_OF_MEMORY);
    if (bytes > all_memory() - used - others) return OUT_OF_MEMORY;
    void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    memset(memory, 0xff, bytes);
    device_memory[*at = (uint64_t)memory] = bytes, used += bytes;
    device_of[*at] = current;
    record.live["memory"]++;
    return OK;
}
API hipFree(uint64_t at) {
    CALL_THAT_FREES(UNKNOWN);
    auto found = device_memory.find(at);
    if (found == device_memory.end()) return INVALID_VALUE;
    if (!is_here(at)) return INVALID_CONTEXT;
    run_all();
    memset((void*)at, 0xdd, found->second);
    used -= found->second;
    device_memory.erase(found), device_of.erase(at);
    free((void*)at);
    record.live["memory"]--;
    return answer;
}
API hipHostMalloc(void** at, size_t bytes, unsigned) {
    CALL_ON_DEVICE(OUT_OF_MEMORY);
    *at = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*at) return OUT_OF_MEMORY;
    memset(*at, 0xff, bytes);
    pinned[(uint64_t)*at] = bytes;
    record.live["pinned"]++;
    return OK;
}
API hipHostFree(void* at) {
    CALL_THAT_FREES(UNKNOWN);
    if (!pinned.count((uint64_t)at)) return INVALID_VALUE;
    if (current < 0) return INVALID_CONTEXT;
    run_all();
    pinned.erase((uint64_t)at);
    free(at);
    record.live["pinned"]--;
    return answer;
}

API hipMemcpyHtoDAsync(uint64_t to, const void* from, size_t bytes, void* stream) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is_here(to)) return INVALID_VALUE;
    if (int code = copy(stream, [=] { return within(device_memory, to, bytes) && is_of_host(from, bytes); }, (void*)to, from, bytes)) return code;
    if (bytes > 65536) return OK;
    return put(stream, [=] {
        std::swap(written_before[to], written[to]);
        written[to].assign((const uint8_t*)to, (const uint8_t*)to + bytes);
        return (int)OK;
    });
}
API hipMemcpyDtoHAsync(void* to, uint64_t from, size_t bytes, void* stream) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is_here(from)) return INVALID_VALUE;
    return copy(stream, [=] { return within(device_memory, from, bytes) && is_of_host(to, bytes); }, to, (void*)from, bytes);
}
API hipMemcpyDtoDAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is_here(to) || !is_here(from)) return INVALID_VALUE;
    const bool apart = to + bytes <= from || from + bytes <= to;
    return copy(stream, [=] { return apart && within(device_memory, to, bytes) && within(device_memory, from, bytes); }, (void*)to,
                (void*)from, bytes);
}
API hipMemsetD8Async(uint64_t at, unsigned char byte, size_t bytes, void* stream) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!within(device_memory, at, bytes) || !is_here(at)) return INVALID_VALUE;
    return put(stream, [=] {
        if (!within(device_memory, at, bytes)) return (int)INVALID_VALUE;
        memset((void*)at, byte, bytes);
        return (int)OK;
    });
}

API hipStreamCreateWithFlags(void** stream, unsigned) {
    CALL_ON_DEVICE(UNKNOWN);
    *stream = made("streams", new Stream{streams_made++, {}, 0, {}});
    return OK;
}
API hipStreamDestroy(void* handle) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("streams", handle)) return INVALID_HANDLE;
    Stream* stream = (Stream*)handle;
    wait(stream->capture ? stream->ends_before : stream->ends);
    gone(stream);
    return answer;
}
API hipStreamSynchronize(void* stream) {
    CALL_ON_DEVICE(LAUNCH_FAILURE);
    if (!is("streams", stream)) return INVALID_HANDLE;
    if (((Stream*)stream)->capture) return CAPTURE_UNSUPPORTED;
    return wait(((Stream*)stream)->ends);
}
// What comes on the stream from now on waits for what the event is now. By an event of a capture the stream becomes part of that.
API hipStreamWaitEvent(void* handle, void* event, unsigned flags) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is("streams", handle) || !is("events", event)) return INVALID_HANDLE;
    if (flags) return INVALID_VALUE;
    const TaskPtr task = ((Event*)event)->task;
    if (!task) return OK;
    Stream* stream = (Stream*)handle;
    if (stream->capture && task->capture != stream->capture) return CAPTURE_ISOLATION;
    if (task->capture && !captures.count(task->capture)) return CAPTURED_EVENT;
    if (task->capture && !stream->capture) {
        stream->capture = task->capture;
        stream->ends_before.swap(stream->ends);
    }
    stream->ends.push_back(task);
    return OK;
}

API hipEventCreateWithFlags(void** event, unsigned) {
    CALL_ON_DEVICE(UNKNOWN);
    *event = made("events", new Event);
    return OK;
}
API hipEventDestroy(void* event) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("events", event)) return INVALID_HANDLE;
    gone((Event*)event);
    return answer;
}
API hipEventRecord(void* event, void* stream) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is("events", event) || !is("streams", stream)) return INVALID_HANDLE;
    ((Event*)event)->task = add((Stream*)stream, nullptr);
    return OK;
}
API hipEventSynchronize(void* event) {
    CALL_ON_DEVICE(LAUNCH_FAILURE);
    if (!is("events", event)) return INVALID_HANDLE;
    const TaskPtr task = ((Event*)event)->task;
    if (task && task->capture) return CAPTURED_EVENT;
    return task ? wait({task}) : (int)OK;
}
API hipEventElapsedTime(float* ms, void* first, void* last) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is("events", first) || !is("events", last)) return INVALID_HANDLE;
    const TaskPtr a = ((Event*)first)->task, b = ((Event*)last)->task;
    if (!a || !b || !a->is_done || !b->is_done) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(b->at - a->at).count();
    return OK;
}

// A code object of hiprtc.cpp is lanes:LIBRARY:SYMBOL:NAME.
API hipModuleLoadData(void** module, const char* code) {
    CALL_ON_DEVICE(INVALID_IMAGE);
    if (strncmp(code, "lanes:", 6)) return INVALID_IMAGE;
    const std::string text = code + 6;
    const size_t first = text.find(':'), second = text.find(':', first + 1);
    if (second == std::string::npos) return INVALID_IMAGE;
    void* lanes = lanes_open(text.substr(0, first).c_str());
    if (!lanes) return INVALID_IMAGE;
    *module = made("modules", new Module{lanes, text.substr(first + 1, second - first - 1), text.substr(second + 1), {}});
    return OK;
}
API hipModuleUnload(void* handle) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("modules", handle)) return INVALID_HANDLE;
    run_all();
    Module* module = (Module*)handle;
    for (Function* function : module->functions) handles.erase(function), delete function;
    lanes_close(module->lanes);
    gone(module);
    return answer;
}
API hipModuleGetFunction(void** function, void* handle, const char* name) {
    CALL_ON_DEVICE(NOT_FOUND);
    if (!is("modules", handle)) return INVALID_HANDLE;
    Module* module = (Module*)handle;
    const LanesKernel* kernel = module->name == name ? lanes_find(module->lanes, module->symbol.c_str()) : nullptr;
    if (!kernel) return NOT_FOUND;
    Function* found = new Function{module->lanes, kernel, name};
    module->functions.push_back(found);
    handles[*function = found] = {"functions", current};
    return OK;
}
API hipModuleLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                          unsigned, void* stream, void** arguments, void**) {
    CALL_ON_DEVICE(LAUNCH_FAILURE);
    if (!is("functions", handle)) return INVALID_HANDLE;
    const Function* function = (const Function*)handle;
    if (!x || !y || !z || !threads || threads > 1024 || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
    std::vector<uint64_t> values;
    for (int i = 0; i < function->kernel->count; i++) {
        uint64_t value = 0;
        memcpy(&value, arguments[i], function->kernel->is_address[i] ? 8 : 4);
        if (function->kernel->is_address[i] && !(within(device_memory, value, 1) && is_here(value))) return INVALID_VALUE;
        values.push_back(value);
    }
    // As some driver's graphs have done (hipfire 591).
    const bool is_late = is("streams", stream) && ((Stream*)stream)->capture && told("SINTER_STUB_LATE_ARGUMENTS", nullptr);
    return put(stream, [=] {
        std::vector<uint64_t> own = values;
        for (size_t i = 0; is_late && i < own.size(); i++) memcpy(&own[i], arguments[i], function->kernel->is_address[i] ? 8 : 4);
        std::vector<void*> pointers;
        for (size_t i = 0; i < own.size(); i++) {
            if (function->kernel->is_address[i] && !within(device_memory, own[i], 1)) return (int)LAUNCH_FAILURE;
            pointers.push_back(&own[i]);
        }
        const unsigned grid[3] = {x, y, z};
        const uint64_t seed = strtoull(told("SINTER_STUB_SEED", "1"), nullptr, 10) + ++launched;
        lanes_launch(function->module, function->kernel, function->name.c_str(), pointers.data(), grid, threads,
                     strncmp(arch(), "gfx9", 4) ? 32 : 64, seed);
        record.live.try_emplace("memory", 0);
        record.calls["kernels that ran"]++;
        return (int)OK;
    });
}

API hipStreamBeginCapture(void* handle, int) {
    CALL_ON_DEVICE(UNKNOWN);
    if (!is("streams", handle)) return INVALID_HANDLE;
    Stream* stream = (Stream*)handle;
    if (stream->capture) return CAPTURE_INVALIDATED;
    stream->capture = ++last_capture;
    stream->ends_before.swap(stream->ends);
    captures[stream->capture].origin = stream;
    return OK;
}
// Every stream of the capture must have been joined to the one that it began with, and all of them are as they were before.
API hipStreamEndCapture(void* handle, void** graph) {
    CALL_THAT_FREES(CAPTURE_INVALIDATED);
    if (!is("streams", handle)) return INVALID_HANDLE;
    Stream* origin = (Stream*)handle;
    const uint64_t capture = origin->capture;
    if (!capture || captures[capture].origin != origin) return INVALID_HANDLE;
    Graph captured = std::move(captures[capture]);
    captures.erase(capture);
    captured.ends = origin->ends;
    for (auto& [other, handle] : handles) {
        Stream* stream = (Stream*)other;
        if (strcmp(handle.what, "streams") || stream->capture != capture) continue;
        stream->capture = 0;
        stream->ends = std::move(stream->ends_before);
        stream->ends_before.clear();
    }
    if (answer) return answer;
    std::set<TaskPtr> joined(captured.ends.begin(), captured.ends.end());
    for (size_t i = captured.tasks.size(); i-- > 0;) {
        if (!joined.count(captured.tasks[i])) return CAPTURE_UNJOINED;
        joined.insert(captured.tasks[i]->after.begin(), captured.tasks[i]->after.end());
    }
    *graph = made("graphs", new Graph(std::move(captured)));
    return OK;
}
API hipGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    CALL_ON_DEVICE(OUT_OF_MEMORY);
    if (!is("graphs", graph)) return INVALID_HANDLE;
    *exec = made("graph execs", new Graph(*(Graph*)graph));
    return OK;
}
API hipGraphLaunch(void* exec, void* stream) {
    CALL_ON_DEVICE(LAUNCH_FAILURE);
    if (!is("graph execs", exec)) return INVALID_HANDLE;
    const char* wrong = told("SINTER_STUB_REPLAY", "");
    if (!strcmp(wrong, "stale")) {
        const int code = put(stream, [] {
            for (auto& [to, bytes] : written_before) {
                if (within(device_memory, to, bytes.size())) memcpy((void*)to, bytes.data(), bytes.size());
            }
            return (int)OK;
        });
        if (code) return code;
    }
    if (!is("streams", stream)) return INVALID_HANDLE;
    std::vector<TaskPtr>& ends = ((Stream*)stream)->ends;
    std::map<TaskPtr, TaskPtr> copies;
    int n = 0;
    for (const TaskPtr& task : ((Graph*)exec)->tasks) {
        const TaskPtr copy(new Task{task->work, task->stream, 0, task->after, false, {}});
        if (copy->work && ++n == atoi(wrong)) copy->work = nullptr;
        for (TaskPtr& earlier : copy->after) earlier = copies[earlier];
        if (copy->after.empty()) copy->after = ends;
        pending.push_back(copies[task] = copy);
    }
    std::vector<TaskPtr> all;
    for (const TaskPtr& task : ((Graph*)exec)->ends) all.push_back(copies[task]);
    if (!all.empty()) ends = all;
    return OK;
}
API hipGraphDestroy(void* graph) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("graphs", graph)) return INVALID_HANDLE;
    gone((Graph*)graph);
    return answer;
}
API hipGraphExecDestroy(void* exec) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("graph execs", exec)) return INVALID_HANDLE;
    run_all();
    gone((Graph*)exec);
    return answer;
}
