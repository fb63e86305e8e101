// The sequential maps of the training data, for Python (pybind11; not part of the op library).
// megagpt/data/indexed/index_builder.py has the same in NumPy, and says what the arrays mean.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace py = pybind11;

template <typename Element>
using Array = py::array_t<Element, py::array::c_style>;

// [n_samples + 1, 2]: (position in document_index, token offset) of global token row * seq_len.
// One pass that skips whole documents, and no temporaries.
template <typename Out>
py::array sample_index(const Array<int32_t>& lengths, const Array<int32_t>& document_index, int64_t seq_len,
                       int64_t n_samples) {
  Array<Out> rows({n_samples + 1, int64_t{2}});
  const int32_t* length = lengths.data();
  const int32_t* document = document_index.data();
  const int64_t n_lengths = lengths.size(), n_documents = document_index.size();
  Out* out = rows.mutable_data();

  {
    py::gil_scoped_release no_gil;
    int64_t position = 0, offset = 0;
    out[0] = out[1] = 0;
    for (int64_t row = 1; row <= n_samples; ++row) {
      offset += seq_len;
      for (;; ++position) {
        if (position == n_documents) throw py::value_error("fewer tokens than n_samples * seq_len + 1");
        if (document[position] < 0 || document[position] >= n_lengths)
          throw py::index_error("document_index names a document that lengths does not have");
        if (offset < length[document[position]]) break;
        offset -= length[document[position]];
      }
      out[2 * row] = static_cast<Out>(position);
      out[2 * row + 1] = static_cast<Out>(offset);
    }
  }
  return rows;
}

// Which dataset gives sample s, and how many it gave before: always the one that lags most behind its weight.
py::tuple blending_indices(const Array<double>& weights, int64_t size) {
  Array<int16_t> dataset(size);
  Array<int64_t> sample(size);
  const double* weight = weights.data();
  const int64_t n_datasets = weights.size();
  int16_t* dataset_out = dataset.mutable_data();
  int64_t* sample_out = sample.mutable_data();
  {
    py::gil_scoped_release no_gil;
    std::vector<int64_t> taken(n_datasets, 0);
    for (int64_t s = 0; s < size; ++s) {
      const double drawn = static_cast<double>(std::max<int64_t>(s, 1));
      int64_t most = 0;
      double most_lag = weight[0] * drawn - static_cast<double>(taken[0]);
      for (int64_t i = 1; i < n_datasets; ++i) {
        const double lag = weight[i] * drawn - static_cast<double>(taken[i]);
        if (lag > most_lag) most = i, most_lag = lag;
      }
      dataset_out[s] = static_cast<int16_t>(most);
      sample_out[s] = taken[most]++;
    }
  }
  return py::make_tuple(dataset, sample);
}

// Matsumoto & Nishimura 1998, as NumPy's RandomState goes on from a state: 624 words and the place of the next one.
struct MersenneTwister {
  static constexpr int64_t kWords = 624, kAhead = 397;
  uint32_t* key;
  int64_t place;

  uint32_t next() {
    if (place == kWords) {
      for (int64_t i = 0; i < kWords; ++i) {
        const uint32_t y = (key[i] & 0x80000000u) | (key[(i + 1) % kWords] & 0x7FFFFFFFu);
        key[i] = key[(i + kAhead) % kWords] ^ (y >> 1) ^ (y & 1u ? 0x9908B0DFu : 0u);
      }
      place = 0;
    }
    uint32_t y = key[place++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9D2C5680u;
    y ^= (y << 15) & 0xEFC60000u;
    return y ^ (y >> 18);
  }

  // Evenly from 0 to most: words are drawn until one, without the bits that most cannot have, is not above it.
  uint32_t up_to(uint32_t most) {
    uint32_t mask = most;
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    uint32_t drawn;
    do drawn = next() & mask;
    while (drawn > most);
    return drawn;
  }
};

// RandomState.shuffle (Fisher & Yates), without the GIL, which it holds for minutes: other threads go on. Returns the
// place in `key`, which is moved on. At most 2^32 elements.
template <typename Element>
int64_t shuffle(Array<Element> index, Array<uint32_t> key, int64_t place) {
  if (key.size() != MersenneTwister::kWords || place < 0 || place > MersenneTwister::kWords)
    throw py::value_error("wanted a state of the Mersenne Twister: 624 words, and a place up to 624");
  if (index.size() > int64_t{1} << 32) throw py::value_error("wanted at most 2^32 elements");
  Element* elements = index.mutable_data();
  MersenneTwister random{key.mutable_data(), place};
  py::gil_scoped_release no_gil;
  for (int64_t i = index.size() - 1; i > 0; --i) std::swap(elements[i], elements[random.up_to(static_cast<uint32_t>(i))]);
  return random.place;
}

PYBIND11_MODULE(_index_builder, module) {
  // noconvert: an array of another dtype, or one that is not contiguous, is an error and never a silent copy.
  const auto exact = [](const char* name) { return py::arg(name).noconvert(); };
  module.def("sample_index_int32", &sample_index<int32_t>, exact("lengths"), exact("document_index"),
             py::arg("seq_len"), py::arg("n_samples"));
  module.def("sample_index_int64", &sample_index<int64_t>, exact("lengths"), exact("document_index"),
             py::arg("seq_len"), py::arg("n_samples"));
  module.def("shuffle", &shuffle<int32_t>, exact("index"), exact("key"), py::arg("place"));
  module.def("shuffle", &shuffle<uint32_t>, exact("index"), exact("key"), py::arg("place"));
  module.def("shuffle", &shuffle<int64_t>, exact("index"), exact("key"), py::arg("place"));
  module.def("blending_indices", &blending_indices, exact("weights"), py::arg("size"));
}
