// Dropout whose mask is a function of (seed, site, sample, element), in CUDA: see megagpt/ops/dropout.py.

#include "common.cuh"
#include "philox.h"

namespace megagpt {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostLines = 65535;  // side by side in a grid; a block goes on to the next ones

// A pack of 16 bytes a thread, which is one or two whole Philox blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_packs(const T* __restrict__ x, const int64_t* __restrict__ ids,
                                                          T* __restrict__ y, int64_t n_lines, Lines lines,
                                                          DropoutMask mask) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (i >= lines.length) return;
  for (int64_t line = blockIdx.y; line < n_lines; line += gridDim.y) {
    float v[kSize];
    load_pack(x + line * lines.length + i, v);
    mask.apply(v, static_cast<uint64_t>(lines.first(line) + i) / 4, __ldg(ids + line / lines.per_sample));
    store_pack(y + line * lines.length + i, v);
  }
}

// A Philox block a thread: for what does not divide into packs, or begins within a block.
template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_blocks(const T* __restrict__ x, const int64_t* __restrict__ ids,
                                                           T* __restrict__ y, int64_t n_lines, Lines lines,
                                                           DropoutMask mask) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t line = blockIdx.y; line < n_lines; line += gridDim.y) {
    const int64_t first = lines.first(line), block = first / 4 + number, i = 4 * block - first;
    if (i >= lines.length) continue;
    const PhiloxBlock drawn = philox(block, __ldg(ids + line / lines.per_sample), mask.seed, mask.site);
    const int64_t row = line * lines.length;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < 0 || i + k >= lines.length) continue;
      y[row + i + k] = from_float<T>(mask.apply(to_float(x[row + i + k]), drawn.word[k]));
    }
  }
}

Tensor dropout_cuda(const Tensor& x_in, const Tensor& sample_ids_in, double p, int64_t seed, int64_t site,
                    int64_t offset, int64_t rows, int64_t columns) {
  const Tensor x = dense(x_in), sample_ids = dense(sample_ids_in);
  check_sample_ids("dropout", x, sample_ids);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Lines lines = lines_of(x, offset, rows, columns);
  const int64_t n_lines = x.numel() / lines.length, side_by_side = std::min(n_lines, kMostLines);
  const int64_t* ids = data<int64_t>(sample_ids);
  const DropoutMask mask(p, seed, site);
  const bool whole_blocks = offset % 4 == 0 && lines.columns % 4 == 0;
  for_cuda_dtype("dropout", x, [&](auto zero) {
    using T = decltype(zero);
    if (whole_blocks && packable<T>(lines.length, data<T>(x), data<T>(y))) {
      MEGAGPT_BRANCH("dropout.cuda.packs");
      const int64_t n_packs = lines.length / Pack<T>::kSize;
      const int threads = threads_for(n_packs, kThreads);
      launch(dropout_packs<T>, dim3(ceil_div(n_packs, threads), side_by_side), threads, 0, x, data<T>(x), ids,
             mutable_data<T>(y), n_lines, lines, mask);
    } else {
      MEGAGPT_BRANCH("dropout.cuda.blocks");
      const int64_t n_blocks = ceil_div(lines.length + 3, 4);  // that a line may reach into
      const int threads = threads_for(n_blocks, kThreads);
      launch(dropout_blocks<T>, dim3(ceil_div(n_blocks, threads), side_by_side), threads, 0, x, data<T>(x), ids,
             mutable_data<T>(y), n_lines, lines, mask);
    }
  });
  return y;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) { m.impl("dropout", TORCH_BOX(&megagpt::dropout_cuda)); }
