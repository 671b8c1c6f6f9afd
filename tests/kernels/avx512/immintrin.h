// AVX-512's instructions for bytes in two halves by AVX2, so that code for them runs, and is tested, where they are not.
// Compile with -ffp-contract=off, and with -DREVNETS_LIKE_VNNI for a processor that has VNNI.

#pragma once

#include_next <immintrin.h>

#define __AVX512BW__ 1
#define __AVX512VL__ 1
#if defined(REVNETS_LIKE_VNNI)
#define __AVX512VNNI__ 1
#endif
#define asm(...)  // "+v" names registers that are not there

namespace like512 {

struct alignas(64) Whole {
  __m256i low, high;
};
struct Reals {
  __m256 low, high;
};
typedef unsigned short Mask;

#define REVNETS_TWO(name, of) \
  inline Whole name(Whole a, Whole b) { return {of(a.low, b.low), of(a.high, b.high)}; }
#define REVNETS_SAME(name) REVNETS_TWO(name, _mm256_##name)
REVNETS_SAME(add_epi32) REVNETS_SAME(sub_epi32) REVNETS_SAME(add_epi16) REVNETS_SAME(adds_epi16)
REVNETS_SAME(packs_epi32) REVNETS_SAME(packus_epi16) REVNETS_SAME(min_epu8) REVNETS_SAME(max_epu8)
REVNETS_SAME(shuffle_epi8) REVNETS_SAME(maddubs_epi16) REVNETS_SAME(madd_epi16)
REVNETS_SAME(unpacklo_epi8) REVNETS_SAME(unpackhi_epi8)
REVNETS_TWO(and_si512, _mm256_and_si256) REVNETS_TWO(xor_si512, _mm256_xor_si256)
#define REVNETS_REAL(name) \
  inline Reals name(Reals a, Reals b) { return {_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)}; }
REVNETS_REAL(mul_ps) REVNETS_REAL(add_ps) REVNETS_REAL(min_ps) REVNETS_REAL(max_ps)

inline Whole set1_epi8(char v) { return {_mm256_set1_epi8(v), _mm256_set1_epi8(v)}; }
inline Whole set1_epi16(short v) { return {_mm256_set1_epi16(v), _mm256_set1_epi16(v)}; }
inline Whole set1_epi32(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Reals set1_ps(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
template <typename... Ints>
inline Whole setr_epi32(Ints... v) {
  const int all[16] = {v...};
  Whole found;
  __builtin_memcpy(&found, all, 64);
  return found;
}
inline Whole srli_epi32(Whole a, int by) { return {_mm256_srli_epi32(a.low, by), _mm256_srli_epi32(a.high, by)}; }
inline Reals cvtepi32_ps(Whole a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Whole cvtps_epi32(Reals a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
inline Reals castsi512_ps(Whole a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
inline Whole cvtepu8_epi32(__m128i a) { return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))}; }
inline Whole cvtepi8_epi16(__m256i a) {
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1))};
}
inline Whole broadcast_i32x4(__m128i a) { return {_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a)}; }
inline Whole loadu_si512(const void* p) {
  Whole found;
  __builtin_memcpy(&found, p, 64);
  return found;
}
inline Whole load_si512(const void* p) { return *static_cast<const Whole*>(__builtin_assume_aligned(p, 64)); }
inline void store_si512(void* p, Whole a) { *static_cast<Whole*>(__builtin_assume_aligned(p, 64)) = a; }

