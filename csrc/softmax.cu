// Scaled softmax of attention scores, in CUDA: see megagpt/ops/softmax.py.
//
// A row of up to 2 KB (1024 keys of 16 bits) is one warp's, a longer one a block's; up to 32 KB it stays in registers
// between its one reading and its one writing. Rows that are longer or do not divide into packs are read twice, the
// second time out of the cache. Only columns inside the band are read.

#include "common.cuh"
#include "softmax.h"

namespace megagpt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kWarpsPerBlock = 4;  // of the kernels that give each warp a row
constexpr int kMostThreads = 512;  // of a block that keeps its row in registers: more would have too few of them each

// What all rows share.
struct Rows {
  Band band;
  Mask mask;
  uint32_t n_rows, n_heads;
  float scale;
  const float* slopes;
};

// One query's row.
struct Row {
  int64_t start;        // of its first column, in elements
  int begin, end;       // the columns of its band
  const uint8_t* mask;  // of column 0; null where no key is masked
  float scale, slope;

  // Whether any of `size` columns is in the band.
  __device__ __forceinline__ bool has(int column, int size) const { return column < end && column + size > begin; }

  // x, the scores of every stride-th column, becomes scaled and biased, or -inf. The bias counts from the last column
  // of the band: a constant more or less is the same softmax, and there the numbers are smallest.
  template <int kSize>
  __device__ __forceinline__ void scale_and_mask(int column, int stride, float (&x)[kSize]) const {
    const float distance = static_cast<float>(column - end + 1);
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[k] = x[k] * scale + slope * (distance + static_cast<float>(k * stride));
    if (mask == nullptr && column >= begin && column + (kSize - 1) * stride < end) return;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const int c = column + k * stride;
      if (c < begin || c >= end || (mask != nullptr && !mask[c])) x[k] = -kInfinity;
    }
  }
};

__device__ __forceinline__ Row row_of(const Rows& rows, uint32_t i) {
  const uint32_t n_queries = rows.band.n_queries, head = i / n_queries, t = i - head * n_queries;
  const uint32_t b = head / rows.n_heads, h = head - b * rows.n_heads;
  const uint8_t* mask = rows.mask.row(b, h, t);
  const int begin = rows.band.begin(t);
  const bool all_masked = mask != nullptr && rows.mask.key == 0 && *mask == 0;
  return {i * rows.band.n_keys, begin, all_masked ? begin : static_cast<int>(rows.band.end(t)),
          rows.mask.key == 0 ? nullptr : mask, rows.scale, rows.slopes == nullptr ? 0.0f : rows.slopes[h]};
}

// Who works on a row: a warp, or all threads of a block.
template <bool kOneWarp>
struct Team {
  __device__ __forceinline__ static uint32_t row() {
    return kOneWarp ? blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp : blockIdx.x;
  }
  __device__ __forceinline__ static int rank() { return kOneWarp ? threadIdx.x % kWarp : threadIdx.x; }
  __device__ __forceinline__ static int size() { return kOneWarp ? kWarp : blockDim.x; }

  template <typename Op>
  __device__ __forceinline__ static float reduce(float x) {
    if constexpr (kOneWarp) {
      return warp_reduce<Op>(x);
    } else {
      MEGAGPT_SHARED_ARRAY(float, scratch, kWarp);
      return block_reduce<Op>(x, scratch);
    }
  }
};

// What exp is taken of x minus: NaN for a row with +inf, as NaN gives for its row.
__device__ __forceinline__ float offset_of(float most) { return most == kInfinity ? most - most : most; }

// exp(x - offset); 0 where masked, in rows of NaN or without any key too.
__device__ __forceinline__ float exp_unless_masked(float x, float offset) {
  return x == -kInfinity ? 0.0f : __expf(x - offset);
}

// What the exponentials are multiplied by. In a row of NaN they are NaN or, where masked, 0, and so they stay.
__device__ __forceinline__ float factor_of(float sum) { return sum > 0.0f ? __fdividef(1.0f, sum) : 1.0f; }

__device__ __forceinline__ float times_unless_zero(float a, float b) { return a == 0.0f ? 0.0f : a * b; }

