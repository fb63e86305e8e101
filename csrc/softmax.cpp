// Scaled softmax of attention scores, on the CPU: see megagpt/ops/softmax.py.
//
// A row takes four passes over the columns of its band, of which the first alone reaches beyond the cache: scale and
// mask, maximum, exp and its sum, division.

#include "softmax.h"
#include "vec_math.h"

namespace megagpt {
namespace {

template <typename T>
constexpr acc_t<T> kInfinity = std::numeric_limits<acc_t<T>>::infinity();

// One row's band: n columns, and after them `padding` that is masked, so that loops end on whole vectors. A key is
// masked where `mask` is not null and holds false.
template <typename T>
struct Row {
  const T* scores;
  const uint8_t* mask;
  int64_t n, padding;
  acc_t<T> scale, slope;
};

// x = scale * scores + bias, -inf where masked. The bias counts from the last column: a constant more or less is the
// same softmax, and there the numbers are smallest.
template <typename T, bool kMasked>
MEGAGPT_CLONES void scale_and_mask(const T* __restrict scores, const uint8_t* __restrict mask, acc_t<T>* __restrict x,
                                   int64_t n, acc_t<T> scale, acc_t<T> slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> v = load(scores[i]) * scale + slope * static_cast<acc_t<T>>(static_cast<int32_t>(i - n + 1));
    if constexpr (kMasked) {
      x[i] = mask[i] ? v : -kInfinity<T>;
    } else {
      x[i] = v;
    }
  }
}

template <typename T>
void scale_and_mask(const Row<T>& row, acc_t<T>* x) {
  const auto pass = row.mask ? &scale_and_mask<T, true> : &scale_and_mask<T, false>;
  pass(row.scores, row.mask, x, row.n, row.scale, row.slope);
  std::fill_n(x + row.n, row.padding, -kInfinity<T>);
}

// The largest of x, NaN left out.
template <typename A>
MEGAGPT_CLONES A largest(const A* x, int64_t n) {
  A most = -kInfinity<A>;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// x becomes exp(x - most), 0 where that is below 2^-100 of the largest: divided by the sum it might be no normal number,
// and with these (which ALiBi makes many of) the product with the values takes half as long again. Returns its sum.
template <typename A>
MEGAGPT_CLONES A exponentiate(A* x, int64_t n, A most) {
  constexpr A kLeast = A(0x1p-100);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const A all = exp_below_zero(x[i] - most), e = all < kLeast ? A(0) : all;
    x[i] = e;
    sum += e;
  }
  return sum;
}

template <typename T>
MEGAGPT_CLONES void divide(const acc_t<T>* e, T* y, int64_t n, acc_t<T> sum) {
  const acc_t<T> factor = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(e[i] * factor);
}

// y = softmax of a row; x is room for as many numbers, which may be y itself. NaN or +inf makes the row NaN, and
// masked keys get 0 even so.
template <typename T>
void softmax_row(const Row<T>& row, acc_t<T>* x, T* y) {
  const int64_t n = row.n + row.padding;
  scale_and_mask(row, x);
  const acc_t<T> most = largest(x, n);
  if (std::isfinite(most)) {
    const acc_t<T> sum = exponentiate(x, n, most);
    if (std::isfinite(sum)) return divide<T>(x, y, n, sum);
    scale_and_mask(row, x);
  }
  constexpr acc_t<T> kNaN = std::numeric_limits<acc_t<T>>::quiet_NaN();
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(x[i] == -kInfinity<T> ? acc_t<T>(0) : kNaN);
}

// How many more columns make [begin, end) whole vectors, where the row has them.
int64_t padding_of(int64_t begin, int64_t end, int64_t n_keys) {
  constexpr int64_t kVector = 16;
  return std::min((begin - end) & (kVector - 1), n_keys - end);
}

// Zeros outside of [begin, end) of a row.
template <typename T>
void clear_outside(T* y, int64_t begin, int64_t end, int64_t n) {
  std::memset(static_cast<void*>(y), 0, begin * sizeof(T));
  std::memset(static_cast<void*>(y + end), 0, (n - end) * sizeof(T));
}

// Sum of grad * p. Where p is 0 the key may be masked, and its gradient anything; products come before the choice, so
// that compilers see no branch.
template <typename T>
MEGAGPT_CLONES acc_t<T> dot(const T* __restrict grad, const T* __restrict p, int64_t n) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> q = load(p[i]), product = load(grad[i]) * q;
    sum += q == 0 ? q : product;
  }
  return sum;
}

