// Dropout whose mask is a function of (seed, site, sample, element), on the CPU: see megagpt/ops/dropout.py.

#include "common.h"
#include "philox_cpu.h"

namespace megagpt {
namespace {

template <typename T>
MEGAGPT_CLONES void drop(const T* __restrict x, const uint32_t* __restrict words, T* __restrict y, int64_t n,
                         DropoutMask mask) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(mask.apply(load(x[i]), words[i]));
}

Tensor dropout_cpu(const Tensor& x_in, const Tensor& sample_ids_in, double p, int64_t seed, int64_t site,
                   int64_t offset, int64_t rows, int64_t columns) {
  const Tensor x = dense(x_in), sample_ids = dense(sample_ids_in);
  check_sample_ids("dropout", x, sample_ids);
  const Tensor y = torch::stable::empty_like(x);
  const DropoutMask mask(p, seed, site);
  for_dtype("dropout", x, [&](auto zero) {
    using T = decltype(zero);
    MEGAGPT_BRANCH("dropout.cpu");
    const Lines lines = lines_of(x, offset, rows, columns);
    // Parts of the whole, not of samples: a micro-batch may hold a single one.
    parallel(x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for_words(begin, end, lines, data<int64_t>(sample_ids), mask,
                [&](int64_t i, int64_t n, const uint32_t* words) {
                  drop(data<T>(x) + i, words, mutable_data<T>(y) + i, n, mask);
                });
    });
  });
  return y;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) { m.impl("dropout", TORCH_BOX(&megagpt::dropout_cpu)); }