// The first column of a thread's j-th pack.
template <typename T, bool kOneWarp>
__device__ __forceinline__ int column_of(int j) {
  return (j * Team<kOneWarp>::size() + Team<kOneWarp>::rank()) * Pack<T>::kSize;
}

// kPacks packs of a row, all asked for at once; those outside of the band are not read.
template <typename T, int kPacks, bool kOneWarp>
__device__ __forceinline__ void load_row(const T* x, const Row& row, Pack<T> (&packs)[kPacks]) {
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int column = column_of<T, kOneWarp>(j);
    packs[j] = {};
    if (row.has(column, Pack<T>::kSize)) packs[j] = *reinterpret_cast<const Pack<T>*>(x + row.start + column);
  }
}

template <typename T, int kPacks, bool kOneWarp>
__global__ void __launch_bounds__(kOneWarp ? kWarp * kWarpsPerBlock : kMostThreads, 1)
    softmax_registers(const T* __restrict__ scores, T* __restrict__ p, Rows rows) {
  using Us = Team<kOneWarp>;
  constexpr int kSize = Pack<T>::kSize;
  if (Us::row() >= rows.n_rows) return;  // a whole warp or nobody
  const Row row = row_of(rows, Us::row());
  const int n_keys = rows.band.n_keys;
  Pack<T> packs[kPacks];
  load_row<T, kPacks, kOneWarp>(scores, row, packs);

  float x[kPacks][kSize], most = -kInfinity;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int column = column_of<T, kOneWarp>(j);
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[j][k] = to_float(packs[j].v[k]);
    if (!row.has(column, kSize)) continue;
    row.scale_and_mask(column, 1, x[j]);
#pragma unroll
    for (int k = 0; k < kSize; ++k) most = Max::of(most, x[j][k]);
  }
  const float offset = offset_of(Us::template reduce<Max>(most));

  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (!row.has(column_of<T, kOneWarp>(j), kSize)) continue;
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += x[j][k] = exp_unless_masked(x[j][k], offset);
  }
  const float factor = factor_of(Us::template reduce<Sum>(sum));

#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int column = column_of<T, kOneWarp>(j);
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[j][k] *= factor;
    if (column < n_keys) store_pack(p + row.start + column, x[j]);
  }
}

// The elements that a thread takes at a time of a row too long for registers: a pack, or where rows do not divide into
// packs, as many elements that lie a block's width apart, so that neighbours are read by neighbours.
template <typename T, bool kPacked>
struct Group {
  static constexpr int kSize = Pack<T>::kSize;
  int stride = kPacked ? 1 : Team<false>::size();
  int first = kPacked ? Team<false>::rank() * kSize : Team<false>::rank();
  int step = Team<false>::size() * kSize;

  // 0 for columns outside of the band.
  __device__ __forceinline__ void load(const T* x, const Row& row, int column, float (&v)[kSize]) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) v[k] = 0.0f;
    if constexpr (kPacked) {
      if (row.has(column, kSize)) load_pack(x + row.start + column, v);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (row.has(column + k * stride, 1)) v[k] = to_float(x[row.start + column + k * stride]);
      }
    }
  }

  __device__ __forceinline__ void store(T* y, const Row& row, int n_keys, int column, const float (&v)[kSize]) const {
    if constexpr (kPacked) {
      if (column < n_keys) store_pack(y + row.start + column, v);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (column + k * stride < n_keys) y[row.start + column + k * stride] = from_float<T>(v[k]);
      }
    }
  }
};

// Rows of any length, one a block: the maximum and the sum of exp in one pass (Milakov & Gimelshein 2018), then p.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(1024) softmax_loop(const T* __restrict__ scores, T* __restrict__ p, Rows rows) {
  using Us = Team<false>;
  constexpr int kSize = Pack<T>::kSize;
  const Row row = row_of(rows, Us::row());
  const Group<T, kPacked> group;
  float most = -kInfinity, sum = 0.0f, x[kSize];
  for (int column = row.begin / kSize * kSize + group.first; column < row.end; column += group.step) {
    group.load(scores, row, column, x);
    row.scale_and_mask(column, group.stride, x);
    const float before = most;
#pragma unroll
    for (int k = 0; k < kSize; ++k) most = Max::of(most, x[k]);
    sum = times_unless_zero(sum, __expf(before - most));
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += exp_unless_masked(x[k], most);
  }
  const float offset = offset_of(Us::template reduce<Max>(most));
  const float factor = factor_of(Us::template reduce<Sum>(times_unless_zero(sum, __expf(most - offset))));

  const int n_keys = rows.band.n_keys;
  for (int column = group.first; column < n_keys; column += group.step) {
    group.load(scores, row, column, x);
    row.scale_and_mask(column, group.stride, x);
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[k] = exp_unless_masked(x[k], offset) * factor;
    group.store(p, row, n_keys, column, x);
  }
}

