// Runs CUDA kernels on a CPU, for tests: csrc/*.cu compile as C++ when this stands in for cuda_runtime.h.
//
// Blocks run one after another. The threads of a block are fibers on one CPU thread: each runs until it waits at a
// barrier or a shuffle. Even blocks take their threads in ascending order, odd ones in descending order, so that a
// missing __syncthreads() shows in one of them. A barrier that not all threads reach ends the process with a message, and
// so does a launch that a GPU would refuse: its limits are those of every architecture from sm_80 on.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __constant__ static

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1)
      : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)), z(static_cast<unsigned>(z)) {}
};

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr unsigned kMostThreads = 1024, kMostBlocksX = 0x7FFFFFFF, kMostBlocksYZ = 65535;
constexpr size_t kMostShared = 99 * 1024;  // bytes of a block that asks for them; sm_86 and sm_89 have the least

struct Fiber {
  dim3 thread{0, 0, 0};
  bool started = false, done = false;
  jmp_buf here;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

// A barrier for `size` fibers: the last to arrive opens it for all.
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  dim3 block{0, 0, 0}, grid{1, 1, 1}, size{1, 1, 1};
  unsigned current = 0, alive = 0, progress = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchange;  // a word for each lane
  std::vector<unsigned char> shared;
  size_t dynamic_bytes = 0, allowed_bytes = 0;
  jmp_buf scheduler;
  ucontext_t main;
};

inline Block& state() {
  static thread_local Block block;
  return block;
}

inline void yield() {
  Block& b = state();
  if (_setjmp(b.fibers[b.current].here) == 0) _longjmp(b.scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned size) {
  Block& b = state();
  const unsigned generation = barrier.generation;
  ++b.progress;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}

inline unsigned lane() { return state().current % kLanes; }
inline unsigned warp() { return state().current / kLanes; }

inline void sync_warp() {
  Block& b = state();
  wait(b.warps[warp()], std::min<unsigned>(kLanes, b.fibers.size() - warp() * kLanes));
}

// Every lane gives a word and gets that of lane `source`. All lanes of the warp take part.
template <typename T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  Block& b = state();
  std::memcpy(&b.exchange[b.current], &value, sizeof(T));
  sync_warp();
  T result;
  std::memcpy(&result, &b.exchange[warp() * kLanes + source % kLanes], sizeof(T));
  sync_warp();
  return result;
}

inline void enter() {
  Block& b = state();
  b.body();
  b.fibers[b.current].done = true;
  --b.alive;
  ++b.progress;
  if (b.alive > 0 && b.all.arrived == b.alive) {  // threads that have returned are not waited for
    b.all.arrived = 0;
    ++b.all.generation;
  }
  _longjmp(b.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  Block& b = state();
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

inline void run_block() {
  Block& b = state();
  const unsigned n = b.fibers.size();
  const bool backwards = (b.block.x + b.block.y + b.block.z) % 2 == 1;
  for (Fiber& fiber : b.fibers) fiber.started = fiber.done = false;
  b.alive = n;
  b.all = {};
  b.warps.assign((n + kLanes - 1) / kLanes, {});
  std::memset(b.shared.data(), 0xFF, b.shared.size());  // NaN: what is read must have been written
  while (b.alive > 0) {
    b.progress = 0;
    for (unsigned i = 0; i < n; ++i) {
      b.current = backwards ? n - 1 - i : i;
      if (!b.fibers[b.current].done) resume(b.fibers[b.current]);
    }
    if (b.progress == 0) {
      std::fprintf(stderr, "emulated CUDA: block (%u, %u, %u): %u threads wait at a barrier that the others left out\n",
                   b.block.x, b.block.y, b.block.z, b.alive);
      std::abort();
    }
  }
}

inline void require(bool ok, const char* what, size_t got, size_t most) {
  if (ok) return;
  std::fprintf(stderr, "emulated CUDA: %s: got %zu, the most is %zu\n", what, got, most);
  std::abort();
}

// What a kernel says of the array that it declares itself.
inline void has_static_shared(size_t bytes) {
  const Block& b = state();
  const size_t all = bytes + b.dynamic_bytes;
  require(all <= b.allowed_bytes, "bytes of shared memory, static and dynamic", all, b.allowed_bytes);
}

// allowed_bytes: of shared memory, as far as more than the usual 48 KiB was asked for.
inline void run(dim3 grid, int threads, size_t shared_bytes, size_t allowed_bytes, std::function<void()> body) {
  Block& b = state();
  require(threads >= 1 && threads <= static_cast<int>(kMostThreads), "threads in a block", threads, kMostThreads);
  require(grid.x <= kMostBlocksX, "blocks in x", grid.x, kMostBlocksX);
  require(std::max(grid.y, grid.z) <= kMostBlocksYZ, "blocks in y or z", std::max(grid.y, grid.z), kMostBlocksYZ);
  require(shared_bytes <= allowed_bytes, "bytes of dynamic shared memory", shared_bytes, allowed_bytes);
  b.dynamic_bytes = shared_bytes;
  b.allowed_bytes = allowed_bytes;
  b.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) b.fibers[t].thread = dim3(t, 0, 0);
  b.exchange.assign((threads + kLanes - 1) / kLanes * kLanes, 0);
  b.shared.resize(shared_bytes + 16);
  b.body = std::move(body);
  b.grid = grid;
  b.size = dim3(threads);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        b.block = dim3(x, y, z);
        run_block();
      }
    }
  }
}

inline void* dynamic_shared() {
  const uintptr_t address = reinterpret_cast<uintptr_t>(state().shared.data());
  return reinterpret_cast<void*>((address + 15) / 16 * 16);
}

}  // namespace emulation

#define threadIdx (::emulation::state().fibers[::emulation::state().current].thread)
#define blockIdx (::emulation::state().block)
#define blockDim (::emulation::state().size)
#define gridDim (::emulation::state().grid)

inline void __syncthreads() { emulation::wait(emulation::state().all, emulation::state().alive); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { emulation::sync_warp(); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const unsigned source = emulation::lane() + delta;
  return emulation::exchange(value, source < emulation::kLanes ? source : emulation::lane());
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline float atomicAdd(float* p, float x) {
  const float old = *p;
  *p += x;
  return old;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
