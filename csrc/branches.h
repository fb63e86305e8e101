// Which dispatch branches have run in this process: what proves that the tests reach each of them.
//
// MEGAGPT_BRANCH("norm.wide") stands where an op has chosen one of several ways, once per call and never in a loop.
// tests/ops compares the names in the sources with `torch.ops.megagpt.branches_reached()`.
#pragma once

namespace megagpt {

bool branch_reached(const char* name);  // branches.cpp

}  // namespace megagpt

#define MEGAGPT_BRANCH(name)                                                           \
  do {                                                                                 \
    [[maybe_unused]] static const bool megagpt_once = ::megagpt::branch_reached(name); \
  } while (false)
