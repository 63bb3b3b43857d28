// Packing and unpacking on the CPU: a source is read into plain blocks of 64 x 64, which know the way to
// the packed order (cpu/plain_block.h, cpu/sparse_block.h). A new source needs its own `load`, no more.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "cpu/half.h"
#include "cpu/plain_block.h"
#include "cpu/sparse_block.h"
#include "layout/source.h"
#include "layout/sparse.h"

namespace marlin::cpu {
namespace {

constexpr int kBlock = layout::kBlock;
constexpr int64_t kGrain = 16;  // blocks, about 30 us: the least worth a thread

// Eight bytes' low nibbles as one word, and back.
uint32_t nibbles_of(uint64_t bytes) {
  bytes &= 0x0f0f0f0f0f0f0f0fu;
  bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffu;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
  return static_cast<uint32_t>(bytes | bytes >> 16);
}

uint64_t bytes_of(uint32_t nibbles) {
  uint64_t bytes = nibbles;
  bytes = (bytes | bytes << 16) & 0x0000ffff0000ffffu;
  bytes = (bytes | bytes << 8) & 0x00ff00ff00ff00ffu;
  return (bytes | bytes << 4) & 0x0f0f0f0f0f0f0f0fu;
}

// Byte 0 of a word is the first in memory.
static_assert(std::endian::native == std::endian::little);

// The first `count` of kWhole bytes: nearly always all of them, and then without a call of memcpy.
template <int kWhole>
void copy(void* to, const void* from, int count) {
  if (count == kWhole) {
    std::memcpy(to, from, kWhole);
  } else {
    std::memcpy(to, from, static_cast<size_t>(count));
  }
}

// Where a block lies in a weight, and how much of it.
struct Part {
  int64_t row, col;  // its first
  int rows, cols;    // inside the weight: 1..64

