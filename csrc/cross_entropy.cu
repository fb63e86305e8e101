// Cross-entropy over a part of the vocabulary, in CUDA: see megagpt/ops/cross_entropy.py. A block a row, which is read
// once forward, and read and written once backward.

#include "common.cuh"

namespace megagpt {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // packs that a thread loads before it uses the first

// exp(x) to about 2 units in the last place; 0 where it would be below 2^-126, for which CUDA's own __expf takes more
// instructions: they, not the memory, would set the pace.
__device__ __forceinline__ float fast_exp(float x) {
  const float power = x * 1.44269504088896341f;
#ifdef MEGAGPT_EMULATED_CUDA
  return exp2f(power);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(power));
  return y;
#endif
}

// Where the packs of a row lie: elements [0, head) and [tail, n) stand alone, those between are whole packs.
struct Span {
  int head, tail;
};

// For a row that begins at p. `together`: whether a second row, with elements at the same places, is aligned alike.
template <typename T>
__device__ __forceinline__ Span span_of(const T* p, int n, bool together = true) {
  constexpr int kSize = Pack<T>::kSize;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T)) & (kSize - 1);
  const int head = past == 0 ? 0 : kSize - past;
  if (!together || head >= n) return {n, n};
  return {head, head + (n - head) / kSize * kSize};
}

// Largest logit, sum of exponentials relative to it, and sum of what one thread has seen (Milakov & Gimelshein 2018).
struct Online {
  float top = std::numeric_limits<float>::lowest();  // finite, so that -infinity minus it is no NaN
  float total = 0.0f, sum = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount]) {
    float new_top = top;
#pragma unroll
    for (int k = 0; k < kCount; ++k) new_top = fmaxf(new_top, z[k]);
    total *= fast_exp(top - new_top);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      total += fast_exp(z[k] - new_top);
      sum += z[k];
    }
    top = new_top;
  }
};

// Row z, all of it, by all threads of the block; every thread gets the result.
template <typename T>
__device__ __forceinline__ Online row_statistics(const T* z, int n, float* scratch) {
  constexpr int kSize = Pack<T>::kSize;
  const Span span = span_of(z, n);
  const int step = blockDim.x * kSize;
  Online seen;
  int i = span.head + threadIdx.x * kSize;
  for (; i + (kUnroll - 1) * step < span.tail; i += kUnroll * step) {
    Pack<T> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) packs[u] = *reinterpret_cast<const Pack<T>*>(z + i + u * step);
    float x[kUnroll * kSize];
#pragma unroll
    for (int k = 0; k < kUnroll * kSize; ++k) x[k] = to_float(packs[k / kSize].v[k % kSize]);
    seen.add(x);
  }
  for (; i < span.tail; i += step) {
    float x[kSize];
    load_pack(z + i, x);
    seen.add(x);
  }
  for (int j = threadIdx.x; j < span.head + n - span.tail; j += blockDim.x) {
    const float x[1] = {to_float(z[j < span.head ? j : j - span.head + span.tail])};
    seen.add(x);
  }
  Online row;
  row.top = block_reduce<Max>(seen.top, scratch);
  row.total = block_reduce<Sum>(seen.total * fast_exp(seen.top - row.top), scratch);
  row.sum = block_reduce<Sum>(seen.sum, scratch);
  if (row.total == 0.0f) row.top = -std::numeric_limits<float>::infinity();  // no logit above -infinity
  return row;
}

// Where the statistics of the rows go.
struct Statistics {
  float *top, *total, *label_logit, *logit_sum;

  __device__ __forceinline__ void put(int64_t row, const Online& seen, float logit) const {
    top[row] = seen.top;
    total[row] = seen.total;
    label_logit[row] = logit;
    logit_sum[row] = seen.sum;
  }
};

// Which columns are which, and which loss is taken.
struct Loss {
  int64_t first;
  int n_valid, columns;
  float label_share, uniform_share, z_loss;  // 1 - label smoothing, label smoothing / vocabulary

  // The column of a label, or -1 if it belongs to another rank.
  __device__ __forceinline__ int column_of(int64_t label) const {
    return label >= first && label < first + n_valid ? static_cast<int>(label - first) : -1;
  }
};

// Each row's statistics, for the loss and for the ranks to merge.
template <typename T>
__global__ void __launch_bounds__(kThreads) statistics(const T* __restrict__ logits, const int64_t* __restrict__ labels,
                                                       Statistics out, Loss loss) {
  MEGAGPT_SHARED_ARRAY(float, scratch, kWarp);
  const int64_t row = blockIdx.x;
  const T* z = logits + row * loss.columns;
  const Online seen = row_statistics(z, loss.n_valid, scratch);
  if (threadIdx.x > 0) return;
  const int label = loss.column_of(labels[row]);
  out.put(row, seen, label < 0 ? 0.0f : to_float(z[label]));
}

// What turns a row of logits into its gradient: exp(z - top) scale - shift, less `at_label` in the label's column.
struct Row {
  float top, scale, shift, at_label;
  int label;  // -1 if it belongs to another rank

  __device__ __forceinline__ Row(float row_top, float total, float grad, int row_label, const Loss& loss)
      : top(row_top),
        scale(grad * (1.0f + 2.0f * loss.z_loss * (row_top + logf(total))) / total),
        shift(grad * loss.uniform_share),
        at_label(grad * loss.label_share),
        label(row_label) {}

  __device__ __forceinline__ float gradient(float z, int column) const {
    const float d = fast_exp(z - top) * scale - shift;
    return column == label ? d - at_label : d;
  }
};

