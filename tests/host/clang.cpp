// A clang for AMD's GPUs that compiles for the CPU, by hiprtc.cpp: what `sinter compile` runs ahead of time on a machine that has neither.
// It knows the architectures of hip.cpp alone.
//
//   SINTER_STUB_OBJECT=TEXT     what it writes instead of each code object
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
int hiprtcCreateProgram(void** program, const char* source, const char*, int, const char**, const char**);
int hiprtcCompileProgram(void* program, int count, const char** options);
int hiprtcGetProgramLogSize(void* program, size_t* bytes);
int hiprtcGetProgramLog(void* program, char* log);
int hiprtcGetCodeSize(void* program, size_t* bytes);
int hiprtcGetCode(void* program, char* code);
}

int main(int count, char** args) {
    std::string arch, file, out;
    for (int i = 1; i < count; i++) {
        const std::string arg = args[i];
        if (arg == "--version") return puts("stub clang version 1.2.3") < 0;
        if (arg.rfind("--offload-arch=", 0) == 0) arch = arg;
        if (arg == "-o" && i + 1 < count) out = args[i + 1];
        if (arg.size() > 4 && arg.substr(arg.size() - 4) == ".hip") file = arg;
    }
    if (arch != "--offload-arch=gfx1100" && arch != "--offload-arch=gfx942") {
        fprintf(stderr, "error: invalid target ID in %s\n", arch.c_str());
        return 1;
    }
    std::ifstream in(file);
    std::stringstream source;
    source << in.rdbuf();
    std::string code = "nothing";
    if (source.str().find("KERNEL(") != std::string::npos) {
        void* program;
        const char* options[] = {arch.c_str()};
        size_t bytes;
        if (hiprtcCreateProgram(&program, source.str().c_str(), file.c_str(), 0, nullptr, nullptr)) return 2;
        if (hiprtcCompileProgram(program, 1, options)) {
            hiprtcGetProgramLogSize(program, &bytes);
            std::vector<char> log(bytes);
            hiprtcGetProgramLog(program, log.data());
            fprintf(stderr, "%s\n", log.data());
            return 1;
        }
        hiprtcGetCodeSize(program, &bytes);
        std::vector<char> made(bytes);
        hiprtcGetCode(program, made.data());
        code.assign(made.data(), bytes);
        if (const char* instead = getenv("SINTER_STUB_OBJECT")) code = instead;
    }
    std::ofstream(out, std::ios::binary) << code;
    return 0;
}
