// Rotary embedding of packed queries, keys and values, in CUDA: see megagpt/ops/rotary.py.
//
// A block has one token. A thread takes the same two packs of 16 bytes (or elements) of several heads, such that it
// holds both partners of each pair, and loads their cosines and sines once.

#include "common.cuh"

namespace megagpt {
namespace {

constexpr int kThreads = 256;

// The layout of one call: rows (one per token) of n_heads heads of d_head elements; of every `per_group` heads the
// first n_rotated are rotated, in the first 2 * n_pairs elements.
struct Layout {
  int64_t seq_len, table_rows;
  int n_heads, per_group, d_head, n_rotated, n_pairs;
};

// N pairs of a and b, turned by the angles of cosine c and sine s. Interleaved, partners are neighbours in [a | b].
template <bool kInterleaved, typename T, int N>
__device__ __forceinline__ void rotate(Elements<T, N>& a, Elements<T, N>& b, const float (&c)[N],
                                       const float (&s)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int first = kInterleaved ? 2 * i : i, second = kInterleaved ? 2 * i + 1 : N + i;
    T& one = first < N ? a.v[first % N] : b.v[first % N];
    T& two = second < N ? a.v[second % N] : b.v[second % N];
    const float u = to_float(one), v = to_float(two);
    one = from_float<T>(u * c[i] - v * s[i]);
    two = from_float<T>(v * c[i] + u * s[i]);
  }
}

// N floats of a table, in accesses of 16 bytes where N allows.
template <int N>
__device__ __forceinline__ void read_table(const float* __restrict__ p, float factor, float (&x)[N]) {
  constexpr int kStep = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const Elements<float, kStep> part = read<kStep>(p + i);
#pragma unroll
    for (int k = 0; k < kStep; ++k) x[i + k] = factor * part.v[k];
  }
}

// y = x rotated. Threads_per_head threads share a head: thread j of them has its packs `first` and `second`.
template <bool kInterleaved, typename T, int N>
__global__ void rotate_rows(const T* __restrict__ x, T* __restrict__ y, const float* __restrict__ cos,
                            const float* __restrict__ sin, const int64_t* __restrict__ positions, float sign,
                            int threads_per_head, Layout l) {
  const int64_t row = blockIdx.x;
  const int64_t position = positions == nullptr ? row % l.seq_len : __ldg(positions + row);
  const bool known = 0 <= position && position < l.table_rows;  // others give NaN: there is no error to raise from here
  const int n_packs = l.d_head / N, n_turned = l.n_pairs / N;    // n_turned threads have a pack of each partner
  const int n_items = (n_packs + 1) / 2;
  for (int j = threadIdx.x % threads_per_head; j < n_items; j += threads_per_head) {
    const bool turned = j < n_turned;
    const int first = turned ? (kInterleaved ? 2 * j : j) : n_turned + j;
    const int second = turned ? (kInterleaved ? 2 * j + 1 : n_turned + j) : n_items + j;
    float c[N], s[N];
#pragma unroll
    for (int i = 0; i < N; ++i) c[i] = s[i] = std::numeric_limits<float>::quiet_NaN();
    if (turned && known) {
      read_table(cos + position * l.n_pairs + j * N, 1.0f, c);
      read_table(sin + position * l.n_pairs + j * N, sign, s);
    }
#pragma unroll 4
    for (int head = threadIdx.x / threads_per_head; head < l.n_heads; head += blockDim.x / threads_per_head) {
      const int64_t at = (row * l.n_heads + head) * l.d_head;
      Elements<T, N> a = read<N>(x + at + first * N), b = a;
      if (second < n_packs) b = read<N>(x + at + second * N);
      if (turned && head % l.per_group < l.n_rotated) rotate<kInterleaved>(a, b, c, s);
      write(y + at + first * N, a);
      if (second < n_packs) write(y + at + second * N, b);
    }
  }
}

Tensor rotary_cuda(const Tensor& qkv_in, const Tensor& cos_in, const Tensor& sin_in,
                   const std::optional<Tensor>& positions_in, int64_t n_rotated, bool interleaved, bool inverse) {
  const Tensor qkv = dense(qkv_in), cos = dense(cos_in), sin = dense(sin_in);
  const std::optional<Tensor> positions = dense(positions_in);
  const Tensor y = torch::stable::empty_like(qkv);
  const auto to_int = [](int64_t n) { return static_cast<int>(n); };
  const Layout l{qkv.size(1), cos.size(0), to_int(qkv.size(2) * qkv.size(3)), to_int(qkv.size(3)), to_int(qkv.size(4)),
                 to_int(n_rotated), to_int(cos.size(1))};
  const int64_t n_rows = qkv.numel() == 0 ? 0 : qkv.size(0) * qkv.size(1);
  for_cuda_dtype("rotary", qkv, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto size) {
      constexpr int N = size;
      const int items = std::max((l.d_head / N + 1) / 2, 1), threads_per_head = std::min(items, kThreads);
      const int heads_at_once = std::clamp(kThreads / threads_per_head, 1, std::max(l.n_heads, 1));
      launch(interleaved ? rotate_rows<true, T, N> : rotate_rows<false, T, N>, dim3(n_rows),
             threads_per_head * heads_at_once, 0, qkv, data<T>(qkv), mutable_data<T>(y), data<float>(cos),
             data<float>(sin), data<int64_t>(positions), inverse ? -1.0f : 1.0f, threads_per_head, l);
    };
    if (packable<T>(l.d_head, data<T>(qkv), data<T>(y)) &&
        packable<T>(l.n_pairs, data<float>(cos), data<float>(sin))) {
      MEGAGPT_BRANCH("rotary.cuda.packs");
      run(std::integral_constant<int, Pack<T>::kSize>{});
    } else {
      MEGAGPT_BRANCH("rotary.cuda.elements");
      run(std::integral_constant<int, 1>{});
    }
  });
  return y;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) { m.impl("rotary", TORCH_BOX(&megagpt::rotary_cuda)); }
