// What the stubs of AMD's libraries share: calls are counted, the n-th of a name can be told to fail, and what is alive when the process
// ends is written down.
//
//   SINTER_STUB_FAIL=hipMalloc:3   the third call of hipMalloc fails; several are separated by commas
//   SINTER_STUB_LOG=FILE           gets `ended 1` and lines `calls NAME N` and `live WHAT N` at the end of the process
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#define API extern "C" __attribute__((visibility("default"))) int

inline std::recursive_mutex lock_of_all;
typedef std::lock_guard<std::recursive_mutex> Guard;

struct Record {
    std::map<std::string, long> calls, live;

    ~Record() {
        const char* path = getenv("SINTER_STUB_LOG");
        FILE* file = path ? fopen(path, "a") : nullptr;
        if (!file) return;
        fprintf(file, "ended 1\n");
        for (auto& [name, n] : calls) fprintf(file, "calls %s %ld\n", name.c_str(), n);
        for (auto& [name, n] : live) fprintf(file, "live %s %ld\n", name.c_str(), n);
        fclose(file);
    }

    // Counts a call. Whether it is one that is to fail.
    bool fails(const char* name) {
        const long n = ++calls[name];
        const char* told = getenv("SINTER_STUB_FAIL");
        const std::string wanted = std::string(name) + ":" + std::to_string(n) + ",";
        return told && ("," + std::string(told) + ",").find("," + wanted) != std::string::npos;
    }
};
inline Record record;

// Begins a call that does nothing if it is to fail.
#define CALL(code)       \
    Guard guard(lock_of_all); \
    if (record.fails(__func__)) return code

// A call that gives something back does so, whatever it answers: as drivers do that tell of what failed before.
#define CALL_THAT_FREES(code) \
    Guard guard(lock_of_all);      \
    const int answer = record.fails(__func__) ? (code) : 0