  Part(layout::Shape shape, int64_t block)
      : row(block / shape.k_blocks() * kBlock),
        col(block % shape.k_blocks() * kBlock),
        rows(static_cast<int>(std::min<int64_t>(kBlock, shape.n - row))),
        cols(static_cast<int>(std::min<int64_t>(kBlock, shape.k - col))) {}
};

PlainBlock load(const Unpacked& source, layout::Shape shape, const Part& part) {
  PlainBlock block;
  for (int row = 0; row < part.rows; ++row) {
    const uint8_t* from = source.data + (part.row + row) * shape.k + part.col;
    uint64_t bytes[kEights] = {};
    copy<sizeof(bytes)>(bytes, from, part.cols);
    for (int c = 0; c < kEights; ++c) block.eights[c][row] = nibbles_of(bytes[c]);
  }
  return block;
}

// Packed column 8 c + i comes from any word of its source row: nibbles go to place i by a shift that
// is one for all 64 rows.
void load_permuted(const Gptq& source, layout::Shape shape, const Part& part, PlainBlock& block) {
  for (int col = 0; col < part.cols; col += 8) {
    const int32_t* from[8];
    int shift[8];
    for (int i = 0; i < 8; ++i) {
      const int32_t feature = source.perm[part.col + col + i];
      from[i] = source.data + feature / 8 * shape.n + part.row;
      shift[i] = feature % 8 * 4;
    }
    for (int row = 0; row < part.rows; ++row) {
      uint32_t word = 0;
      for (int i = 0; i < 8; ++i) {
        word |= (static_cast<uint32_t>(from[i][row]) >> shift[i] & 15) << 4 * i;
      }
      block.eights[col / 8][row] = word;
    }
  }
}

PlainBlock load(const Gptq& source, layout::Shape shape, const Part& part) {
  PlainBlock block;
  if (source.perm) {
    load_permuted(source, shape, part, block);
    return block;
  }
  for (int col = 0; col < part.cols; col += 8) {
    const int32_t* from = source.data + (part.col + col) / 8 * shape.n + part.row;
    copy<4 * kBlock>(block.eights[col / 8], from, 4 * part.rows);
  }
  return block;
}

// Words hold eight output features of one column: eight columns are transposed, nibble by nibble.
constexpr int kAwqWords = kBlock / 8;  // side by side in a block: eight output features each

// Exchanges word i, nibble j with word j, nibble i, of `kAwqWords` columns of eight words.
void transpose_nibbles(uint32_t (&words)[8][kAwqWords]) {
  constexpr uint32_t kLow[] = {0, 0x0f0f0f0fu, 0x00ff00ffu, 0, 0x0000ffffu};
  for (const int distance : {4, 2, 1}) {
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      for (int w = 0; w < kAwqWords; ++w) {
        uint32_t &low = words[i][w], &high = words[i + distance][w];
        const uint32_t differ = (low >> 4 * distance ^ high) & kLow[distance];
        low ^= differ << 4 * distance;
        high ^= differ;
      }
    }
  }
}

PlainBlock load(const Awq& source, layout::Shape shape, const Part& part) {
  PlainBlock block;
  for (int col = 0; col < part.cols; col += 8) {
    uint32_t words[8][kAwqWords] = {};  // [column][eight output features]
    for (int i = 0; i < std::min(8, part.cols - col); ++i) {
      const int32_t* from = source.data + ((part.col + col + i) * shape.n + part.row) / 8;
      copy<4 * kAwqWords>(words[i], from, part.rows / 2);
    }
    transpose_nibbles(words);
    for (int nibble = 0; nibble < 8; ++nibble) {
      const int feature = nibble % 4 * 2 + nibble / 4;  // {0, 2, 4, 6, 1, 3, 5, 7}
      for (int w = 0; w < kAwqWords; ++w) {
        block.eights[col / 8][8 * w + feature] = words[nibble][w];
      }
    }
  }
  return block;
}

// By which places of a quad are kept, as a bit each.
constexpr auto kStoredPlaces = [] {
  std::array<layout::Places, 16> places{};
  for (uint32_t kept = 0; kept < 16; ++kept) places[kept] = layout::stored_places(kept);
  return places;
}();

SparseBlock load(const Sparse& source, layout::Shape survivors, const Part& part) {
  SparseBlock block;
  for (int row = 0; row < part.rows; ++row) {
    const int64_t at = 2 * ((part.row + row) * survivors.k + part.col);
    uint32_t weights[layout::kQuads] = {}, mask[layout::kQuads] = {};
    copy<sizeof(weights)>(weights, source.q + at, 2 * part.cols);
    copy<sizeof(mask)>(mask, source.mask + at, 2 * part.cols);
    for (int c = 0; c < kEights; ++c) {
      uint32_t eight = 0, places = 0;
      for (int i = 0; i < 4; ++i) {
        const int quad = 4 * c + i;
        // The product brings bits 0, 8, 16, 24 to 24 .. 27, and the others elsewhere.
        const uint32_t kept = layout::kept_bytes(mask[quad]) * 0x01020408u >> 24;
        const layout::Places stored = kStoredPlaces[kept];
        const uint32_t first = weights[quad] >> 8 * stored.first & 15;
        const uint32_t second = weights[quad] >> 8 * stored.second & 15;
        eight |= (first | second << 4) << 8 * i;
        places |= layout::nibble_of(stored) << 4 * i;
      }
      block.survivors.eights[c][row] = eight;
      block.places[c][row] = static_cast<uint16_t>(places);
    }
  }
  return block;
}

template <typename Source>
void pack_blocks(const Source& source, int32_t* qweight, layout::Shape shape,
                 const ParallelFor& parallel_for) {
  parallel_for(shape.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      store_packed(load(source, shape, Part(shape, block)),
                   qweight + block * layout::kWordsPerBlock);
    }
  });
}

}  // namespace

void serial_for(int64_t count, int64_t /*grain*/, const Body& body) {
  if (count > 0) body(0, count);
}

