// The packed weight format: where every 4-bit weight lives. Compiled by g++ and nvcc alike.
//
// A weight matrix [n output features, k input features] is cut into blocks of 64 x 64. A block is
// 128 threads x 16 bytes: the register fragment of `wgmma` m64k16 (and, warp by warp, of `mma.sync`
// m16n8k16) with the weights as operand A, for four steps of k16. So one 16-byte load per thread
// feeds four tensor-core steps. The specification, with a picture, is in csrc/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MARLIN_HOST_DEVICE __host__ __device__
#else
#define MARLIN_HOST_DEVICE
#endif

namespace marlin::layout {

inline constexpr int kBlock = 64;          // output features, and input features, of a block
inline constexpr int kThreads = 128;       // threads that share a block: four warps of 16 rows
inline constexpr int kWordsPerThread = 4;  // one 32-bit word per k16 step
inline constexpr int kNibblesPerWord = 8;  // four registers x two halves
inline constexpr int kWordsPerBlock = kThreads * kWordsPerThread;
inline constexpr int kBytesPerBlock = kWordsPerBlock * 4;
inline constexpr int kSymmetricZero = 8;  // the zero point of a layer without a `zeros` tensor

// Every word is rotated left by this much, so that fp16 takes all eight nibbles into mantissas with
// one shift (5 instructions) and bf16 with three (7): see layout/convert.h.
inline constexpr int kRotation = 2;

struct Position {  // of a weight inside its block
  int row, col;    // output feature, input feature: 0..63
};

struct Cell {  // of a packed block
  int thread;  // 0..127
  int word;    // 0..3: the k16 step
  int nibble;  // 0..7: register r = nibble % 4, half h = nibble / 4
};

// Register r of a lane holds row g + 8 (r % 2) and columns 2t + h + 8 (r / 2) of the k16 step,
// where g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16", operand A).
MARLIN_HOST_DEVICE constexpr Position position_of(Cell c) {
  const int warp = c.thread / 32, g = c.thread % 32 / 4, t = c.thread % 4;
  const int r = c.nibble % 4, h = c.nibble / 4;
  return {16 * warp + g + 8 * (r % 2), 16 * c.word + 2 * t + h + 8 * (r / 2)};
}

MARLIN_HOST_DEVICE constexpr Cell cell_of(Position p) {
  const int warp = p.row / 16, g = p.row % 8, row_half = p.row / 8 % 2;
  const int word = p.col / 16, t = p.col % 8 / 2, h = p.col % 2, col_half = p.col / 8 % 2;
  return {32 * warp + 4 * g + t, word, row_half + 2 * col_half + 4 * h};
}

MARLIN_HOST_DEVICE constexpr uint32_t rotate_left(uint32_t word, int bits) {
  return (word << (bits & 31)) | (word >> (-bits & 31));
}

MARLIN_HOST_DEVICE constexpr uint32_t rotate_right(uint32_t word, int bits) {
  return rotate_left(word, -bits);
}

// nibbles[i] is nibble i, 0..15.
MARLIN_HOST_DEVICE constexpr uint32_t join(const uint32_t (&nibbles)[kNibblesPerWord]) {
  uint32_t word = 0;
  for (int i = 0; i < kNibblesPerWord; ++i) word |= nibbles[i] << (4 * i);
  return rotate_left(word, kRotation);
}

MARLIN_HOST_DEVICE constexpr uint32_t nibble_of(uint32_t word, int nibble) {
  return rotate_right(word, kRotation + 4 * nibble) & 15u;
}

MARLIN_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Index, in 32-bit words, of a word of the packed tensor int32 [n_blocks, k_blocks, 512].
MARLIN_HOST_DEVICE constexpr int64_t word_index(int64_t n_block, int64_t k_block, int64_t k_blocks,
                                                int thread, int word) {
  return (n_block * k_blocks + k_block) * kWordsPerBlock + thread * kWordsPerThread + word;
}

// --- proofs ---------------------------------------------------------------------------------

namespace proof {

constexpr bool cells_and_positions_are_inverse() {
  for (int row = 0; row < kBlock; ++row) {
    for (int col = 0; col < kBlock; ++col) {
      const Cell c = cell_of({row, col});
      if (c.thread < 0 || c.thread >= kThreads || c.word < 0 || c.word >= kWordsPerThread) {
        return false;
      }
      if (c.nibble < 0 || c.nibble >= kNibblesPerWord) return false;
      const Position p = position_of(c);
      if (p.row != row || p.col != col) return false;
    }
  }
  return kThreads * kWordsPerThread * kNibblesPerWord == kBlock * kBlock;  // so: a bijection
}

constexpr bool join_and_nibble_are_inverse() {
  for (int i = 0; i < kNibblesPerWord; ++i) {
    for (uint32_t value = 0; value < 16; ++value) {
      uint32_t nibbles[kNibblesPerWord] = {};
      nibbles[i] = value;
      const uint32_t word = join(nibbles);
      for (int j = 0; j < kNibblesPerWord; ++j) {
        if (nibble_of(word, j) != nibbles[j]) return false;
      }
    }
  }
  return true;
}

static_assert(cells_and_positions_are_inverse());
static_assert(join_and_nibble_are_inverse());

}  // namespace proof
}  // namespace marlin::layout
