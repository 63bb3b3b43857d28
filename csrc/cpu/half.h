// fp16 and bf16 to float and back, in portable C++ (round to nearest even).
#pragma once

#include <bit>
#include <cstdint>

#include "marlin/marlin.h"

namespace marlin::cpu {

template <DType kType>
inline float to_float(uint16_t bits) {
  if constexpr (kType == DType::kBFloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  } else {
    // Shift exponent and mantissa into place; a multiplication by 2^112 corrects the exponent's bias
    // and normalises subnormals exactly; infinities and NaNs get the largest exponent.
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
  }
}

template <DType kType>
inline uint16_t from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if constexpr (kType == DType::kBFloat16) {
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fc0u);  // NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  } else {
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to inf
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the bits
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | rounded >> 13);
  }
}

// Calls `f` with the type as a template argument: f.template operator()<kType>().
template <typename F>
void dispatch(DType dtype, F&& f) {
  if (dtype == DType::kFloat16) {
    f.template operator()<DType::kFloat16>();
  } else {
    f.template operator()<DType::kBFloat16>();
  }
}

}  // namespace marlin::cpu
