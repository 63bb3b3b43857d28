// The torch-free C++ API on the CPU, alone.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "cpu/half.h"
#include "layout/packed.h"
#include "marlin/marlin.h"

namespace {

using namespace marlin;

constexpr DType kType = DType::kFloat16;

struct Problem {
  int64_t m, n, k, group_size;
  std::vector<uint8_t> q, zeros;
  std::vector<uint16_t> input, scales, bias;
  std::vector<int32_t> qweight, perm;

  Problem(int64_t m_, int64_t n_, int64_t k_, int64_t group_size_)
      : m(m_), n(n_), k(k_), group_size(group_size_) {
    std::mt19937 random(5);
    const auto number = [&](float size) {
      const float unit = static_cast<float>(random() % 2001) / 1000.f - 1.f;
      return cpu::from_float<kType>(unit * size);
    };
    const int64_t groups = layout::ceil_div(k, group_size);
    for (int64_t i = 0; i < n * k; ++i) q.push_back(static_cast<uint8_t>(random() % 16));
    for (int64_t i = 0; i < groups * n; ++i) zeros.push_back(static_cast<uint8_t>(random() % 16));
    for (int64_t i = 0; i < groups * n; ++i) scales.push_back(number(0.01f));
    for (int64_t i = 0; i < n; ++i) bias.push_back(number(1.f));
    for (int64_t i = 0; i < m * k; ++i) input.push_back(number(1.f));
    for (int64_t i = 0; i < k; ++i) perm.push_back(static_cast<int32_t>((i * 7) % k));  // 7 ∤ k
    qweight.resize(static_cast<size_t>(layout::ceil_div(n, 64) * layout::ceil_div(k, 64) * 512));
    cpu::pack(Unpacked{q.data()}, qweight.data(), n, k);
  }

  Gemm arguments(uint16_t* output) const {
    return {input.data(),
            k,
            qweight.data(),
            scales.data(),
            zeros.data(),
            perm.data(),
            bias.data(),
            output,
            m,
            n,
            k,
            group_size,
            kType};
  }

  double expected(int64_t token, int64_t row) const {
    double sum = cpu::to_float<kType>(bias[row]);
    for (int64_t c = 0; c < k; ++c) {
      const int64_t at = c / group_size * n + row;
      sum += (q[row * k + c] - static_cast<double>(zeros[at])) * cpu::to_float<kType>(scales[at]) *
             cpu::to_float<kType>(input[token * k + perm[c]]);
    }
    return sum;
  }
};

TEST(CpuApi, GemmEqualsTheDefinition) {
  for (const auto& [m, n, k, g] : {std::array<int64_t, 4>{1, 64, 64, 64},
                                   {3, 72, 200, 32},
                                   {5, 65, 129, 128},
                                   {9, 100, 90, 90}}) {
    const Problem problem(m, n, k, g);
    std::vector<uint16_t> output(static_cast<size_t>(m * n));
    cpu::gemm(problem.arguments(output.data()));
    for (int64_t t = 0; t < m; ++t) {
      for (int64_t row = 0; row < n; ++row) {
        const double expected = problem.expected(t, row);
        ASSERT_NEAR(cpu::to_float<kType>(output[t * n + row]), expected,
                    std::abs(expected) * 0x1p-11 + 1e-4);
      }
    }
  }
}

TEST(CpuApi, ThreadsDoNotChangeTheBits) {
  const Problem problem(7, 640, 512, 128);
  std::vector<uint16_t> serial(7 * 640), threaded(7 * 640, 1);
  cpu::gemm(problem.arguments(serial.data()));
  cpu::gemm(problem.arguments(threaded.data()), [](int64_t count, int64_t, const cpu::Body& body) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back([&, i] { body(i, i + 1); });
    for (auto& thread : threads) thread.join();
  });
  EXPECT_EQ(serial, threaded);
}

}  // namespace
