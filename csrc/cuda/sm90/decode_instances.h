// The compiled decode kernels as function pointers, in the order of plan/decode_table.inc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace marlin::cuda::sm90 {

template <typename Element>
struct DecodeParams;

// Kernel `id` of the table for scales every `period` columns: 32, 64 or 128.
template <typename Element>
auto decode_instance(int id, int period) -> void (*)(DecodeParams<Element>);

}  // namespace marlin::cuda::sm90
