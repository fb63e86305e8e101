// Scaled softmax of attention scores, on the CPU: see megagpt/ops/softmax.py.
//
// A row takes three passes, over the columns of its band only: the maximum, the sum of exp, the division. The second
// and third find the row in cache.

#include "softmax.h"
#include "vec_math.h"

namespace megagpt {
namespace {

// One row's band: n columns, of which a key is masked where mask is given and false.
template <typename T>
struct Row {
  const T* scores;
  const bool* mask;
  int64_t n;
  acc_t<T> scale, slope;

  // Scaled, biased, masked by -inf. The bias counts from the last column: a constant more or less is the same softmax,
  // and there the numbers are smallest.
  template <bool kMasked>
  MEGAGPT_INLINE acc_t<T> at(int64_t i) const {
    const acc_t<T> x = load(scores[i]) * scale + slope * static_cast<acc_t<T>>(static_cast<int32_t>(i - n + 1));
    if constexpr (kMasked) return mask[i] ? x : -std::numeric_limits<acc_t<T>>::infinity();
    return x;
  }
};

template <typename T, bool kMasked>
MEGAGPT_CLONES acc_t<T> row_max(Row<T> row) {
  acc_t<T> most = -std::numeric_limits<acc_t<T>>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < row.n; ++i) most = std::max(most, row.template at<kMasked>(i));
  return most;
}

// e = exp(x - most); returns its sum. `most` is finite, so that masked keys give 0.
template <typename T, bool kMasked>
MEGAGPT_CLONES acc_t<T> row_exp(Row<T> row, acc_t<T> most, acc_t<T>* __restrict e) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < row.n; ++i) {
    e[i] = vexp(row.template at<kMasked>(i) - most);
    sum += e[i];
  }
  return sum;
}

template <typename T>
MEGAGPT_CLONES void row_divide(const acc_t<T>* e, T* y, int64_t n, acc_t<T> sum) {
  const acc_t<T> factor = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(e[i] * factor);
}

// A row that holds NaN or +inf gives NaN, one without keys gives 0: masked keys are 0 in both.
template <typename T, bool kMasked>
void row_without_softmax(Row<T> row, T* y) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < row.n; ++i) {
    const bool masked = row.template at<kMasked>(i) == -std::numeric_limits<A>::infinity();
    y[i] = store<T>(masked ? A(0) : std::numeric_limits<A>::quiet_NaN());
  }
}

// `e`: room for the row, which may be y itself.
template <typename T, bool kMasked>
void softmax_row(Row<T> row, T* y, acc_t<T>* e) {
  const acc_t<T> most = row_max<T, kMasked>(row);
  const acc_t<T> sum = std::isfinite(most) ? row_exp<T, kMasked>(row, most, e) : std::numeric_limits<acc_t<T>>::infinity();
  if (std::isfinite(sum)) return row_divide<T>(e, y, row.n, sum);
  row_without_softmax<T, kMasked>(row, y);
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

Tensor softmax_cpu(const Tensor& scores_in, double scale, int64_t behind, int64_t ahead,
                   const std::optional<Tensor>& mask_in, const std::optional<Tensor>& slopes_in) {
  const Tensor scores = dense(scores_in);
  const std::optional<Tensor> mask_kept = with_dense_keys(mask_in), slopes = dense(slopes_in);
  const Tensor p = torch::stable::empty_like(scores);
  const Band band = band_of(scores, behind, ahead);
  const Mask mask = mask_of(mask_kept);
  const int64_t n_heads = scores.size(1), n_queries = band.n_queries, n_keys = band.n_keys;
  if (scores.numel() == 0) return p;
  for_dtype("softmax", scores, [&](auto zero) {
    using T = decltype(zero);
    MEGAGPT_BRANCH("softmax.cpu");
    parallel(scores.size(0) * n_heads * n_queries, row_grain(n_keys), [&](int64_t first, int64_t stop) {
      std::vector<acc_t<T>> scratch(std::is_same_v<T, BFloat16> ? n_keys : 0);
      for (int64_t i = first; i < stop; ++i) {
        const int64_t head = i / n_queries, t = balanced(i % n_queries, n_queries), b = head / n_heads, h = head % n_heads;
        const bool* mask_row = mask.row(b, h, t);
        const bool all_masked = mask_row && mask.key == 0 && !*mask_row;
        const int64_t begin = band.begin(t), end = all_masked ? begin : band.end(t);
        const Row<T> row = {data<T>(scores) + (head * n_queries + t) * n_keys + begin,
                            mask_row ? mask_row + begin * mask.key : nullptr, end - begin, static_cast<acc_t<T>>(scale),
                            slopes ? data<float>(*slopes)[h] : acc_t<T>(0)};
        T* y = mutable_data<T>(p) + (head * n_queries + t) * n_keys;
        acc_t<T>* e = scratch.data();
        if constexpr (!std::is_same_v<T, BFloat16>) e = y + begin;
        clear_outside(y, begin, end, n_keys);
        if (mask_row && mask.key == 1) {
          softmax_row<T, true>(row, y + begin, e);
        } else {
          softmax_row<T, false>(row, y + begin, e);
        }
      }
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
