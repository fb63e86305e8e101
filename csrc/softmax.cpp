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

// e^x for x <= 0 to about 1e-7 relative, 0 below -87, NaN for NaN. Cheaper than vexp, whose range is wider: one factor
// 2^n is enough, and adding 1.5 * 2^23 both rounds x / ln 2 to n and leaves n in the low bits.
MEGAGPT_INLINE double exp_below_zero(double x) { return std::exp(x); }
MEGAGPT_INLINE float exp_below_zero(float x) {
  constexpr float kShift = 12582912.0f;
  const float shifted = madd(x, 1.44269504088896341f, kShift), n = shifted - kShift;
  const float r = madd(n, 2.12194440e-4f, madd(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = madd(p, r, 1.3981999507e-3f);
  p = madd(p, r, 8.3334519073e-3f);
  p = madd(p, r, 4.1665795894e-2f);
  p = madd(p, r, 1.6666665459e-1f);
  p = madd(p, r, 5.0000001201e-1f);
  p = madd(p * r, r, r + 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

// One row's band: n columns. A key is masked where `mask` is not null and holds false.
template <typename T>
struct Row {
  const T* scores;
  const uint8_t* mask;
  int64_t n;
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
}

// The largest of x, NaN left out.
template <typename A>
MEGAGPT_CLONES A largest(const A* x, int64_t n) {
  A most = -kInfinity<A>;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// x becomes exp(x - most); returns its sum.
template <typename A>
MEGAGPT_CLONES A exponentiate(A* x, int64_t n, A most) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const A e = exp_below_zero(x[i] - most);
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
  scale_and_mask(row, x);
  const acc_t<T> most = largest(x, row.n);
  if (std::isfinite(most)) {
    const acc_t<T> sum = exponentiate(x, row.n, most);
    if (std::isfinite(sum)) return divide<T>(x, y, row.n, sum);
    scale_and_mask(row, x);
  }
  constexpr acc_t<T> kNaN = std::numeric_limits<acc_t<T>>::quiet_NaN();
  for (int64_t i = 0; i < row.n; ++i) y[i] = store<T>(x[i] == -kInfinity<T> ? acc_t<T>(0) : kNaN);
}

// Zeros outside of [begin, end) of a row.
template <typename T>
void clear_outside(T* y, int64_t begin, int64_t end, int64_t n) {
  std::memset(static_cast<void*>(y), 0, begin * sizeof(T));
  std::memset(static_cast<void*>(y + end), 0, (n - end) * sizeof(T));
}

template <typename T>
MEGAGPT_CLONES acc_t<T> dot(const T* __restrict grad, const T* __restrict p, int64_t n) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> q = load(p[i]);
    sum += q == 0 ? acc_t<T>(0) : load(grad[i]) * q;
  }
  return sum;
}

template <typename T>
MEGAGPT_CLONES void backward_row(const T* __restrict grad, const T* __restrict p, T* __restrict dx, int64_t n,
                                 acc_t<T> sum, acc_t<T> scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> q = load(p[i]);
    dx[i] = store<T>(q == 0 ? acc_t<T>(0) : scale * q * (load(grad[i]) - sum));
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
      const int64_t start = (head * n_queries + t) * n_keys;
      const Row<T> row = {scores + start + begin, seen && mask.key == 1 ? seen + begin : nullptr, end - begin,
                          static_cast<acc_t<T>>(scale), slopes ? slopes[h] : acc_t<T>(0)};
      clear_outside(p + start, begin, end, n_keys);
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
        const int64_t t = balanced(i % n_queries, n_queries), begin = band.begin(t), end = band.end(t);
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
