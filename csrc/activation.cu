// Bias and activation, gated or not, in CUDA: see megagpt/ops/activation.py; the functions are in activations.h.
//
// A thread has N neighbouring columns, a pack of 16 bytes or one element, and walks down the rows: it loads the bias
// once, several rows at a time, and sums the bias's gradient in registers. blockIdx.x picks columns, blockIdx.y rows.

#include "activations.h"
#include "common.cuh"

namespace megagpt {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAThread = 16;  // forward: enough for the bias to cost little

// The bias of N columns, 0 where there is none.
template <int N, typename T>
__device__ __forceinline__ void read_bias(const T* bias, float (&b)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) b[k] = 0.0f;
  if (bias == nullptr) return;
  const Elements<T, N> raw = read<N>(bias);
#pragma unroll
  for (int k = 0; k < N; ++k) b[k] = to_float(raw.v[k]);
}

// y = f(x + bias).
template <typename Op, typename T, int N>
__global__ void forward(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t n_rows,
                        int64_t n_columns) {
  constexpr int kRows = 4;  // in flight
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= n_columns) return;
  float b[N];
  read_bias(bias == nullptr ? bias : bias + column, b);
  for (int64_t row = blockIdx.y * kRows; row < n_rows; row += gridDim.y * kRows) {
    Elements<T, N> values[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i < n_rows) values[i] = read<N>(x + (row + i) * n_columns + column);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[i].v[k] = from_float<T>(Op::at(to_float(values[i].v[k]) + b[k]).value);
      if (row + i < n_rows) write(y + (row + i) * n_columns + column, values[i]);
    }
  }
}

// y = f(gate + bias) (up + bias), where a row of x and the bias are [gate | up], n_columns each.
template <typename Op, typename T, int N>
__global__ void forward_gated(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t n_rows,
                              int64_t n_columns) {
  constexpr int kRows = 2;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= n_columns) return;
  float gate_bias[N], up_bias[N];
  read_bias(bias == nullptr ? bias : bias + column, gate_bias);
  read_bias(bias == nullptr ? bias : bias + n_columns + column, up_bias);
  for (int64_t row = blockIdx.y * kRows; row < n_rows; row += gridDim.y * kRows) {
    Elements<T, N> gate[kRows], up[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= n_rows) continue;
      gate[i] = read<N>(x + (row + i) * 2 * n_columns + column);
      up[i] = read<N>(x + ((row + i) * 2 + 1) * n_columns + column);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float f = Op::at(to_float(gate[i].v[k]) + gate_bias[k]).value;
        up[i].v[k] = from_float<T>(f * (to_float(up[i].v[k]) + up_bias[k]));
      }
      if (row + i < n_rows) write(y + (row + i) * n_columns + column, up[i]);
    }
  }
}

// dx = grad f'(x + bias); its sums over this block's rows go to parts[blockIdx.y], where there are parts.
template <typename Op, typename T, int N>
__global__ void backward(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                         T* __restrict__ dx, float* __restrict__ parts, int64_t n_rows, int64_t n_columns) {
  constexpr int kRows = 2;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= n_columns) return;
  float b[N], sum[N] = {};
  read_bias(bias == nullptr ? bias : bias + column, b);
  for (int64_t row = blockIdx.y * kRows; row < n_rows; row += gridDim.y * kRows) {
    Elements<T, N> grads[kRows], values[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= n_rows) continue;
      grads[i] = read<N>(grad + (row + i) * n_columns + column);
      values[i] = read<N>(x + (row + i) * n_columns + column);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= n_rows) continue;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float d = to_float(grads[i].v[k]) * Op::at(to_float(values[i].v[k]) + b[k]).slope;
        sum[k] += d;
        values[i].v[k] = from_float<T>(d);
      }
      write(dx + (row + i) * n_columns + column, values[i]);
    }
  }
  if (parts == nullptr) return;
#pragma unroll
  for (int k = 0; k < N; ++k) parts[blockIdx.y * n_columns + column + k] = sum[k];
}

template <typename Op, typename T, int N>
__global__ void backward_gated(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                               T* __restrict__ dx, float* __restrict__ parts, int64_t n_rows, int64_t n_columns) {
  constexpr int kRows = 2;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= n_columns) return;
  float gate_bias[N], up_bias[N], gate_sum[N] = {}, up_sum[N] = {};
  read_bias(bias == nullptr ? bias : bias + column, gate_bias);
  read_bias(bias == nullptr ? bias : bias + n_columns + column, up_bias);
  for (int64_t row = blockIdx.y * kRows; row < n_rows; row += gridDim.y * kRows) {
    Elements<T, N> grads[kRows], gate[kRows], up[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= n_rows) continue;
      grads[i] = read<N>(grad + (row + i) * n_columns + column);
      gate[i] = read<N>(x + (row + i) * 2 * n_columns + column);
      up[i] = read<N>(x + ((row + i) * 2 + 1) * n_columns + column);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= n_rows) continue;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float g = to_float(grads[i].v[k]);
        const Point<float> f = Op::at(to_float(gate[i].v[k]) + gate_bias[k]);
        const float d_gate = g * (to_float(up[i].v[k]) + up_bias[k]) * f.slope, d_up = g * f.value;
        gate_sum[k] += d_gate;
        up_sum[k] += d_up;
        gate[i].v[k] = from_float<T>(d_gate);
        up[i].v[k] = from_float<T>(d_up);
      }
      write(dx + (row + i) * 2 * n_columns + column, gate[i]);
      write(dx + ((row + i) * 2 + 1) * n_columns + column, up[i]);
    }
  }
  if (parts == nullptr) return;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    parts[blockIdx.y * 2 * n_columns + column + k] = gate_sum[k];
    parts[(blockIdx.y * 2 + 1) * n_columns + column + k] = up_sum[k];
  }
}

