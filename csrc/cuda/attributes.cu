#include "cuda/attributes.h"

#include "cuda/check.h"
#include "cuda/element.cuh"
#include "cuda/sm80/gemm.cuh"
#include "cuda/sm80/instances.h"
#include "plan/plan.h"

namespace marlin::cuda {

KernelAttributes kernel_attributes(int id, DType dtype) {
  const auto kernels = plan::kernels();
  if (id < 0 || id >= static_cast<int>(kernels.size())) {
    throw std::runtime_error("marlin: there is no kernel " + std::to_string(id) + "; there are " +
                             std::to_string(kernels.size()));
  }
  const plan::Tile& tile = kernels[id].tile;
  const int shared = tile.shared_bytes();
  const auto* function = dispatch(dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    return reinterpret_cast<const void*>(sm80::instances<Element>()[id].gemm);
  });
  cudaFuncAttributes a{};
  check(cudaFuncGetAttributes(&a, function), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, tile.threads(), shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return {a.numRegs,   static_cast<int>(a.localSizeBytes),
          shared,      tile.threads(),
          blocks,      a.binaryVersion,
          a.ptxVersion};
}

}  // namespace marlin::cuda
