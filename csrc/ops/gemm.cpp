#include <limits>
#include <vector>

#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace marlin::ops {
namespace {

void check_input(const char* op, const Tensor& input, const Tensor& qweight, const Tensor& scales) {
  MARLIN_CHECK(
      input.scalar_type() == ScalarType::Half || input.scalar_type() == ScalarType::BFloat16,
      "marlin::", op, ": input must be float16 or bfloat16, got ", name_of(input.scalar_type()),
      "; cast it, e.g. input.to(scales.dtype)");
  MARLIN_CHECK(input.dim() >= 1, "marlin::", op,
               ": input must have shape [..., K], got a tensor without dimensions");
  MARLIN_CHECK(scales.scalar_type() == input.scalar_type(), "marlin::", op, ": scales must have ",
               "the dtype of input, ", name_of(input.scalar_type()), ", got ",
               name_of(scales.scalar_type()));
  check_same_device(op, "input", input, "qweight", qweight);
  const int64_t last = input.dim() - 1;
  MARLIN_CHECK(input.size(last) <= 1 || input.stride(last) == 1, "marlin::", op,
               ": input must have stride 1 along its last dimension, got ", input.stride(last),
               "; call input.contiguous()");
}

void check_bias(const char* op, const Tensor& bias, const Tensor& input, int64_t n) {
  check_dtype(op, "bias", bias, input.scalar_type());
  MARLIN_CHECK(bias.dim() == 1 && bias.size(0) == n, "marlin::", op,
               ": bias must have shape [N] = [", n, "], got ", shape_of(bias));
  check_contiguous(op, "bias", bias);
  check_same_device(op, "bias", bias, "input", input);
}

// The distance between the rows of `input` seen as [m, k], or -1 where there is no such view.
int64_t row_stride(const Tensor& input) {
  const int64_t last = input.dim() - 1;
  int64_t stride = -1, rows = 1;  // rows: how many the dimensions so far make together
  for (int64_t d = last - 1; d >= 0; --d) {
    if (input.size(d) == 1) continue;
    if (stride == -1) {
      stride = input.stride(d);
    } else if (input.stride(d) != stride * rows) {
      return -1;
    }
    rows *= input.size(d);
  }
  return stride == -1 ? input.size(last) : stride;
}

// A weight's tensors; `meta` of a 2:4 sparse one.
struct Weight {
  const Tensor &qweight, &scales;
  const OptionalTensor &meta, &zeros, &perm;
};

Gemm arguments(const Tensor& input, const Weight& weight, const OptionalTensor& bias,
               const WeightShape& w) {
  Gemm args;
  args.input = input.data_ptr();
  args.input_stride = row_stride(input);
  args.qweight = static_cast<const int32_t*>(weight.qweight.data_ptr());
  args.meta = data_or_null<int32_t>(weight.meta);
  args.scales = weight.scales.data_ptr();
  args.zeros = data_or_null<uint8_t>(weight.zeros);
  args.perm = data_or_null<int32_t>(weight.perm);
  args.bias = data_or_null<void>(bias);
  args.m = input.numel() / w.k;
  args.n = w.n;
  args.k = w.k;
  args.group_size = w.group_size;
  args.dtype = dtype_of(input);
  return args;
}

Tensor multiply(const char* op, const Tensor& input, const Weight& weight,
                const OptionalTensor& bias, bool static_weights) {
  const auto& [qweight, scales, meta, zeros, perm] = weight;
  check_input(op, input, qweight, scales);
  const int64_t last = input.dim() - 1;
  const WeightShape w =
      check_weight(op, qweight, scales, zeros, perm, input.size(last), meta.has_value());
  if (bias) check_bias(op, *bias, input, w.n);
  check_range_on_cpu(op, perm, w.k);
  // On a GPU this would wait for the device. There, places that do not rise make outputs undefined, but
  // nothing outside the tensors is read: two bits name one of four columns that are read anyway.
  if (meta && meta->is_cpu()) check_places(op, *meta, w.n, w.k);
  MARLIN_CHECK(input.numel() / w.k < std::numeric_limits<int32_t>::max(), "marlin::", op,
               ": input has ", input.numel() / w.k, " rows; at most 2^31 - 2");

  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes[last] = w.n;
  const Tensor output = torch::stable::new_empty(input, sizes);
  if (output.numel() == 0) return output;

  const Tensor rows = row_stride(input) < 0 ? torch::stable::contiguous(input) : input;
  Gemm args = arguments(rows, weight, bias, w);
  args.output = output.data_ptr();
  args.static_weights = static_weights;
  run_where(
      qweight, [&](const cpu::ParallelFor& parallel_for) { cpu::gemm(args, parallel_for); },
      [&](auto stream) {
        // Scratch comes from torch's allocator, so it is safe across streams and in graph capture.
        const int64_t bytes = cuda::gemm_workspace_bytes(args);
        const Tensor workspace = torch::stable::new_empty(input, {bytes}, ScalarType::Byte);
        cuda::gemm(args, workspace.data_ptr(), stream);
      });
  return output;
}

}  // namespace

Tensor gemm(Tensor input, Tensor qweight, Tensor scales, OptionalTensor zeros, OptionalTensor perm,
            OptionalTensor bias, bool static_weights) {
  return multiply("gemm", input, {qweight, scales, std::nullopt, zeros, perm}, bias,
                  static_weights);
}

Tensor gemm_24(Tensor input, Tensor qweight, Tensor meta, Tensor scales, OptionalTensor zeros,
               OptionalTensor bias, bool static_weights) {
  constexpr const char* kOp = "gemm_24";
  check_packed(kOp, qweight, true);
  check_meta(kOp, meta, qweight);
  if (input.dim() >= 1) check_quads(kOp, "K of input", input.size(input.dim() - 1));
  return multiply(kOp, input, {qweight, scales, meta, zeros, std::nullopt}, bias, static_weights);
}

}  // namespace marlin::ops
