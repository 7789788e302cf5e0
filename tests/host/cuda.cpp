// libcuda as hip.cpp is libamdhip64, of whose functions each gets its name there by who compiles this; and what CUDA has besides: the
// context of a device, which is there while somebody retains it.
#include "hip.cpp"

namespace {
int retained = 0;
}

API cuDevicePrimaryCtxRetain(void** context, int) {
    CALL(UNKNOWN);
    retained++, record.live["contexts"]++;
    handles[*context = &retained] = "contexts";
    return OK;
}
API cuDevicePrimaryCtxRelease_v2(int) {
    CALL_THAT_FREES(UNKNOWN);
    if (!retained) return INVALID_DEVICE;
    record.live["contexts"]--;
    if (!--retained) handles.erase(&retained);
    return answer;
}
API cuCtxSetCurrent(void* context) {
    CALL(UNKNOWN);
    return is("contexts", context) ? OK : INVALID_HANDLE;
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
