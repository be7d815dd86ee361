// Selective backward, gradient hooks, threads, denormals.
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <omp.h>
#include <ATen/ops/leaky_relu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include "guard.h"

// Of the MKL inside libtorch; NULL in builds without it.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace {

class GradientHook : public torch::autograd::PostAccumulateGradHook {
 public:
  GradientHook(size_t index, takuma_gradient_sink sink) : index_(index), sink_(sink) {}
  GradientHook(const GradientHook &) = delete;
  GradientHook &operator=(const GradientHook &) = delete;
  ~GradientHook() override { sink_.drop(sink_.context); }

  void operator()(const torch::autograd::Variable &parameter) override {
    at::Tensor gradient = parameter.grad();
    switch (sink_.call(sink_.context, index_, &gradient)) {
      case TAKUMA_GRADIENT_LEFT:
        return;
      case TAKUMA_GRADIENT_TAKEN:
        // Its memory is warm in the cache: the next gradient should get it.
        parameter.mutable_grad().reset();
        return;
      default:
        throw std::runtime_error("the gradient exchange failed");
    }
  }

 private:
  size_t index_;
  takuma_gradient_sink sink_;
};

}  // namespace

extern "C" {

void takuma_free_error(char *message) { free(message); }

void takuma_flush_denormals(void) { at::globalContext().setFlushDenormal(true); }

void takuma_compute_on_this_thread_alone(void) {
  // libtorch sets a thread's limits to the process' when the thread first asks; let it do so before. It
  // remembers that twice: inside the library, and in the inline functions that this file has of it.
  at::get_num_threads();
  at::internal::lazy_init_num_threads();
  // OpenMP (libtorch's loops, oneDNN) and MKL each keep a limit per thread. at::set_num_threads would set
  // the process' too.
  omp_set_num_threads(1);
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(1);
}

char *takuma_backward(tensor loss, const tensor *inputs, size_t n_inputs) {
  return guarded([&] {
    torch::autograd::backward({deref(loss)}, {}, /*retain_graph=*/false, /*create_graph=*/false,
                              list(inputs, n_inputs));
  });
}

char *takuma_set_gradient_hook(tensor parameter, size_t index, takuma_gradient_sink sink) {
  auto hook = std::make_unique<GradientHook>(index, sink);
  return guarded([&] {
    torch::autograd::impl::set_post_acc_grad_hooks(deref(parameter), std::move(hook));
  });
}

char *takuma_clear_gradients(const tensor *params, size_t n) {
  return guarded([&] {
    for (auto &parameter : list(params, n)) parameter.mutable_grad().reset();
  });
}

char *takuma_leaky_relu(tensor x, double slope, tensor *y) {
  return guarded([&] { *y = new at::Tensor(at::leaky_relu(deref(x), slope)); });
}

}  // extern "C"
