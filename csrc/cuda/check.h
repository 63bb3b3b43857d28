#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace marlin::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice) {
    throw std::runtime_error(
        "marlin: this build has no code for this GPU; reinstall marlin with TORCH_CUDA_ARCH_LIST "
        "naming its compute capability (`marlin env` shows both)");
  }
  throw std::runtime_error(std::string("marlin: ") + what + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

}  // namespace marlin::cuda
