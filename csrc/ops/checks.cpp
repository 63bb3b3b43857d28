#include "ops/checks.h"

#include <algorithm>
#include <vector>

#include "layout/sparse.h"

namespace marlin::ops {
namespace {

std::string prefix(const char* op, const char* name) {
  return std::string("marlin::") + op + ": " + name + " ";
}

// One group, or groups of 32, 64 or 128 columns, the last of which may be short. 0 where none fits.
int64_t group_size_of(int64_t groups, int64_t k) {
  if (groups == 1) return k;
  for (const int64_t size : {32, 64, 128}) {
    if (layout::ceil_div(k, size) == groups) return size;
  }
  return 0;
}

}  // namespace

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  MARLIN_CHECK(t.scalar_type() == wanted, prefix(op, name), "must be ", name_of(wanted), ", got ",
               name_of(t.scalar_type()));
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* layout) {
  MARLIN_CHECK(t.dim() == dim, prefix(op, name), "must have shape ", layout, ", got ", shape_of(t));
}

void check_contiguous(const char* op, const char* name, const Tensor& t) {
  MARLIN_CHECK(t.is_contiguous(), prefix(op, name), "must be contiguous; call ", name,
               ".contiguous()");
}

void check_same_device(const char* op, const char* name, const Tensor& t,
                       const char* reference_name, const Tensor& reference) {
  MARLIN_CHECK(device_of(t) == device_of(reference), prefix(op, name), "is on ", device_of(t),
               " but ", reference_name, " is on ", device_of(reference),
               "; move them to one device");
}

void check_not_empty(const char* op, const char* name, const Tensor& t) {
  MARLIN_CHECK(t.numel() > 0, prefix(op, name), "must not be empty, got ", shape_of(t));
}

void check_alignment(const char* op, const char* name, const Tensor& t) {
  MARLIN_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, prefix(op, name),
               "must start at a 16-byte boundary; call ", name, ".clone()");
}

void check_packed(const char* op, const Tensor& qweight, bool sparse) {
  check_dtype(op, "qweight", qweight, ScalarType::Int);
  MARLIN_CHECK(qweight.dim() == 3 && qweight.size(2) == layout::kWordsPerBlock,
               prefix(op, "qweight"), "must have shape [ceil(N/64), ceil(K/",
               sparse ? layout::kSparseColumns : layout::kBlock, "), 512], got ", shape_of(qweight),
               "; make it with ", sparse ? "pack_24" : "pack, repack_gptq or repack_awq");
  check_contiguous(op, "qweight", qweight);
  check_alignment(op, "qweight", qweight);
}

void check_meta(const char* op, const Tensor& meta, const Tensor& qweight) {
  check_dtype(op, "meta", meta, ScalarType::Int);
  MARLIN_CHECK(meta.dim() == 3 && meta.size(0) == qweight.size(0) &&
                   meta.size(1) == qweight.size(1) && meta.size(2) == layout::kMetaWordsPerBlock,
               prefix(op, "meta"), "must have shape [", qweight.size(0), ", ", qweight.size(1),
               ", 256], as qweight, got ", shape_of(meta), "; make both with pack_24");
  check_contiguous(op, "meta", meta);
  check_alignment(op, "meta", meta);
  check_same_device(op, "meta", meta, "qweight", qweight);
}

void check_quads(const char* op, const char* name, int64_t k) {
  MARLIN_CHECK(k % 4 == 0, prefix(op, name), "must be a multiple of 4, got ", k);
}

void check_places(const char* op, const Tensor& meta, int64_t n, int64_t k) {
  const Tensor on_cpu = to_cpu(meta);
  const auto* words = static_cast<const int32_t*>(on_cpu.data_ptr());
  const auto rises = [](int32_t word) { return layout::places_rise(static_cast<uint32_t>(word)); };
  if (std::all_of(words, words + meta.numel(), rises)) return;
  for (int64_t row = 0; row < n; ++row) {  // where; in the padding it does no harm
    for (int64_t quad = 0; quad < k / 4; ++quad) {
      const layout::Places places = layout::packed_places(words, meta.size(1), row, quad);
      MARLIN_CHECK(places.first < places.second, prefix(op, "meta"), "has the places ",
                   places.first, ", ", places.second, " for row ", row, ", columns ", quad * 4,
                   "..", quad * 4 + 3, "; the first must be the smaller; make it with pack_24");
    }
  }
}