struct Ints {
  int v[16];
  Ints() = default;
  Ints(Whole a) { __builtin_memcpy(v, &a, 64); }
  operator Whole() const { return loadu_si512(v); }
};
inline Whole maskz_loadu_epi32(Mask mask, const void* p) {
  Ints found;
  for (int k = 0; k < 16; ++k) {
    found.v[k] = 0;
    if (mask >> k & 1) __builtin_memcpy(found.v + k, static_cast<const char*>(p) + 4 * k, 4);
  }
  return found;
}
inline void mask_storeu_epi32(void* p, Mask mask, Whole a) {
  const Ints all = a;
  for (int k = 0; k < 16; ++k)
    if (mask >> k & 1) __builtin_memcpy(static_cast<char*>(p) + 4 * k, all.v + k, 4);
}
inline Whole mask_mov_epi32(Whole a, Mask mask, Whole b) {
  Ints found = a;
  const Ints other = b;
  for (int k = 0; k < 16; ++k)
    if (mask >> k & 1) found.v[k] = other.v[k];
  return found;
}
inline Whole permutex2var_epi32(Whole a, Whole index, Whole b) {
  const Ints one = a, other = b, at = index;
  Ints found;
  for (int k = 0; k < 16; ++k) found.v[k] = (at.v[k] & 16 ? other : one).v[at.v[k] & 15];
  return found;
}
inline Whole permutexvar_epi32(Whole index, Whole a) { return permutex2var_epi32(a, index, a); }
inline Whole dpbusd_epi32(Whole sum, Whole a, Whole b) {
  Ints found = sum;
  unsigned char x[64];
  signed char w[64];
  __builtin_memcpy(x, &a, 64);
  __builtin_memcpy(w, &b, 64);
  for (int k = 0; k < 64; ++k) found.v[k / 4] += x[k] * w[k];
  return found;
}

}  // namespace like512

#define __m512i like512::Whole
#define __m512 like512::Reals
#define __mmask16 like512::Mask
#define _mm512_add_epi32 like512::add_epi32
#define _mm512_sub_epi32 like512::sub_epi32
#define _mm512_add_epi16 like512::add_epi16
#define _mm512_adds_epi16 like512::adds_epi16
#define _mm512_packs_epi32 like512::packs_epi32
#define _mm512_packus_epi16 like512::packus_epi16
#define _mm512_min_epu8 like512::min_epu8
#define _mm512_max_epu8 like512::max_epu8
#define _mm512_shuffle_epi8 like512::shuffle_epi8
#define _mm512_maddubs_epi16 like512::maddubs_epi16
#define _mm512_madd_epi16 like512::madd_epi16
#define _mm512_unpacklo_epi8 like512::unpacklo_epi8
#define _mm512_unpackhi_epi8 like512::unpackhi_epi8
#define _mm512_and_si512 like512::and_si512
#define _mm512_xor_si512 like512::xor_si512
#define _mm512_mul_ps like512::mul_ps
#define _mm512_add_ps like512::add_ps
#define _mm512_min_ps like512::min_ps
#define _mm512_max_ps like512::max_ps
#define _mm512_set1_epi8 like512::set1_epi8
#define _mm512_set1_epi16 like512::set1_epi16
#define _mm512_set1_epi32 like512::set1_epi32
#define _mm512_set1_ps like512::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 like512::setr_epi32
#define _mm512_srli_epi32 like512::srli_epi32
#define _mm512_cvtepi32_ps like512::cvtepi32_ps
#define _mm512_cvtps_epi32 like512::cvtps_epi32
#define _mm512_castsi512_ps like512::castsi512_ps
#define _mm512_cvtepu8_epi32 like512::cvtepu8_epi32
#define _mm512_cvtepi8_epi16 like512::cvtepi8_epi16
#define _mm512_broadcast_i32x4 like512::broadcast_i32x4
#define _mm512_loadu_si512 like512::loadu_si512
#define _mm512_load_si512 like512::load_si512
#define _mm512_store_si512 like512::store_si512
#define _mm512_maskz_loadu_epi32 like512::maskz_loadu_epi32
#define _mm512_mask_storeu_epi32 like512::mask_storeu_epi32
#define _mm512_mask_mov_epi32 like512::mask_mov_epi32
#define _mm512_permutex2var_epi32 like512::permutex2var_epi32
#define _mm512_permutexvar_epi32 like512::permutexvar_epi32
#define _mm512_dpbusd_epi32 like512::dpbusd_epi32
