// Standard normals by counting, for Python (pybind11; not part of the op library): the first weights of a model.
// megagpt/philox.py has the same in PyTorch, and says what an element is; the bits are equal, since only operations are
// used that IEEE 754 rounds in one way. Hence no fused multiply-add in this file: setup.py compiles it by itself.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>

#include "philox_cpu.h"

namespace py = pybind11;

namespace megagpt {
namespace {

constexpr double kLn2 = 0.6931471805599453, kPi = 3.141592653589793, kRootHalf = 0.7071067811865476;
// Of artanh, sine and cosine, by Taylor.
constexpr double kArtanh[] = {2.0 / 1, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17};
constexpr double kSin[] = {1.0,           -1.0 / 6,        1.0 / 120,        -1.0 / 5040,
                           1.0 / 362880,  -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000};
constexpr double kCos[] = {1.0,          -1.0 / 2,       1.0 / 24,        -1.0 / 720,
                           1.0 / 40320,  -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200};

// c0 + x (c1 + x (c2 + ...)).
template <size_t N>
MEGAGPT_INLINE double horner(const double (&coefficients)[N], double x) {
  double total = coefficients[N - 1];
  for (size_t k = N - 1; k-- > 0;) total = coefficients[k] + x * total;
  return total;
}

// ln of what lies between 0 and 1: of its power of two, and of the rest m by 2 artanh((m - 1) / (m + 1)).
MEGAGPT_INLINE double log_below_one(double u) {
  uint64_t bits;
  std::memcpy(&bits, &u, sizeof(bits));
  double power = static_cast<double>(static_cast<int32_t>(bits >> 52) - 1022);
  bits = (bits & 0x000FFFFFFFFFFFFFu) | 0x3FE0000000000000u;
  double m;
  std::memcpy(&m, &bits, sizeof(m));
  const bool small = m < kRootHalf;
  m = small ? m + m : m;
  power = small ? power - 1.0 : power;
  const double s = (m - 1.0) / (m + 1.0);
  return power * kLn2 + s * horner(kArtanh, s * s);
}

// Two words to two normals, pair by pair.
MEGAGPT_CLONES void box_muller(const uint32_t* __restrict words, float* __restrict out, int64_t n_pairs, double std) {
#pragma omp simd
  for (int64_t i = 0; i < n_pairs; ++i) {
    const double radius = std::sqrt(-2.0 * log_below_one((static_cast<double>(words[2 * i]) + 0.5) * 0x1p-32));
    // A quarter turn times 0 to 3, and an angle of at most an eighth of a turn to both sides, exactly.
    const uint32_t word = words[2 * i + 1], quarter = (word + (1u << 29)) >> 30;  // 4 quarters are none
    const double angle = static_cast<double>(static_cast<int32_t>(word - (quarter << 30))) * (0x1p-32 * (2 * kPi));
    const double square = angle * angle;
    const double sin = angle * horner(kSin, square), cos = horner(kCos, square);
    const double x = quarter & 1 ? sin : cos, y = quarter & 1 ? cos : sin;
    out[2 * i] = static_cast<float>(radius * ((quarter + 1) & 2 ? -x : x) * std);
    out[2 * i + 1] = static_cast<float>(radius * (quarter & 2 ? -y : y) * std);
  }
}

// n elements of a key's normal from `element` on.
void fill_run(float* out, int64_t n, uint64_t element, uint32_t k0, uint32_t k1, double std) {
  alignas(64) uint32_t words[4 * kPhiloxMost];
  alignas(64) float normals[4 * kPhiloxMost];
  while (n > 0) {
    const int64_t skip = element % 4, m = std::min(n, 4 * kPhiloxMost - skip), blocks = (skip + m + 3) / 4;
    philox_words(element / 4, blocks, 0, k0, k1, words);
    box_muller(words, normals, 2 * blocks, std);
    std::memcpy(out, normals + skip, m * sizeof(float));
    out += m, element += m, n -= m;
  }
}

void fill(py::array_t<float, py::array::c_style> out, uint64_t key, double std, uint64_t first, int64_t row,
          uint64_t stride) {
  if (row < 1) throw py::value_error("wanted rows of 1 element or more");
  float* at = out.mutable_data();  // raises where it is read-only
  int64_t left = out.size();
  py::gil_scoped_release no_gil;
  for (; left > 0; first += stride) {
    const int64_t n = std::min(left, row);
    fill_run(at, n, first, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), std);
    at += n, left -= n;
  }
}

}  // namespace
}  // namespace megagpt

PYBIND11_MODULE(_normal, m) {
  m.doc() = "Standard normals by counting: see megagpt/philox.py";
  m.def("fill", &megagpt::fill, py::arg("out").noconvert(), py::arg("key"), py::arg("std"), py::arg("first"),
        py::arg("row"), py::arg("stride"));
}