// A masked key's gradient is 0, even in rows of NaN: p = 0 says that it is masked.
__device__ __forceinline__ float gradient(float p, float grad, float sum, float scale) {
  return p == 0.0f ? 0.0f : scale * p * (grad - sum);
}

template <typename T, int kPacks, bool kOneWarp>
__global__ void __launch_bounds__(kOneWarp ? kWarp * kWarpsPerBlock : kMostThreads, 1)
    softmax_backward_registers(const T* __restrict__ grad, const T* __restrict__ p, T* __restrict__ dx, Rows rows) {
  using Us = Team<kOneWarp>;
  constexpr int kSize = Pack<T>::kSize;
  if (Us::row() >= rows.n_rows) return;
  const Row row = row_of(rows, Us::row());
  const int n_keys = rows.band.n_keys;
  Pack<T> ps[kPacks], grads[kPacks];
  load_row<T, kPacks, kOneWarp>(p, row, ps);
  load_row<T, kPacks, kOneWarp>(grad, row, grads);

  // A pack at the edge of the band holds p = 0 beyond it.
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += times_unless_zero(to_float(ps[j].v[k]), to_float(grads[j].v[k]));
  }
  sum = Us::template reduce<Sum>(sum);

#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int column = column_of<T, kOneWarp>(j);
    float y[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) y[k] = gradient(to_float(ps[j].v[k]), to_float(grads[j].v[k]), sum, row.scale);
    if (column < n_keys) store_pack(dx + row.start + column, y);
  }
}

template <typename T, bool kPacked>
__global__ void __launch_bounds__(1024)
    softmax_backward_loop(const T* __restrict__ grad, const T* __restrict__ p, T* __restrict__ dx, Rows rows) {
  using Us = Team<false>;
  constexpr int kSize = Pack<T>::kSize;
  const Row row = row_of(rows, Us::row());
  const Group<T, kPacked> group;
  float sum = 0.0f, q[kSize], g[kSize];
  for (int column = row.begin / kSize * kSize + group.first; column < row.end; column += group.step) {
    group.load(p, row, column, q);
    group.load(grad, row, column, g);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += times_unless_zero(q[k], g[k]);
  }
  sum = Us::template reduce<Sum>(sum);

  const int n_keys = rows.band.n_keys;
  for (int column = group.first; column < n_keys; column += group.step) {
    group.load(p, row, column, q);
    group.load(grad, row, column, g);
#pragma unroll
    for (int k = 0; k < kSize; ++k) q[k] = gradient(q[k], g[k], sum, row.scale);
    group.store(dx, row, n_keys, column, q);
  }
}

// The kernels that a row's length asks for.
template <int kPacks, bool kOneWarp>
struct InRegisters {
  template <typename T>
  static constexpr auto forward = &softmax_registers<T, kPacks, kOneWarp>;
  template <typename T>
  static constexpr auto backward = &softmax_backward_registers<T, kPacks, kOneWarp>;
};
template <bool kPacked>
struct Looping {
  template <typename T>
  static constexpr auto forward = &softmax_loop<T, kPacked>;
  template <typename T>
  static constexpr auto backward = &softmax_backward_loop<T, kPacked>;
};