void pack(const Unpacked& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for) {
  pack_blocks(source, qweight, {n, k}, parallel_for);
}

void pack(const Gptq& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for) {
  pack_blocks(source, qweight, {n, k}, parallel_for);
}

void pack(const Awq& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for) {
  pack_blocks(source, qweight, {n, k}, parallel_for);
}

void unpack(const int32_t* qweight, uint8_t* q, int64_t n, int64_t k,
            const ParallelFor& parallel_for) {
  const layout::Shape shape{n, k};
  parallel_for(shape.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part part(shape, i);
      const PlainBlock block = load_packed(qweight + i * layout::kWordsPerBlock);
      for (int row = 0; row < part.rows; ++row) {
        uint64_t bytes[kEights];
        for (int c = 0; c < kEights; ++c) bytes[c] = bytes_of(block.eights[c][row]);
        copy<sizeof(bytes)>(q + (part.row + row) * k + part.col, bytes, part.cols);
      }
    }
  });
}

void pack_24(const Sparse& source, int32_t* qweight, int32_t* meta, int64_t n, int64_t k,
             const ParallelFor& parallel_for) {
  const layout::Shape survivors = layout::SparseShape{n, k}.survivors();
  parallel_for(survivors.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      store_packed(load(source, survivors, Part(survivors, i)),
                   qweight + i * layout::kWordsPerBlock, meta + i * layout::kMetaWordsPerBlock);
    }
  });
}

void unpack_24(const int32_t* qweight, const int32_t* meta, uint8_t* q, uint8_t* mask, int64_t n,
               int64_t k, const ParallelFor& parallel_for) {
  const layout::Shape survivors = layout::SparseShape{n, k}.survivors();
  parallel_for(survivors.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part part(survivors, i);
      const SparseBlock block =
          load_packed(qweight + i * layout::kWordsPerBlock, meta + i * layout::kMetaWordsPerBlock);
      for (int row = 0; row < part.rows; ++row) {
        const int64_t at = (part.row + row) * k + 2 * part.col;
        uint32_t values[layout::kQuads], stored[layout::kQuads];
        for (int quad = 0; quad < layout::kQuads; ++quad) {
          const uint32_t pair = block.survivors.eights[quad / 4][row] >> quad % 4 * 8;
          const layout::Places places =
              layout::places_of(block.places[quad / 4][row] >> quad % 4 * 4);
          const int first = 8 * places.first, second = 8 * places.second;
          values[quad] = (pair & 15) << first | (pair >> 4 & 15) << second;
          stored[quad] = 1u << first | 1u << second;
        }
        copy<sizeof(values)>(q + at, values, 2 * part.cols);
        copy<sizeof(stored)>(mask + at, stored, 2 * part.cols);
      }
    }
  });
}

void dequantize(const Dequantize& args, const ParallelFor& parallel_for) {
  const int64_t k_blocks =
      layout::ceil_div(args.k, args.meta ? layout::kSparseColumns : layout::kBlock);
  const auto* scales = static_cast<const uint16_t*>(args.scales);
  auto* weight = static_cast<uint16_t*>(args.weight);
  // What a bad permutation leaves out must not be stray memory: all ones is NaN.
  if (args.perm) std::fill_n(weight, args.n * args.k, uint16_t{0xffff});
  dispatch(args.dtype, [&]<DType kType>() {
    parallel_for(args.n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < args.k; ++col) {
          const int64_t at = col / args.group_size * args.n + row;
          const int zero = args.zeros ? args.zeros[at] : layout::kSymmetricZero;
          const int q = layout::weight_or_zero(args, k_blocks, row, col, zero);
          const int64_t feature = args.perm ? args.perm[col] : col;
          weight[row * args.k + feature] =
              from_float<kType>(static_cast<float>(q - zero) * to_float<kType>(scales[at]));
        }
      }
    });
  });
}

}  // namespace marlin::cpu
