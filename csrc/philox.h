// Philox 4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
// Four words are a pure function of (counter, key): no state, so any process computes any element by itself.
//
// Who uses it: dropout, on the CPU (philox_cpu.h draws many blocks at once) and in CUDA (megagpt/ops/dropout.py); the
// first weights of a model (megagpt/philox.py).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MEGAGPT_HD __host__ __device__ __forceinline__
#else
#define MEGAGPT_HD inline __attribute__((always_inline))
#endif

namespace megagpt {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multiply the counter in each round
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // added to the key after each round
constexpr int kPhiloxRounds = 10;

// One of the ten rounds, in place: counter words c, key words k.
MEGAGPT_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

struct PhiloxBlock {
  uint32_t word[4];

  // A word that is not known when compiling: selects keep all four in registers.
  MEGAGPT_HD uint32_t at(int i) const { return i < 2 ? (i == 0 ? word[0] : word[1]) : (i == 2 ? word[2] : word[3]); }
};

// The four words of counter (block, sample) and key (k0, k1).
MEGAGPT_HD PhiloxBlock philox(uint64_t block, uint64_t sample, uint32_t k0, uint32_t k1) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(sample), c3 = static_cast<uint32_t>(sample >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    philox_round(c0, c1, c2, c3, k0, k1);
  }
  return {{c0, c1, c2, c3}};
}

// A dropout mask: an element whose word is at least `threshold` is kept and scaled, any other becomes 0.
struct DropoutMask {
  uint32_t seed, site, threshold;
  float scale;

  DropoutMask(double p, int64_t seed, int64_t site)
      : seed(static_cast<uint32_t>(seed)),
        site(static_cast<uint32_t>(site)),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}

  template <typename A>
  MEGAGPT_HD A apply(A x, uint32_t word) const {
    return word >= threshold ? x * static_cast<A>(scale) : A(0);
  }

  // Elements 4 * block, 4 * block + 1, … of a sample, in place: whole blocks.
  template <int N>
  MEGAGPT_HD void apply(float (&x)[N], uint64_t block, uint64_t sample) const {
    static_assert(N % 4 == 0);
    for (int i = 0; i < N; i += 4) {
      const PhiloxBlock drawn = philox(block + i / 4, sample, seed, site);
      for (int k = 0; k < 4; ++k) x[i + k] = apply(x[i + k], drawn.word[k]);
    }
  }
};

// Which elements of its sample's whole a tensor holds: lines of `length` elements that are side by side there, of each
// sample `per_sample` lines. The first begins with element `offset`; `rows` lines are of one matrix of the whole, in which
// they are `columns` elements apart, and the next matrix is `matrix` elements away.
struct Lines {
  int64_t length, offset, per_sample = 1, rows = 1, columns = 0, matrix = 0;

  // The first element of a line, of all of the tensor's.
  MEGAGPT_HD int64_t first(int64_t line) const {
    const int64_t in_sample = line % per_sample;
    return offset + in_sample / rows * matrix + in_sample % rows * columns;
  }
};

// The whole from `offset` on; where columns are not 0, of matrices of rows x columns a part of as many as x has.
template <typename Tensor>
Lines lines_of(const Tensor& x, int64_t offset, int64_t rows, int64_t columns) {
  const int64_t per_sample = x.numel() / (x.size(0) == 0 ? 1 : x.size(0));
  if (columns == 0 || per_sample == 0) return {per_sample == 0 ? 1 : per_sample, offset};
  const int64_t length = x.size(x.dim() - 1);
  return {length, offset, per_sample / length, x.size(x.dim() - 2), columns, rows * columns};
}

}  // namespace megagpt
