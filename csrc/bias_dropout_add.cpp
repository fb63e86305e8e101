// residual + dropout(x + bias), on the CPU: see megagpt/ops/bias_dropout_add.py.

#include "common.h"
#include "philox_cpu.h"

namespace megagpt {
namespace {

constexpr int64_t kParts = 32;  // at most: sums over rows are taken in so many parts, whatever the number of threads

// A piece of a row. Without a bias or a mask their pointers are null.
template <typename T, bool kBias, bool kMask>
MEGAGPT_CLONES void add(const T* __restrict x, const T* __restrict bias, const T* __restrict residual,
                        const uint32_t* __restrict words, T* __restrict y, int64_t n, DropoutMask mask) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    acc_t<T> v = load(x[i]);
    if constexpr (kBias) v += load(bias[i]);
    if constexpr (kMask) v = mask.apply(v, words[i]);
    y[i] = store<T>(load(residual[i]) + v);
  }
}

template <typename T>
MEGAGPT_CLONES void drop_and_sum(const T* __restrict grad, const uint32_t* __restrict words, T* __restrict dx,
                                 acc_t<T>* __restrict sums, int64_t n, DropoutMask mask) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> v = mask.apply(load(grad[i]), words[i]);
    dx[i] = store<T>(v);
    sums[i] += v;
  }
}

// Calls f(i, column, n) for the parts of [i, i + n) that lie in one row each.
template <typename F>
MEGAGPT_INLINE void for_rows(int64_t i, int64_t n, int64_t columns, F&& f) {
  for (const int64_t end = i + n; i < end;) {
    const int64_t column = i % columns, m = std::min(columns - column, end - i);
    f(i, column, m);
    i += m;
  }
}

struct Inputs {
  Tensor x;
  std::optional<Tensor> bias;
  Tensor residual, sample_ids;
};

template <typename T, bool kBias>
void forward(const Inputs& in, const Tensor& y, const DropoutMask& mask, bool plain, int64_t offset) {
  const int64_t columns = in.x.size(-1), rows = in.x.numel() / columns, per_sample = in.x.numel() / in.x.size(0);
  const T *x = data<T>(in.x), *bias = data<T>(in.bias), *residual = data<T>(in.residual);
  T* out = mutable_data<T>(y);
  parallel(rows, row_grain(columns), [&](int64_t first, int64_t last) {
    const int64_t begin = first * columns, end = last * columns;
    if (plain) {
      for_rows(begin, end - begin, columns, [&](int64_t i, int64_t column, int64_t n) {
        add<T, kBias, false>(x + i, kBias ? bias + column : nullptr, residual + i, nullptr, out + i, n, mask);
      });
      return;
    }
    for_words(begin, end, {per_sample, offset}, data<int64_t>(in.sample_ids), mask,
              [&](int64_t start, int64_t length, const uint32_t* words) {
                for_rows(start, length, columns, [&](int64_t i, int64_t column, int64_t n) {
                  add<T, kBias, true>(x + i, kBias ? bias + column : nullptr, residual + i, words + (i - start),
                                      out + i, n, mask);
                });
              });
  });
}

Tensor bias_dropout_add_cpu(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
                            const Tensor& sample_ids, double p, int64_t seed, int64_t site, int64_t offset) {
  const Inputs in{dense(x), dense(bias), dense(residual), dense(sample_ids)};
  check_sample_ids("bias_dropout_add", in.x, in.sample_ids, 2);
  const Tensor y = torch::stable::empty_like(in.x);
  if (y.numel() == 0) return y;
  const bool plain = p == 0.0;
  if (plain) {
    MEGAGPT_BRANCH("bias_dropout_add.cpu.plain");
  } else {
    MEGAGPT_BRANCH("bias_dropout_add.cpu.mask");
  }
  for_dtype("bias_dropout_add", in.x, [&](auto zero) {
    using T = decltype(zero);
    const auto run = in.bias ? forward<T, true> : forward<T, false>;
    run(in, y, DropoutMask(p, seed, site), plain, offset);
  });
  return y;
}

// dx, and one row of sums for each part of the rows.
template <typename T>
void backward(const Tensor& grad, const Tensor& sample_ids, const DropoutMask& mask, int64_t offset, const Tensor& dx,
              std::vector<acc_t<T>>& sums, int64_t n_parts) {
  const int64_t columns = grad.size(-1), rows = grad.numel() / columns, per_sample = grad.numel() / grad.size(0);
  parallel(n_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * rows / n_parts * columns, end = (part + 1) * rows / n_parts * columns;
      for_words(begin, end, {per_sample, offset}, data<int64_t>(sample_ids), mask,
                [&](int64_t start, int64_t length, const uint32_t* words) {
                  for_rows(start, length, columns, [&](int64_t i, int64_t column, int64_t n) {
                    drop_and_sum(data<T>(grad) + i, words + (i - start), mutable_data<T>(dx) + i,
                                 sums.data() + part * columns + column, n, mask);
                  });
                });
    }
  });
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward_cpu(const Tensor& grad_in, const Tensor& sample_ids_in, double p,
                                                         int64_t seed, int64_t site, int64_t offset) {
  const Tensor grad = dense(grad_in), sample_ids = dense(sample_ids_in);
  check_sample_ids("bias_dropout_add_backward", grad, sample_ids, 2);
  const int64_t columns = grad.size(-1);
  const Tensor dx = torch::stable::empty_like(grad), dbias = torch::stable::new_zeros(grad, {columns});
  if (grad.numel() == 0) return {dx, dbias};
  for_dtype("bias_dropout_add_backward", grad, [&](auto zero) {
    using T = decltype(zero);
    MEGAGPT_BRANCH("bias_dropout_add_backward.cpu");
    const int64_t n_parts = std::clamp<int64_t>(grad.numel() / (1 << 14), 1, kParts);
    std::vector<acc_t<T>> sums(n_parts * columns);
    backward<T>(grad, sample_ids, DropoutMask(p, seed, site), offset, dx, sums, n_parts);
    for (int64_t c = 0; c < columns; ++c) {
      acc_t<T> sum = 0;
      for (int64_t part = 0; part < n_parts; ++part) sum += sums[part * columns + c];
      mutable_data<T>(dbias)[c] = store<T>(sum);
    }
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) {
  m.impl("bias_dropout_add", TORCH_BOX(&megagpt::bias_dropout_add_cpu));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&megagpt::bias_dropout_add_backward_cpu));
}
