// LayerNorm and RMSNorm of a residual sum, on the CPU: see megagpt/ops/norm.py.
//
// A row is read from memory once: the passes over it after the first find it in cache.

#include "common.h"

namespace megagpt {
namespace {

// f(0) + ... + f(n - 1), in 64 sums, so that one addition need not wait for the one before.
template <typename A, typename F>
MEGAGPT_INLINE A sum_over(int64_t n, F f) {
  constexpr int64_t kSums = 64;
  A sums[kSums] = {}, total = 0;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
#pragma omp simd
    for (int64_t k = 0; k < kSums; ++k) sums[k] += f(i + k);
  }
  for (; i < n; ++i) total += f(i);
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < kSums; ++k) total += sums[k];
  return total;
}

// The same for two sums at once: f(i, a, b) adds to them.
template <typename A, typename F>
MEGAGPT_INLINE void two_sums_over(int64_t n, A& a, A& b, F f) {
  constexpr int64_t kSums = 32;
  A as[kSums] = {}, bs[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
#pragma omp simd
    for (int64_t k = 0; k < kSums; ++k) f(i + k, as[k], bs[k]);
  }
  for (; i < n; ++i) f(i, a, b);
#pragma omp simd reduction(+ : a, b)
  for (int64_t k = 0; k < kSums; ++k) {
    a += as[k];
    b += bs[k];
  }
}

template <typename T>
struct Forward {
  const T *x, *residual, *weight, *bias;  // residual and bias: may be null
  T *y, *sum;
  acc_t<T> *mean, *rstd;
  int64_t columns;
  acc_t<T> eps;
};

template <typename A>
struct Moments {
  A mean, variance;
};

// Mean and variance of a row in one pass, about its first element, which is a better guess of the mean than 0. Where
// that lies so far off that digits cancel, a second pass about the mean itself. Without kCenter: 0 and the mean square.
// Adds the residual on the way, if there is one.
template <typename T, bool kCenter, bool kAdd>
MEGAGPT_INLINE Moments<acc_t<T>> moments(const T* __restrict x, const T* __restrict residual, T* __restrict sum,
                                         int64_t n) {
  using A = acc_t<T>;
  const auto read = [&](int64_t i) {
    if constexpr (!kAdd) return load(x[i]);
    sum[i] = store<T>(load(x[i]) + load(residual[i]));
    return load(sum[i]);
  };
  if constexpr (!kCenter) {
    return {0, sum_over<A>(n, [&](int64_t i) {
              const A value = read(i);
              return value * value;
            }) / n};
  }
  const A guess = n > 0 ? read(0) : A(0);
  A first = 0, second = 0;
  two_sums_over<A>(n, first, second, [&](int64_t i, A& a, A& b) {
    const A off = read(i) - guess;
    a += off;
    b += off * off;
  });
  const A off = first / n, mean = guess + off, variance = second / n - off * off;
  if (off * off <= 4 * variance) return {mean, variance};
  const T* values = kAdd ? sum : x;
  const auto squared = [&](int64_t i) { return (load(values[i]) - mean) * (load(values[i]) - mean); };
  return {mean, sum_over<A>(n, squared) / n};
}

template <typename T, bool kCenter>
MEGAGPT_CLONES void forward(const Forward<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t n = p.columns;
  const T *__restrict weight = p.weight, *__restrict bias = p.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict x = p.x + row * n;
    T* __restrict y = p.y + row * n;
    Moments<A> m;
    if (p.residual) {
      m = moments<T, kCenter, true>(x, p.residual + row * n, p.sum + row * n, n);
      x = p.sum + row * n;
    } else {
      m = moments<T, kCenter, false>(x, nullptr, nullptr, n);
    }
    const A mean = m.mean, rstd = 1 / std::sqrt(m.variance + p.eps);
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = store<T>((load(x[i]) - mean) * rstd * load(weight[i]) + load(bias[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = store<T>((load(x[i]) - mean) * rstd * load(weight[i]));
    }
    if (kCenter) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

template <typename T>
struct Backward {
  const T *grad, *grad_sum, *x, *weight;  // grad_sum: may be null
  const acc_t<T> *mean, *rstd;            // mean: null unless centered
  T* dx;
  int64_t columns;
};

// dx of one row, and its part in the gradients of weight and bias.
template <typename T, bool kCenter, bool kStream>
MEGAGPT_INLINE void backward_row(const Backward<T>& p, int64_t row, acc_t<T>* __restrict dweight,
                                 acc_t<T>* __restrict dbias) {
  using A = acc_t<T>;
  const int64_t n = p.columns;
  const T *__restrict g = p.grad + row * n, *__restrict x = p.x + row * n, *__restrict weight = p.weight;
  const T* __restrict stream = kStream ? p.grad_sum + row * n : nullptr;
  T* __restrict dx = p.dx + row * n;
  const A mean = kCenter ? p.mean[row] : A(0), rstd = p.rstd[row];
  A sum = 0, dot = 0;
  two_sums_over<A>(n, sum, dot, [&](int64_t i, A& a, A& b) {
    const A d = load(g[i]), normal = (load(x[i]) - mean) * rstd;
    if (kCenter) a += d * load(weight[i]);
    b += d * load(weight[i]) * normal;
    dweight[i] += d * normal;
    if (kCenter) dbias[i] += d;
  });
  const A shift = sum / n, slope = dot / n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A normal = (load(x[i]) - mean) * rstd;
    const A d = rstd * (load(g[i]) * load(weight[i]) - shift - normal * slope);
    dx[i] = store<T>(kStream ? d + load(stream[i]) : d);
  }
}

template <typename T, bool kCenter>
MEGAGPT_CLONES void backward(const Backward<T>& p, int64_t begin, int64_t end, acc_t<T>* dweight, acc_t<T>* dbias) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.grad_sum) {
      backward_row<T, kCenter, true>(p, row, dweight, dbias);
    } else {
      backward_row<T, kCenter, false>(p, row, dweight, dbias);
    }
  }
}

