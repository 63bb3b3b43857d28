// The packed format without a GPU: words are packed, taken apart by the conversion's bit tricks, and
// multiplied as the PTX ISA says the tensor core would, lane by lane.
#include <gtest/gtest.h>

#include <array>
#include <random>
#include <vector>

#include "cpu/half.h"
#include "layout/convert.h"
#include "layout/packed.h"
#include "layout/sparse.h"
#include "marlin/marlin.h"

namespace {

using namespace marlin;

float value_of(uint16_t bits, DType type) {
  return type == DType::kFloat16 ? cpu::to_float<DType::kFloat16>(bits)
                                 : cpu::to_float<DType::kBFloat16>(bits);
}

// The exact integers q - zero in fragment register r: {low half, high half}.
template <typename Format>
std::array<float, 2> integers(uint32_t word, int r, uint32_t zero) {
  const DType type = std::is_same_v<Format, layout::Fp16> ? DType::kFloat16 : DType::kBFloat16;
  const uint32_t taken = layout::take<Format>(word, r);
  const uint32_t less = layout::subtrahend<Format>(zero, r);
  const auto half = [&](int shift) {
    return value_of(static_cast<uint16_t>(taken >> shift), type) -
           value_of(static_cast<uint16_t>(less >> shift), type);
  };
  return {half(0), half(16)};
}

// d[16][8] += a[16][16] b[16][8], from the 32 lanes' fragments. The lane maps are the figures of the
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", written out by hand.
void emulate_mma(float (&d)[16][8], const float (&a)[32][4][2], const float (&b)[32][2][2]) {
  float full_a[16][16], full_b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 8; ++i) {  // a0 .. a7
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      full_a[row][col] = a[lane][i / 2][i & 1];
    }
    for (int i = 0; i < 4; ++i) {  // b0 .. b3
      full_b[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = b[lane][i / 2][i & 1];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) d[i][j] += full_a[i][k] * full_b[k][j];
    }
  }
}

template <typename Format>
void multiply_block_as_the_tensor_core_would() {
  std::mt19937 random(7);
  std::vector<uint8_t> q(64 * 64);
  for (auto& value : q) value = static_cast<uint8_t>(random() % 16);
  float x[8][64];
  for (auto& row : x) {
    for (float& value : row) value = static_cast<float>(static_cast<int>(random() % 17) - 8);
  }
  std::vector<int32_t> packed(layout::kWordsPerBlock);
  cpu::pack(Unpacked{q.data()}, packed.data(), 64, 64);

  constexpr uint32_t kZero = 5;
  for (int warp = 0; warp < 4; ++warp) {  // the rows of warp w are 16 w .., as for wgmma m64k16
    float d[16][8] = {};
    for (int step = 0; step < 4; ++step) {
      float a[32][4][2], b[32][2][2];
      for (int lane = 0; lane < 32; ++lane) {
        const int thread = warp * 32 + lane;
        const auto word = static_cast<uint32_t>(packed[thread * 4 + step]);
        for (int r = 0; r < 4; ++r) {
          const auto pair = integers<Format>(word, r, kZero);
          a[lane][r][0] = pair[0], a[lane][r][1] = pair[1];
        }
        for (int r = 0; r < 2; ++r) {
          for (int h = 0; h < 2; ++h) {
            b[lane][r][h] = x[lane / 4][step * 16 + lane % 4 * 2 + h + 8 * r];
          }
        }
      }
      emulate_mma(d, a, b);
    }
    for (int row = 0; row < 16; ++row) {
      for (int token = 0; token < 8; ++token) {
        float expected = 0;
        for (int k = 0; k < 64; ++k) {
          expected += (static_cast<float>(q[(warp * 16 + row) * 64 + k]) - kZero) * x[token][k];
        }
        ASSERT_EQ(d[row][token], expected) << "warp " << warp << " row " << row;
      }
    }
  }
}

TEST(Layout, TensorCoreProductInFp16) { multiply_block_as_the_tensor_core_would<layout::Fp16>(); }
TEST(Layout, TensorCoreProductInBf16) { multiply_block_as_the_tensor_core_would<layout::Bf16>(); }

template <typename Format>
void every_nibble_with_every_zero_point() {
  for (uint32_t zero = 0; zero < 16; ++zero) {
    for (int r = 0; r < 4; ++r) {
      for (uint32_t value = 0; value < 256; ++value) {
        uint32_t nibbles[8] = {15, 0, 15, 0, 0, 15, 0, 15};
        nibbles[r] = value & 15;
        nibbles[r + 4] = value >> 4;
        const auto pair = integers<Format>(layout::join(nibbles), r, zero);
        ASSERT_EQ(pair[0], static_cast<float>(value & 15) - static_cast<float>(zero));
        ASSERT_EQ(pair[1], static_cast<float>(value >> 4) - static_cast<float>(zero));
      }
    }
  }
}

