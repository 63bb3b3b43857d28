#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

#include "layout/packed.h"

namespace marlin::ops {
namespace {

Tensor new_packed(const Tensor& like, int64_t n, int64_t k) {
  return torch::stable::new_empty(like,
                                  {layout::ceil_div(n, layout::kBlock),
                                   layout::ceil_div(k, layout::kBlock), layout::kWordsPerBlock},
                                  ScalarType::Int);
}

template <typename Source>
Tensor pack_from(const Tensor& like, const Source& source, int64_t n, int64_t k) {
  const Tensor out = new_packed(like, n, k);
  auto* words = static_cast<int32_t*>(out.data_ptr());
  run_where(
      like,
      [&](const cpu::ParallelFor& parallel_for) { cpu::pack(source, words, n, k, parallel_for); },
      [&](auto stream) { cuda::pack(source, words, n, k, stream); });
  return out;
}

}  // namespace

Tensor pack(Tensor q) {
  check_dtype("pack", "q", q, ScalarType::Byte);
  check_dim("pack", "q", q, 2, "[N, K]");
  check_not_empty("pack", "q", q);
  check_contiguous("pack", "q", q);
  const int64_t top = largest(q);
  MARLIN_CHECK(top < 16, "marlin::pack: q must hold 4-bit values, 0..15, got ", top);
  return pack_from(q, Unpacked{static_cast<const uint8_t*>(q.data_ptr())}, q.size(0), q.size(1));
}

Tensor repack_gptq(Tensor qweight, OptionalTensor perm) {
  constexpr const char* kOp = "repack_gptq";
  check_dtype(kOp, "qweight", qweight, ScalarType::Int);
  check_dim(kOp, "qweight", qweight, 2, "[K/8, N]");
  check_not_empty(kOp, "qweight", qweight);
  check_contiguous(kOp, "qweight", qweight);
  const int64_t k = qweight.size(0) * 8, n = qweight.size(1);
  if (perm) {
    check_perm(kOp, *perm, k, qweight);
    check_permutation(kOp, *perm, k);
  }
  const Gptq source{static_cast<const int32_t*>(qweight.data_ptr()), data_or_null<int32_t>(perm)};
  return pack_from(qweight, source, n, k);
}

Tensor repack_awq(Tensor qweight) {
  constexpr const char* kOp = "repack_awq";
  check_dtype(kOp, "qweight", qweight, ScalarType::Int);
  check_dim(kOp, "qweight", qweight, 2, "[K, N/8]");
  check_not_empty(kOp, "qweight", qweight);
  check_contiguous(kOp, "qweight", qweight);
  const Awq source{static_cast<const int32_t*>(qweight.data_ptr())};
  return pack_from(qweight, source, qweight.size(1) * 8, qweight.size(0));
}

Tensor unpack(Tensor qweight, int64_t n, int64_t k) {
  check_packed("unpack", qweight);
  MARLIN_CHECK(n >= 1 && layout::ceil_div(n, layout::kBlock) == qweight.size(0) && k >= 1 &&
                   layout::ceil_div(k, layout::kBlock) == qweight.size(1),
               "marlin::unpack: n = ", n, ", k = ", k, " do not fit qweight ", shape_of(qweight),
               ", which is [ceil(n/64), ceil(k/64), 512]");
  const Tensor q = torch::stable::new_empty(qweight, {n, k}, ScalarType::Byte);
  const auto* words = static_cast<const int32_t*>(qweight.data_ptr());
  auto* out = static_cast<uint8_t*>(q.data_ptr());
  run_where(
      qweight,
      [&](const cpu::ParallelFor& parallel_for) { cpu::unpack(words, out, n, k, parallel_for); },
      [&](auto stream) { cuda::unpack(words, out, n, k, stream); });
  return q;
}

}  // namespace marlin::ops
