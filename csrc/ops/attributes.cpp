// The one C symbol that the op library exports: marlin._inspect asks it for kernel attributes, so that
// it need not carry the kernels a second time.
#include <cstdio>
#include <exception>

#include "cuda/attributes.h"

#ifdef MARLIN_WITH_CUDA

extern "C" __attribute__((visibility("default"))) int marlin_kernel_attributes(
    int id, int bf16, marlin::cuda::KernelAttributes* out, char* error, size_t error_size) try {
  *out = marlin::cuda::kernel_attributes(id,
                                         bf16 ? marlin::DType::kBFloat16 : marlin::DType::kFloat16);
  return 0;
} catch (const std::exception& e) {
  std::snprintf(error, error_size, "%s", e.what());
  return 1;
}

#endif
