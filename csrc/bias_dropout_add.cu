// residual + dropout(x + bias), in CUDA: see megagpt/ops/bias_dropout_add.py.

#include "common.cuh"
#include "philox.h"

namespace megagpt {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;                // that a thread of the backward pass reads before it uses the first
constexpr int64_t kMostInGrid = 65535;  // blocks along y or z

// Samples of rows of columns. A grid takes columns along x, rows of a sample along y and samples along z; where it is
// smaller than that, its blocks go on by its size.
struct Extent {
  int64_t n_samples, rows, columns, offset;

  __host__ __device__ int64_t per_sample() const { return rows * columns; }
};

// A thread keeps one pack of columns, and its bias in registers, over all its rows.
template <typename T, bool kBias, bool kMask>
__global__ void __launch_bounds__(kThreads) add_packs(const T* __restrict__ x, const T* __restrict__ bias,
                                                      const T* __restrict__ residual, const int64_t* __restrict__ ids,
                                                      T* __restrict__ y, Extent extent, DropoutMask mask) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (column >= extent.columns) return;
  float added[kSize] = {};
  if constexpr (kBias) load_pack(bias + column, added);
  for (int64_t sample = blockIdx.z; sample < extent.n_samples; sample += gridDim.z) {
    const int64_t id = kMask ? __ldg(ids + sample) : 0;
    for (int64_t row = blockIdx.y; row < extent.rows; row += gridDim.y) {
      const int64_t i = row * extent.columns + column, at = sample * extent.per_sample() + i;
      float v[kSize], kept[kSize];
      load_pack(x + at, v);
      load_pack(residual + at, kept);
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] += added[k];
      if constexpr (kMask) mask.apply(v, static_cast<uint64_t>(extent.offset + i) / 4, id);
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] += kept[k];
      store_pack(y + at, v);
    }
  }
}

// A Philox block a thread: for what does not divide into packs, or begins within a block.
template <typename T, bool kBias, bool kMask>
__global__ void __launch_bounds__(kThreads) add_blocks(const T* __restrict__ x, const T* __restrict__ bias,
                                                       const T* __restrict__ residual,
                                                       const int64_t* __restrict__ ids, T* __restrict__ y,
                                                       Extent extent, DropoutMask mask) {
  const int64_t block = extent.offset / 4 + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = 4 * block - extent.offset;
  for (int64_t sample = blockIdx.z; sample < extent.n_samples; sample += gridDim.z) {
    PhiloxBlock drawn{};
    if constexpr (kMask) drawn = philox(block, __ldg(ids + sample), mask.seed, mask.site);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t i = first + k, at = sample * extent.per_sample() + i;
      if (i < 0 || i >= extent.per_sample()) continue;
      float v = to_float(x[at]);
      if constexpr (kBias) v += to_float(bias[i % extent.columns]);
      if constexpr (kMask) v = mask.apply(v, drawn.word[k]);
      y[at] = from_float<T>(to_float(residual[at]) + v);
    }
  }
}

// Each block along y and z sums its rows of dx into one row of `parts`.
__device__ __forceinline__ int64_t part() { return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y; }

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_packs(const T* __restrict__ grad,
                                                           const int64_t* __restrict__ ids, T* __restrict__ dx,
                                                           float* __restrict__ parts, Extent extent,
                                                           DropoutMask mask) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (column >= extent.columns) return;
  float sums[kSize] = {};
  for (int64_t sample = blockIdx.z; sample < extent.n_samples; sample += gridDim.z) {
    const int64_t start = sample * extent.per_sample() + column, id = __ldg(ids + sample);
    for (int64_t row = blockIdx.y; row < extent.rows; row += kRows * gridDim.y) {
      Pack<T> read[kRows];  // as they lie in memory: half the registers of float32
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * gridDim.y;
        if (at < extent.rows) read[r] = *reinterpret_cast<const Pack<T>*>(grad + start + at * extent.columns);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * gridDim.y;
        if (at >= extent.rows) break;
        float v[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) v[k] = to_float(read[r].v[k]);
        mask.apply(v, static_cast<uint64_t>(extent.offset + at * extent.columns + column) / 4, id);
        store_pack(dx + start + at * extent.columns, v);
#pragma unroll
        for (int k = 0; k < kSize; ++k) sums[k] += v[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) parts[part() * extent.columns + column + k] = sums[k];
}

// A column a thread, which draws a block for each of its elements.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_elements(const T* __restrict__ grad,
                                                              const int64_t* __restrict__ ids, T* __restrict__ dx,
                                                              float* __restrict__ parts, Extent extent,
                                                              DropoutMask mask) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= extent.columns) return;
  float sum = 0.0f;
  for (int64_t sample = blockIdx.z; sample < extent.n_samples; sample += gridDim.z) {
    for (int64_t row = blockIdx.y; row < extent.rows; row += gridDim.y) {
      const int64_t i = row * extent.columns + column, at = sample * extent.per_sample() + i;
      const uint64_t element = static_cast<uint64_t>(extent.offset + i);
      const PhiloxBlock drawn = philox(element / 4, __ldg(ids + sample), mask.seed, mask.site);
      const float v = mask.apply(to_float(grad[at]), drawn.at(element % 4));
      dx[at] = from_float<T>(v);
      sum += v;
    }
  }
  parts[part() * extent.columns + column] = sum;
}

Extent extent_of(const Tensor& x, int64_t offset) {
  const int64_t columns = x.size(-1), n_samples = x.size(0);
  return {n_samples, x.numel() / n_samples / columns, columns, offset};
}

