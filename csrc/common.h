// What every CPU kernel of csrc/ uses: tensors, number formats, threads, and loops that vectorise.
//
// Of torch, kernels use its stable ABI only (torch/csrc/stable): a source compiles in a second or two instead of ten,
// and the library, built once, loads into every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "branches.h"
#include "clones.h"

// MEGAGPT_CPU_KERNELS(m) { m.impl("name", TORCH_BOX(&name_cpu)); } registers kernels under the schemas of megagpt/ops.
#define MEGAGPT_CPU_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(megagpt, CPU, m)

namespace megagpt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What sums are kept in: float64 for float64, else float32.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
MEGAGPT_INLINE acc_t<T> load(T x) {
  return x;
}
MEGAGPT_INLINE float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

// Rounds to nearest even; written with selects instead of branches, so that loops over it vectorise.
template <typename T>
MEGAGPT_INLINE T store(acc_t<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return BFloat16(static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded), BFloat16::from_bits());
  } else {
    return x;
  }
}

// Calls f with a value of the element type of x: f([&](auto zero) { using T = decltype(zero); ... }).
template <typename F>
void for_dtype(const char* op, const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, op, ": got a dtype that its CPU kernel lacks; wanted float64, float32, bfloat16");
  }
}

// Calls f(begin, end) on torch's threads, for parts of [0, n) of at least `grain`.
template <typename F>
void parallel(int64_t n, int64_t grain, F&& f) {
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), std::forward<F>(f));
}

// Rows that make up about 16K elements: less is not worth a thread.
inline int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(columns, 1)); }

// x itself where its elements lie in order without gaps, else such a copy.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(dense(*x)) : std::nullopt;
}

// Elements of `x` as const T*; null for a tensor that is not there.
template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
const T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + ")";
}

// The kernels read an id for each sample of x, which has that and at least `least - 1` more dimensions.
inline void check_sample_ids(const char* op, const Tensor& x, const Tensor& sample_ids, int64_t least = 1) {
  STD_TORCH_CHECK(x.dim() >= least && sample_ids.dim() == 1 && sample_ids.numel() == x.size(0), op, ": got x ",
                  shape_of(x), " and sample_ids ", shape_of(sample_ids), ", wanted an id for each sample");
  STD_TORCH_CHECK(sample_ids.scalar_type() == ScalarType::Long, op, ": got sample_ids of another type than int64");
}

}  // namespace megagpt
