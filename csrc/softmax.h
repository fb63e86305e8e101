// Which keys a query may attend, for the kernels of softmax.cpp and softmax.cu: the band and the mask.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#define MEGAGPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MEGAGPT_HOST_DEVICE inline
#endif

namespace megagpt {

// Query t of n_queries stands at key position t + n_keys - n_queries, and may attend the keys from `behind` before to
// `ahead` after that position: the columns [begin, end) of its row, which is empty where end == begin.
struct Band {
  int64_t n_queries, n_keys, behind, ahead;

  MEGAGPT_HOST_DEVICE int64_t begin(int64_t query) const {
    const int64_t first = query + n_keys - n_queries - behind;
    return first < 0 ? 0 : (first > n_keys ? n_keys : first);
  }
  MEGAGPT_HOST_DEVICE int64_t end(int64_t query) const {
    const int64_t stop = query + n_keys - n_queries + ahead + 1, least = begin(query);
    return stop > n_keys ? n_keys : (stop < least ? least : stop);
  }
};

inline Band band_of(const Tensor& x_BHTS, int64_t behind, int64_t ahead) {
  return {x_BHTS.size(2), x_BHTS.size(3), behind, ahead};
}

// A bool tensor of shape (1 or B, 1 or H, 1 or T, 1 or S), read through its strides: 0 where its size is 1.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;  // key: 0 or 1

  MEGAGPT_HOST_DEVICE const uint8_t* row(int64_t b, int64_t h, int64_t t) const {
    return data ? data + b * batch + h * head + t * query : nullptr;
  }
};

// The mask with its keys side by side, which no kernel has to copy again: masks of broadcast shapes stay small.
inline std::optional<Tensor> with_dense_keys(const std::optional<Tensor>& mask) {
  return mask && mask->size(3) > 1 && mask->stride(3) > 1 ? dense(mask) : mask;
}

inline Mask mask_of(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  const auto stride = [&](int64_t d) { return mask->size(d) == 1 ? int64_t{0} : mask->stride(d); };
  return {data<uint8_t>(*mask), stride(0), stride(1), stride(2), stride(3)};
}

}  // namespace megagpt