TEST(Layout, ConversionIsExactInFp16) { every_nibble_with_every_zero_point<layout::Fp16>(); }
TEST(Layout, ConversionIsExactInBf16) { every_nibble_with_every_zero_point<layout::Bf16>(); }

// The specification's worked example (csrc/README.md): a change here is a change of the format.
TEST(Layout, GoldenWords) {
  std::vector<uint8_t> q(64 * 64);
  for (int row = 0; row < 64; ++row) {
    for (int col = 0; col < 64; ++col)
      q[row * 64 + col] = static_cast<uint8_t>((3 * row + col) % 16);
  }
  std::vector<int32_t> packed(layout::kWordsPerBlock);
  cpu::pack(Unpacked{q.data()}, packed.data(), 64, 64);
  EXPECT_EQ(static_cast<uint32_t>(packed[0]), 0x66442200u);    // thread 0, word 0
  EXPECT_EQ(static_cast<uint32_t>(packed[511]), 0x1132ccefu);  // thread 127, word 3
}

TEST(Layout, PackAndUnpackAreInverse) {
  std::mt19937 random(1);
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1, 1}, {64, 64}, {65, 63}, {200, 72}, {72, 4640}, {129, 333}}) {
    std::vector<uint8_t> q(static_cast<size_t>(n * k)), back(q.size(), 99);
    for (auto& value : q) value = static_cast<uint8_t>(random() % 16);
    const int64_t words = layout::ceil_div(n, 64) * layout::ceil_div(k, 64) * 512;
    std::vector<int32_t> packed(static_cast<size_t>(words), -1);
    cpu::pack(Unpacked{q.data()}, packed.data(), n, k);
    cpu::unpack(packed.data(), back.data(), n, k);
    EXPECT_EQ(q, back) << n << " x " << k;
  }
}

// A sparse block as the tensor core sees it. The figures of the PTX ISA for mma.sp m16n8k32 with 16-bit
// types, written out by hand: a thread's registers hold compressed columns as those of m16n8k16; of
// every four lanes the two that the selector names hold metadata, each for 16 columns of row g in
// the low half of its word and of row g + 8 in the high half.
TEST(Layout, SparseBlocksAreWhatTheTensorCoreWants) {
  constexpr int64_t kRows = 64, kColumns = 128;
  std::mt19937 random(3);
  std::vector<uint8_t> q(kRows * kColumns), mask(q.size()), expected(q.size());
  for (size_t quad = 0; quad < q.size(); quad += 4) {
    const size_t first = random() % 4, second = (first + 1 + random() % 3) % 4;
    for (size_t i = 0; i < 4; ++i) {
      q[quad + i] = static_cast<uint8_t>(1 + random() % 15);
      mask[quad + i] = i == first || i == second;
      expected[quad + i] = mask[quad + i] ? q[quad + i] : 0;
    }
  }
  std::vector<int32_t> words(layout::kWordsPerBlock), meta(layout::kMetaWordsPerBlock);
  cpu::pack_24(Sparse{q.data(), mask.data()}, words.data(), meta.data(), kRows, kColumns);

  std::vector<uint8_t> seen(q.size());
  for (int thread = 0; thread < 128; ++thread) {
    const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
    for (int step = 0; step < 4; ++step) {  // 32 columns each
      const int selector = step / 2;        // lanes 2 selector and 2 selector + 1 of four
      const auto word = static_cast<uint32_t>(words[thread * 4 + step]);
      for (int i = 0; i < 8; ++i) {  // a0 .. a7: see emulate_mma
        const int row_half = i / 2 % 2, compressed = in_group * 2 + i % 2 + (i < 4 ? 0 : 8);
        const int quad = compressed / 2;
        const int lane = 32 * warp + 4 * group + 2 * selector + quad / 4;
        const auto places =
            static_cast<uint32_t>(meta[lane * 2 + step % 2]) >> (16 * row_half + 4 * (quad % 4));
        const uint32_t place = compressed % 2 ? places >> 2 & 3 : places & 3;
        const int row = 16 * warp + group + 8 * row_half;
        const auto column = 32 * step + 4 * quad + static_cast<int>(place);
        seen[row * kColumns + column] =
            static_cast<uint8_t>(layout::nibble_of(word, i / 2 + 4 * (i % 2)));
      }
    }
  }
  EXPECT_EQ(seen, expected);

  std::vector<uint8_t> back(q.size(), 99), stored(q.size(), 99);
  cpu::unpack_24(words.data(), meta.data(), back.data(), stored.data(), kRows, kColumns);
  EXPECT_EQ(back, expected);
  EXPECT_EQ(stored, mask);
}

}  // namespace
