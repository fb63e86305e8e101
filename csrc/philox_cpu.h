// Philox for many blocks at once, on the CPU: what the dropout kernels spend most of their instructions on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "clones.h"
#include "philox.h"

namespace megagpt {
namespace {

constexpr int64_t kPhiloxMost = 128;  // blocks that one call may draw: a multiple of those drawn side by side

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)

using Lanes4 = uint64_t __attribute__((vector_size(32)));
using Lanes8 = uint64_t __attribute__((vector_size(64)));

// The low halves of c0 to c3, block after block, for lanes that hold the blocks 0, 4, 1, 5, … or 0, 2, 1, 3.
template <typename Lanes>
MEGAGPT_INLINE void store_words(const Lanes& c0, const Lanes& c1, const Lanes& c2, const Lanes& c3, uint32_t* words) {
  const Lanes w01 = (c0 & 0xFFFFFFFFu) | (c1 << 32), w23 = (c2 & 0xFFFFFFFFu) | (c3 << 32);
  Lanes ordered[2];
  if constexpr (std::is_same_v<Lanes, Lanes8>) {
    ordered[0] = __builtin_shuffle(w01, w23, Lanes{0, 8, 2, 10, 4, 12, 6, 14});
    ordered[1] = __builtin_shuffle(w01, w23, Lanes{1, 9, 3, 11, 5, 13, 7, 15});
  } else {
    ordered[0] = __builtin_shuffle(w01, w23, Lanes{0, 4, 2, 6});
    ordered[1] = __builtin_shuffle(w01, w23, Lanes{1, 5, 3, 7});
  }
  std::memcpy(words, ordered, sizeof(ordered));
}

// words[4 b + i] = word i of block first + b, for b in [0, n), n rounded up to kSets vectors. A counter word fills the
// low half of a 64-bit lane: the instruction multiplies low halves into 64 bits, whose high half is one result and
// whose low half, left where it is, the other. GCC does not find that by itself, hence the assembler.
// kSets vectors are under way at once, since each round waits for the one before.
template <typename Lanes, int kSets>
MEGAGPT_INLINE void philox_lanes(uint64_t first, int64_t n, uint64_t sample, uint32_t seed, uint32_t site,
                                 uint32_t* words) {
  constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
  static_assert(kPhiloxMost % (kSets * kLanes) == 0);
  const Lanes zero = {}, m0 = zero + kPhiloxM0, m1 = zero + kPhiloxM1;
  for (int64_t b = 0; b < n; b += kSets * kLanes) {
    Lanes c0[kSets], c1[kSets], c2[kSets], c3[kSets];
    for (int j = 0; j < kSets; ++j) {
      // Which block a lane draws is chosen so that two shuffles put the words in order (store_words).
      if constexpr (kLanes == 8) c0[j] = Lanes{0, 4, 1, 5, 2, 6, 3, 7};
      if constexpr (kLanes == 4) c0[j] = Lanes{0, 2, 1, 3};
      c0[j] += first + b + j * kLanes;
      c1[j] = c0[j] >> 32;
      c2[j] = zero + sample;
      c3[j] = zero + (sample >> 32);
    }
    uint32_t k0 = seed, k1 = site;
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      for (int j = 0; j < kSets; ++j) {
        Lanes p0, p1;
        __asm__("vpmuludq %1, %2, %0" : "=v"(p0) : "v"(c0[j]), "v"(m0));
        __asm__("vpmuludq %1, %2, %0" : "=v"(p1) : "v"(c2[j]), "v"(m1));
        c0[j] = (p1 >> 32) ^ c1[j] ^ k0;
        c2[j] = (p0 >> 32) ^ c3[j] ^ k1;
        c1[j] = p1;
        c3[j] = p0;
      }
    }
    for (int j = 0; j < kSets; ++j) store_words(c0[j], c1[j], c2[j], c3[j], words + 4 * (b + j * kLanes));
  }
}

__attribute__((target("arch=x86-64-v4"))) void philox_words(uint64_t first, int64_t n, uint64_t sample, uint32_t seed,
                                                            uint32_t site, uint32_t* words) {
  philox_lanes<Lanes8, 4>(first, n, sample, seed, site, words);
}

__attribute__((target("arch=x86-64-v3"))) void philox_words(uint64_t first, int64_t n, uint64_t sample, uint32_t seed,
                                                            uint32_t site, uint32_t* words) {
  philox_lanes<Lanes4, 2>(first, n, sample, seed, site, words);
}

__attribute__((target("default")))
#endif
void philox_words(uint64_t first, int64_t n, uint64_t sample, uint32_t seed, uint32_t site, uint32_t* words) {
  for (int64_t b = 0; b < n; ++b) {
    const PhiloxBlock drawn = philox(first + b, sample, seed, site);
    std::memcpy(words + 4 * b, drawn.word, sizeof(drawn.word));
  }
}

// Calls f(i, n, words) for pieces that make up [begin, end) of a tensor of such lines: words[k] belongs to element i + k.
template <typename F>
MEGAGPT_INLINE void for_words(int64_t begin, int64_t end, const Lines& lines, const int64_t* sample_ids,
                              const DropoutMask& mask, F&& f) {
  alignas(64) uint32_t words[4 * kPhiloxMost];
  for (int64_t i = begin; i < end;) {
    const int64_t line = i / lines.length, in_line = i % lines.length;
    const uint64_t element = static_cast<uint64_t>(lines.first(line) + in_line);
    const int64_t skip = element % 4;
    const int64_t n = std::min({4 * kPhiloxMost - skip, lines.length - in_line, end - i});
    const uint64_t sample = static_cast<uint64_t>(sample_ids[line / lines.per_sample]);
    philox_words(element / 4, (skip + n + 3) / 4, sample, mask.seed, mask.site, words);
    f(i, n, words + skip);
    i += n;
  }
}

}  // namespace
}  // namespace megagpt