template <typename T>
MEGAGPT_CLONES void backward_row(const T* __restrict grad, const T* __restrict p, T* __restrict dx, int64_t n,
                                 acc_t<T> sum, acc_t<T> scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> q = load(p[i]), d = scale * q * (load(grad[i]) - sum);
    dx[i] = store<T>(q == 0 ? q : d);
  }
}

// Rows from both ends of a head by turns: causal ones differ in length, and threads get ranges of equal work.
int64_t balanced(int64_t i, int64_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

struct Softmax {
  Band band;
  Mask mask;
  int64_t n_heads;
  double scale;
  const float* slopes;

  // The rows [first, stop), numbered through all batches and heads.
  template <typename T>
  void rows(int64_t first, int64_t stop, const T* scores, T* p) const {
    const int64_t n_queries = band.n_queries, n_keys = band.n_keys;
    std::vector<acc_t<T>> scratch(std::is_same_v<T, acc_t<T>> ? 0 : n_keys);
    for (int64_t i = first; i < stop; ++i) {
      const int64_t head = i / n_queries, t = balanced(i % n_queries, n_queries), h = head % n_heads;
      const uint8_t* seen = mask.row(head / n_heads, h, t);
      const bool all_masked = seen && mask.key == 0 && !*seen;
      const int64_t begin = band.begin(t), end = all_masked ? begin : band.end(t);
      const int64_t start = (head * n_queries + t) * n_keys, padding = padding_of(begin, end, n_keys);
      const Row<T> row = {scores + start + begin, seen && mask.key == 1 ? seen + begin : nullptr, end - begin, padding,
                          static_cast<acc_t<T>>(scale), slopes ? slopes[h] : acc_t<T>(0)};
      clear_outside(p + start, begin, end + padding, n_keys);
      if constexpr (std::is_same_v<T, acc_t<T>>) {
        softmax_row(row, p + start + begin, p + start + begin);
      } else {
        softmax_row(row, scratch.data(), p + start + begin);
      }
    }
  }
};

Tensor softmax_cpu(const Tensor& scores_in, double scale, int64_t behind, int64_t ahead,
                   const std::optional<Tensor>& mask_in, const std::optional<Tensor>& slopes_in) {
  const Tensor scores = dense(scores_in);
  const std::optional<Tensor> mask = with_dense_keys(mask_in), slopes = dense(slopes_in);
  const Tensor p = torch::stable::empty_like(scores);
  if (p.numel() == 0) return p;
  const Softmax softmax = {band_of(scores, behind, ahead), mask_of(mask), scores.size(1), scale, data<float>(slopes)};
  for_dtype("softmax", scores, [&](auto zero) {
    using T = decltype(zero);
    MEGAGPT_BRANCH("softmax.cpu");
    parallel(p.numel() / p.size(3), row_grain(p.size(3)), [&](int64_t first, int64_t stop) {
      softmax.rows(first, stop, data<T>(scores), mutable_data<T>(p));
    });
  });
  return p;
}

Tensor softmax_backward_cpu(const Tensor& grad_in, const Tensor& p_in, double scale, int64_t behind, int64_t ahead) {
  const Tensor grad = dense(grad_in), p = dense(p_in);
  const Tensor dx = torch::stable::empty_like(p);
  const Band band = band_of(p, behind, ahead);
  const int64_t n_queries = band.n_queries, n_keys = band.n_keys;
  if (p.numel() == 0) return dx;
  for_dtype("softmax_backward", p, [&](auto zero) {
    using T = decltype(zero);
    parallel(p.numel() / n_keys, row_grain(n_keys), [&](int64_t first, int64_t stop) {
      for (int64_t i = first; i < stop; ++i) {
        const int64_t t = balanced(i % n_queries, n_queries), begin = band.begin(t);
        const int64_t end = band.end(t) + padding_of(begin, band.end(t), n_keys);  // p is 0 in the padding
        const int64_t start = (i - i % n_queries + t) * n_keys;
        const T *g = data<T>(grad) + start + begin, *q = data<T>(p) + start + begin;
        T* d = mutable_data<T>(dx) + start;
        clear_outside(d, begin, end, n_keys);
        backward_row<T>(g, q, d + begin, end - begin, dot<T>(g, q, end - begin), static_cast<acc_t<T>>(scale));
      }
    });
  });
  return dx;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) {
  m.impl("softmax", TORCH_BOX(&megagpt::softmax_cpu));
  m.impl("softmax_backward", TORCH_BOX(&megagpt::softmax_backward_cpu));
}
