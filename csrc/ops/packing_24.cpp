#include <algorithm>
#include <cstring>

#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

#include "layout/sparse.h"

namespace marlin::ops {
namespace {

// Where the mask keeps more than two of four. Waits for the device: packing is load-time work.
void check_mask(const Tensor& mask, int64_t n, int64_t k) {
  const Tensor on_cpu = to_cpu(mask);
  const auto* kept = static_cast<const uint8_t*>(on_cpu.data_ptr());
  uint32_t most = 0;  // by words and without a branch, since a layer has millions of quads
  for (int64_t i = 0; i < n * k; i += 4) {
    uint32_t quad;
    std::memcpy(&quad, kept + i, 4);
    quad = layout::kept_bytes(quad);
    quad += quad >> 16;
    most = std::max(most, (quad + (quad >> 8)) & 255);
  }
  if (most <= 2) return;
  for (int64_t i = 0; i < n * k; i += 4) {
    const int count = (kept[i] != 0) + (kept[i + 1] != 0) + (kept[i + 2] != 0) + (kept[i + 3] != 0);
    MARLIN_CHECK(count <= 2, "marlin::pack_24: mask keeps ", count, " weights of row ", i / k,
                 ", columns ", i % k, "..", i % k + 3, "; at most 2 of every 4");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> pack_24(Tensor q, Tensor mask) {
  constexpr const char* kOp = "pack_24";
  check_dtype(kOp, "q", q, ScalarType::Byte);
  check_dim(kOp, "q", q, 2, "[N, K]");
  check_not_empty(kOp, "q", q);
  check_contiguous(kOp, "q", q);
  check_quads(kOp, "K of q", q.size(1));
  check_dtype(kOp, "mask", mask, ScalarType::Bool);
  MARLIN_CHECK(mask.dim() == 2 && mask.size(0) == q.size(0) && mask.size(1) == q.size(1),
               "marlin::pack_24: mask must have the shape of q, ", shape_of(q), ", got ",
               shape_of(mask));
  check_contiguous(kOp, "mask", mask);
  check_same_device(kOp, "mask", mask, "q", q);
  const int64_t top = largest(q);
  MARLIN_CHECK(top < 16, "marlin::pack_24: q must hold 4-bit values, 0..15, got ", top);
  const int64_t n = q.size(0), k = q.size(1);
  check_mask(mask, n, k);

  const int64_t n_blocks = layout::ceil_div(n, layout::kBlock);
  const int64_t k_blocks = layout::ceil_div(k, layout::kSparseColumns);
  const Tensor qweight =
      torch::stable::new_empty(q, {n_blocks, k_blocks, layout::kWordsPerBlock}, ScalarType::Int);
  const Tensor meta = torch::stable::new_empty(q, {n_blocks, k_blocks, layout::kMetaWordsPerBlock},
                                               ScalarType::Int);
  const Sparse source{static_cast<const uint8_t*>(q.data_ptr()),
                      static_cast<const uint8_t*>(mask.data_ptr())};
  auto* words = static_cast<int32_t*>(qweight.data_ptr());
  auto* meta_words = static_cast<int32_t*>(meta.data_ptr());
  run_where(
      q,
      [&](const cpu::ParallelFor& parallel_for) {
        cpu::pack_24(source, words, meta_words, n, k, parallel_for);
      },
      [&](auto stream) { cuda::pack_24(source, words, meta_words, n, k, stream); });
  return {qweight, meta};
}

std::tuple<Tensor, Tensor> unpack_24(Tensor qweight, Tensor meta, int64_t n, int64_t k) {
  constexpr const char* kOp = "unpack_24";
  check_packed(kOp, qweight, true);
  check_meta(kOp, meta, qweight);
  check_quads(kOp, "k", k);
  MARLIN_CHECK(n >= 1 && layout::ceil_div(n, layout::kBlock) == qweight.size(0) && k >= 1 &&
                   layout::ceil_div(k, layout::kSparseColumns) == qweight.size(1),
               "marlin::unpack_24: n = ", n, ", k = ", k, " do not fit qweight ", shape_of(qweight),
               ", which is [ceil(n/64), ceil(k/128), 512]");
  check_places(kOp, meta, n, k);
  const Tensor q = torch::stable::new_empty(qweight, {n, k}, ScalarType::Byte);
  const Tensor mask = torch::stable::new_empty(qweight, {n, k}, ScalarType::Bool);
  const auto* words = static_cast<const int32_t*>(qweight.data_ptr());
  const auto* meta_words = static_cast<const int32_t*>(meta.data_ptr());
  auto* values = static_cast<uint8_t*>(q.data_ptr());
  auto* stored = static_cast<uint8_t*>(mask.data_ptr());
  run_where(
      qweight,
      [&](const cpu::ParallelFor& parallel_for) {
        cpu::unpack_24(words, meta_words, values, stored, n, k, parallel_for);
      },
      [&](auto stream) { cuda::unpack_24(words, meta_words, values, stored, n, k, stream); });
  return {q, mask};
}

}  // namespace marlin::ops
