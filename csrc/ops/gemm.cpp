#include <limits>
#include <vector>

#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace marlin::ops {
namespace {

constexpr const char* kOp = "gemm";

void check_input(const Tensor& input, const Tensor& qweight, const Tensor& scales) {
  MARLIN_CHECK(
      input.scalar_type() == ScalarType::Half || input.scalar_type() == ScalarType::BFloat16,
      "marlin::gemm: input must be float16 or bfloat16, got ", name_of(input.scalar_type()),
      "; cast it, e.g. input.to(scales.dtype)");
  MARLIN_CHECK(input.dim() >= 1,
               "marlin::gemm: input must have shape [..., K], got a tensor without dimensions");
  MARLIN_CHECK(scales.scalar_type() == input.scalar_type(), "marlin::gemm: scales must have ",
               "the dtype of input, ", name_of(input.scalar_type()), ", got ",
               name_of(scales.scalar_type()));
  check_same_device(kOp, "input", input, "qweight", qweight);
  const int64_t last = input.dim() - 1;
  MARLIN_CHECK(input.size(last) <= 1 || input.stride(last) == 1,
               "marlin::gemm: input must have stride 1 along its last dimension, got ",
               input.stride(last), "; call input.contiguous()");
}

void check_bias(const Tensor& bias, const Tensor& input, int64_t n) {
  check_dtype(kOp, "bias", bias, input.scalar_type());
  MARLIN_CHECK(bias.dim() == 1 && bias.size(0) == n, "marlin::gemm: bias must have shape [N] = [",
               n, "], got ", shape_of(bias));
  check_contiguous(kOp, "bias", bias);
  check_same_device(kOp, "bias", bias, "input", input);
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

Gemm arguments(const Tensor& input, const Tensor& qweight, const Tensor& scales,
               const OptionalTensor& zeros, const OptionalTensor& perm, const OptionalTensor& bias,
               const WeightShape& w) {
  Gemm args;
  args.input = input.data_ptr();
  args.input_stride = row_stride(input);
  args.qweight = static_cast<const int32_t*>(qweight.data_ptr());
  args.scales = scales.data_ptr();
  args.zeros = data_or_null<uint8_t>(zeros);
  args.perm = data_or_null<int32_t>(perm);
  args.bias = data_or_null<void>(bias);
  args.m = input.numel() / w.k;
  args.n = w.n;
  args.k = w.k;
  args.group_size = w.group_size;
  args.dtype = dtype_of(input);
  return args;
}

}  // namespace

Tensor gemm(Tensor input, Tensor qweight, Tensor scales, OptionalTensor zeros, OptionalTensor perm,
            OptionalTensor bias, bool static_weights) {
  check_input(input, qweight, scales);
  const int64_t last = input.dim() - 1;
  const WeightShape w = check_weight(kOp, qweight, scales, zeros, perm, input.size(last));
  if (bias) check_bias(*bias, input, w.n);
  check_range_on_cpu(kOp, perm, w.k);
  MARLIN_CHECK(input.numel() / w.k < std::numeric_limits<int32_t>::max(),
               "marlin::gemm: input has ", input.numel() / w.k, " rows; at most 2^31 - 2");

  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes[last] = w.n;
  const Tensor output = torch::stable::new_empty(input, sizes);
  if (output.numel() == 0) return output;

  const Tensor rows = row_stride(input) < 0 ? torch::stable::contiguous(input) : input;
  Gemm args = arguments(rows, qweight, scales, zeros, perm, bias, w);
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

}  // namespace marlin::ops
