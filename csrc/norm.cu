// LayerNorm and RMSNorm of a residual sum, in CUDA: see megagpt/ops/norm.py.
//
// A row is read once and stays in registers while its statistics are taken; only rows of odd length, and those too long
// for registers, are read again.

#include "common.cuh"

namespace megagpt {
namespace {

constexpr int kForwardPacks = 4;   // packs of a row that a thread holds
constexpr int kBackwardPacks = 2;  // fewer: it holds the gradient as well, and sums over rows
constexpr int kMaxThreads = 1024;
constexpr int kWarpRows = 4;  // rows, a warp each, of a block

template <typename T>
struct Forward {
  const T *x, *residual, *weight, *bias;  // residual and bias: may be null
  T *y, *sum;
  float *mean, *rstd;  // mean: null unless centered
  int64_t rows, columns;
  float eps;
};

template <typename T>
struct Backward {
  const T *grad, *grad_sum, *x, *weight;  // grad_sum: may be null
  const float *mean, *rstd;               // mean: null unless centered
  T* dx;
  float *dweight, *dbias;  // a row for each part; dbias: null unless centered
  int64_t rows, columns;
};

// A pack in four registers: as elements of 16 bits it would take one for each.
struct alignas(16) Words {
  uint32_t w[4];
};

template <typename T>
__device__ __forceinline__ float element(const Words& words, int i) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(words.w[i]);
  else return to_float(T(static_cast<uint16_t>(words.w[i / 2] >> (i % 2 * 16)), T::from_bits()));
}

template <typename T>
__device__ __forceinline__ Words words_of(const float (&x)[Pack<T>::kSize]) {
  Words words = {};
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) {
    if constexpr (sizeof(T) == 4) words.w[i] = __float_as_uint(x[i]);
    else words.w[i / 2] |= static_cast<uint32_t>(from_float<T>(x[i]).x) << (i % 2 * 16);
  }
  return words;
}

// Pack number `pack` from p on.
template <typename T>
__device__ __forceinline__ Words load_words(const T* p, int64_t pack) {
  return reinterpret_cast<const Words*>(p)[pack];
}

template <bool kWarpPerRow>
__device__ __forceinline__ float row_sum(float x, float* scratch) {
  if constexpr (kWarpPerRow) return warp_reduce<Sum>(x);
  return block_reduce<Sum>(x, scratch);
}

// What thread `lane` of a row's `lanes` holds of it: packs lane, lane + lanes, ...; zeros past the end.
template <typename T>
__device__ __forceinline__ void load_row(const Forward<T>& p, int64_t row, int lane, int lanes, int n_packs,
                                         Words (&x)[kForwardPacks]) {
  Words residual[kForwardPacks] = {};
#pragma unroll
  for (int k = 0; k < kForwardPacks; ++k) {
    const int pack = lane + k * lanes;
    if (pack < n_packs) x[k] = load_words(p.x, row * n_packs + pack);
    if (pack < n_packs && p.residual) residual[k] = load_words(p.residual, row * n_packs + pack);
  }
  if (!p.residual) return;
#pragma unroll
  for (int k = 0; k < kForwardPacks; ++k) {
    const int pack = lane + k * lanes;
    if (pack >= n_packs) continue;
    float sum[Pack<T>::kSize];
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) sum[i] = element<T>(x[k], i) + element<T>(residual[k], i);
    x[k] = words_of<T>(sum);
    reinterpret_cast<Words*>(p.sum)[row * n_packs + pack] = x[k];
  }
}

// A row in the registers of a warp or of a block: at most kForwardPacks packs a thread. They stay packed until they
// are used, which halves the registers in 16 bits.
template <typename T, bool kWarpPerRow>
__global__ void __launch_bounds__(kWarpPerRow ? kWarpRows * kWarp : kMaxThreads) norm_row(Forward<T> p) {
  constexpr int kSize = Pack<T>::kSize;
  MEGAGPT_SHARED_ARRAY(float, scratch, kWarp);
  const int lanes = kWarpPerRow ? kWarp : blockDim.x, lane = threadIdx.x % lanes;
  const int64_t row = kWarpPerRow ? static_cast<int64_t>(blockIdx.x) * kWarpRows + threadIdx.x / kWarp : blockIdx.x;
  if (row >= p.rows) return;  // a whole warp, or nobody
  const int n_packs = static_cast<int>(p.columns / kSize);
  Words x[kForwardPacks] = {};
  load_row(p, row, lane, lanes, n_packs, x);
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kForwardPacks; ++k) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += element<T>(x[k], i);
  }
  const float mean = p.mean ? row_sum<kWarpPerRow>(sum, scratch) / p.columns : 0.0f;
