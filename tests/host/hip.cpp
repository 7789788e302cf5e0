// libamdhip64 without a GPU: memory of the host, kernels that hiprtc.cpp compiled for the CPU (lanes.cpp runs them), and the calls that
// src/runtime/hip makes. It forgives nothing: what is on a stream is done when somebody waits for it and not before, memory is garbage
// until it is written and after it is freed, and addresses must lie in what was allocated.
//
//   SINTER_STUB_ARCH=gfx942     the architecture, gfx1100 unless told; those of gfx9 have waves of 64
//   SINTER_STUB_MEMORY=BYTES    the memory that there is
//   SINTER_STUB_DEVICES=N       how many devices, 1 unless told; 0 is an error of its own, as drivers have it
//   SINTER_STUB_SEED=N          permutes the order of lanes
//   SINTER_STUB_REPLAY=N        graphs replay without their launch N
//   SINTER_STUB_REPLAY=stale    graphs replay on what the host wrote before it wrote last, for small copies
#include "lanes.h"
#include "stub.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

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
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILURE = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    UNKNOWN = 999,
};

typedef std::function<int()> Work;

struct Graph {
    std::vector<Work> work;
};
struct Stream {
    std::deque<Work> pending;
    Graph* captures = nullptr;
};
struct Event {
    Stream* stream = nullptr;
    bool is_done = false;
    std::chrono::steady_clock::time_point at;
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

std::map<uint64_t, size_t> device_memory, pinned;
std::map<void*, const char*> handles;
size_t used = 0;
// The last two small copies to each address.
std::map<uint64_t, std::vector<uint8_t>> written, written_before;
uint64_t launched = 0;

const char* told(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}
const char* arch() { return told("SINTER_STUB_ARCH", "gfx1100"); }
size_t all_memory() { return strtoull(told("SINTER_STUB_MEMORY", "8589934592"), nullptr, 10); }

template <class T>
T* made(const char* what, T* handle) {
    record.live[what]++;
    handles[handle] = what;
    return handle;
}
bool is(const char* what, void* handle) {
    auto found = handles.find(handle);
    return found != handles.end() && !strcmp(found->second, what);
}
template <class T>
void gone(T* handle) {
    record.live[handles[handle]]--;
    handles.erase(handle);
    delete handle;
}

bool within(const std::map<uint64_t, size_t>& all, uint64_t at, size_t bytes) {
    auto next = all.upper_bound(at);
    if (next == all.begin()) return false;
    auto [first, size] = *--next;
    return at - first <= size && bytes <= size - (at - first);
}
// Memory of the host may be anything; but if it begins in a pinned part, it ends there.
bool is_of_host(const void* at, size_t bytes) {
    return at && (!within(pinned, (uint64_t)at, 0) || within(pinned, (uint64_t)at, bytes));
}

int run(Stream* stream, const bool* until = nullptr) {
    while (!stream->pending.empty() && !(until && *until)) {
        Work work = std::move(stream->pending.front());
        stream->pending.pop_front();
        if (int code = work()) return code;
    }
    return OK;
}
// What drivers wait for before memory goes.
void run_all() {
    for (auto& [handle, what] : handles) {
        if (!strcmp(what, "streams")) run((Stream*)handle);
    }
}

int put(void* handle, Work work) {
    if (!is("streams", handle)) return INVALID_HANDLE;
    Stream* stream = (Stream*)handle;
    if (stream->captures) {
        stream->captures->work.push_back(std::move(work));
    } else {
        stream->pending.push_back(std::move(work));
    }
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
    return device < atoi(told("SINTER_STUB_DEVICES", "1")) ? OK : INVALID_DEVICE;
}
API hipDriverGetVersion(int* version) {
    CALL(UNKNOWN);
    *version = 60443484;
    return OK;
}
// Where the name of the architecture lies in the structure is told by who compiles this.
API hipGetDevicePropertiesR0600(char* properties, int) {
    CALL(INVALID_DEVICE);
    memset(properties, 0, PROPERTIES_BYTES);
    snprintf(properties + PROPERTIES_ARCH, 256, "%s:sramecc+:xnack-", arch());
    return OK;
}
extern "C" __attribute__((visibility("default"))) const char* hipGetErrorName(int code) {
    switch (code) {
        case OK: return "hipSuccess";
        case INVALID_VALUE: return "hipErrorInvalidValue";
        case OUT_OF_MEMORY: return "hipErrorOutOfMemory";
        case INVALID_DEVICE: return "hipErrorInvalidDevice";
        case INVALID_IMAGE: return "hipErrorInvalidImage";
        case INVALID_HANDLE: return "hipErrorInvalidHandle";
        case NOT_FOUND: return "hipErrorNotFound";
        case NOT_READY: return "hipErrorNotReady";
        case LAUNCH_FAILURE: return "hipErrorLaunchFailure";
        case CAPTURE_UNSUPPORTED: return "hipErrorStreamCaptureUnsupported";
        case CAPTURE_INVALIDATED: return "hipErrorStreamCaptureInvalidated";
        default: return "hipErrorUnknown";
    }
}

API hipMemGetInfo(size_t* free, size_t* all) {
    CALL(UNKNOWN);
    *all = all_memory(), *free = *all - used;
    return OK;
}
API hipMalloc(uint64_t* at, size_t bytes) {
    CALL(OUT_OF_MEMORY);
    if (bytes > all_memory() - used) return OUT_OF_MEMORY;
    void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    memset(memory, 0xff, bytes);
    device_memory[*at = (uint64_t)memory] = bytes, used += bytes;
    record.live["memory"]++;
    return OK;
}
API hipFree(uint64_t at) {
    CALL_THAT_FREES(UNKNOWN);
    auto found = device_memory.find(at);
    if (found == device_memory.end()) return INVALID_VALUE;
    run_all();
    memset((void*)at, 0xdd, found->second);
    used -= found->second;
    device_memory.erase(found);
    free((void*)at);
    record.live["memory"]--;
    return answer;
}
API hipHostMalloc(void** at, size_t bytes, unsigned) {
    CALL(OUT_OF_MEMORY);
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
    run_all();
    pinned.erase((uint64_t)at);
    free(at);
    record.live["pinned"]--;
    return answer;
}

API hipMemcpyHtoDAsync(uint64_t to, const void* from, size_t bytes, void* stream) {
    CALL(UNKNOWN);
    if (int code = copy(stream, [=] { return within(device_memory, to, bytes) && is_of_host(from, bytes); }, (void*)to, from, bytes)) return code;
    if (bytes > 65536) return OK;
    return put(stream, [=] {
        std::swap(written_before[to], written[to]);
        written[to].assign((const uint8_t*)to, (const uint8_t*)to + bytes);
        return (int)OK;
    });
}
API hipMemcpyDtoHAsync(void* to, uint64_t from, size_t bytes, void* stream) {
    CALL(UNKNOWN);
    return copy(stream, [=] { return within(device_memory, from, bytes) && is_of_host(to, bytes); }, to, (void*)from, bytes);
}
API hipMemcpyDtoDAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    CALL(UNKNOWN);
    const bool apart = to + bytes <= from || from + bytes <= to;
    return copy(stream, [=] { return apart && within(device_memory, to, bytes) && within(device_memory, from, bytes); }, (void*)to,
                (void*)from, bytes);
}
API hipMemsetD8Async(uint64_t at, unsigned char byte, size_t bytes, void* stream) {
    CALL(UNKNOWN);
    if (!within(device_memory, at, bytes)) return INVALID_VALUE;
    return put(stream, [=] {
        if (!within(device_memory, at, bytes)) return (int)INVALID_VALUE;
        memset((void*)at, byte, bytes);
        return (int)OK;
    });
}

