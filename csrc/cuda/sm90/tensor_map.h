// Tensor maps: how the copy engine finds boxes of a tensor in global memory.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>

namespace marlin::cuda::sm90 {

enum class MapType { kFloat16, kBFloat16, kUint8 };

// `sizes` and `box` innermost first; `strides` in bytes, of all dimensions but the innermost, multiples
// of 16; `data` on 16 bytes. What a box covers outside the tensor reads as zero and is not
// written.
CUtensorMap tensor_map(MapType type, const void* data, std::span<const uint64_t> sizes,
                       std::span<const uint64_t> strides, std::span<const uint32_t> box,
                       bool swizzle128);

}  // namespace marlin::cuda::sm90
