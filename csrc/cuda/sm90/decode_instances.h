// The compiled decode kernels as function pointers, in the order of plan/decode_table.inc or, for 2:4
// sparse weights, plan/decode_24_table.inc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace marlin::cuda::sm90 {

template <typename Element>
struct DecodeParams;

// Kernel `id` of its table for scales every `period` columns: 32, 64 or 128.
template <typename Element, bool kSparse>
auto decode_instance(int id, int period) -> void (*)(DecodeParams<Element>);

template <typename Element>
auto decode_instance(int id, bool sparse, int period) -> void (*)(DecodeParams<Element>) {
  return sparse ? decode_instance<Element, true>(id, period)
                : decode_instance<Element, false>(id, period);
}

}  // namespace marlin::cuda::sm90
