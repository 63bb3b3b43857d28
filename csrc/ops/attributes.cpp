// The C symbols that the op library exports: marlin._inspect asks it about the compiled kernels, so that
// it need not carry them a second time. Both return 0, or 1 with a message in `error`.
#include <cstdio>
#include <exception>

#include "cuda/attributes.h"

#ifdef MARLIN_WITH_CUDA

#define MARLIN_EXPORT extern "C" __attribute__((visibility("default")))

MARLIN_EXPORT int marlin_kernel_attributes(int id, int bf16, marlin::cuda::KernelAttributes* out,
                                           char* error, size_t error_size) try {
  *out = marlin::cuda::kernel_attributes(id,
                                         bf16 ? marlin::DType::kBFloat16 : marlin::DType::kFloat16);
  return 0;
} catch (const std::exception& e) {
  std::snprintf(error, error_size, "%s", e.what());
  return 1;
}

MARLIN_EXPORT int marlin_force_plan(int id, int sm_count, int shares, char* error,
                                    size_t error_size) try {
  marlin::cuda::force_plan(id, sm_count, shares != 0);
  return 0;
} catch (const std::exception& e) {
  std::snprintf(error, error_size, "%s", e.what());
  return 1;
}

#endif