#pragma unroll
  for (int k = 0; k < kForwardPacks; ++k) {
    if (lane + k * lanes >= n_packs) continue;
#pragma unroll
    for (int i = 0; i < kSize; ++i) squares += (element<T>(x[k], i) - mean) * (element<T>(x[k], i) - mean);
  }
  const float rstd = rsqrtf(row_sum<kWarpPerRow>(squares, scratch) / p.columns + p.eps);
#pragma unroll
  for (int k = 0; k < kForwardPacks; ++k) {
    const int pack = lane + k * lanes;
    if (pack >= n_packs) continue;
    float weight[kSize], y[kSize] = {};
    load_pack(p.weight + pack * kSize, weight);
    if (p.bias) load_pack(p.bias + pack * kSize, y);
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] += (element<T>(x[k], i) - mean) * rstd * weight[i];
    store_pack(p.y + (row * n_packs + pack) * kSize, y);
  }
  if (lane == 0 && p.mean) p.mean[row] = mean;
  if (lane == 0) p.rstd[row] = rstd;
}

// Any row, a block each: read once more for each pass over it.
template <typename T>
__global__ void norm_any(Forward<T> p) {
  MEGAGPT_SHARED_ARRAY(float, scratch, kWarp);
  const int64_t row = blockIdx.x, n = p.columns;
  const T* x = (p.residual ? p.sum : p.x) + row * n;
  float sum = 0.0f, squares = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    // Each thread reads back only what it wrote itself.
    if (p.residual) p.sum[row * n + i] = from_float<T>(to_float(p.x[row * n + i]) + to_float(p.residual[row * n + i]));
    sum += to_float(x[i]);
  }
  const float mean = p.mean ? block_reduce<Sum>(sum, scratch) / n : 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) squares += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  const float rstd = rsqrtf(block_reduce<Sum>(squares, scratch) / n + p.eps);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float bias = p.bias ? to_float(p.bias[i]) : 0.0f;
    p.y[row * n + i] = from_float<T>((to_float(x[i]) - mean) * rstd * to_float(p.weight[i]) + bias);
  }
  if (threadIdx.x == 0 && p.mean) p.mean[row] = mean;
  if (threadIdx.x == 0) p.rstd[row] = rstd;
}

// The sums of a and b over each team of the block: `team` threads, whole warps. Once all threads have called it,
// scratch, 64 floats, may be used again after the next barrier only: callers take two in turn.
__device__ __forceinline__ void team_sums(float& a, float& b, int team, float* scratch) {
  a = warp_reduce<Sum>(a);
  b = warp_reduce<Sum>(b);
  if (team == kWarp) return;
  const int lane = threadIdx.x % kWarp, n_warps = team / kWarp, first = threadIdx.x / team * n_warps;
  if (lane == 0) {
    scratch[threadIdx.x / kWarp] = a;
    scratch[kWarp + threadIdx.x / kWarp] = b;
  }
  __syncthreads();
  a = warp_reduce<Sum>(lane < n_warps ? scratch[first + lane] : 0.0f);
  b = warp_reduce<Sum>(lane < n_warps ? scratch[kWarp + first + lane] : 0.0f);
}

// part = the sum of what each team of the block holds of a row, added in the order of the teams.
template <int kSize>
__device__ __forceinline__ void add_teams(const float (&held)[kBackwardPacks][kSize], int team, int n_packs,
                                          float* shared, float* part) {
  const int lane = threadIdx.x % team, mine = threadIdx.x / team, n_teams = blockDim.x / team;
  for (int turn = 0; turn < n_teams; ++turn) {
#pragma unroll
    for (int k = 0; k < kBackwardPacks; ++k) {
      const int pack = lane + k * team;
      if (mine != turn || pack >= n_packs) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int at = pack * kSize + i;
        const float before = turn == 0 ? 0.0f : shared[at];
        (turn == n_teams - 1 ? part : shared)[at] = before + held[k][i];
      }
    }
    __syncthreads();
  }
}

