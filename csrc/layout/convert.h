// From a packed word to the bits of four fragment registers, without arithmetic.
//
// `take` leaves each nibble q in the mantissa of a power of two P, so the half-precision value is
// exactly P + q. Subtracting P + z then gives the exact integer q - z. One AND-OR (one LOP3) per
// register; the rotation of the word (kRotation) is chosen so that fp16 needs one shift per word
// and bf16, whose mantissa has room for one position only, three.
#pragma once

#include <cstdint>

#include "layout/packed.h"

namespace marlin::layout {

struct Fp16 {  // 10 mantissa bits: a nibble fits at bits 2..5 (P = 256) and at bits 6..9 (P = 16)
  MARLIN_HOST_DEVICE static constexpr int rotate(int r) { return r / 2 * 8; }
  MARLIN_HOST_DEVICE static constexpr uint32_t mask(int r) {
    return r % 2 ? 0x03c003c0 : 0x003c003c;
  }
  MARLIN_HOST_DEVICE static constexpr uint32_t magic(int r) {
    return r % 2 ? 0x4c004c00 : 0x5c005c00;
  }
  MARLIN_HOST_DEVICE static constexpr int offset(int r) { return r % 2 ? 16 : 256; }
  MARLIN_HOST_DEVICE static constexpr int position(int r) { return r % 2 ? 6 : 2; }
};

struct Bf16 {  // 7 mantissa bits: a nibble at bits 2..5 (P = 32)
  MARLIN_HOST_DEVICE static constexpr int rotate(int r) { return r * 4; }
  MARLIN_HOST_DEVICE static constexpr uint32_t mask(int) { return 0x003c003c; }
  MARLIN_HOST_DEVICE static constexpr uint32_t magic(int) { return 0x42004200; }
  MARLIN_HOST_DEVICE static constexpr int offset(int) { return 32; }
  MARLIN_HOST_DEVICE static constexpr int position(int) { return 2; }
};

// The bits of fragment register r: two 16-bit values, offset(r) + nibble r in the low half and
// offset(r) + nibble r + 4 in the high half.
template <typename Format>
MARLIN_HOST_DEVICE constexpr uint32_t take(uint32_t word, int r) {
  return (rotate_right(word, Format::rotate(r)) & Format::mask(r)) | Format::magic(r);
}

// The bits of {offset(r) + zero, offset(r) + zero}: what to subtract from `take` to get q - zero.
template <typename Format>
MARLIN_HOST_DEVICE constexpr uint32_t subtrahend(uint32_t zero, int r) {
  return Format::magic(r) | (zero << Format::position(r)) * 0x00010001u;
}

namespace proof {

// The value of a positive normal number: 1.mantissa x 2^(exponent - bias), as an exact integer.
constexpr uint32_t integer_value(uint32_t bits, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(bits >> mantissa_bits) - bias;
  const uint32_t mantissa = (bits & ((1u << mantissa_bits) - 1)) | (1u << mantissa_bits);
  return mantissa >> (mantissa_bits - exponent);
}

template <typename Format>
constexpr bool take_is_exact(int mantissa_bits, int bias) {
  for (int r = 0; r < 4; ++r) {
    for (uint32_t low = 0; low < 16; ++low) {
      for (uint32_t high = 0; high < 16; ++high) {
        // Neighbours are all ones: whatever leaked in from them would show.
        uint32_t nibbles[kNibblesPerWord] = {15, 15, 15, 15, 15, 15, 15, 15};
        nibbles[r] = low;
        nibbles[r + 4] = high;
        const uint32_t bits = take<Format>(join(nibbles), r);
        const uint32_t offset = Format::offset(r);
        if (low == high && bits != subtrahend<Format>(low, r)) return false;
        if (integer_value(bits & 0xffff, mantissa_bits, bias) != offset + low) return false;
        if (integer_value(bits >> 16, mantissa_bits, bias) != offset + high) return false;
      }
    }
  }
  return true;
}

static_assert(take_is_exact<Fp16>(10, 15));
static_assert(take_is_exact<Bf16>(7, 127));

}  // namespace proof
}  // namespace marlin::layout