API hipStreamCreateWithFlags(void** stream, unsigned) {
    CALL(UNKNOWN);
    *stream = made("streams", new Stream);
    return OK;
}
API hipStreamDestroy(void* stream) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("streams", stream)) return INVALID_HANDLE;
    run((Stream*)stream);
    delete ((Stream*)stream)->captures;
    gone((Stream*)stream);
    return answer;
}
API hipStreamSynchronize(void* stream) {
    CALL(LAUNCH_FAILURE);
    if (!is("streams", stream)) return INVALID_HANDLE;
    if (((Stream*)stream)->captures) return CAPTURE_UNSUPPORTED;
    return run((Stream*)stream);
}

API hipEventCreateWithFlags(void** event, unsigned) {
    CALL(UNKNOWN);
    *event = made("events", new Event);
    return OK;
}
API hipEventDestroy(void* event) {
    CALL_THAT_FREES(UNKNOWN);
    if (!is("events", event)) return INVALID_HANDLE;
    if (is("streams", ((Event*)event)->stream)) run(((Event*)event)->stream);
    gone((Event*)event);
    return answer;
}
API hipEventRecord(void* handle, void* stream) {
    CALL(UNKNOWN);
    if (!is("events", handle)) return INVALID_HANDLE;
    Event* event = (Event*)handle;
    event->is_done = false, event->stream = (Stream*)stream;
    return put(stream, [=] {
        event->is_done = true, event->at = std::chrono::steady_clock::now();
        return (int)OK;
    });
}
API hipEventSynchronize(void* handle) {
    CALL(LAUNCH_FAILURE);
    if (!is("events", handle)) return INVALID_HANDLE;
    Event* event = (Event*)handle;
    return event->is_done || !event->stream ? OK : run(event->stream, &event->is_done);
}
API hipEventElapsedTime(float* ms, void* first, void* last) {
    CALL(UNKNOWN);
    if (!is("events", first) || !is("events", last)) return INVALID_HANDLE;
    Event *a = (Event*)first, *b = (Event*)last;
    if (!a->is_done || !b->is_done) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(b->at - a->at).count();
    return OK;
}

