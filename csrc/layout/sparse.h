// The packed format of 2:4 sparse weights: where the survivors and their places live. Compiled by g++
// and nvcc alike.
//
// Of every four neighbouring columns of a row, a quad, at most two weights survive; two are stored. A
// block is 64 rows x 128 columns: its 64 x 64 survivors are a block of layout/packed.h, column 2 i + j of
// which is survivor j of quad i, and their places are the metadata operand of `mma.sp` m16n8k32 and
// `wgmma.sp` m64k32, two words a thread. The specification is in csrc/README.md.
#pragma once

#include "layout/source.h"

namespace marlin::layout {

inline constexpr int kSparseColumns = 128;         // of a block
inline constexpr int kQuads = kSparseColumns / 4;  // in a row of a block
inline constexpr int kMetaWordsPerThread = 2;
inline constexpr int kMetaWordsPerBlock = kThreads * kMetaWordsPerThread;
inline constexpr int kMetaBytesPerBlock = kMetaWordsPerBlock * 4;

struct QuadPosition {  // of a quad inside its block
  int row, quad;       // 0..63, 0..31
};

struct MetaCell {  // of a block's metadata
  int thread;      // 0..127
  int word;        // 0..1
  int nibble;      // 0..7: first place | second place << 2
};

// Threads t = 0 and 1 of four hold the first two steps of 32 columns, t = 2 and 3 the others, so that a
// step is selected by the instruction's selector. Of a step, t % 2 says which 16 columns; the low half of
// a word is row g, the high half row g + 8 (PTX ISA, "Sparse matrix storage", for m16n8k32 and 16 bits).
MARLIN_HOST_DEVICE constexpr QuadPosition quad_position_of(MetaCell c) {
  const int warp = c.thread / 32, g = c.thread % 32 / 4, t = c.thread % 4;
  const int step = t / 2 * 2 + c.word;
  return {16 * warp + g + 8 * (c.nibble / 4), 8 * step + 4 * (t % 2) + c.nibble % 4};
}

MARLIN_HOST_DEVICE constexpr MetaCell meta_cell_of(QuadPosition p) {
  const int warp = p.row / 16, g = p.row % 8, row_half = p.row / 8 % 2;
  const int step = p.quad / 8, column_half = p.quad / 4 % 2;
  return {32 * warp + 4 * g + step / 2 * 2 + column_half, step % 2, 4 * row_half + p.quad % 4};
}

// Index, in 32-bit words, of a word of the metadata tensor int32 [n_blocks, k_blocks, 256].
MARLIN_HOST_DEVICE constexpr int64_t meta_index(int64_t n_block, int64_t k_block, int64_t k_blocks,
                                                int thread, int word) {
  return (n_block * k_blocks + k_block) * kMetaWordsPerBlock + thread * kMetaWordsPerThread + word;
}

// The places of a quad's two survivors in a metadata nibble. The first is always the smaller: so the
// ordered forms of the instructions want it.
struct Places {
  int first, second;
};
MARLIN_HOST_DEVICE constexpr uint32_t nibble_of(Places p) {
  return static_cast<uint32_t>(p.first | p.second << 2);
}
MARLIN_HOST_DEVICE constexpr Places places_of(uint32_t nibble) {
  return {static_cast<int>(nibble & 3), static_cast<int>(nibble >> 2 & 3)};
}

// Whether the places of all eight nibbles of a word rise: by bits, since a layer has millions of them.
MARLIN_HOST_DEVICE constexpr bool places_rise(uint32_t word) {
  constexpr uint32_t kEach = 0x11111111u;  // a bit of every nibble: first | second << 2
  const uint32_t first_low = word, first_high = word >> 1;
  const uint32_t second_low = word >> 2, second_high = word >> 3;
  const uint32_t equal_high = ~(first_high ^ second_high);
  const uint32_t less = (~first_high & second_high) | (equal_high & ~first_low & second_low);
  return (less & kEach) == kEach;
}

// The bytes of a quad's mask, which keep where they are not 0, as bytes of 0 and 1.
MARLIN_HOST_DEVICE constexpr uint32_t kept_bytes(uint32_t mask) {
  constexpr uint32_t kLow = 0x7f7f7f7fu;
  return (((mask & kLow) + kLow) | mask) >> 7 & 0x01010101u;
}
static_assert(kept_bytes(0x00000000u) == 0x00000000u && kept_bytes(0x01000201u) == 0x01000101u &&
              kept_bytes(0x80ff007fu) == 0x01010001u);

// Sizes of a sparse weight; `k` is a multiple of 4.
struct SparseShape {
  int64_t n, k;
  MARLIN_HOST_DEVICE Shape survivors() const { return {n, k / 2}; }  // a dense weight
  MARLIN_HOST_DEVICE int64_t n_blocks() const { return ceil_div(n, kBlock); }
  MARLIN_HOST_DEVICE int64_t k_blocks() const { return ceil_div(k, kSparseColumns); }
  MARLIN_HOST_DEVICE int64_t meta_words() const {
    return n_blocks() * k_blocks() * kMetaWordsPerBlock;
  }
};

// Which places of a quad are stored, where bit i of `kept` says that the mask keeps place i: those that
// are kept, and where these are fewer than two, the first of the others.
MARLIN_HOST_DEVICE constexpr Places stored_places(uint32_t kept) {
  bool stored[4] = {};
  int count = 0;
  for (int i = 0; i < 4; ++i) {
    stored[i] = (kept >> i & 1) && count < 2;
    count += stored[i];
  }
  for (int i = 0; i < 4 && count < 2; ++i) {
    if (!stored[i]) stored[i] = true, ++count;
  }
  Places places{-1, -1};
  for (int i = 0; i < 4; ++i) {
    if (stored[i]) (places.first < 0 ? places.first : places.second) = i;
  }
  return places;
}

// Of a quad of a weight. Outside the weight: 0 and 1.
MARLIN_HOST_DEVICE inline Places stored_places(const Sparse& s, SparseShape shape, int64_t row,
                                               int64_t quad) {
  uint32_t kept = 0;
  if (row < shape.n && quad * 4 < shape.k) {
    for (int i = 0; i < 4; ++i) {
      kept |= static_cast<uint32_t>(s.mask[row * shape.k + quad * 4 + i] != 0) << i;
    }
  }
  return stored_places(kept);
}

// Survivor `col` of a row, so that `packed_word` packs `shape.survivors()` like any dense weight.
MARLIN_HOST_DEVICE inline uint32_t weight_at(const Sparse& s, Shape survivors, int64_t row,
                                             int64_t col) {
  const SparseShape shape{survivors.n, 2 * survivors.k};
  const int64_t quad = col / 2;
  const Places places = stored_places(s, shape, row, quad);
  return s.q[row * shape.k + quad * 4 + (col % 2 ? places.second : places.first)] & 15u;
}

// Word `index` of the metadata.
MARLIN_HOST_DEVICE inline uint32_t meta_word(const Sparse& s, SparseShape shape, int64_t index) {
  const int64_t block = index / kMetaWordsPerBlock;
  const int thread = static_cast<int>(index % kMetaWordsPerBlock) / kMetaWordsPerThread;
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const QuadPosition p =
        quad_position_of({thread, static_cast<int>(index % kMetaWordsPerThread), i});
    const int64_t row = block / shape.k_blocks() * kBlock + p.row;
    const int64_t quad = block % shape.k_blocks() * kQuads + p.quad;
    word |= nibble_of(stored_places(s, shape, row, quad)) << (4 * i);
  }
  return word;
}

