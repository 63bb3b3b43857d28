// marlin from a LibTorch program without Python: the ops, found by name in torch's dispatcher.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <exception>
#include <optional>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

int run() {
  const auto pack = op<Tensor(const Tensor&)>("marlin::pack");
  const auto gemm = op<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                              const MaybeTensor&, const MaybeTensor&, bool)>("marlin::gemm");

  constexpr int64_t m = 5, n = 96, k = 192, group = 64;
  const Tensor q = at::randint(0, 16, {n, k}, at::kByte);
  const Tensor scales = (at::rand({k / group, n}) / 16).to(at::kHalf);
  const Tensor input = at::randn({m, k}).to(at::kHalf);
  const Tensor bias = at::randn({n}).to(at::kHalf);

  const Tensor got =
      gemm.call(input, pack.call(q), scales, std::nullopt, std::nullopt, bias, false);

  const Tensor per_weight = scales.to(at::kDouble).repeat_interleave(group, 0).t();
  const Tensor weight = (q.to(at::kDouble) - 8) * per_weight;
  const Tensor expected = at::matmul(input.to(at::kDouble), weight.t()) + bias.to(at::kDouble);
  const double error = ((got.to(at::kDouble) - expected).norm() / expected.norm()).item<double>();
  std::printf("marlin::ops: relative error %.2e\n", error);
  return error < 1e-3 ? 0 : 1;  // fp16 rounds at 2^-11
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
