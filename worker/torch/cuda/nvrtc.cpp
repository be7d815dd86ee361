// See nvrtc.h.
#include "nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

namespace {

// nvrtc.h's, which no header package of CUDA's runtime holds.
using Program = struct _nvrtcProgram *;

struct Nvrtc {
  explicit Nvrtc(void *library) {
    load(library, "nvrtcGetErrorString", error_string);
    load(library, "nvrtcCreateProgram", create);
    load(library, "nvrtcDestroyProgram", destroy);
    load(library, "nvrtcCompileProgram", compile);
    load(library, "nvrtcGetProgramLogSize", log_size);
    load(library, "nvrtcGetProgramLog", log);
    load(library, "nvrtcGetCUBINSize", cubin_size);
    load(library, "nvrtcGetCUBIN", cubin);
    load(library, "nvrtcGetPTXSize", ptx_size);
    load(library, "nvrtcGetPTX", ptx);
    load(library, "nvrtcGetNumSupportedArchs", architecture_count);
    load(library, "nvrtcGetSupportedArchs", architectures);
  }

  template <typename Function>
  static void load(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("libnvrtc has no ") + name);
  }

  void check(int result, const char *what) const {
    if (result != 0) throw std::runtime_error(std::string(what) + ": " + error_string(result));
  }

  const char *(*error_string)(int);
  int (*create)(Program *, const char *source, const char *name, int headers, const char *const *,
                const char *const *);
  int (*destroy)(Program *);
  int (*compile)(Program, int options, const char *const *);
  int (*log_size)(Program, size_t *), (*log)(Program, char *);
  int (*cubin_size)(Program, size_t *), (*cubin)(Program, char *);
  int (*ptx_size)(Program, size_t *), (*ptx)(Program, char *);
  int (*architecture_count)(int *), (*architectures)(int *);
};

std::string text(const Nvrtc &nvrtc, Program program, int (*size_of)(Program, size_t *),
                 int (*read)(Program, char *)) {
  size_t size = 0;
  nvrtc.check(size_of(program, &size), "libnvrtc's output");
  std::string out(size, '\0');
  if (size > 0) nvrtc.check(read(program, out.data()), "libnvrtc's output");
  return out;
}

// The target of --gpu-architecture, and whether it is a cubin's. The driver makes code of PTX for newer devices.
std::pair<std::string, bool> target(const Nvrtc &nvrtc, int architecture) {
  int count = 0;
  nvrtc.check(nvrtc.architecture_count(&count), "libnvrtc's architectures");
  std::vector<int> known(count);
  nvrtc.check(nvrtc.architectures(known.data()), "libnvrtc's architectures");
  int best = 0;
  for (int one : known)
    if (one <= architecture) best = std::max(best, one);
  if (best == 0) throw std::runtime_error("libnvrtc compiles for no GPU as old as this");
  const bool exact = best == architecture;
  return {(exact ? "sm_" : "compute_") + std::to_string(best), exact};
}

}  // namespace

void *open_nvrtc(const std::vector<std::string> &folders) {
  std::string reason = "no folder to look in";
  for (const std::string &folder : folders) {
    const std::string prefix = folder.empty() ? folder : folder + "/";
    // libnvrtc looks for this one by its name alone, and takes it if it is open.
    dlopen((prefix + "libnvrtc-builtins.so.13.0").c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (void *library = dlopen((prefix + "libnvrtc.so.13").c_str(), RTLD_NOW)) return library;
    if (&folder == &folders.front()) reason = dlerror();
  }
  throw std::runtime_error("libnvrtc.so.13, which comes with libtorch's CUDA libraries: " + reason);
}

CompiledKernels compile_kernels(void *library, const char *source, int architecture) {
  const Nvrtc nvrtc(library);
  const auto [name, is_cubin] = target(nvrtc, architecture);
  const std::string option = "--gpu-architecture=" + name;
  // Without contraction of products and sums: what the kernels say is what is computed, there and in the tests.
  const char *options[] = {option.c_str(), "--std=c++17", "--fmad=false", "--ptxas-options=-v"};
  Program program = nullptr;
  nvrtc.check(nvrtc.create(&program, source, "takuma_kernels.cu", 0, nullptr, nullptr),
              "libnvrtc's start");
  struct Destroy {
    const Nvrtc &nvrtc;
    Program &program;
    ~Destroy() { nvrtc.destroy(&program); }
  } destroy{nvrtc, program};
  const int result = nvrtc.compile(program, 4, options);
  CompiledKernels out;
  out.log = text(nvrtc, program, nvrtc.log_size, nvrtc.log);
  if (result != 0)
    throw std::runtime_error("the kernels do not compile for " + name + ": " + out.log);
  out.image = is_cubin ? text(nvrtc, program, nvrtc.cubin_size, nvrtc.cubin)
                       : text(nvrtc, program, nvrtc.ptx_size, nvrtc.ptx);
  return out;
}