// Adds one pack to the sums over its row, and to those of its columns over rows. dbias has a place for each thread.
template <typename T, bool kCenter>
__device__ __forceinline__ void add_pack(const Words& grad, const Words& x, const Words& weight, float mean, float rstd,
                                         float& sum, float& dot, float (&dweight)[Pack<T>::kSize], Pack<float>* dbias) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) {
    const float g = element<T>(grad, i), normal = (element<T>(x, i) - mean) * rstd;
    sum += g * element<T>(weight, i);
    dot += g * element<T>(weight, i) * normal;
    dweight[i] += g * normal;
  }
  if (!kCenter) return;
#pragma unroll
  for (int quarter = 0; quarter < Pack<T>::kSize / 4; ++quarter) {
    Pack<float> before = dbias[quarter * blockDim.x];
#pragma unroll
    for (int i = 0; i < 4; ++i) before.v[i] += element<T>(grad, quarter * 4 + i);
    dbias[quarter * blockDim.x] = before;
  }
}

// Adds the gradient through the norm to dx.
template <typename T>
__device__ __forceinline__ void dx_pack(const Words& grad, const Words& x, const Words& weight, float mean, float rstd,
                                        float shift, float slope, float (&dx)[Pack<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) {
    const float normal = (element<T>(x, i) - mean) * rstd;
    dx[i] += rstd * (element<T>(grad, i) * element<T>(weight, i) - shift - normal * slope);
  }
}

// A row in the registers of a team of threads, some teams a block; each thread sums dweight and dbias of its own
// columns over all rows it sees: dweight in registers, dbias, for which there is no room left, in shared memory.
template <typename T, bool kCenter>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_row(Backward<T> p, int team) {
  constexpr int kSize = Pack<T>::kSize, kQuarters = kSize / 4;
  MEGAGPT_SHARED_ARRAY(float, scratch, 4 * kWarp);  // two of team_sums, in turn
  MEGAGPT_SHARED(Pack<float>, shared);
  Pack<float>* own = shared + threadIdx.x;
  const int lane = threadIdx.x % team, n_teams = blockDim.x / team, n_packs = static_cast<int>(p.columns / kSize);
  float dweight[kBackwardPacks][kSize] = {};
  for (int k = 0; kCenter && k < kBackwardPacks * kQuarters; ++k) own[k * blockDim.x] = {};
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * n_teams; first < p.rows; first += gridDim.x * n_teams) {
    const int64_t row = first + threadIdx.x / team;
    const bool here = row < p.rows;  // all threads of the block take part in the sums
    const int n = here ? n_packs : 0;
    const float mean = kCenter && here ? p.mean[row] : 0.0f, rstd = here ? p.rstd[row] : 0.0f;
    Words grad[kBackwardPacks], x[kBackwardPacks];
#pragma unroll
    for (int k = 0; k < kBackwardPacks; ++k) {
      const int pack = lane + k * team;
      if (pack < n) grad[k] = load_words(p.grad, row * n_packs + pack);
      if (pack < n) x[k] = load_words(p.x, row * n_packs + pack);
    }
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int k = 0; k < kBackwardPacks; ++k) {
      const int pack = lane + k * team;
      if (pack >= n) continue;
      Pack<float>* dbias = own + k * kQuarters * blockDim.x;
      add_pack<T, kCenter>(grad[k], x[k], load_words(p.weight, pack), mean, rstd, sum, dot, dweight[k], dbias);
    }
    team_sums(sum, dot, team, scratch + 2 * kWarp * (turn ^= 1));
    const float shift = kCenter ? sum / p.columns : 0.0f, slope = dot / p.columns;
#pragma unroll
    for (int k = 0; k < kBackwardPacks; ++k) {
      const int pack = lane + k * team;
      if (pack >= n) continue;
      float dx[kSize] = {};
      if (p.grad_sum) load_pack(p.grad_sum + (row * n_packs + pack) * kSize, dx);
      dx_pack<T>(grad[k], x[k], load_words(p.weight, pack), mean, rstd, shift, slope, dx);
      store_pack(p.dx + (row * n_packs + pack) * kSize, dx);
    }
  }
  float dbias[kBackwardPacks][kSize];
