// Packing on the CPU, block by block, against the index maps of layout/, one weight at a time.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "layout/source.h"
#include "layout/sparse.h"
#include "marlin/marlin.h"

namespace {

using namespace marlin;
using layout::Shape;
using layout::SparseShape;

template <typename T>
std::vector<T> random_numbers(int64_t count) {
  std::mt19937 random(11);
  std::vector<T> numbers(static_cast<size_t>(count));
  for (T& number : numbers) number = static_cast<T>(random());
  return numbers;
}

// One piece a block, each in its own thread.
void threaded_for(int64_t count, int64_t /*grain*/, const cpu::Body& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back([&, i] { body(i, i + 1); });
  for (auto& thread : threads) thread.join();
}

template <typename Source>
std::vector<int32_t> packed_word_by_word(const Source& source, Shape shape) {
  std::vector<int32_t> words;
  for (int64_t i = 0; i < shape.words(); ++i) {
    words.push_back(static_cast<int32_t>(layout::packed_word(source, shape, i)));
  }
  return words;
}

template <typename Source>
void expect_equal_words(const Source& source, Shape shape) {
  const std::vector<int32_t> expected = packed_word_by_word(source, shape);
  std::vector<int32_t> serial(expected.size(), -1), threaded(expected.size(), -1);
  cpu::pack(source, serial.data(), shape.n, shape.k);
  EXPECT_EQ(serial, expected) << shape.n << " x " << shape.k;
  cpu::pack(source, threaded.data(), shape.n, shape.k, threaded_for);
  EXPECT_EQ(threaded, expected) << shape.n << " x " << shape.k;
}

TEST(Packing, Unpacked) {
  for (const Shape shape : {Shape{64, 64}, {1, 1}, {65, 63}, {63, 129}, {127, 201}, {130, 7}}) {
    const auto q = random_numbers<uint8_t>(shape.n * shape.k);  // the upper halves are ignored
    expect_equal_words(Unpacked{q.data()}, shape);
  }
}

TEST(Packing, Gptq) {
  for (const Shape shape : {Shape{64, 64}, {1, 8}, {65, 56}, {63, 136}, {129, 200}}) {
    const auto words = random_numbers<int32_t>(shape.n * shape.k / 8);
    std::vector<int32_t> perm(static_cast<size_t>(shape.k));
    std::iota(perm.begin(), perm.end(), 0);
    expect_equal_words(Gptq{words.data(), nullptr}, shape);
    expect_equal_words(Gptq{words.data(), perm.data()}, shape);
    std::shuffle(perm.begin(), perm.end(), std::mt19937(5));
    expect_equal_words(Gptq{words.data(), perm.data()}, shape);
  }
}

TEST(Packing, Awq) {
  for (const Shape shape : {Shape{64, 64}, {8, 1}, {72, 63}, {56, 131}, {136, 205}}) {
    const auto words = random_numbers<int32_t>(shape.n / 8 * shape.k);
    expect_equal_words(Awq{words.data()}, shape);
  }
}

TEST(Packing, Unpacking) {
  for (const Shape shape : {Shape{64, 64}, {1, 1}, {65, 63}, {63, 129}, {127, 201}}) {
    const auto words = random_numbers<int32_t>(shape.words());
    std::vector<uint8_t> expected;
    for (int64_t i = 0; i < shape.n * shape.k; ++i) {
      expected.push_back(static_cast<uint8_t>(
          layout::unpacked_weight(words.data(), shape.k_blocks(), i / shape.k, i % shape.k)));
    }
    std::vector<uint8_t> q(expected.size(), 99);
    cpu::unpack(words.data(), q.data(), shape.n, shape.k, threaded_for);
    EXPECT_EQ(q, expected) << shape.n << " x " << shape.k;
  }
}

// Masks of every kind, those that keep more than two of four among them: the first two are stored.
TEST(Packing, Sparse) {
  for (const SparseShape shape : {SparseShape{64, 128}, {1, 4}, {65, 124}, {63, 260}, {129, 404}}) {
    const auto q = random_numbers<uint8_t>(shape.n * shape.k);
    auto mask = random_numbers<uint8_t>(shape.n * shape.k);
    for (uint8_t& kept : mask) kept = kept % 2 ? kept : 0;
    const Sparse source{q.data(), mask.data()};
    std::vector<int32_t> expected_meta;
    for (int64_t i = 0; i < shape.meta_words(); ++i) {
      expected_meta.push_back(static_cast<int32_t>(layout::meta_word(source, shape, i)));
    }
    const std::vector<int32_t> expected = packed_word_by_word(source, shape.survivors());
    std::vector<int32_t> words(expected.size(), -1), meta(expected_meta.size(), -1);
    cpu::pack_24(source, words.data(), meta.data(), shape.n, shape.k, threaded_for);
    EXPECT_EQ(words, expected) << shape.n << " x " << shape.k;
    EXPECT_EQ(meta, expected_meta) << shape.n << " x " << shape.k;

    std::vector<uint8_t> values(q.size(), 99), stored(q.size(), 99);
    cpu::unpack_24(words.data(), meta.data(), values.data(), stored.data(), shape.n, shape.k,
                   threaded_for);
    for (int64_t i = 0; i < shape.n * shape.k; ++i) {
      const int value = layout::unpacked_survivor(words.data(), meta.data(), shape.k_blocks(),
                                                  i / shape.k, i % shape.k);
      ASSERT_EQ(stored[i], value >= 0) << shape.n << " x " << shape.k << ", weight " << i;
      ASSERT_EQ(values[i], std::max(value, 0)) << shape.n << " x " << shape.k << ", weight " << i;
    }
  }
}

}  // namespace
