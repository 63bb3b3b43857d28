// What every Hopper kernel is told of a call.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace marlin::cuda::sm90 {

template <typename Element>
struct LayerParams {
  CUtensorMap input;   // {64 columns, m tokens, k / 64}, 128-byte swizzle
  CUtensorMap scales;  // {n, groups}
  CUtensorMap zeros;   // likewise; not used where has_zeros is false
  const int32_t* qweight;
  const Element* bias;  // or null
  Element* output;
  int m, n, n_blocks, k_blocks;  // blocks of weights
  int input_tokens;              // of a stage: between 64 columns of activations and the next
  bool has_zeros, one_group, static_weights;
  const int32_t* meta;  // of 2:4 sparse weights
};

}  // namespace marlin::cuda::sm90