#pragma unroll
  for (int k = 0; kCenter && k < kBackwardPacks * kSize; ++k) {
    dbias[k / kSize][k % kSize] = own[k / 4 * blockDim.x].v[k % 4];
  }
  __syncthreads();  // shared is free
  add_teams<kSize>(dweight, team, n_packs, shared->v, p.dweight + blockIdx.x * p.columns);
  if (kCenter) add_teams<kSize>(dbias, team, n_packs, shared->v, p.dbias + blockIdx.x * p.columns);
}

// dx of any row, a block each.
template <typename T>
__global__ void norm_backward_any(Backward<T> p) {
  MEGAGPT_SHARED_ARRAY(float, scratch, kWarp);
  const int64_t row = blockIdx.x, n = p.columns;
  const T *grad = p.grad + row * n, *x = p.x + row * n;
  const float mean = p.mean ? p.mean[row] : 0.0f, rstd = p.rstd[row];
  float sum = 0.0f, dot = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float scaled = to_float(grad[i]) * to_float(p.weight[i]);
    sum += scaled;
    dot += scaled * (to_float(x[i]) - mean) * rstd;
  }
  const float shift = p.mean ? block_reduce<Sum>(sum, scratch) / n : 0.0f;
  const float slope = block_reduce<Sum>(dot, scratch) / n;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float normal = (to_float(x[i]) - mean) * rstd;
    const float d = rstd * (to_float(grad[i]) * to_float(p.weight[i]) - shift - normal * slope);
    p.dx[row * n + i] = from_float<T>(p.grad_sum ? d + to_float(p.grad_sum[row * n + i]) : d);
  }
}

// dweight and dbias of any rows: a thread for each column of each part.
template <typename T>
__global__ void norm_backward_columns(Backward<T> p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= p.columns) return;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float g = to_float(p.grad[row * p.columns + column]);
    const float centered = to_float(p.x[row * p.columns + column]) - (p.mean ? p.mean[row] : 0.0f);
    dweight += g * centered * p.rstd[row];
    dbias += g;
  }
  p.dweight[blockIdx.y * p.columns + column] = dweight;
  if (p.dbias) p.dbias[blockIdx.y * p.columns + column] = dbias;
}

std::vector<int64_t> without_last(const Tensor& x) {
  return std::vector<int64_t>(x.sizes().begin(), x.sizes().end() - 1);
}

