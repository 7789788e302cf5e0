// libhiprtc that compiles for the CPU, by a clang that is here. A code object says which library has the kernel, by what name, and how
// the source calls it. What was compiled once is kept, by the hash of the source; so tests compile most of it beforehand.
//
//   SINTER_STUB_FOLDER=DIR      the headers of kernels, lanes.h, liblanes.so and what is compiled
//   SINTER_STUB_BREAK=TEXT      what is put in front of every source
#include "stub.h"

#include <cstdint>
#include <cstring>
#include <fstream>
#include <unistd.h>

namespace {

enum { OK = 0, OUT_OF_MEMORY = 1, INVALID_INPUT = 3, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6, INTERNAL_ERROR = 11 };

struct Program {
    std::string source, log, code;
};
std::map<void*, Program*> programs;

// FNV-1a, which is enough to tell sources apart.
std::string hash(const std::string& text) {
    uint64_t h = 0xcbf29ce484222325;
    for (unsigned char c : text) h = (h ^ c) * 0x100000001b3;
    char digits[17];
    snprintf(digits, sizeof digits, "%016llx", (unsigned long long)h);
    return digits;
}

// Macros that a compiler for an architecture defines.
std::string macros(const std::string& arch) {
    return " -D__" + arch + "__ -D__GFX" + (arch.rfind("gfx9", 0) == 0 ? "9" : arch.substr(3, 2)) + "__";
}

int compile(Program& program, const std::string& arch) {
    const char* folder = getenv("SINTER_STUB_FOLDER");
    const char* broken = getenv("SINTER_STUB_BREAK");
    if (!folder) return INTERNAL_ERROR;
    const std::string source = (broken ? std::string(broken) + "\n" : "") + program.source;
    const std::string base = std::string(folder) + "/" + hash(arch + "\n" + source), own = base + "." + std::to_string(getpid());
    std::ifstream known(base + ".code");
    if (std::getline(known, program.code)) return OK;
    const size_t at = source.find("KERNEL(");
    if (at == std::string::npos) return INVALID_INPUT;
    const std::string name = source.substr(at + 7, source.find(',', at) - at - 7);
    std::ofstream(own + ".cpp") << source << "LANES_EXPORT(" << name << ", kernel_" << name << ")\n";
    const std::string command = "clang++-19 -std=c++17 -O1 -Wall -Werror -Wno-unused -Wno-psabi -fPIC -shared -fvisibility=hidden -DSINTER_HOST=1" +
        macros(arch) + " -I " + folder + " " + own + ".cpp -o " + base + ".so " + folder + "/liblanes.so 2>&1";
    FILE* out = popen(command.c_str(), "r");
    if (!out) return INTERNAL_ERROR;
    char some[4096];
    while (size_t n = fread(some, 1, sizeof some, out)) program.log.append(some, n);
    const int status = pclose(out);
    unlink((own + ".cpp").c_str());
    if (status != 0) return COMPILATION;
    program.code = "lanes:" + base + ".so:" + name + ":" + name;
    std::ofstream(own + ".code") << program.code << "\n";
    return rename((own + ".code").c_str(), (base + ".code").c_str()) == 0 ? OK : INTERNAL_ERROR;
}

}  // namespace

API hiprtcVersion(int* major, int* minor) {
    CALL(INTERNAL_ERROR);
    *major = 6, *minor = 4;
    return OK;
}
// The headers are those of the folder.
API hiprtcCreateProgram(void** program, const char* source, const char*, int, const char**, const char**) {
    CALL(OUT_OF_MEMORY);
    Program* made = new Program{source, "", ""};
    programs[*program = made] = made;
    record.live["programs"]++;
    return OK;
}
API hiprtcCompileProgram(void* handle, int count, const char** options) {
    Program* program;
    std::string arch;
    {
        CALL(INTERNAL_ERROR);
        if (!programs.count(handle)) return INVALID_PROGRAM;
        program = programs[handle];
        for (int i = 0; i < count; i++) {
            if (!strncmp(options[i], "--offload-arch=", 15)) arch = options[i] + 15;
        }
        if (arch.empty()) return INVALID_OPTION;
    }
    // Several at once.
    return compile(*program, arch);
}
API hiprtcGetProgramLogSize(void* program, size_t* bytes) {
    CALL(INTERNAL_ERROR);
    if (!programs.count(program)) return INVALID_PROGRAM;
    *bytes = programs[program]->log.size() + 1;
    return OK;
}
API hiprtcGetProgramLog(void* program, char* log) {
    CALL(INTERNAL_ERROR);
    if (!programs.count(program)) return INVALID_PROGRAM;
    strcpy(log, programs[program]->log.c_str());
    return OK;
}
API hiprtcGetCodeSize(void* program, size_t* bytes) {
    CALL(INTERNAL_ERROR);
    if (!programs.count(program)) return INVALID_PROGRAM;
    *bytes = programs[program]->code.size() + 1;
    return OK;
}
API hiprtcGetCode(void* program, char* code) {
    CALL(INTERNAL_ERROR);
    if (!programs.count(program)) return INVALID_PROGRAM;
    strcpy(code, programs[program]->code.c_str());
    return OK;
}
API hiprtcDestroyProgram(void** program) {
    CALL_THAT_FREES(INTERNAL_ERROR);
    if (!programs.count(*program)) return INVALID_PROGRAM;
    delete programs[*program];
    programs.erase(*program);
    *program = nullptr;
    record.live["programs"]--;
    return answer;
}
