// Vectors of bytes under one name, of AVX-512 or of AVX2, so that one code serves both.

#pragma once

#include "call.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define REVNETS_BYTE_VECTOR 64
#define REVNETS_OF(name) _mm512_##name
#if defined(__AVX512VNNI__)
#define REVNETS_VNNI
#define REVNETS_BYTE_TARGET "AVX-512 VNNI"
#else
#define REVNETS_BYTE_TARGET "AVX-512"
#endif
#elif defined(__AVX2__)
#define REVNETS_BYTE_VECTOR 32
#define REVNETS_OF(name) _mm256_##name
#define REVNETS_BYTE_TARGET "AVX2"
#else
#define REVNETS_BYTE_TARGET "portable"
#endif

namespace {

#if defined(REVNETS_BYTE_VECTOR)
constexpr int kPixels = REVNETS_BYTE_VECTOR / 4;  // of a vector
#else
constexpr int kPixels = 4;
#endif
constexpr int kBytes = 4 * kPixels;

#if REVNETS_BYTE_VECTOR == 64

typedef __m512i Bytes;
typedef __m512 Reals;

// Some of the 32-bit lanes: memory of the others is not touched.
struct Lanes {
  __mmask16 mask;
  Lanes() = default;
  explicit Lanes(uint32_t bits) : mask(static_cast<__mmask16>(bits)) {}
};
inline Bytes load_bytes(const void* p) { return _mm512_load_si512(p); }
inline Bytes load_any(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes v) { _mm512_store_si512(p, v); }
inline Bytes load_lanes(const void* p, const Lanes& lanes) { return _mm512_maskz_loadu_epi32(lanes.mask, p); }
inline void store_lanes(void* p, Bytes v, const Lanes& lanes) { _mm512_mask_storeu_epi32(p, lanes.mask, v); }
inline Bytes blended(Bytes v, Bytes other, const Lanes& lanes) { return _mm512_mask_mov_epi32(v, lanes.mask, other); }
inline Reals reals_of(Bytes bits) { return _mm512_castsi512_ps(bits); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes different(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes repeated(__m128i v) { return _mm512_broadcast_i32x4(v); }
inline Bytes widened(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline Bytes permuted(Bytes v, Bytes index) { return _mm512_permutexvar_epi32(index, v); }
inline Bytes even_lanes(Bytes a, Bytes b) {
  return _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}

#elif REVNETS_BYTE_VECTOR == 32

typedef __m256i Bytes;
typedef __m256 Reals;

struct Lanes {
  __m256i mask;
  bool all;
  Lanes() = default;
  explicit Lanes(uint32_t bits) : all((bits & 0xFF) == 0xFF) {
    const __m256i powers = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), powers), powers);
  }
};
inline Bytes load_bytes(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
inline Bytes load_any(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, Bytes v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
inline Bytes load_lanes(const void* p, const Lanes& lanes) {
  return lanes.all ? load_any(p) : _mm256_maskload_epi32(static_cast<const int*>(p), lanes.mask);
}
inline void store_lanes(void* p, Bytes v, const Lanes& lanes) {
  if (lanes.all) _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  else _mm256_maskstore_epi32(static_cast<int*>(p), lanes.mask, v);
}
inline Bytes blended(Bytes v, Bytes other, const Lanes& lanes) { return _mm256_blendv_epi8(v, other, lanes.mask); }
inline Reals reals_of(Bytes bits) { return _mm256_castsi256_ps(bits); }
inline Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes different(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
inline Bytes repeated(__m128i v) { return _mm256_broadcastsi128_si256(v); }
inline Bytes widened(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Bytes permuted(Bytes v, Bytes index) { return _mm256_permutevar8x32_epi32(v, index); }
inline Bytes even_lanes(Bytes a, Bytes b) {
  const __m256 mixed = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
  return _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xD8);
}

#endif

#if defined(REVNETS_BYTE_VECTOR)

// Four floats again and again.
inline Reals repeated_reals(const float* p) { return reals_of(repeated(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Lanes all_lanes() { return Lanes(0xFFFF); }
inline Lanes first_lanes(int64_t count) { return Lanes(count >= 16 ? 0xFFFF : (1u << std::max<int64_t>(0, count)) - 1); }
inline void store_some(float* p, Reals v, const Lanes& lanes) {
  Bytes bits;
  std::memcpy(&bits, &v, sizeof(v));
  store_lanes(p, bits, lanes);
}

// Of four bytes of each of four pixels those of each channel side by side, and back.
inline Bytes transposed_fours(Bytes v) {
  return REVNETS_OF(shuffle_epi8)(v, repeated(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

inline Reals product(Reals a, Reals b) {
  Reals found = REVNETS_OF(mul_ps)(a, b);
#if REVNETS_BYTE_VECTOR == 64
  asm("" : "+v"(found));  // not fused with a sum
#else
  asm("" : "+x"(found));
#endif
  return found;
}

// Bytes by the table.
inline Bytes looked_up(const uint8_t* table, Bytes bytes) {
#if REVNETS_BYTE_VECTOR == 64 && defined(__AVX512VBMI__)
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
#else
  alignas(64) uint8_t some[kBytes];
  store_bytes(some, bytes);
  for (uint8_t& one : some) one = table[one];
  return load_bytes(some);
#endif
}

// What four int32 vectors, scaled and rounded, become.
struct ToBytes {
  Bytes zero, low, high;
  const uint8_t* table;
  explicit ToBytes(const Call& c)
      : zero(REVNETS_OF(set1_epi16)(static_cast<int16_t>(c.zero_out))),
        low(REVNETS_OF(set1_epi8)(static_cast<char>(c.low))),
        high(REVNETS_OF(set1_epi8)(static_cast<char>(c.high))),
        table(c.table) {}
  // of pairs that packs_epi32 has made
  Bytes operator()(Bytes first, Bytes second) const {
    Bytes q = REVNETS_OF(packus_epi16)(REVNETS_OF(adds_epi16)(first, zero), REVNETS_OF(adds_epi16)(second, zero));
    q = REVNETS_OF(min_epu8)(REVNETS_OF(max_epu8)(q, low), high);
    return table ? looked_up(table, q) : q;
  }
};

#endif

}  // namespace