WeightShape check_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                         const OptionalTensor& zeros, const OptionalTensor& perm, int64_t k,
                         bool sparse) {
  check_packed(op, qweight, sparse);
  const int block_columns = sparse ? layout::kSparseColumns : layout::kBlock;
  MARLIN_CHECK(
      scales.scalar_type() == ScalarType::Half || scales.scalar_type() == ScalarType::BFloat16,
      prefix(op, "scales"), "must be float16 or bfloat16, got ", name_of(scales.scalar_type()));
  check_dim(op, "scales", scales, 2, "[G, N]");
  check_contiguous(op, "scales", scales);
  check_same_device(op, "scales", scales, "qweight", qweight);

  const int64_t groups = scales.size(0), n = scales.size(1);
  MARLIN_CHECK(n >= 1 && layout::ceil_div(n, layout::kBlock) == qweight.size(0),
               prefix(op, "scales"), "has N = ", n, " columns, but qweight ", shape_of(qweight),
               " holds ", qweight.size(0), " blocks of 64 output features");
  MARLIN_CHECK(k >= 1 && layout::ceil_div(k, block_columns) == qweight.size(1),
               prefix(op, "qweight"), shape_of(qweight), " holds ", qweight.size(1), " blocks of ",
               block_columns, " input features, but K = ", k);
  constexpr int64_t kLimit = int64_t{1} << 30;  // sizes are 32-bit in the kernels, with room to pad
  MARLIN_CHECK(n < kLimit && k < kLimit, prefix(op, "qweight"), "is for N = ", n, ", K = ", k,
               "; each must be below 2^30");
  const int64_t group_size = group_size_of(groups, k);
  MARLIN_CHECK(group_size != 0, prefix(op, "scales"), "has G = ", groups, " groups, but K = ", k,
               " makes 1, or ", layout::ceil_div(k, 32), ", ", layout::ceil_div(k, 64), " or ",
               layout::ceil_div(k, 128), " for group sizes 32, 64 and 128");
  if (zeros) {
    check_dtype(op, "zeros", *zeros, ScalarType::Byte);
    MARLIN_CHECK(zeros->dim() == 2 && zeros->size(0) == groups && zeros->size(1) == n,
                 prefix(op, "zeros"), "must have the shape of scales, ", shape_of(scales), ", got ",
                 shape_of(*zeros));
    check_contiguous(op, "zeros", *zeros);
    check_same_device(op, "zeros", *zeros, "qweight", qweight);
  }
  if (perm) check_perm(op, *perm, k, qweight);
  return {n, k, groups, group_size};
}

int64_t largest(const Tensor& bytes) {
  const Tensor top = to_cpu(torch::stable::amax(bytes, {0, 1}));
  return *static_cast<const uint8_t*>(top.data_ptr());
}

void check_perm(const char* op, const Tensor& perm, int64_t k, const Tensor& qweight) {
  check_dtype(op, "perm", perm, ScalarType::Int);
  MARLIN_CHECK(perm.dim() == 1 && perm.size(0) == k, prefix(op, "perm"), "must have shape [K] = [",
               k, "], got ", shape_of(perm));
  check_contiguous(op, "perm", perm);
  check_same_device(op, "perm", perm, "qweight", qweight);
}

void check_range_on_cpu(const char* op, const OptionalTensor& perm, int64_t k) {
  if (!perm || !perm->is_cpu()) return;
  const auto* entries = static_cast<const int32_t*>(perm->data_ptr());
  for (int64_t i = 0; i < k; ++i) {
    MARLIN_CHECK(entries[i] >= 0 && entries[i] < k, prefix(op, "perm"), "entry ", i, " is ",
                 entries[i], "; entries must be 0..", k - 1);
  }
}

void check_permutation(const char* op, const Tensor& perm, int64_t k) {
  const Tensor on_cpu = to_cpu(perm);
  check_range_on_cpu(op, on_cpu, k);
  const auto* entries = static_cast<const int32_t*>(on_cpu.data_ptr());
  std::vector<bool> seen(static_cast<size_t>(k), false);
  for (int64_t i = 0; i < k; ++i) {
    MARLIN_CHECK(!seen[entries[i]], prefix(op, "perm"), "holds ", entries[i],
                 " twice; it must be a permutation of 0..", k - 1);
    seen[entries[i]] = true;
  }
}

}  // namespace marlin::ops
