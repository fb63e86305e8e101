// Which GPUs the CUDA kernels were compiled for: megagpt/ops/library.py compares them with those at hand.

#include <string>

#include "common.h"

#ifndef MEGAGPT_CUDA_ARCHITECTURES  // by setup.py, where there are CUDA kernels: sm_80+sm_90+compute_90
#define MEGAGPT_CUDA_ARCHITECTURES
#endif
#define MEGAGPT_QUOTED(...) #__VA_ARGS__
#define MEGAGPT_TEXT(x) MEGAGPT_QUOTED(x)

namespace megagpt {
namespace {

std::string cuda_architectures() { return MEGAGPT_TEXT(MEGAGPT_CUDA_ARCHITECTURES); }

}  // namespace
}  // namespace megagpt

STABLE_TORCH_LIBRARY_IMPL(megagpt, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&megagpt::cuda_architectures));
}
