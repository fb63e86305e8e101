// What every CUDA kernel of csrc/ uses: launching, 16-byte accesses, reductions over warps and blocks.
//
// Threads run 32 to a warp. Elements are read and written as packs of 16 bytes, the widest access there is; arithmetic
// is in float32. The same source also compiles as plain C++ under tests/ops/cuda_emulation.h, which runs it on a CPU:
// so launch through launch(), and declare shared memory by MEGAGPT_SHARED and MEGAGPT_SHARED_ARRAY.
#pragma once

#ifdef MEGAGPT_EMULATED_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

#include "common.h"

// MEGAGPT_CUDA_KERNELS(m) { m.impl("name", TORCH_BOX(&name_cuda)); }
// MEGAGPT_SHARED(float, name): this block's dynamic shared memory, of the size that launch() was given.
// MEGAGPT_SHARED_ARRAY(float, name, n): an array of this block's that every kernel has, at most kStaticShared bytes.
#ifdef MEGAGPT_EMULATED_CUDA
#define MEGAGPT_SHARED_ARRAY(type, name, n)                                               \
  static type name[n];                                                                     \
  static_assert(sizeof(name) <= ::megagpt::kStaticShared, "raise kStaticShared with it"); \
  ::emulation::has_static_shared(sizeof(name))
#define MEGAGPT_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(megagpt, CPU, m)
#define MEGAGPT_SHARED(type, name) type* name = reinterpret_cast<type*>(::emulation::dynamic_shared())
#else
#define MEGAGPT_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(megagpt, CUDA, m)
#define MEGAGPT_SHARED_ARRAY(type, name, n) \
  __shared__ type name[n];                  \
  static_assert(sizeof(name) <= ::megagpt::kStaticShared, "raise kStaticShared with it")
#define MEGAGPT_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char megagpt_shared[]; \
  type* name = reinterpret_cast<type*>(megagpt_shared)
#endif

namespace megagpt {

constexpr int kWarp = 32;

// Shared memory of a block, in bytes: what a kernel's own array may take, and what it may have in all, that array and
// what launch() is given, without asking for more.
constexpr size_t kStaticShared = 512, kUnasked = 48 * 1024;

inline bool must_ask(size_t dynamic_shared) { return kStaticShared + dynamic_shared > kUnasked; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.x) << 16); }
__device__ __forceinline__ float to_float(Half x) { return static_cast<float>(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

// 16 bytes of elements: 8 of 16 bits, 4 of 32.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// Eight or four elements at p, which is a multiple of 16 bytes, as float32; and back.
template <typename T>
__device__ __forceinline__ void load_pack(const T* p, float (&x)[Pack<T>::kSize]) {
  const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p);
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) x[i] = to_float(pack.v[i]);
}
template <typename T>
__device__ __forceinline__ void store_pack(T* p, const float (&x)[Pack<T>::kSize]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.v[i] = from_float<T>(x[i]);
  *reinterpret_cast<Pack<T>*>(p) = pack;
}

// N neighbouring elements as they are stored, a pack or fewer, for kernels written once for packs and for elements.
template <typename T, int N>
struct alignas(N * sizeof(T)) Elements {
  T v[N];
};
template <int N, typename T>
__device__ __forceinline__ Elements<T, N> read(const T* p) {
  return *reinterpret_cast<const Elements<T, N>*>(p);
}
template <int N, typename T>
__device__ __forceinline__ void write(T* p, const Elements<T, N>& x) {
  *reinterpret_cast<Elements<T, N>*>(p) = x;
}

struct Sum {
  static constexpr float kIdentity = 0.0f;
  __device__ __forceinline__ static float of(float a, float b) { return a + b; }
};
struct Max {  // NaN wins, as in torch.amax
  static constexpr float kIdentity = -std::numeric_limits<float>::infinity();
  __device__ __forceinline__ static float of(float a, float b) { return (a > b || a != a) ? a : b; }
};

// x of all 32 threads of the warp, combined; every thread gets the result. All 32 must call it.
template <typename Op>
__device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = Op::of(x, __shfl_xor_sync(0xFFFFFFFFu, x, lane));
  return x;
}

// x of all threads of the block, combined; every thread gets the result. All must call it; blockDim.x is a multiple
// of 32, at most 1024. `scratch`: 32 floats of shared memory, which may be used again at once.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, n_warps = blockDim.x / kWarp;
  x = warp_reduce<Op>(x);
  if (n_warps == 1) return x;
  __syncthreads();  // earlier readers of scratch are done
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_reduce<Op>(lane < n_warps ? scratch[lane] : Op::kIdentity);
}

// Calls f with a value of the element type of x.
template <typename F>
void for_cuda_dtype(const char* op, const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, op, ": got a dtype that its CUDA kernel lacks; wanted float32, float16, bfloat16");
  }
}

// Whether rows of `columns` elements can be read as packs: their length and every pointer are multiples of 16 bytes.
template <typename T, typename... P>
bool packable(int64_t columns, const P*... pointers) {
  return columns % Pack<T>::kSize == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for `work` items of one row, one a thread where possible: a multiple of 32, from 32 to `most`.
inline int threads_for(int64_t work, int most = 1024) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(work, kWarp) * kWarp, kWarp, most));
}

#ifdef MEGAGPT_EMULATED_CUDA

inline int n_multiprocessors(const Tensor&) { return 2; }

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, const Tensor&, A... args) {
  if (grid.x * grid.y * grid.z == 0) return;
  emulation::run(grid, threads, shared_bytes, must_ask(shared_bytes) ? emulation::kMostShared : kUnasked,
                 [&] { kernel(P(args)...); });
}

#else

inline int n_multiprocessors(const Tensor& like) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()));
  return count;
}

// Runs kernel<<<grid, threads, shared_bytes>>>(args...) on the current stream of the device of `like`.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, const Tensor& like, A... args) {
  if (grid.x * grid.y * grid.z == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  if (must_ask(shared_bytes)) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(P(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

#endif

}  // namespace megagpt