template <typename T>
void launch_forward(const Forward<T>& p, const Tensor& like) {
  const int64_t n_packs = p.columns / Pack<T>::kSize;
  const bool packs = packable<T>(p.columns, p.x, p.residual, p.weight, p.bias, p.y, p.sum);
  if (packs && n_packs <= kForwardPacks * kWarp) {
    MEGAGPT_BRANCH("norm.cuda.warp");
    launch(norm_row<T, true>, dim3(ceil_div(p.rows, kWarpRows)), kWarpRows * kWarp, 0, like, p);
  } else if (packs && n_packs <= kForwardPacks * kMaxThreads) {
    MEGAGPT_BRANCH("norm.cuda.block");
    launch(norm_row<T, false>, dim3(p.rows), threads_for(ceil_div(n_packs, kForwardPacks)), 0, like, p);
  } else {
    MEGAGPT_BRANCH("norm.cuda.any");
    launch(norm_any<T>, dim3(p.rows), threads_for(p.columns, 512), 0, like, p);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_cuda(const Tensor& x_in, const std::optional<Tensor>& residual_in,
                                                     const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                                                     double eps, bool center) {
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const std::optional<Tensor> residual = dense(residual_in), bias = dense(bias_in);
  const Tensor y = torch::stable::empty_like(x);
  const Tensor sum = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor rstd = torch::stable::new_empty(x, without_last(x), ScalarType::Float);
  const Tensor mean = center ? torch::stable::empty_like(rstd) : torch::stable::new_empty(rstd, {0});
  for_cuda_dtype("norm", x, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> p{data<T>(x),
                       data<T>(residual),
                       data<T>(weight),
                       data<T>(bias),
                       mutable_data<T>(y),
                       mutable_data<T>(sum),
                       center ? mutable_data<float>(mean) : nullptr,
                       mutable_data<float>(rstd),
                       rstd.numel(),
                       x.size(-1),
                       static_cast<float>(eps)};
    launch_forward(p, x);
  });
  return {y, sum, mean, rstd};
}

// How the backward pass goes over rows: by `team` threads a row in registers, or (team 0) any row; `n_parts` blocks, or
// rows of blocks, each write their own part of dweight and dbias.
struct Plan {
  int team, threads;
  int64_t n_parts;
};

template <typename T>
Plan plan_backward(const Backward<T>& p, const Tensor& like) {
  const int64_t n_packs = p.columns / Pack<T>::kSize, n_processors = n_multiprocessors(like);
  const bool packs = packable<T>(p.columns, p.grad, p.grad_sum, p.x, p.weight, p.dx);
  if (!packs || n_packs > kBackwardPacks * kMaxThreads) return {0, 256, std::clamp<int64_t>(p.rows / 64, 1, 64)};
  // Registers hold 1024 such threads a multiprocessor. Two blocks of 512 wait for each other less than one of 1024.
  const int team = threads_for(ceil_div(n_packs, kBackwardPacks));
  const int n_teams = std::max(512 / team, 1);
  const int64_t n_blocks = n_processors * (team > 512 ? 1 : 2);
  return {team, team * n_teams, std::clamp<int64_t>(ceil_div(p.rows, n_teams), 1, n_blocks)};
}

template <typename T>
void launch_backward(const Backward<T>& p, const Plan& plan, const Tensor& like) {
  if (plan.team == 0) {
    MEGAGPT_BRANCH("norm_backward.cuda.any");
    launch(norm_backward_any<T>, dim3(p.rows), threads_for(p.columns, 512), 0, like, p);
    launch(norm_backward_columns<T>, dim3(ceil_div(p.columns, plan.threads), plan.n_parts), plan.threads, 0, like, p);
    return;
  }
  const size_t for_teams = plan.threads > plan.team ? p.columns * sizeof(float) : 0;
  const size_t for_dbias = plan.threads * kBackwardPacks * Pack<T>::kSize * sizeof(float);  // no less
  if (p.dbias) {
    MEGAGPT_BRANCH("norm_backward.cuda.row");
    launch(norm_backward_row<T, true>, dim3(plan.n_parts), plan.threads, for_dbias, like, p, plan.team);
  } else {
    MEGAGPT_BRANCH("norm_backward.cuda.row_rms");
    launch(norm_backward_row<T, false>, dim3(plan.n_parts), plan.threads, for_teams, like, p, plan.team);
  }
}

Tensor add_parts(const Tensor& parts, ScalarType dtype) {
  return torch::stable::to(torch::stable::sum(parts, std::vector<int64_t>{0}), dtype);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_cuda(const Tensor& grad_in, const std::optional<Tensor>& grad_sum_in,
                                                      const Tensor& x_in, const Tensor& mean_in, const Tensor& rstd_in,
                                                      const Tensor& weight_in, bool center) {
  const Tensor grad = dense(grad_in), x = dense(x_in), weight = dense(weight_in);
  const Tensor mean = dense(mean_in), rstd = dense(rstd_in);
  const std::optional<Tensor> grad_sum = dense(grad_sum_in);
  const Tensor dx = torch::stable::empty_like(x);
  Tensor dweight, dbias = torch::stable::new_empty(weight, {0});
  for_cuda_dtype("norm_backward", x, [&](auto zero) {
    using T = decltype(zero);
    Backward<T> p{data<T>(grad),   data<T>(grad_sum), data<T>(x), data<T>(weight), center ? data<float>(mean) : nullptr,
                  data<float>(rstd), mutable_data<T>(dx), nullptr, nullptr, rstd.numel(), x.size(-1)};
    const Plan plan = plan_backward(p, x);
    const Tensor dweight_parts = torch::stable::new_empty(rstd, {plan.n_parts, p.columns});
    const Tensor dbias_parts = torch::stable::new_empty(rstd, {center ? plan.n_parts : 0, p.columns});
    p.dweight = mutable_data<float>(dweight_parts);
    p.dbias = center ? mutable_data<float>(dbias_parts) : nullptr;
    launch_backward(p, plan, x);
    dweight = add_parts(dweight_parts, weight.scalar_type());
    if (center) dbias = add_parts(dbias_parts, weight.scalar_type());
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) {
  m.impl("norm", TORCH_BOX(&megagpt::norm_cuda));
  m.impl("norm_backward", TORCH_BOX(&megagpt::norm_backward_cuda));
}
