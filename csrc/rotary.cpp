// Rotary embedding of packed queries, keys and values, on the CPU: see megagpt/ops/rotary.py.

#include "common.h"

namespace megagpt {
namespace {

// The layout of one call: rows (one per token) of n_heads heads of d_head elements; of every `per_group` heads the
// first n_rotated are rotated, in the first 2 * n_pairs elements.
struct Layout {
  int64_t n_rows, seq_len, n_heads, per_group, d_head, n_rotated, n_pairs;
};

// Pairs (a, b) of x, turned by the angles whose cosines and sines are given; sign -1 turns them back.
template <bool kInterleaved, typename T>
MEGAGPT_INLINE void rotate(const T* __restrict x, T* __restrict y, const acc_t<T>* __restrict cos,
                           const acc_t<T>* __restrict sin, acc_t<T> sign, int64_t n_pairs) {
  constexpr int64_t kStep = kInterleaved ? 2 : 1;
  const int64_t partner = kInterleaved ? 1 : n_pairs;
#pragma omp simd
  for (int64_t i = 0; i < n_pairs; ++i) {
    const acc_t<T> a = load(x[kStep * i]), b = load(x[kStep * i + partner]), s = sign * sin[i];
    y[kStep * i] = store<T>(a * cos[i] - b * s);
    y[kStep * i + partner] = store<T>(b * cos[i] + a * s);
  }
}

// Rows [begin, end): rotates some heads, and copies the rest.
template <bool kInterleaved, typename T>
MEGAGPT_CLONES void rotate_rows(const T* __restrict x, T* __restrict y, const acc_t<T>* __restrict cos,
                                const acc_t<T>* __restrict sin, const int64_t* positions, acc_t<T> sign, Layout l,
                                int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t angle = (positions ? positions[row] : row % l.seq_len) * l.n_pairs;
    for (int64_t head = 0; head < l.n_heads; ++head) {
      const int64_t at = (row * l.n_heads + head) * l.d_head;
      const int64_t n_pairs = head % l.per_group < l.n_rotated ? l.n_pairs : 0;
      rotate<kInterleaved, T>(x + at, y + at, cos + angle, sin + angle, sign, n_pairs);
      std::memcpy(y + at + 2 * n_pairs, x + at + 2 * n_pairs, (l.d_head - 2 * n_pairs) * sizeof(T));
    }
  }
}

void require_rows(const int64_t* positions, int64_t n, int64_t n_rows_of_table) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(0 <= positions[i] && positions[i] < n_rows_of_table, "rotary: got position ", positions[i],
                    ", wanted one in [0, ", n_rows_of_table, "), the rows of the tables");
  }
}

Tensor rotary_cpu(const Tensor& qkv_in, const Tensor& cos_in, const Tensor& sin_in,
                  const std::optional<Tensor>& positions_in, int64_t n_rotated, bool interleaved, bool inverse) {
  const Tensor qkv = dense(qkv_in), cos = dense(cos_in), sin = dense(sin_in);
  const std::optional<Tensor> positions = dense(positions_in);
  const Tensor y = torch::stable::empty_like(qkv);
  const Layout l{qkv.size(0) * qkv.size(1), qkv.size(1), qkv.size(2) * qkv.size(3), qkv.size(3), qkv.size(4),
                 n_rotated, cos.size(1)};
  if (positions) require_rows(data<int64_t>(positions), l.n_rows, cos.size(0));
  for_dtype("rotary", qkv, [&](auto zero) {
    using T = decltype(zero);
    using F = acc_t<T>;
    if (interleaved) MEGAGPT_BRANCH("rotary.cpu.interleaved");
    else MEGAGPT_BRANCH("rotary.cpu.halves");
    parallel(l.n_rows, row_grain(l.n_heads * l.d_head), [&](int64_t begin, int64_t end) {
      (interleaved ? rotate_rows<true, T> : rotate_rows<false, T>)(data<T>(qkv), mutable_data<T>(y), data<F>(cos),
                                                                   data<F>(sin), data<int64_t>(positions),
                                                                   inverse ? F(-1) : F(1), l, begin, end);
    });
  });
  return y;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) { m.impl("rotary", TORCH_BOX(&megagpt::rotary_cpu)); }
