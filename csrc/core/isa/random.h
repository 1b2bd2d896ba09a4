// Random numbers from a counter: a pure function of a seed, an index and a salt, so that a mask is never stored. Two
// rounds of a 32-bit hash, 16 instructions for a vector. llmkern/reference/_random.py is the same in PyTorch.
#pragma once
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {

template <class U>
static inline U mix_bits(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 32 bits for each of the indices [index, index + lanes of float).
static inline vu32 random_bits(uint64_t seed, uint64_t index, uint32_t salt) {
  vu32 lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
  const uint32_t seed_low = static_cast<uint32_t>(seed), seed_high = static_cast<uint32_t>(seed >> 32);
  const vu32 lows = lane + low;
  // Past 2^32 the upper half of an index is one more.
  const vu32 highs = (lows < low ? lane - lane + (high + 1) : lane - lane + high) * 0x85ebca77u + seed_high;
  return mix_bits((mix_bits(lows * 0x9e3779b1u + seed_low) ^ highs) + salt * 0xc2b2ae3du);
}

// 1 where an element is drawn, each with probability p, else 0.
template <class S>
static inline Vec<S> drawn(double p, uint64_t seed, uint64_t index, uint32_t salt) {
  const vu32 bits = random_bits(seed, index, salt);
  const double limit = p * 4294967296.0;
  Vec<S> result;
  if constexpr (sizeof(S) == 4) {
    // All are below 2^32.
    if (p >= 1) return splat(S{1});
    const uint32_t bound = static_cast<uint32_t>(limit) + (limit > static_cast<uint32_t>(limit));
    result = bits < bound ? splat(S{1}) : splat(S{0});
  } else {
    for (int i = 0; i < kLanes<S>; ++i) result[i] = bits[i] < limit ? S{1} : S{0};
  }
  return result;
}

}  // namespace llmkern::cpu::LLMKERN_ISA
