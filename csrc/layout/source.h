// Reading and writing single weights: the foreign layouts that can be packed, and the packed one.
// Packing happens once, at load time, so these are simple rather than fast: enough on a GPU. A CPU packs
// block by block (cpu/plain_block.h), and is tested against these.
#pragma once

#include "layout/packed.h"
#include "marlin/marlin.h"

namespace marlin::layout {

struct Shape {
  int64_t n, k;  // output features, input features (before padding)
  MARLIN_HOST_DEVICE int64_t n_blocks() const { return ceil_div(n, kBlock); }
  MARLIN_HOST_DEVICE int64_t k_blocks() const { return ceil_div(k, kBlock); }
  MARLIN_HOST_DEVICE int64_t blocks() const { return n_blocks() * k_blocks(); }
  MARLIN_HOST_DEVICE int64_t words() const { return blocks() * kWordsPerBlock; }
};

// The weight of output feature `row` at packed column `col`.
MARLIN_HOST_DEVICE inline uint32_t weight_at(const Unpacked& s, Shape shape, int64_t row,
                                             int64_t col) {
  return s.data[row * shape.k + col] & 15u;
}

MARLIN_HOST_DEVICE inline uint32_t weight_at(const Gptq& s, Shape shape, int64_t row, int64_t col) {
  const int64_t source = s.perm ? s.perm[col] : col;
  return static_cast<uint32_t>(s.data[source / 8 * shape.n + row]) >> (source % 8 * 4) & 15u;
}

MARLIN_HOST_DEVICE inline uint32_t weight_at(const Awq& s, Shape shape, int64_t row, int64_t col) {
  // Column 8c + j is nibble j / 2 + 4 (j % 2): the inverse of {0, 2, 4, 6, 1, 3, 5, 7}.
  const int j = static_cast<int>(row % 8), nibble = j / 2 + 4 * (j % 2);
  return static_cast<uint32_t>(s.data[col * (shape.n / 8) + row / 8]) >> (4 * nibble) & 15u;
}

// Word `index` of the packed tensor. Padding is 0.
template <typename Source>
MARLIN_HOST_DEVICE uint32_t packed_word(const Source& source, Shape shape, int64_t index) {
  const int64_t block = index / kWordsPerBlock;
  const int thread = static_cast<int>(index % kWordsPerBlock) / kWordsPerThread;
  const int word = static_cast<int>(index % kWordsPerThread);
  uint32_t nibbles[kNibblesPerWord];
  for (int i = 0; i < kNibblesPerWord; ++i) {
    const Position p = position_of({thread, word, i});
    const int64_t row = block / shape.k_blocks() * kBlock + p.row;
    const int64_t col = block % shape.k_blocks() * kBlock + p.col;
    nibbles[i] = row < shape.n && col < shape.k ? weight_at(source, shape, row, col) : 0;
  }
  return join(nibbles);
}

// The weight of output feature `row` at packed column `col` of a packed tensor.
MARLIN_HOST_DEVICE inline uint32_t unpacked_weight(const int32_t* qweight, int64_t k_blocks,
                                                   int64_t row, int64_t col) {
  const Cell c = cell_of({static_cast<int>(row % kBlock), static_cast<int>(col % kBlock)});
  const int64_t at = word_index(row / kBlock, col / kBlock, k_blocks, c.thread, c.word);
  return nibble_of(static_cast<uint32_t>(qweight[at]), c.nibble);
}

}  // namespace marlin::layout