// Blocks for `work` threads along x, and at most about `n_blocks` in all.
dim3 grid_for(int64_t work, int threads, const Extent& extent, int64_t n_blocks) {
  const int64_t x = ceil_div(work, threads), beside = std::clamp<int64_t>(n_blocks / x, 1, kMostInGrid);
  const int64_t z = std::min(extent.n_samples, beside);
  return dim3(x, std::min(extent.rows, ceil_div(beside, z)), z);
}

template <typename T, bool kBias, bool kMask>
void forward(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual, const Tensor& sample_ids,
             const Tensor& y, const Extent& extent, const DropoutMask& mask) {
  const int64_t most = 16 * n_multiprocessors(x);  // twice what runs at once
  if (extent.offset % 4 == 0 && packable<T>(extent.columns, data<T>(x), data<T>(bias), data<T>(residual), data<T>(y))) {
    MEGAGPT_BRANCH("bias_dropout_add.cuda.packs");
    const int64_t n_packs = extent.columns / Pack<T>::kSize;
    const int threads = threads_for(n_packs, kThreads);
    launch(add_packs<T, kBias, kMask>, grid_for(n_packs, threads, extent, most * kThreads / threads), threads, 0, x,
           data<T>(x), data<T>(bias), data<T>(residual), data<int64_t>(sample_ids), mutable_data<T>(y), extent, mask);
  } else {
    MEGAGPT_BRANCH("bias_dropout_add.cuda.blocks");
    const int64_t n_blocks = ceil_div(extent.offset + extent.per_sample(), 4) - extent.offset / 4;
    const int threads = threads_for(n_blocks, kThreads);
    const dim3 grid(ceil_div(n_blocks, threads), 1, std::min(extent.n_samples, kMostInGrid));
    launch(add_blocks<T, kBias, kMask>, grid, threads, 0, x, data<T>(x), data<T>(bias), data<T>(residual),
           data<int64_t>(sample_ids), mutable_data<T>(y), extent, mask);
  }
}

Tensor bias_dropout_add_cuda(const Tensor& x_in, const std::optional<Tensor>& bias_in, const Tensor& residual_in,
                             const Tensor& sample_ids_in, double p, int64_t seed, int64_t site, int64_t offset) {
  const Tensor x = dense(x_in), residual = dense(residual_in), sample_ids = dense(sample_ids_in);
  const std::optional<Tensor> bias = dense(bias_in);
  check_sample_ids("bias_dropout_add", x, sample_ids);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Extent extent = extent_of(x, offset);
  const DropoutMask mask(p, seed, site);
  for_cuda_dtype("bias_dropout_add", x, [&](auto zero) {
    using T = decltype(zero);
    if (p == 0.0) {
      MEGAGPT_BRANCH("bias_dropout_add.cuda.plain");
      const auto run = bias ? forward<T, true, false> : forward<T, false, false>;
      run(x, bias, residual, sample_ids, y, extent, mask);
    } else {
      const auto run = bias ? forward<T, true, true> : forward<T, false, true>;
      run(x, bias, residual, sample_ids, y, extent, mask);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward_cuda(const Tensor& grad_in, const Tensor& sample_ids_in, double p,
                                                          int64_t seed, int64_t site, int64_t offset) {
  const Tensor grad = dense(grad_in), sample_ids = dense(sample_ids_in);
  check_sample_ids("bias_dropout_add_backward", grad, sample_ids);
  const Tensor dx = torch::stable::empty_like(grad);
  if (grad.numel() == 0) return {dx, torch::stable::new_zeros(grad, {grad.size(-1)})};
  const Extent extent = extent_of(grad, offset);
  const DropoutMask mask(p, seed, site);
  const int64_t* ids = data<int64_t>(sample_ids);
  Tensor parts;
  for_cuda_dtype("bias_dropout_add_backward", grad, [&](auto zero) {
    using T = decltype(zero);
    const bool packs = offset % 4 == 0 && packable<T>(extent.columns, data<T>(grad), data<T>(dx));
    const int64_t work = packs ? extent.columns / Pack<T>::kSize : extent.columns;
    const int threads = threads_for(work, kThreads);
    // Fewer blocks than could run: each writes a row of parts.
    const dim3 grid = grid_for(work, threads, extent, 2 * n_multiprocessors(grad) * kThreads / threads);
    parts = torch::stable::new_empty(grad, {int64_t{grid.y} * grid.z, extent.columns}, ScalarType::Float);
    if (packs) {
      MEGAGPT_BRANCH("bias_dropout_add_backward.cuda.packs");
      launch(backward_packs<T>, grid, threads, 0, grad, data<T>(grad), ids, mutable_data<T>(dx),
             mutable_data<float>(parts), extent, mask);
    } else {
      MEGAGPT_BRANCH("bias_dropout_add_backward.cuda.elements");
      launch(backward_elements<T>, grid, threads, 0, grad, data<T>(grad), ids, mutable_data<T>(dx),
             mutable_data<float>(parts), extent, mask);
    }
  });
  const int64_t rows[] = {0};
  return {dx, torch::stable::to(torch::stable::sum(parts, {{rows, 1}}), grad.scalar_type())};
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) {
  m.impl("bias_dropout_add", TORCH_BOX(&megagpt::bias_dropout_add_cuda));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&megagpt::bias_dropout_add_backward_cuda));
}
