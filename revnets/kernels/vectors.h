// Vectors of floats, copies of lines, activations. GCC's vector extensions (also clang's): AVX-512, AVX2, NEON or what
// else the compiler targets.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define REVNETS_VECTOR 64
#define REVNETS_TARGET "AVX-512"
#elif defined(__AVX__)
#define REVNETS_VECTOR 32
#define REVNETS_TARGET "AVX2"
#elif defined(__ARM_NEON)
#define REVNETS_VECTOR 16
#define REVNETS_TARGET "NEON"
#else
#define REVNETS_VECTOR 16
#define REVNETS_TARGET "portable"
#endif

namespace {

typedef float vec __attribute__((vector_size(REVNETS_VECTOR)));
typedef float loose __attribute__((vector_size(REVNETS_VECTOR), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(REVNETS_VECTOR)));

constexpr int kLanes = REVNETS_VECTOR / 4;

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
// Keeps the compiler from loading a vector again at each use: half of what is not aligned lies in two lines of the cache.
inline void in_register(vec& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}
inline vec same(float value) { return value - vec{}; }
// a * b + c, rounded once where the processor can. Left to the compiler, it is rounded twice in some loops: GCC tunes for
// Zen by keeping sums of a single vector from waiting for each other, and other numbers of vectors gave other bits.
inline vec multiply_add(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
// NaN stays NaN: in x86's instructions the second operand is what comes out where the comparison is false.
inline vec clamp(vec v, vec low, vec high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(high, _mm512_max_ps(low, v));
#elif defined(__AVX__)
  return _mm256_min_ps(high, _mm256_max_ps(low, v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}
inline vec clamp(vec v, float low, float high) { return clamp(v, same(low), same(high)); }

// Some neighbouring lanes of a vector: those outside are neither read, but 0, nor written.
struct Part {
#if defined(__AVX512F__)
  __mmask16 mask;
#elif defined(__AVX__)
  __m256i mask;
#else
  int64_t from, to;
#endif
  Part() = default;
  Part(int64_t from_, int64_t to_) {
    const int64_t first = std::max<int64_t>(0, std::min<int64_t>(from_, kLanes)), last = std::max(first, std::min<int64_t>(to_, kLanes));
#if defined(__AVX512F__)
    mask = static_cast<__mmask16>((1u << last) - (1u << first));
#elif defined(__AVX__)
    const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7};  // compared at once: lane by lane it takes longer than the sums
    mask = reinterpret_cast<__m256i>((lanes >= static_cast<int32_t>(first)) & (lanes < static_cast<int32_t>(last)));
#else
    from = first;
    to = last;
#endif
  }
};

#if defined(__AVX512F__)
inline vec load(const float* p, const Part& part) { return _mm512_maskz_loadu_ps(part.mask, p); }
inline void store(float* p, vec v, const Part& part) { _mm512_mask_storeu_ps(p, part.mask, v); }
#elif defined(__AVX__)
inline vec load(const float* p, const Part& part) { return _mm256_maskload_ps(p, part.mask); }
inline void store(float* p, vec v, const Part& part) { _mm256_maskstore_ps(p, part.mask, v); }
#else
inline vec load(const float* p, const Part& part) {
  if (part.to - part.from == kLanes) return load(p);
  vec v = {};
#pragma GCC unroll 4
  for (int j = 0; j < kLanes; ++j)
    if (j >= part.from && j < part.to) v[j] = p[j];
  return v;
}
inline void store(float* p, vec v, const Part& part) {
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j)
    if (j >= part.from && j < part.to) p[j] = v[j];
}
#endif

inline int64_t round_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// Floats from one place to another, without the call that memcpy is: lines are short.
inline void copy(float* to, const float* from, int64_t length) {
  if (length >= kLanes) {
    for (int64_t k = 0; k + kLanes < length; k += kLanes) store(to + k, load(from + k));
    store(to + length - kLanes, load(from + length - kLanes));  // the last two may overlap
  } else if (length >= 8) {
    std::memcpy(to, from, 32);
    std::memcpy(to + length - 8, from + length - 8, 32);
  } else if (length >= 4) {
    std::memcpy(to, from, 16);
    std::memcpy(to + length - 4, from + length - 4, 16);
  } else {
    for (int64_t k = 0; k < length; ++k) to[k] = from[k];
  }
}

// Lane j is lane index[j] of two vectors one after the other.
inline vec shuffled(vec a, vec b, ivec index) {
#if defined(__clang__)
  vec out;
  for (int j = 0; j < kLanes; ++j) out[j] = index[j] < kLanes ? a[index[j]] : b[index[j] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}
template <typename Index>
inline vec pick(vec a, vec b, Index index) {
  ivec lanes;
  for (int j = 0; j < kLanes; ++j) lanes[j] = index(j);
  return shuffled(a, b, lanes);
}
// Lane j is lane index[j] of a vector.
inline vec lanes_of(vec v, ivec index) {
#if defined(__clang__)
  vec out;
  for (int j = 0; j < kLanes; ++j) out[j] = v[index[j] % kLanes];
  return out;
#else
  return __builtin_shuffle(v, index);
#endif
}
inline vec even_of(vec a, vec b) {
  return pick(a, b, [](int j) { return 2 * j; });
}
inline vec odd_of(vec a, vec b) {
  return pick(a, b, [](int j) { return 2 * j + 1; });
}

// The lanes of each of kLanes vectors summed up: lane j is the sum of vector j.
inline vec sums_of(vec* v) {
#pragma GCC unroll 4
  for (int number = kLanes / 2; number; number /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < number; ++i) v[i] = even_of(v[2 * i], v[2 * i + 1]) + odd_of(v[2 * i], v[2 * i + 1]);
  return v[0];
}
// 0 where the mask's lane is 0, whatever is there.
inline vec masked(vec v, ivec mask) { return reinterpret_cast<vec>(reinterpret_cast<ivec>(v) & mask); }

// Every other float.
inline void copy_even(float* __restrict to, const float* __restrict from, int64_t length) {
  if (length < kLanes) {
    for (int64_t k = 0; k < length; ++k) to[k] = from[2 * k];
    return;
  }
  for (int64_t k = 0; k < length; k += kLanes) {
    const int64_t start = std::min(k, length - kLanes);
    const float* at = from + 2 * start;  // the second vector starts one earlier: nothing beyond the last is read
    const auto index = [](int j) { return 2 * j < kLanes ? 2 * j : 2 * j + 1; };
    store(to + start, pick(load(at), load(at + kLanes - 1), index));
  }
}

// e^v: 2^k * e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial of degree 7
inline vec exponential(vec v) {
  v = clamp(v, -87.0f, 88.0f);
  const vec t = v * 1.44269504f;
  const ivec k = __builtin_convertvector(t + (t < 0.0f ? same(-0.5f) : same(0.5f)), ivec);
  const vec n = __builtin_convertvector(k, vec);
  const vec r = v - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = same(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * reinterpret_cast<vec>((k + 127) << 23);
}

enum Activation { kNone = 0, kRelu = 1, kRelu6 = 2, kHardswish = 3, kHardsigmoid = 4, kSilu = 5, kSigmoid = 6 };

inline vec hard_gate(vec v) { return clamp(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); }

// What is applied in registers: ReLU, ReLU6 and none are a range, and hardswish; see also finish.
struct Range {
  vec low, high;
  bool is_hardswish;
  explicit Range(int64_t activation) {
    const float infinity = __builtin_inff();
    low = same(activation == kRelu || activation == kRelu6 ? 0.0f : -infinity);
    high = same(activation == kRelu6 ? 6.0f : infinity);
    is_hardswish = activation == kHardswish;
  }
  vec operator()(vec v) const { return is_hardswish ? v * hard_gate(v) : clamp(v, low, high); }
};

inline float mean_of(const float* x, int64_t length) {
  vec sums = same(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) sums += load(x + k);
  double sum = 0.0;
  for (int j = 0; j < kLanes; ++j) sum += sums[j];
  for (; k < length; ++k) sum += x[k];
  return static_cast<float>(sum / length);
}

template <typename Function>
inline void map(float* y, int64_t length, Function function) {
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) store(y + k, function(load(y + k)));
  if (k == length) return;
  float rest[kLanes] = {};
  std::memcpy(rest, y + k, (length - k) * sizeof(float));
  store(rest, function(load(rest)));
  std::memcpy(y + k, rest, (length - k) * sizeof(float));
}

// The other activations, on what has just been written and is still in the first cache.
__attribute__((noinline)) void finish_others(float* y, int64_t length, int64_t activation) {
  switch (activation) {
    case kHardsigmoid: return map(y, length, hard_gate);
    case kSilu: return map(y, length, [](vec v) { return v / (1.0f + exponential(-v)); });
    case kSigmoid: return map(y, length, [](vec v) { return 1.0f / (1.0f + exponential(-v)); });
  }
}

inline void finish(float* y, int64_t length, int64_t activation) {
  if (activation > kHardswish) finish_others(y, length, activation);
}

// A vector of which only the first `length` pixels exist in the output.
__attribute__((noinline)) void store_end(const Range& range, vec v, const float* residual, float* y, int64_t length) {
  float buffer[kLanes] = {};
  if (residual) std::memcpy(buffer, residual, length * sizeof(float));
  store(buffer, range(v + load(buffer)));
  std::memcpy(y, buffer, length * sizeof(float));
}

}  // namespace
