#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

#include "layout/sparse.h"

namespace marlin::ops {
namespace {

// `args` names the weight's own tensors.
Tensor dequantized(Dequantize args, const Tensor& qweight, const Tensor& scales,
                   const OptionalTensor& zeros, const WeightShape& w) {
  const Tensor weight = torch::stable::new_empty(scales, {w.n, w.k});
  args.qweight = static_cast<const int32_t*>(qweight.data_ptr());
  args.scales = scales.data_ptr();
  args.zeros = data_or_null<uint8_t>(zeros);
  args.weight = weight.data_ptr();
  args.n = w.n;
  args.k = w.k;
  args.group_size = w.group_size;
  args.dtype = dtype_of(scales);
  run_where(
      qweight, [&](const cpu::ParallelFor& parallel_for) { cpu::dequantize(args, parallel_for); },
      [&](auto stream) { cuda::dequantize(args, stream); });
  return weight;
}

}  // namespace

Tensor dequantize(Tensor qweight, Tensor scales, OptionalTensor zeros, OptionalTensor perm,
                  std::optional<int64_t> k) {
  constexpr const char* kOp = "dequantize";
  check_packed(kOp, qweight);
  const WeightShape w =
      check_weight(kOp, qweight, scales, zeros, perm, k.value_or(qweight.size(1) * layout::kBlock));
  check_range_on_cpu(kOp, perm, w.k);
  Dequantize args;
  args.perm = data_or_null<int32_t>(perm);
  return dequantized(args, qweight, scales, zeros, w);
}

Tensor dequantize_24(Tensor qweight, Tensor meta, Tensor scales, OptionalTensor zeros,
                     std::optional<int64_t> k) {
  constexpr const char* kOp = "dequantize_24";
  check_packed(kOp, qweight, true);
  check_meta(kOp, meta, qweight);
  const int64_t columns = k.value_or(qweight.size(1) * layout::kSparseColumns);
  check_quads(kOp, "k", columns);
  const WeightShape w = check_weight(kOp, qweight, scales, zeros, std::nullopt, columns, true);
  if (meta.is_cpu()) check_places(kOp, meta, w.n, w.k);  // on a GPU this would wait for the device
  Dequantize args;
  args.meta = static_cast<const int32_t*>(meta.data_ptr());
  return dequantized(args, qweight, scales, zeros, w);
}

}  // namespace marlin::ops
