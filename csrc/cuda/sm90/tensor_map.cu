#include "cuda/sm90/tensor_map.h"

#include <cudaTypedefs.h>

#include "cuda/check.h"

namespace marlin::cuda::sm90 {
namespace {

// From the driver, through the runtime, so that libcuda need not be linked.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
  if (!function) throw std::runtime_error("marlin: the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

CUtensorMapDataType data_type(MapType type) {
  switch (type) {
    case MapType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case MapType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace

CUtensorMap tensor_map(MapType type, const void* data, std::span<const uint64_t> sizes,
                       std::span<const uint64_t> strides, std::span<const uint32_t> box,
                       bool swizzle128) {
  static const auto encode = find_encoder();
  constexpr uint32_t kOne[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, data_type(type), static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data),
             sizes.data(), strides.data(), box.data(), kOne, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("marlin: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace marlin::cuda::sm90
