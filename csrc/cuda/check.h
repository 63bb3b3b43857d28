#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace marlin::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("marlin: ") + what + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

}  // namespace marlin::cuda