// total = the sum of the rows of parts (n_parts, columns).
template <typename T>
MEGAGPT_CLONES void add_parts(const acc_t<T>* __restrict parts, int64_t n_parts, int64_t columns, T* __restrict total) {
  constexpr int64_t kBlock = 256;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t n = std::min(kBlock, columns - first);
    acc_t<T> sums[kBlock] = {};
    for (int64_t part = 0; part < n_parts; ++part) {
      const acc_t<T>* __restrict from = parts + part * columns + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sums[i] += from[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[first + i] = store<T>(sums[i]);
  }
}

// Calls f(std::true_type) or f(std::false_type).
template <typename F>
void for_center(bool center, F&& f) {
  center ? f(std::true_type{}) : f(std::false_type{});
}

std::vector<int64_t> without_last(const Tensor& x) {
  return std::vector<int64_t>(x.sizes().begin(), x.sizes().end() - 1);
}

ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_cpu(const Tensor& x_in, const std::optional<Tensor>& residual_in,
                                                    const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                                                    double eps, bool center) {
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const std::optional<Tensor> residual = dense(residual_in), bias = dense(bias_in);
  const Tensor y = torch::stable::empty_like(x);
  const Tensor sum = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor rstd = torch::stable::new_empty(x, without_last(x), statistics_dtype(x));
  const int64_t columns = x.size(-1), rows = rstd.numel();
  const Tensor mean = center ? torch::stable::empty_like(rstd) : torch::stable::new_empty(rstd, {0});
  for_dtype("norm", x, [&](auto zero) {
    using T = decltype(zero);
    for_center(center, [&](auto centered) {
      MEGAGPT_BRANCH("norm.cpu");
      const Forward<T> p{data<T>(x),
                         data<T>(residual),
                         data<T>(weight),
                         data<T>(bias),
                         mutable_data<T>(y),
                         mutable_data<T>(sum),
                         mutable_data<acc_t<T>>(mean),
                         mutable_data<acc_t<T>>(rstd),
                         columns,
                         static_cast<acc_t<T>>(eps)};
      parallel(rows, row_grain(columns), [&](int64_t begin, int64_t end) {
        forward<T, centered.value>(p, begin, end);
      });
    });
  });
  return {y, sum, mean, rstd};
}

// Rows fall into parts by the shape alone; each part sums its gradient of weight and bias, then the parts are added.
std::tuple<Tensor, Tensor, Tensor> norm_backward_cpu(const Tensor& grad_in, const std::optional<Tensor>& grad_sum_in,
                                                     const Tensor& x_in, const Tensor& mean_in, const Tensor& rstd_in,
                                                     const Tensor& weight_in, bool center) {
  const Tensor grad = dense(grad_in), x = dense(x_in), weight = dense(weight_in);
  const Tensor mean = dense(mean_in), rstd = dense(rstd_in);
  const std::optional<Tensor> grad_sum = dense(grad_sum_in);
  const int64_t columns = x.size(-1), rows = rstd.numel();
  const int64_t n_parts = std::clamp<int64_t>(rows / std::max<int64_t>(64, row_grain(columns)), 1, 64);
  const Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  const Tensor dbias = center ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, {0});
  const Tensor dweight_parts = torch::stable::new_zeros(rstd, {n_parts, columns});
  const Tensor dbias_parts = torch::stable::new_zeros(rstd, {center ? n_parts : 0, columns});
  for_dtype("norm_backward", x, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    for_center(center, [&](auto centered) {
      MEGAGPT_BRANCH("norm_backward.cpu");
      const Backward<T> p{data<T>(grad),  data<T>(grad_sum), data<T>(x),          data<T>(weight),
                          data<A>(mean),  data<A>(rstd),     mutable_data<T>(dx), columns};
      A *dw = mutable_data<A>(dweight_parts), *db = mutable_data<A>(dbias_parts);
      parallel(n_parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          backward<T, centered.value>(p, rows * part / n_parts, rows * (part + 1) / n_parts, dw + part * columns,
                                      center ? db + part * columns : nullptr);
        }
      });
      add_parts<T>(dw, n_parts, columns, mutable_data<T>(dweight));
      if (center) add_parts<T>(db, n_parts, columns, mutable_data<T>(dbias));
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) {
  m.impl("norm", TORCH_BOX(&megagpt::norm_cpu));
  m.impl("norm_backward", TORCH_BOX(&megagpt::norm_backward_cpu));
}
