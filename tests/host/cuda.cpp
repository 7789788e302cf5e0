// libcuda as hip.cpp is libamdhip64, of whose functions each gets its name there by who compiles this; and what CUDA has besides: the
// context of a device, which is there while somebody retains it.
#define DRIVER_VERSION 13000
#include "hip.cpp"

namespace {
// By device.
int retained[8];
}

API cuDevicePrimaryCtxRetain(void** context, int device) {
    CALL(UNKNOWN);
    if (device < 0 || device >= 8) return INVALID_DEVICE;
    retained[device]++, record.live["contexts"]++;
    handles[*context = &retained[device]] = {"contexts", device};
    return OK;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    CALL_THAT_FREES(UNKNOWN);
    if (device < 0 || device >= 8 || !retained[device]) return INVALID_DEVICE;
    record.live["contexts"]--;
    if (!--retained[device]) handles.erase(&retained[device]);
    return answer;
}
API cuCtxSetCurrent(void* context) {
    CALL(UNKNOWN);
    auto found = handles.find(context);
    if (found == handles.end() || strcmp(found->second.what, "contexts")) return INVALID_HANDLE;
    current = found->second.device;
    return OK;
}
// The compute capability, which is all that is asked for.
API cuDeviceGetAttribute(int* value, int which, int) {
    CALL(INVALID_DEVICE);
    *value = which == 75 ? 9 : 0;
    return OK;
}
API cuGetErrorName(int code, const char** name) {
    *name = hipGetErrorName(code);
    return OK;
}