// Row z's gradient and zeros for the padding, by all threads of the block; dz may be z: who reads an element writes it.
template <typename T>
__device__ __forceinline__ void write_gradient(const T* z, T* dz, int n, int columns, const Row& row) {
  constexpr int kSize = Pack<T>::kSize;
  const uintptr_t apart = reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(dz);
  const Span span = span_of(z, n, apart % 16 == 0);
  const int step = blockDim.x * kSize;
#pragma unroll 2
  for (int i = span.head + threadIdx.x * kSize; i < span.tail; i += step) {
    float x[kSize];
    load_pack(z + i, x);
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[k] = row.gradient(x[k], i + k);
    store_pack(dz + i, x);
  }
  for (int j = threadIdx.x; j < span.head + n - span.tail; j += blockDim.x) {
    const int column = j < span.head ? j : j - span.head + span.tail;
    dz[column] = from_float<T>(row.gradient(to_float(z[column]), column));
  }
  for (int column = n + threadIdx.x; column < columns; column += blockDim.x) dz[column] = from_float<T>(0.0f);
}

// Each row's gradient, into `out`, which may be the logits.
template <typename T>
__global__ void __launch_bounds__(kThreads) gradient(const T* logits, T* out, const int64_t* __restrict__ labels,
                                                     const float* __restrict__ top, const float* __restrict__ total,
                                                     const float* __restrict__ grad, Loss loss) {
  const int64_t index = blockIdx.x, offset = index * loss.columns;
  const Row row(top[index], total[index], grad[index], loss.column_of(labels[index]), loss);
  write_gradient(logits + offset, out + offset, loss.n_valid, loss.columns, row);
}

// Threads for a row: a pack each where that is enough.
template <typename T>
int row_threads(int64_t columns) {
  return threads_for(ceil_div(columns, Pack<T>::kSize), kThreads);
}

Loss loss_of(const Tensor& logits, int64_t first, int64_t n_valid, int64_t vocab = 1, double label_smoothing = 0,
             double z_loss = 0) {
  const int64_t columns = logits.size(1);
  STD_TORCH_CHECK(columns < (int64_t{1} << 30), "cross_entropy: got ", columns, " columns, wanted fewer than 2^30");
  return {first,
          static_cast<int>(n_valid),
          static_cast<int>(columns),
          static_cast<float>(1 - label_smoothing),
          static_cast<float>(label_smoothing / static_cast<double>(vocab)),
          static_cast<float>(z_loss)};
}

void require_dense(const Tensor& logits) {
  STD_TORCH_CHECK(logits.is_contiguous(), "cross_entropy in place: got logits with gaps, wanted contiguous ones");
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors new_statistics(const Tensor& logits) {
  const auto numbers = [&] { return torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float); };
  return {numbers(), numbers(), numbers(), numbers()};
}

Statistics pointers(const FourTensors& of) {
  return {mutable_data<float>(std::get<0>(of)), mutable_data<float>(std::get<1>(of)),
          mutable_data<float>(std::get<2>(of)), mutable_data<float>(std::get<3>(of))};
}

FourTensors statistics_cuda(const Tensor& logits_in, const Tensor& labels_in, int64_t first, int64_t n_valid) {
  const Tensor logits = dense(logits_in), labels = dense(labels_in);
  const FourTensors result = new_statistics(logits);
  const Loss loss = loss_of(logits, first, n_valid);
  for_cuda_dtype("cross_entropy", logits, [&](auto zero) {
    using T = decltype(zero);
    MEGAGPT_BRANCH("cross_entropy.cuda.statistics");
    launch(statistics<T>, dim3(logits.size(0)), row_threads<T>(n_valid), 0, logits, data<T>(logits),
           data<int64_t>(labels), pointers(result), loss);
  });
  return result;
}

void write_gradients(const Tensor& logits, const Tensor& out, const Tensor& labels_in, const Tensor& top_in,
                     const Tensor& total_in, const Tensor& grad_in, const Loss& loss) {
  const Tensor labels = dense(labels_in), top = dense(top_in), total = dense(total_in), grad = dense(grad_in);
  for_cuda_dtype("cross_entropy_backward", logits, [&](auto zero) {
    using T = decltype(zero);
    launch(gradient<T>, dim3(logits.size(0)), row_threads<T>(loss.columns), 0, logits, data<T>(logits),
           mutable_data<T>(out), data<int64_t>(labels), data<float>(top), data<float>(total), data<float>(grad), loss);
  });
}

Tensor backward_cuda(const Tensor& logits_in, const Tensor& labels, const Tensor& top, const Tensor& total,
                     const Tensor& grad, int64_t first, int64_t n_valid, int64_t vocab, double label_smoothing,
                     double z_loss) {
  MEGAGPT_BRANCH("cross_entropy.cuda.backward");
  const Tensor logits = dense(logits_in);
  const Tensor out = torch::stable::empty_like(logits);
  const Loss loss = loss_of(logits, first, n_valid, vocab, label_smoothing, z_loss);
  write_gradients(logits, out, labels, top, total, grad, loss);
  return out;
}

void gradient_in_place_cuda(const Tensor& logits, const Tensor& labels, const Tensor& top, const Tensor& total,
                            const Tensor& grad, int64_t first, int64_t n_valid, int64_t vocab, double label_smoothing,
                            double z_loss) {
  MEGAGPT_BRANCH("cross_entropy.cuda.in_place");
  require_dense(logits);
  const Loss loss = loss_of(logits, first, n_valid, vocab, label_smoothing, z_loss);
  write_gradients(logits, logits, labels, top, total, grad, loss);
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) {
  m.impl("cross_entropy", TORCH_BOX(&megagpt::statistics_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&megagpt::backward_cuda));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&megagpt::gradient_in_place_cuda));
}
