// NVIDIA's run-time compiler, opened by the caller. No libtorch and no CUDA header in here: the tests compile the
// kernels with it on machines without a GPU.
#pragma once
#include <string>
#include <vector>

struct CompiledKernels {
  std::string image;  // a cubin, or PTX for an architecture that this compiler does not know yet
  std::string log;
};

// Opens libnvrtc.so.13 from the first of `folders` that has it; "" is where the loader looks. Throws
// std::runtime_error with the loader's first words.
void *open_nvrtc(const std::vector<std::string> &folders);

// `library` is an open libnvrtc.so.13; `architecture` is 10 times the major plus the minor number. Throws
// std::runtime_error with the compiler's log.
CompiledKernels compile_kernels(void *library, const char *source, int architecture);
