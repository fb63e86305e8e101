// Philox 4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
// Four words are a pure function of (counter, key): no state, so any process computes any element by itself.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MEGAGPT_HD __host__ __device__ __forceinline__
#else
#define MEGAGPT_HD inline __attribute__((always_inline))
#endif

namespace megagpt {

constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // added to the key after each round

// One of the ten rounds, in place: counter words c, key words k.
MEGAGPT_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
  const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

}  // namespace megagpt
