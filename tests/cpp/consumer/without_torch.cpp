// marlin from a C++ program without torch: pack a weight, multiply, check against the definition
// output[m, n] = sum over k of input[m, k] * (q[n, k] - 8) * scales[k / group, n].
#include <marlin/marlin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

// bfloat16 is the upper half of a float; the values used here have no lower half.
uint16_t to_bf16(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

}  // namespace

int main() {
  constexpr int64_t m = 3, n = 96, k = 192, group = 64;
  constexpr int64_t blocks = ((n + 63) / 64) * ((k + 63) / 64);

  std::vector<uint8_t> q(n * k);
  std::vector<uint16_t> input(m * k), scales(k / group * n), output(m * n);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>((i * 7 + i / 13) % 16);
  for (size_t i = 0; i < input.size(); ++i) input[i] = to_bf16(static_cast<float>(i % 5) - 2.0f);
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = to_bf16(i % 3 == 0 ? 0.25f : 0.5f);

  std::vector<int32_t> qweight(blocks * 512);
  marlin::cpu::pack(marlin::Unpacked{q.data()}, qweight.data(), n, k);

  marlin::Gemm args;
  args.input = input.data();
  args.input_stride = k;
  args.qweight = qweight.data();
  args.scales = scales.data();
  args.output = output.data();
  args.m = m;
  args.n = n;
  args.k = k;
  args.group_size = group;
  args.dtype = marlin::DType::kBFloat16;
  marlin::cpu::gemm(args);

  for (int64_t row = 0; row < m; ++row) {
    for (int64_t col = 0; col < n; ++col) {
      float expected = 0.0f;
      for (int64_t i = 0; i < k; ++i) {
        const float weight = (q[col * k + i] - 8.0f) * from_bf16(scales[i / group * n + col]);
        expected += from_bf16(input[row * k + i]) * weight;
      }
      const float got = from_bf16(output[row * n + col]);
      // Every product and sum is exact in fp32, so only the rounding of the output to 8 bits is left.
      if (std::abs(got - expected) > std::ldexp(std::abs(expected), -8)) {
        std::printf("output[%d, %d]: got %g, expected %g\n", static_cast<int>(row),
                    static_cast<int>(col), got, expected);
        return 1;
      }
    }
  }
  std::puts("marlin::kernels: ok");
}
