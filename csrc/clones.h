// Loops that vectorise, on whatever CPU loads them.
#pragma once

// Compile a hot loop for several instruction sets and pick the best one when the library is loaded, so that one
// binary is fast everywhere. Goes in front of a function or function template whose loops take plain pointers; what
// it calls must be MEGAGPT_INLINE. Only GCC on x86-64 Linux offers this; elsewhere the plain build is used.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define MEGAGPT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGAGPT_CLONES
#endif

#define MEGAGPT_INLINE inline __attribute__((always_inline))
