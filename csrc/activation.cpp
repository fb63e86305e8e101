// Bias and activation, gated or not, on the CPU: see megagpt/ops/activation.py; the functions are in activations.h.

#include "activations.h"

namespace megagpt {
namespace {

// y = f(x + bias), row by row.
template <typename Op, typename T>
MEGAGPT_CLONES void forward(const T* __restrict x, const T* __restrict bias, T* __restrict y, int64_t n_rows,
                            int64_t n_columns) {
  for (; n_rows > 0; --n_rows, x += n_columns, y += n_columns) {
#pragma omp simd
    for (int64_t i = 0; i < n_columns; ++i) y[i] = store<T>(Op::at(load(x[i]) + load(bias[i])).value);
  }
}

// y = f(gate + bias) (up + bias), where a row of x and the bias are [gate | up], n_columns each.
template <typename Op, typename T>
MEGAGPT_CLONES void forward_gated(const T* __restrict x, const T* __restrict bias, T* __restrict y, int64_t n_rows,
                                  int64_t n_columns) {
  const T *const gate_bias = bias, *const up_bias = bias + n_columns;
  for (; n_rows > 0; --n_rows, x += 2 * n_columns, y += n_columns) {
    const T *const gate = x, *const up = x + n_columns;
#pragma omp simd
    for (int64_t i = 0; i < n_columns; ++i) {
      y[i] = store<T>(Op::at(load(gate[i]) + load(gate_bias[i])).value * (load(up[i]) + load(up_bias[i])));
    }
  }
}

// dx = grad f'(x + bias); its sum over rows is added to dbias.
template <typename Op, typename T>
MEGAGPT_CLONES void backward(const T* __restrict grad, const T* __restrict x, const T* __restrict bias,
                             T* __restrict dx, acc_t<T>* __restrict dbias, int64_t n_rows, int64_t n_columns) {
  for (; n_rows > 0; --n_rows, grad += n_columns, x += n_columns, dx += n_columns) {
#pragma omp simd
    for (int64_t i = 0; i < n_columns; ++i) {
      const acc_t<T> d = load(grad[i]) * Op::at(load(x[i]) + load(bias[i])).slope;
      dx[i] = store<T>(d);
      dbias[i] += d;
    }
  }
}

template <typename Op, typename T>
MEGAGPT_CLONES void backward_gated(const T* __restrict grad, const T* __restrict x, const T* __restrict bias,
                                   T* __restrict dx, acc_t<T>* __restrict dbias, int64_t n_rows, int64_t n_columns) {
  const T *const gate_bias = bias, *const up_bias = bias + n_columns;
  acc_t<T>*__restrict const dgate_bias = dbias, *__restrict const dup_bias = dbias + n_columns;
  for (; n_rows > 0; --n_rows, grad += n_columns, x += 2 * n_columns, dx += 2 * n_columns) {
    const T *const gate = x, *const up = x + n_columns;
    T *__restrict const dgate = dx, *__restrict const dup = dx + n_columns;
#pragma omp simd
    for (int64_t i = 0; i < n_columns; ++i) {
      const acc_t<T> g = load(grad[i]);
      const Point<acc_t<T>> f = Op::at(load(gate[i]) + load(gate_bias[i]));
      const acc_t<T> d_gate = g * (load(up[i]) + load(up_bias[i])) * f.slope, d_up = g * f.value;
      dgate[i] = store<T>(d_gate);
      dup[i] = store<T>(d_up);
      dgate_bias[i] += d_gate;
      dup_bias[i] += d_up;
    }
  }
}

// Rows of x, and how they are shared out: in parts that depend on the shape only, at most 64.
struct Layout {
  int64_t width, n_columns, n_rows, rows_per_part, n_parts;
  Layout(const Tensor& x, bool gated) {
    width = x.size(x.dim() - 1);  // of x
    n_columns = gated ? width / 2 : width;  // of y
    n_rows = width == 0 ? 0 : x.numel() / width;
    rows_per_part = std::max(row_grain(width), (n_rows + 63) / 64);
    n_parts = (n_rows + rows_per_part - 1) / rows_per_part;
  }
};

// The bias, or a row of zeros where there is none: one loop instead of two, and the zeros stay in cache.
template <typename T>
const T* bias_or_zeros(const std::optional<Tensor>& bias, int64_t width, std::vector<T>& zeros) {
  if (bias) return data<T>(*bias);
  zeros.assign(width, store<T>(0));
  return zeros.data();
}

Tensor activation_cpu(const Tensor& x_in, const std::optional<Tensor>& bias_in, std::string kind, bool gated) {
  const Tensor x = dense(x_in);
  const std::optional<Tensor> bias = dense(bias_in);
  const Layout l(x, gated);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(d + 1 < x.dim() ? x.size(d) : l.n_columns);
  const Tensor y = torch::stable::new_empty(x, shape);
  for_activation(kind, [&](auto op) {
    for_dtype("activation", x, [&](auto zero) {
      using Op = decltype(op);
      using T = decltype(zero);
      std::vector<T> zeros;
      const T* b = bias_or_zeros(bias, l.width, zeros);
      if (gated) MEGAGPT_BRANCH("activation.cpu.gated");
      else MEGAGPT_BRANCH("activation.cpu");
      parallel(l.n_rows, row_grain(l.width), [&](int64_t begin, int64_t end) {
        (gated ? forward_gated<Op, T> : forward<Op, T>)(data<T>(x) + begin * l.width, b,
                                                        mutable_data<T>(y) + begin * l.n_columns, end - begin,
                                                        l.n_columns);
      });
    });
  });
  return y;
}

// sums[column] += parts[part][column], in order; rounded to T.
template <typename T>
void sum_parts(const std::vector<acc_t<T>>& parts, T* sums, int64_t n_columns) {
  std::vector<acc_t<T>> total(n_columns, 0);
  for (size_t i = 0; i < parts.size(); i += n_columns) {
    for (int64_t c = 0; c < n_columns; ++c) total[c] += parts[i + c];
  }
  for (int64_t c = 0; c < n_columns; ++c) sums[c] = store<T>(total[c]);
}

std::tuple<Tensor, Tensor> activation_backward_cpu(const Tensor& grad_in, const Tensor& x_in,
                                                   const std::optional<Tensor>& bias_in, std::string kind,
                                                   bool gated) {
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const std::optional<Tensor> bias = dense(bias_in);
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor dbias = bias ? torch::stable::empty_like(*bias) : torch::stable::new_empty(x, {0});
  const Layout l(x, gated);
  for_activation(kind, [&](auto op) {
    for_dtype("activation_backward", x, [&](auto zero) {
      using Op = decltype(op);
      using T = decltype(zero);
      std::vector<T> zeros;
      const T* b = bias_or_zeros(bias, l.width, zeros);
      std::vector<acc_t<T>> parts(l.n_parts * l.width, 0);
      if (gated) MEGAGPT_BRANCH("activation_backward.cpu.gated");
      else MEGAGPT_BRANCH("activation_backward.cpu");
      parallel(l.n_parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t row = part * l.rows_per_part, n = std::min(l.rows_per_part, l.n_rows - row);
          (gated ? backward_gated<Op, T> : backward<Op, T>)(
              data<T>(grad) + row * l.n_columns, data<T>(x) + row * l.width, b, mutable_data<T>(dx) + row * l.width,
              parts.data() + part * l.width, n, l.n_columns);
        }
      });
      if (bias) sum_parts(parts, mutable_data<T>(dbias), l.width);
    });
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) {
  m.impl("activation", TORCH_BOX(&megagpt::activation_cpu));
  m.impl("activation_backward", TORCH_BOX(&megagpt::activation_backward_cpu));
}
