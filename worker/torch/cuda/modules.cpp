// See modules.h.
#include "modules.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "nvrtc.h"

// Made by build.rs of kernel_types.h and the .cu files; ends with a NUL.
extern const char takuma_kernel_source[];

namespace {

// The driver's functions, which libtorch's libraries do not export.
struct Driver {
  Driver() {
    library = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(library, "the NVIDIA driver cannot be opened: ", dlerror());
    load("cuGetErrorString", error_string);
    load("cuModuleLoadData", load_data);
    load("cuModuleGetFunction", get_function);
    load("cuLaunchKernel", launch);
    load("cuCtxGetCurrent", current_context);
    // Newer than the others; without it a kernel is loaded when it first runs.
    load_function = reinterpret_cast<decltype(load_function)>(dlsym(library, "cuFuncLoad"));
  }

  template <typename Function>
  void load(const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    TORCH_CHECK(function, "the NVIDIA driver has no ", name);
  }

  void check(CUresult result, const char *what) const {
    if (result == CUDA_SUCCESS) return;
    const char *text = nullptr;
    error_string(result, &text);
    TORCH_CHECK(false, what, ": ", text ? text : "unknown error", " (", static_cast<int>(result), ")");
  }

  // A thread of libtorch's that has not used its device yet has no context.
  void ensure_context(int device) const {
    CUcontext context = nullptr;
    check(current_context(&context), "cuCtxGetCurrent");
    if (!context) C10_CUDA_CHECK(cudaSetDevice(device));
  }

  void *library;
  CUresult (*error_string)(CUresult, const char **);
  CUresult (*load_data)(CUmodule *, const void *);
  CUresult (*get_function)(CUfunction *, CUmodule, const char *);
  CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                     CUstream, void **, void **);
  CUresult (*current_context)(CUcontext *);
  CUresult (*load_function)(CUfunction);
};

const Driver &driver() {
  static const Driver one;
  return one;
}

// Where libnvrtc may be: where the loader looks, and in libtorch_cuda.so's folder or wheel.
std::vector<std::string> nvrtc_folders() {
  Dl_info info = {};
  if (!dladdr(reinterpret_cast<void *>(&c10::cuda::current_device), &info) || !info.dli_fname)
    return {""};
  const std::string path = info.dli_fname, folder = path.substr(0, path.rfind('/'));
  return {"", folder, folder + "/../../nvidia/cu13/lib"};
}

// One device's kernels. Never unloaded: they live as long as the process.
class Module {
 public:
  explicit Module(int device) {
    driver().ensure_context(device);
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    const auto compiled = compile_kernels(open_nvrtc(nvrtc_folders()), takuma_kernel_source, 10 * major + minor);
    driver().check(driver().load_data(&module_, compiled.image.c_str()), "cuModuleLoadData");
  }

  CUfunction function(const char *name) {
    const auto known = functions_.find(name);
    if (known != functions_.end()) return known->second;
    CUfunction found = nullptr;
    driver().check(driver().get_function(&found, module_, name), name);
    if (driver().load_function) driver().check(driver().load_function(found), name);
    functions_.emplace(name, found);
    return found;
  }

 private:
  CUmodule module_ = nullptr;
  std::map<std::string, CUfunction, std::less<>> functions_;
};

CUfunction function_of(int device, const char *name) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<Module>> modules;
  const std::lock_guard<std::mutex> lock(mutex);
  auto &module = modules[device];
  if (!module) module = std::make_unique<Module>(device);
  return module->function(name);
}

}  // namespace

void prepare_kernels() {
  const int device = c10::cuda::current_device();
  // All that a phase may launch: a kernel that is loaded during a capture would end it.
  for (const char *type : {"f32_1", "f32_4", "f64_1", "f64_2", "bf16_1", "bf16_8"})
    for (const char *kernel : {"moments_", "normalize_", "gradient_sums_", "gradient_", "gather_"})
      function_of(device, (std::string("takuma_") + kernel + type).c_str());
  for (const char *kernel :
       {"finish_forward_f32", "finish_forward_f64", "finish_backward_f32", "finish_backward_f64", "scan",
        "vouch", "judge", "commit_statistics"})
    function_of(device, (std::string("takuma_") + kernel).c_str());
}

void launch_kernel(const Launch &launch) {
  const int device = c10::cuda::current_device();
  driver().ensure_context(device);
  const CUfunction function = function_of(device, launch.kernel);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  driver().check(driver().launch(function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads,
                                 1, 1, /*dynamic shared memory*/ 0, stream, launch.arguments, nullptr),
                 launch.kernel);
}
