// Every fp16 and bf16 number, and the roundings between them.
#include <gtest/gtest.h>

#include <cmath>

#include "cpu/half.h"

namespace {

using marlin::DType;
using namespace marlin::cpu;

// IEEE 754 binary16 by its definition.
double fp16_by_definition(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

TEST(Half, EveryFp16ReadsAsDefined) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double expected = fp16_by_definition(static_cast<uint16_t>(bits));
    const float got = to_float<DType::kFloat16>(static_cast<uint16_t>(bits));
    ASSERT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected) << bits;
  }
}

template <DType kType>
void every_number_survives() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = to_float<kType>(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(to_float<kType>(from_float<kType>(value))));
    } else {
      ASSERT_EQ(from_float<kType>(value), bits);
    }
  }
}

TEST(Half, EveryFp16Survives) { every_number_survives<DType::kFloat16>(); }
TEST(Half, EveryBf16Survives) { every_number_survives<DType::kBFloat16>(); }

// Halfway between neighbours goes to the even one; a hair to either side goes to the nearer.
template <DType kType>
void rounds_to_nearest_even(uint32_t first, uint32_t last) {
  for (uint32_t bits = first; bits < last; ++bits) {
    const float low = to_float<kType>(static_cast<uint16_t>(bits));
    const float high = to_float<kType>(static_cast<uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    ASSERT_EQ(from_float<kType>(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(from_float<kType>(std::nextafter(middle, low)), bits);
    ASSERT_EQ(from_float<kType>(std::nextafter(middle, high)), bits + 1);
  }
}

TEST(Half, Fp16RoundsToNearestEven) { rounds_to_nearest_even<DType::kFloat16>(0, 0x7bff); }
TEST(Half, Bf16RoundsToNearestEven) { rounds_to_nearest_even<DType::kBFloat16>(0x80, 0x7f7f); }

TEST(Half, OverflowGoesToInfinity) {
  EXPECT_EQ(from_float<DType::kFloat16>(65519.99f), 0x7bff);
  EXPECT_EQ(from_float<DType::kFloat16>(65520.f), 0x7c00);
  EXPECT_EQ(from_float<DType::kFloat16>(-1e30f), 0xfc00);
  EXPECT_EQ(from_float<DType::kBFloat16>(3.4e38f), 0x7f80);
}

}  // namespace
