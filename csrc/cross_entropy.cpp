// Cross-entropy over a part of the vocabulary, on the CPU: see megagpt/ops/cross_entropy.py.

#include "common.h"
#include "vec_math.h"

namespace megagpt {
namespace {

// Logits whose largest is found and whose exponentials are then added up while they lie in the innermost cache.
constexpr int64_t kBlock = 2048;

// Of one row: the largest logit, the sum of exponentials relative to it, and the sum of the logits.
template <typename A>
struct Statistics {
  A top, total, sum;
};

// z itself where sums are kept in its type, else a copy in theirs: converted once for two loops.
template <typename T>
MEGAGPT_INLINE const acc_t<T>* widen(const T* __restrict z, int64_t n, acc_t<T>* __restrict copy) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return z;
  } else {
    for (int64_t i = 0; i < n; ++i) copy[i] = load(z[i]);
    return copy;
  }
}

// The top of a row without any logit above -infinity is -infinity, its total 0. NaN and +infinity: the total is NaN.
template <typename T>
MEGAGPT_CLONES void row_statistics(const T* __restrict z, int64_t n, Statistics<acc_t<T>>* result) {
  using A = acc_t<T>;
  A top = std::numeric_limits<A>::lowest(), total = 0, sum = 0;  // finite, so that -infinity minus it is no NaN
  A widened[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const A* x = widen(z + begin, size, widened);
    A new_top = top, block_sum = 0, block_total = 0;
#pragma omp simd reduction(max : new_top) reduction(+ : block_sum)
    for (int64_t i = 0; i < size; ++i) {
      new_top = x[i] > new_top ? x[i] : new_top;
      block_sum += x[i];
    }
#pragma omp simd reduction(+ : block_total)
    for (int64_t i = 0; i < size; ++i) block_total += exp_below_zero(x[i] - new_top);
    total = total * exp_below_zero(top - new_top) + block_total;
    sum += block_sum;
    top = new_top;
  }
  *result = {total == 0 ? -std::numeric_limits<A>::infinity() : top, total, sum};
}

// dz = exp(z - top) scale - shift; dz may be z.
template <typename T>
MEGAGPT_CLONES void row_gradient(const T* z, T* dz, int64_t n, acc_t<T> top, acc_t<T> scale, acc_t<T> shift) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dz[i] = store<T>(exp_below_zero(load(z[i]) - top) * scale - shift);
}

// The column of a label, or -1 if it belongs to another rank.
int64_t column_of(int64_t label, int64_t first, int64_t n_valid) {
  return label >= first && label < first + n_valid ? label - first : -1;
}

// What the gradient of a row takes besides its logits.
struct Loss {
  int64_t first, n_valid, vocab;
  double label_smoothing, z_loss;
};

// A row's gradient, with that of its label and zeros for the padding; dz may be z.
template <typename T>
void write_gradient(const T* z, T* dz, int64_t columns, int64_t label, acc_t<T> top, acc_t<T> total, acc_t<T> grad,
                    const Loss& loss) {
  using A = acc_t<T>;
  const A lse = top + std::log(total);
  const A scale = grad * (1 + 2 * static_cast<A>(loss.z_loss) * lse) / total;
  const A shift = grad * static_cast<A>(loss.label_smoothing / static_cast<double>(loss.vocab));
  const A label_logit = label < 0 ? A(0) : load(z[label]);
  row_gradient(z, dz, loss.n_valid, top, scale, shift);
  std::fill(dz + loss.n_valid, dz + columns, store<T>(0));
  if (label < 0) return;
  const A at_label = grad * static_cast<A>(1 - loss.label_smoothing);
  dz[label] = store<T>(exp_below_zero(label_logit - top) * scale - shift - at_label);
}

// Top, total, label's logit and sum of the logits of every row.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Tensor& logits, const Tensor& labels_in, int64_t first,
                                                      int64_t n_valid) {
  using A = acc_t<T>;
  const Tensor labels = dense(labels_in);
  const int64_t n_rows = logits.size(0), columns = logits.size(1);
  const auto wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const auto numbers = [&] { return torch::stable::new_empty(logits, {n_rows}, wide); };
  const Tensor top = numbers(), total = numbers(), label_logit = numbers(), logit_sum = numbers();
  parallel(n_rows, row_grain(n_valid), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* z = data<T>(logits) + row * columns;
      Statistics<A> result;
      row_statistics(z, n_valid, &result);
      const int64_t label = column_of(data<int64_t>(labels)[row], first, n_valid);
      mutable_data<A>(top)[row] = result.top;
      mutable_data<A>(total)[row] = result.total;
      mutable_data<A>(label_logit)[row] = label < 0 ? A(0) : load(z[label]);
      mutable_data<A>(logit_sum)[row] = result.sum;
    }
  });
  return {top, total, label_logit, logit_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> statistics_cpu(const Tensor& logits_in, const Tensor& labels, int64_t first,
                                                          int64_t n_valid) {
  const Tensor logits = dense(logits_in);
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  for_dtype("cross_entropy", logits, [&](auto zero) {
    MEGAGPT_BRANCH("cross_entropy.cpu.statistics");
    result = statistics<decltype(zero)>(logits, labels, first, n_valid);
  });
  return result;
}

void require_dense(const Tensor& logits) {
  STD_TORCH_CHECK(logits.is_contiguous(), "cross_entropy in place: got logits with gaps, wanted contiguous ones");
}

// Every row's gradient, into `out`, which may be the logits.
void gradient(const Tensor& logits, const Tensor& out, const Tensor& labels_in, const Tensor& top_in,
              const Tensor& total_in, const Tensor& grad_in, const Loss& loss) {
  const Tensor labels = dense(labels_in), top = dense(top_in), total = dense(total_in), grad = dense(grad_in);
  const int64_t n_rows = logits.size(0), columns = logits.size(1);
  for_dtype("cross_entropy_backward", logits, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    parallel(n_rows, row_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t label = column_of(data<int64_t>(labels)[row], loss.first, loss.n_valid);
        write_gradient(data<T>(logits) + row * columns, mutable_data<T>(out) + row * columns, columns, label,
                       data<A>(top)[row], data<A>(total)[row], data<A>(grad)[row], loss);
      }
    });
  });
}

Tensor backward_cpu(const Tensor& logits_in, const Tensor& labels, const Tensor& top, const Tensor& total,
                    const Tensor& grad, int64_t first, int64_t n_valid, int64_t vocab, double label_smoothing,
                    double z_loss) {
  MEGAGPT_BRANCH("cross_entropy.cpu.backward");
  const Tensor logits = dense(logits_in);
  const Tensor out = torch::stable::empty_like(logits);
  gradient(logits, out, labels, top, total, grad, {first, n_valid, vocab, label_smoothing, z_loss});
  return out;
}

void gradient_in_place_cpu(const Tensor& logits, const Tensor& labels, const Tensor& top, const Tensor& total,
                           const Tensor& grad, int64_t first, int64_t n_valid, int64_t vocab, double label_smoothing,
                           double z_loss) {
  MEGAGPT_BRANCH("cross_entropy.cpu.in_place");
  require_dense(logits);
  gradient(logits, logits, labels, top, total, grad, {first, n_valid, vocab, label_smoothing, z_loss});
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) {
  m.impl("cross_entropy", TORCH_BOX(&megagpt::statistics_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&megagpt::backward_cpu));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&megagpt::gradient_in_place_cpu));
}
