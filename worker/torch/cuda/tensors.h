// takuma's kernels on tensors: the kernel half of table.h's CudaTable.
#pragma once
#include "table.h"

namespace takuma_cuda {

void vouch(const uint32_t *ended, const at::Tensor &stamp, double phases, double phase, double ranks,
           at::Tensor &pair);
void guard(const std::vector<at::Tensor> &gradients, const at::Tensor &loss, const uint32_t *ended,
           const at::Tensor &pair, const at::Tensor &frozen, bool sticky, at::Tensor &found,
           at::Tensor &index);
void commit_statistics(const std::vector<RunningStatistics> &layers, double momentum,
                       const at::Tensor &found);
void gather_images(const at::Tensor &images, const at::Tensor &rows, at::Tensor &target);
void batch_norm_forward(const std::vector<at::Tensor> &x, const at::Tensor &weight,
                        const at::Tensor &bias, const BatchNormNumbers &numbers,
                        const BatchSumReducer *reducer, std::vector<at::Tensor> &y, at::Tensor &stats,
                        at::Tensor &maps);
void batch_norm_backward(const std::vector<at::Tensor> &x, const std::vector<at::Tensor> &dy,
                         const at::Tensor &weight, const at::Tensor &stats, const at::Tensor &maps,
                         const BatchNormNumbers &numbers, const BatchSumReducer *reducer,
                         std::vector<at::Tensor> &dx, std::vector<at::Tensor> &dweight,
                         std::vector<at::Tensor> &dbias);

}  // namespace takuma_cuda