// Rows and columns of y, and x's width.
struct Layout {
  int64_t width, n_columns, n_rows;
  Layout(const Tensor& x, bool gated) {
    width = x.size(x.dim() - 1);
    n_columns = gated ? width / 2 : width;
    n_rows = width == 0 ? 0 : x.numel() / width;
  }
  int threads(int per_thread) const { return threads_for(ceil_div(n_columns, per_thread), kThreads); }
  int64_t blocks_across(int per_thread) const { return ceil_div(n_columns, threads(per_thread) * per_thread); }
};

// Calls f with the number of columns a thread takes, as a constant: a pack where all rows divide into them.
template <typename T, typename F, typename... P>
void for_columns(int64_t n_columns, F&& f, const P*... pointers) {
  if (packable<T>(n_columns, pointers...)) {
    MEGAGPT_BRANCH("activation.cuda.packs");
    f(std::integral_constant<int, Pack<T>::kSize>{});
  } else {
    MEGAGPT_BRANCH("activation.cuda.elements");
    f(std::integral_constant<int, 1>{});
  }
}

Tensor activation_cuda(const Tensor& x_in, const std::optional<Tensor>& bias_in, std::string kind, bool gated) {
  const Tensor x = dense(x_in);
  const std::optional<Tensor> bias = dense(bias_in);
  const Layout l(x, gated);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(d + 1 < x.dim() ? x.size(d) : l.n_columns);
  const Tensor y = torch::stable::new_empty(x, shape);
  for_activation(kind, [&](auto op) {
    for_cuda_dtype("activation", x, [&](auto zero) {
      using Op = decltype(op);
      using T = decltype(zero);
      const auto run = [&](auto per_thread) {
        constexpr int N = per_thread;
        const dim3 grid(l.blocks_across(N), std::min<int64_t>(ceil_div(l.n_rows, kRowsAThread), 65535));
        launch(gated ? forward_gated<Op, T, N> : forward<Op, T, N>, grid, l.threads(N), 0, x, data<T>(x),
               data<T>(bias), mutable_data<T>(y), l.n_rows, l.n_columns);
      };
      for_columns<T>(l.n_columns, run, data<T>(x), data<T>(bias), data<T>(y));
    });
  });
  return y;
}

// Blocks down the rows: about eight blocks a multiprocessor in all, and no more parts than rows are worth.
int64_t n_parts(const Tensor& x, const Layout& l, int64_t blocks_across) {
  const int64_t wanted = ceil_div(8 * n_multiprocessors(x), std::max<int64_t>(blocks_across, 1));
  return std::min<int64_t>({wanted, ceil_div(l.n_rows, kRowsAThread), 65535});
}

std::tuple<Tensor, Tensor> activation_backward_cuda(const Tensor& grad_in, const Tensor& x_in,
                                                    const std::optional<Tensor>& bias_in, std::string kind,
                                                    bool gated) {
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const std::optional<Tensor> bias = dense(bias_in);
  const Tensor dx = torch::stable::empty_like(x);
  const Layout l(x, gated);
  Tensor dbias = torch::stable::new_empty(x, {0});
  for_activation(kind, [&](auto op) {
    for_cuda_dtype("activation_backward", x, [&](auto zero) {
      using Op = decltype(op);
      using T = decltype(zero);
      const auto run = [&](auto per_thread) {
        constexpr int N = per_thread;
        const int64_t down = n_parts(x, l, l.blocks_across(N));
        const Tensor parts = torch::stable::new_empty(x, {bias ? down : 0, l.width}, ScalarType::Float);
        launch(gated ? backward_gated<Op, T, N> : backward<Op, T, N>, dim3(l.blocks_across(N), down), l.threads(N), 0,
               x, data<T>(grad), data<T>(x), data<T>(bias), mutable_data<T>(dx),
               bias ? mutable_data<float>(parts) : nullptr, l.n_rows, l.n_columns);
        const int64_t rows[] = {0};
        if (bias) dbias = torch::stable::to(torch::stable::sum(parts, rows), x.scalar_type());
      };
      for_columns<T>(l.n_columns, run, data<T>(grad), data<T>(x), data<T>(bias), data<T>(dx));
    });
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) {
  m.impl("activation", TORCH_BOX(&megagpt::activation_cuda));
  m.impl("activation_backward", TORCH_BOX(&megagpt::activation_backward_cuda));
}
