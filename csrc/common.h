// What every CPU kernel of csrc/ shares.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

// Compile a hot loop for several instruction sets and pick the best one when the library is loaded, so that one
// binary is fast everywhere. Only GCC on x86-64 Linux offers this; elsewhere the plain build is used.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define MEGAGPT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEGAGPT_CLONES
#endif

#define MEGAGPT_INLINE inline __attribute__((always_inline))
