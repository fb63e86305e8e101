// Dropout whose mask is a function of (seed, site, sample, element): see megagpt/ops/dropout.py for the contract.
//
// Element e of a sample uses word e % 4 of Philox(counter = (e / 4, sample), key = (seed, site)).

#include "common.h"
#include "philox.h"

#include <algorithm>
#include <vector>

namespace megagpt {
namespace {

constexpr int64_t kBlocks = 64;  // Philox blocks computed side by side: enough for any vector width

// keep[4 * b + lane] for `kBlocks` consecutive blocks. The words of a lane lie side by side, so that the ten rounds
// vectorise; the flags are interleaved afterwards.
MEGAGPT_CLONES void keep_flags(uint64_t first_block, uint64_t sample, uint32_t seed, uint32_t site,
                               uint32_t threshold, uint8_t* __restrict keep) {
  uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (int64_t b = 0; b < kBlocks; ++b) {
    const uint64_t block = first_block + b;
    c0[b] = static_cast<uint32_t>(block);
    c1[b] = static_cast<uint32_t>(block >> 32);
    c2[b] = static_cast<uint32_t>(sample);
    c3[b] = static_cast<uint32_t>(sample >> 32);
  }
  uint32_t k0 = seed, k1 = site;
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    for (int64_t b = 0; b < kBlocks; ++b) philox_round(c0[b], c1[b], c2[b], c3[b], k0, k1);
  }
  for (int64_t b = 0; b < kBlocks; ++b) {
    keep[4 * b + 0] = c0[b] >= threshold;
    keep[4 * b + 1] = c1[b] >= threshold;
    keep[4 * b + 2] = c2[b] >= threshold;
    keep[4 * b + 3] = c3[b] >= threshold;
  }
}

template <typename T>
void dropout_row(const T* x, T* y, int64_t n, uint64_t start, uint64_t sample, uint32_t seed, uint32_t site,
                 uint32_t threshold, float scale) {
  alignas(64) uint8_t keep[4 * kBlocks];
  using acc_t = at::opmath_type<T>;
  for (int64_t i = 0; i < n;) {
    const uint64_t element = start + i;
    const int64_t skip = element % 4;
    keep_flags(element / 4, sample, seed, site, threshold, keep);
    const int64_t m = std::min<int64_t>(4 * kBlocks - skip, n - i);
    const uint8_t* flags = keep + skip;
    for (int64_t j = 0; j < m; ++j) {
      y[i + j] = flags[j] ? static_cast<T>(static_cast<acc_t>(x[i + j]) * static_cast<acc_t>(scale)) : T(0);
    }
    i += m;
  }
}

at::Tensor dropout_cpu(const at::Tensor& x, const at::Tensor& sample_ids, double p, int64_t seed, int64_t site,
                       int64_t offset) {
  const at::Tensor xc = x.contiguous();
  const at::Tensor ids = sample_ids.contiguous();
  TORCH_CHECK(xc.dim() >= 1 && ids.dim() == 1 && ids.numel() == xc.size(0), "dropout: got x of ", x.sizes(),
              " and sample_ids of ", sample_ids.sizes(), ", wanted one id per row of x");
  at::Tensor y = at::empty_like(xc);
  if (xc.numel() == 0) return y;
  const int64_t row = xc.numel() / xc.size(0);
  const uint32_t threshold = static_cast<uint32_t>(p * 4294967296.0);
  const float scale = static_cast<float>(1.0 / (1.0 - p));
  const int64_t* id = ids.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xc.scalar_type(), "megagpt_dropout", [&] {
    const scalar_t* in = xc.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    // Split the flat range, not the rows: a micro-batch may hold a single sample.
    at::parallel_for(0, xc.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / row, first = begin % row, n = std::min(end - begin, row - first);
        dropout_row<scalar_t>(in + begin, out + begin, n, static_cast<uint64_t>(offset + first),
                              static_cast<uint64_t>(id[b]), static_cast<uint32_t>(seed),
                              static_cast<uint32_t>(site), threshold, scale);
        begin += n;
      }
    });
  });
  return y;
}

}  // namespace
}  // namespace megagpt

TORCH_LIBRARY_IMPL(megagpt, CPU, m) { m.impl("dropout", &megagpt::dropout_cpu); }