// Calls run(kernels, blocks, threads) with those for rows of `n_keys` at these pointers.
template <typename T, typename F, typename... P>
void choose(int64_t n_rows, int64_t n_keys, F&& run, const P*... pointers) {
  constexpr int kSize = Pack<T>::kSize, kPacks = 4;
  const int64_t n_packs = n_keys / kSize, shared_out = ceil_div(n_rows, kWarpsPerBlock);
  constexpr int kThreads = kWarp * kWarpsPerBlock;
  if (!packable<T>(n_keys, pointers...)) {
    MEGAGPT_BRANCH("softmax.cuda.elements");
    run(Looping<false>{}, n_rows, threads_for(ceil_div(n_keys, kSize)));
  } else if (n_packs <= kWarp) {
    MEGAGPT_BRANCH("softmax.cuda.warp.1");
    run(InRegisters<1, true>{}, shared_out, kThreads);
  } else if (n_packs <= 2 * kWarp) {
    MEGAGPT_BRANCH("softmax.cuda.warp.2");
    run(InRegisters<2, true>{}, shared_out, kThreads);
  } else if (n_packs <= 4 * kWarp) {
    MEGAGPT_BRANCH("softmax.cuda.warp.4");
    run(InRegisters<4, true>{}, shared_out, kThreads);
  } else if (n_packs <= kPacks * kMostThreads) {
    MEGAGPT_BRANCH("softmax.cuda.block");
    run(InRegisters<kPacks, false>{}, n_rows, threads_for(ceil_div(n_packs, kPacks)));
  } else {
    MEGAGPT_BRANCH("softmax.cuda.packs");
    run(Looping<true>{}, n_rows, 1024);
  }
}

Rows rows_of(const char* op, const Tensor& x, double scale, int64_t behind, int64_t ahead) {
  const int64_t n_rows = x.numel() / x.size(3);
  STD_TORCH_CHECK(n_rows < (int64_t{1} << 31) && x.size(3) < (int64_t{1} << 30), op, ": got shape ", shape_of(x),
                  ", wanted fewer than 2^31 rows of fewer than 2^30 keys");
  return {band_of(x, behind, ahead), {}, static_cast<uint32_t>(n_rows), static_cast<uint32_t>(x.size(1)),
          static_cast<float>(scale), nullptr};
}

Tensor softmax_cuda(const Tensor& scores_in, double scale, int64_t behind, int64_t ahead,
                    const std::optional<Tensor>& mask_in, const std::optional<Tensor>& slopes_in) {
  const Tensor scores = dense(scores_in);
  const std::optional<Tensor> mask = with_dense_keys(mask_in), slopes = dense(slopes_in);
  const Tensor p = torch::stable::empty_like(scores);
  if (p.numel() == 0) return p;
  Rows rows = rows_of("softmax", scores, scale, behind, ahead);
  rows.mask = mask_of(mask);
  rows.slopes = data<float>(slopes);
  for_cuda_dtype("softmax", scores, [&](auto zero) {
    using T = decltype(zero);
    const T* x = data<T>(scores);
    T* y = mutable_data<T>(p);
    const auto run = [&](auto kernels, int64_t blocks, int threads) {
      launch(kernels.template forward<T>, dim3(blocks), threads, 0, scores, x, y, rows);
    };
    choose<T>(rows.n_rows, scores.size(3), run, x, y);
  });
  return p;
}

Tensor softmax_backward_cuda(const Tensor& grad_in, const Tensor& p_in, double scale, int64_t behind, int64_t ahead) {
  const Tensor grad = dense(grad_in), p = dense(p_in);
  const Tensor dx = torch::stable::empty_like(p);
  if (p.numel() == 0) return dx;
  const Rows rows = rows_of("softmax_backward", p, scale, behind, ahead);
  for_cuda_dtype("softmax_backward", p, [&](auto zero) {
    using T = decltype(zero);
    const T *g = data<T>(grad), *q = data<T>(p);
    T* d = mutable_data<T>(dx);
    const auto run = [&](auto kernels, int64_t blocks, int threads) {
      launch(kernels.template backward<T>, dim3(blocks), threads, 0, p, g, q, d, rows);
    };
    choose<T>(rows.n_rows, p.size(3), run, g, q, d);
  });
  return dx;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) {
  m.impl("softmax", TORCH_BOX(&megagpt::softmax_cuda));
  m.impl("softmax_backward", TORCH_BOX(&megagpt::softmax_backward_cuda));
}