// A code object of hiprtc.cpp is lanes:LIBRARY:SYMBOL:NAME.
API hipModuleLoadData(void** module, const char* code) {
    CALL(INVALID_IMAGE);
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
    CALL(NOT_FOUND);
    if (!is("modules", handle)) return INVALID_HANDLE;
    Module* module = (Module*)handle;
    const LanesKernel* kernel = module->name == name ? lanes_find(module->lanes, module->symbol.c_str()) : nullptr;
    if (!kernel) return NOT_FOUND;
    Function* found = new Function{module->lanes, kernel, name};
    module->functions.push_back(found);
    handles[*function = found] = "functions";
    return OK;
}
API hipModuleLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                          unsigned, void* stream, void** arguments, void**) {
    CALL(LAUNCH_FAILURE);
    if (!is("functions", handle)) return INVALID_HANDLE;
    const Function* function = (const Function*)handle;
    if (!x || !y || !z || !threads || threads > 1024 || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
    std::vector<uint64_t> values;
    for (int i = 0; i < function->kernel->count; i++) {
        uint64_t value = 0;
        memcpy(&value, arguments[i], function->kernel->is_address[i] ? 8 : 4);
        if (function->kernel->is_address[i] && !within(device_memory, value, 1)) return INVALID_VALUE;
        values.push_back(value);
    }
    return put(stream, [=] {
        std::vector<uint64_t> own = values;
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
    CALL(UNKNOWN);
    if (!is("streams", handle)) return INVALID_HANDLE;
    Stream* stream = (Stream*)handle;
    if (stream->captures) return CAPTURE_INVALIDATED;
    stream->captures = new Graph;
    return OK;
}
API hipStreamEndCapture(void* handle, void** graph) {
    CALL_THAT_FREES(CAPTURE_INVALIDATED);
    if (!is("streams", handle) || !((Stream*)handle)->captures) return INVALID_HANDLE;
    Graph* captured = ((Stream*)handle)->captures;
    ((Stream*)handle)->captures = nullptr;
    if (answer) {
        delete captured;
        return answer;
    }
    *graph = made("graphs", captured);
    return OK;
}
API hipGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    CALL(OUT_OF_MEMORY);
    if (!is("graphs", graph)) return INVALID_HANDLE;
    *exec = made("graph execs", new Graph(*(Graph*)graph));
    return OK;
}
API hipGraphLaunch(void* exec, void* stream) {
    CALL(LAUNCH_FAILURE);
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
    int n = 0;
    for (const Work& work : ((Graph*)exec)->work) {
        if (++n == atoi(wrong)) continue;
        if (int code = put(stream, work)) return code;
    }
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
