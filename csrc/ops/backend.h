// Runs a piece of work of the torch-free API where a tensor lives.
#pragma once

#include "ops/torch_stable.h"

namespace marlin::ops {

// `on_cpu(parallel_for)` or `on_cuda(stream)`, the latter with the tensor's device made current. Make
// `on_cuda` a generic lambda: then a build without CUDA never looks at its body.
template <typename OnCpu, typename OnCuda>
void run_where(const Tensor& t, OnCpu&& on_cpu, [[maybe_unused]] OnCuda&& on_cuda) {
  if (!t.is_cuda()) {
    on_cpu(cpu::ParallelFor(torch_parallel_for));
    return;
  }
#ifdef MARLIN_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  on_cuda(current_stream(t.get_device_index()));
#else
  MARLIN_CHECK(false,
               "marlin: a CUDA tensor was given, but marlin was built without CUDA kernels "
               "because nvcc was not found; install the CUDA Toolkit (or set CUDA_HOME) and "
               "reinstall marlin");
#endif
}

}  // namespace marlin::ops
