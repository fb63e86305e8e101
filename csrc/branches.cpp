// The list behind branches.h.

#include "branches.h"

#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "common.h"

namespace megagpt {
namespace {

std::mutex mutex;

std::set<std::string>& names() {
  static std::set<std::string> reached;
  return reached;
}

std::vector<std::string> branches_reached() {
  const std::lock_guard<std::mutex> lock(mutex);
  return {names().begin(), names().end()};
}

}  // namespace

bool branch_reached(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  names().insert(name);
  return true;
}

}  // namespace megagpt

STABLE_TORCH_LIBRARY_IMPL(megagpt, CompositeExplicitAutograd, m) {
  m.impl("branches_reached", TORCH_BOX(&megagpt::branches_reached));
}
