// Dropout whose mask is a function of (seed, site, sample, element), in CUDA: see megagpt/ops/dropout.py.

#include "common.cuh"
#include "philox.h"

namespace megagpt {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostSamples = 65535;  // side by side in a grid; a block goes on to the next ones

// A pack of 16 bytes a thread, which is one or two whole Philox blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_packs(const T* __restrict__ x, const int64_t* __restrict__ ids,
                                                          T* __restrict__ y, int64_t n_samples, int64_t per_sample,
                                                          uint64_t first_block, DropoutMask mask) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (i >= per_sample) return;
  for (int64_t sample = blockIdx.y; sample < n_samples; sample += gridDim.y) {
    float v[kSize];
    load_pack(x + sample * per_sample + i, v);
    mask.apply(v, first_block + i / 4, __ldg(ids + sample));
    store_pack(y + sample * per_sample + i, v);
  }
}

// A Philox block a thread: for what does not divide into packs, or begins within a block.
template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_blocks(const T* __restrict__ x, const int64_t* __restrict__ ids,
                                                           T* __restrict__ y, int64_t n_samples, int64_t per_sample,
                                                           int64_t offset, DropoutMask mask) {
  const int64_t block = offset / 4 + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t i = 4 * block - offset;
  if (i >= per_sample) return;
  for (int64_t sample = blockIdx.y; sample < n_samples; sample += gridDim.y) {
    const PhiloxBlock drawn = philox(block, __ldg(ids + sample), mask.seed, mask.site);
    const int64_t row = sample * per_sample;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < 0 || i + k >= per_sample) continue;
      y[row + i + k] = from_float<T>(mask.apply(to_float(x[row + i + k]), drawn.word[k]));
    }
  }
}

Tensor dropout_cuda(const Tensor& x_in, const Tensor& sample_ids_in, double p, int64_t seed, int64_t site,
                    int64_t offset) {
  const Tensor x = dense(x_in), sample_ids = dense(sample_ids_in);
  check_sample_ids("dropout", x, sample_ids);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const int64_t n_samples = x.size(0), per_sample = x.numel() / n_samples;
  const int64_t *ids = data<int64_t>(sample_ids), side_by_side = std::min(n_samples, kMostSamples);
  const DropoutMask mask(p, seed, site);
  for_cuda_dtype("dropout", x, [&](auto zero) {
    using T = decltype(zero);
    if (offset % 4 == 0 && packable<T>(per_sample, data<T>(x), data<T>(y))) {
      MEGAGPT_BRANCH("dropout.cuda.packs");
      const int64_t n_packs = per_sample / Pack<T>::kSize;
      const int threads = threads_for(n_packs, kThreads);
      launch(dropout_packs<T>, dim3(ceil_div(n_packs, threads), side_by_side), threads, 0, x, data<T>(x), ids,
             mutable_data<T>(y), n_samples, per_sample, static_cast<uint64_t>(offset / 4), mask);
    } else {
      MEGAGPT_BRANCH("dropout.cuda.blocks");
      const int64_t n_blocks = ceil_div(offset + per_sample, 4) - offset / 4;
      const int threads = threads_for(n_blocks, kThreads);
      launch(dropout_blocks<T>, dim3(ceil_div(n_blocks, threads), side_by_side), threads, 0, x, data<T>(x), ids,
             mutable_data<T>(y), n_samples, per_sample, offset, mask);
    }
  });
  return y;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) { m.impl("dropout", TORCH_BOX(&megagpt::dropout_cuda)); }
