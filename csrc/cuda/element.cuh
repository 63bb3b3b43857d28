// What differs between fp16 and bf16 activations.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/logic.cuh"
#include "layout/convert.h"
#include "marlin/marlin.h"

namespace marlin::cuda {

template <typename Element>
struct ElementTraits;

template <>
struct ElementTraits<__half> {
  using Pair = __half2;
  using Format = layout::Fp16;
};

template <>
struct ElementTraits<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  using Format = layout::Bf16;
};

template <typename Element>
using Pair = typename ElementTraits<Element>::Pair;

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Element>
__device__ __forceinline__ Element from_float(float x) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// A fragment's worth of weights from one packed word, as exact integers q - zero. `subtrahend[i]`
// belongs to row g + 8i of the fragment, that is, to registers i and i + 2.
template <typename Element>
__device__ __forceinline__ void convert(uint32_t (&fragment)[4], uint32_t word,
                                        const uint32_t (&subtrahend)[2]) {
  using P = Pair<Element>;
  using Format = typename ElementTraits<Element>::Format;
#pragma unroll
  for (int r = 0; r < 4; ++r) {  // layout::take, in one instruction and at most one shift
    const uint32_t rotated =
        Format::rotate(r) == 0 ? word : __funnelshift_r(word, word, Format::rotate(r));
    const uint32_t taken = ptx::and_or(rotated, Format::mask(r), Format::magic(r));
    // By reference, not std::bit_cast: __half2 is not trivially copyable to the host compiler.
    const P value =
        __hsub2(reinterpret_cast<const P&>(taken), reinterpret_cast<const P&>(subtrahend[r % 2]));
    fragment[r] = reinterpret_cast<const uint32_t&>(value);
  }
}

// A fragment times the scales of its rows, rounded: scale[i] holds that of row g + 8i twice.
template <typename Element>
__device__ __forceinline__ void multiply_pairs(uint32_t (&fragment)[4],
                                               const uint32_t (&scale)[2]) {
  using P = Pair<Element>;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const P value =
        __hmul2(reinterpret_cast<const P&>(fragment[r]), reinterpret_cast<const P&>(scale[r % 2]));
    fragment[r] = reinterpret_cast<const uint32_t&>(value);
  }
}

// Two sums, rounded; `low` in the low half.
template <typename Element>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  Pair<Element> pair;
  if constexpr (std::is_same_v<Element, __half>) {
    pair = __floats2half2_rn(low, high);
  } else {
    pair = __floats2bfloat162_rn(low, high);
  }
  return reinterpret_cast<const uint32_t&>(pair);
}

// Calls `f` with a null pointer to the C++ type of `dtype`.
template <typename F>
decltype(auto) dispatch(DType dtype, F&& f) {
  return dtype == DType::kFloat16 ? f(static_cast<__half*>(nullptr))
                                  : f(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace marlin::cuda
