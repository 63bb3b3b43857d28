// A block of the 2:4 sparse format in a plain order, and the way from one to the other: the fellow of
// cpu/plain_block.h.
#pragma once

#include <algorithm>

#include "cpu/plain_block.h"
#include "layout/sparse.h"

namespace marlin::cpu {

// The survivors and their places: byte j of eights[c][row] holds the two of quad 4 c + j, and nibble j
// of places[c][row] says where they are.
struct SparseBlock {
  PlainBlock survivors;
  alignas(64) uint16_t places[kEights][layout::kBlock];

  SparseBlock() { std::fill_n(&places[0][0], kEights * layout::kBlock, uint16_t{0x4444}); }
};

// Calls f(word of metadata, places of its low half, places of its high half): see quad_position_of.
template <typename Meta, typename Block, typename F>
void for_each_meta_word(Meta* meta, Block& block, F&& f) {
  for (int warp = 0; warp < 4; ++warp) {
    for (int g = 0; g < 8; ++g) {
      for (int t = 0; t < 4; ++t) {
        for (int u = 0; u < layout::kMetaWordsPerThread; ++u) {
          auto& places = block.places[t / 2 * 4 + u * 2 + t % 2];
          const int thread = 32 * warp + 4 * g + t, row = 16 * warp + g;
          f(meta[thread * layout::kMetaWordsPerThread + u], places[row], places[row + 8]);
        }
      }
    }
  }
}

inline void store_packed(const SparseBlock& block, int32_t* packed, int32_t* meta) {
  store_packed(block.survivors, packed);
  for_each_meta_word(meta, block, [](int32_t& word, uint32_t low, uint32_t high) {
    word = static_cast<int32_t>(low | high << 16);
  });
}

inline SparseBlock load_packed(const int32_t* packed, const int32_t* meta) {
  SparseBlock block;
  block.survivors = load_packed(packed);
  for_each_meta_word(meta, block, [](int32_t word, uint16_t& low, uint16_t& high) {
    low = static_cast<uint16_t>(word);
    high = static_cast<uint16_t>(static_cast<uint32_t>(word) >> 16);
  });
  return block;
}

}  // namespace marlin::cpu