// The places of a quad of a packed weight.
MARLIN_HOST_DEVICE inline Places packed_places(const int32_t* meta, int64_t k_blocks, int64_t row,
                                               int64_t quad) {
  const MetaCell c =
      meta_cell_of({static_cast<int>(row % kBlock), static_cast<int>(quad % kQuads)});
  const int64_t block = row / kBlock * k_blocks + quad / kQuads;
  const int32_t word = meta[block * kMetaWordsPerBlock + c.thread * kMetaWordsPerThread + c.word];
  return places_of(static_cast<uint32_t>(word) >> (4 * c.nibble) & 15u);
}

// The stored weight at a column of a packed weight, or -1 where none is stored.
MARLIN_HOST_DEVICE inline int unpacked_survivor(const int32_t* qweight, const int32_t* meta,
                                                int64_t k_blocks, int64_t row, int64_t column) {
  const int64_t quad = column / 4;
  const Places places = packed_places(meta, k_blocks, row, quad);
  const int place = static_cast<int>(column % 4);
  if (place != places.first && place != places.second) return -1;
  const int64_t survivor = quad * 2 + (place == places.first ? 0 : 1);
  return static_cast<int>(unpacked_weight(qweight, k_blocks, row, survivor));
}

// The integer of any packed weight; `zero` where a sparse one stores none.
MARLIN_HOST_DEVICE inline int weight_or_zero(const Dequantize& args, int64_t k_blocks, int64_t row,
                                             int64_t column, int zero) {
  if (!args.meta) return static_cast<int>(unpacked_weight(args.qweight, k_blocks, row, column));
  const int stored = unpacked_survivor(args.qweight, args.meta, k_blocks, row, column);
  return stored < 0 ? zero : stored;
}

// --- proofs ---------------------------------------------------------------------------------

namespace proof {

constexpr bool meta_cells_and_quads_are_inverse() {
  for (int row = 0; row < kBlock; ++row) {
    for (int quad = 0; quad < kQuads; ++quad) {
      const MetaCell c = meta_cell_of({row, quad});
      if (c.thread < 0 || c.thread >= kThreads || c.word < 0 || c.word >= kMetaWordsPerThread) {
        return false;
      }
      if (c.nibble < 0 || c.nibble >= 8) return false;
      const QuadPosition p = quad_position_of(c);
      if (p.row != row || p.quad != quad) return false;
    }
  }
  return kMetaWordsPerBlock * 8 == kBlock * kQuads;  // so: a bijection
}

// A thread's registers hold the survivors of its own metadata's rows: register r of step s has, in the
// low half, survivor 0 of a quad and in the high half survivor 1, of row g + 8 (r % 2).
constexpr bool registers_hold_whole_quads() {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int word = 0; word < kWordsPerThread; ++word) {
      for (int r = 0; r < 4; ++r) {
        const Position low = position_of({thread, word, r}),
                       high = position_of({thread, word, r + 4});
        if (low.row != high.row || low.col % 2 != 0 || high.col != low.col + 1) return false;
      }
    }
  }
  return true;
}

constexpr bool rising_places_are_told() {
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    const Places places = places_of(nibble);
    for (int at = 0; at < 8; ++at) {  // the other seven rise: 0, 1
      const uint32_t word = (0x44444444u & ~(0xfu << (4 * at))) | nibble << (4 * at);
      if (places_rise(word) != (places.first < places.second)) return false;
    }
  }
  return true;
}

static_assert(rising_places_are_told());
static_assert(meta_cells_and_quads_are_inverse());
static_assert(registers_hold_whole_quads());

}  // namespace proof
}  // namespace marlin::layout
