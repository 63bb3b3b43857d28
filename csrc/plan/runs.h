// How blocks share tiles over global memory: equal runs of stages. Host and device C++, no torch.
#pragma once

#include <cstdint>

namespace marlin::plan {

// Divides by a number that only the host knows: on the device a division would hold up the first copy.
struct Divisor {
  uint64_t inverse;  // of the number, in 2^-64

  static constexpr Divisor of(int number) { return {~uint64_t{0} / static_cast<uint64_t>(number)}; }
  constexpr int quotient(int value) const {  // value >= 0
    const uint64_t next = static_cast<uint64_t>(value) + 1;
    return static_cast<int>((((inverse & 0xffffffffu) * next >> 32) + (inverse >> 32) * next) >>
                            32);
  }
};
static_assert(Divisor::of(1).quotient(0x7ffffffe) == 0x7ffffffe);
static_assert(Divisor::of(3).quotient(8) == 2 && Divisor::of(3).quotient(9) == 3);
static_assert(Divisor::of(0x7fffffff).quotient(0x7ffffffe) == 0);

// How a launch whose blocks share tiles over memory deals out the stages of all of them: equal runs but
// for one, k fastest.
struct StageRuns {
  int stages;      // of a tile
  int each, more;  // stages of every block, and how many get one more
  Divisor by_stages;

  static constexpr StageRuns of(int blocks, int tiles, int stages) {
    const int64_t all = int64_t{tiles} * stages;
    return {stages, static_cast<int>(all / blocks), static_cast<int>(all % blocks),
            Divisor::of(stages)};
  }
  constexpr int begin(int block) const { return block * each + (block < more ? block : more); }
  constexpr bool share_tiles() const { return each % stages || more; }
  // The first block with stages of a tile, of which `block` has some.
  constexpr int first_sender(int block, int tile) const {
    while (begin(block) > tile * stages) --block;
    return block;
  }
};

// The run of one block: stages begin .. end - 1 of all, of `tiles` tiles, the last of which is done first.
// Of a tile that several blocks share, the one with the last stages thus does them last, and waits for the
// sums of the others, which do theirs first. They have lower numbers, and hardware starts blocks in the order of
// their numbers, though CUDA does not promise it: so those that are waited for run, whatever else runs.
//
//     tile      0       1       2         3 tiles of 4 stages for 5 blocks: two have a stage more.
//     stage     0123    0123    0123      Block 1 does stages 0 and 1 of tile 1 and leaves their sums;
//     block     0001    1122    3344      then stage 3 of tile 0, adds what block 0 has left, and stores.
struct StageRun {
  int begin, end, last, tiles;

  static constexpr StageRun of(const StageRuns& runs, int block) {
    const int begin = runs.begin(block), end = runs.begin(block + 1);
    if (begin == end) return {begin, end, 0, 0};
    const int last = runs.by_stages.quotient(end - 1);
    return {begin, end, last, last - runs.by_stages.quotient(begin) + 1};
  }
  constexpr int first_stage(int tile, int stages) const {
    const int first = begin - tile * stages;
    return first > 0 ? first : 0;
  }
  constexpr int end_stage(int tile, int stages) const {
    const int end_of_run = end - tile * stages;
    return end_of_run < stages ? end_of_run : stages;
  }
};
namespace example {  // the picture above
inline constexpr StageRuns kRuns = StageRuns::of(5, 3, 4);
inline constexpr StageRun kBlock1 = StageRun::of(kRuns, 1);
static_assert(kRuns.each == 2 && kRuns.more == 2 && kRuns.share_tiles());
static_assert(kBlock1.last == 1 && kBlock1.tiles == 2);
static_assert(kBlock1.first_stage(1, 4) == 0 && kBlock1.end_stage(1, 4) == 2);
static_assert(kBlock1.first_stage(0, 4) == 3 && kBlock1.end_stage(0, 4) == 4);
static_assert(kRuns.first_sender(1, 0) == 0 && kRuns.first_sender(3, 2) == 3);
}  // namespace example

}  // namespace marlin::plan
