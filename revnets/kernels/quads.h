// Convolutions with compressed weights by quads: four output channels at once, where vectors are wide.
//
// Zen 4 loads a vector of AVX-512 from the first cache in the time of a multiplication, and broadcasting a weight is
// such a load, too: of five vectors of pixels that a weight multiplies, a sixth of the time is lost. So four output
// channels share what is loaded: the inputs of a chunk are sorted by which of the four have a weight for them, which
// makes 15 lists, and each list is a loop that knows its channels. Its vectors of pixels are loaded once for all of them.
// Where there are few weights, the loops are too short: see quads.py.

#pragma once

#include <utility>

#include "call.h"

namespace {

constexpr int kQuad = 4;
constexpr int kPatterns = 1 << kQuad;  // sets of channels; there is no list for the one of none
constexpr int kQuadVectors = 6;        // of a block, at most: 24 sums, 6 vectors of pixels and a weight are 31 registers

// A chunk of a block of pixels. A row is an output channel or a quad.
struct Work {
  const float* panel;
  int64_t pitch;           // of its lines
  const int32_t* rows;     // where each row's weights begin, from the chunk's first row on
  int64_t begin, end;      // rows
  int64_t row, channel;    // the group's first row and output channel
  int64_t channels;        // of the group
  float* sums;             // of the chunks before: a line of the panel's pitch per output channel from `begin`
  bool first, last;        // chunk
  int64_t length;          // pixels of the block
  int64_t plane;           // of the output
  float* y;                // the block's first pixel in the image's first output channel
  const float* residual;   // likewise, or null
};

#if defined(__AVX512F__)

typedef float half __attribute__((vector_size(REVNETS_VECTOR / 2)));
typedef float loose_half __attribute__((vector_size(REVNETS_VECTOR / 2), aligned(4), may_alias));
constexpr int kHalfLanes = kLanes / 2;

inline half load_half(const float* p) { return *reinterpret_cast<const loose_half*>(p); }
inline void store_half(float* p, half v) { *reinterpret_cast<loose_half*>(p) = v; }
inline half half_of(vec v) { return _mm512_castps512_ps256(v); }
inline vec whole_of(half v) { return _mm512_castps256_ps512(v); }

// Sums of a quad: kNumber vectors per channel, of which the last may be half a one, which takes half the time.
template <int kNumber, bool kHalf>
struct QuadSums {
  static constexpr int kFull = kNumber - kHalf;
  vec full[kQuad][kFull > 0 ? kFull : 1];
  half rest[kQuad];
};

// The weights of one list, for the channels in kPattern.
template <int kNumber, bool kHalf, int kPattern>
inline __attribute__((always_inline)) void add_list(const float* panel, int count, const int16_t*& columns,
                                                    const float*& values, QuadSums<kNumber, kHalf>& sums) {
  constexpr int kFull = kNumber - kHalf;
  constexpr bool kShared = (kPattern & (kPattern - 1)) != 0;
  for (const int16_t* end = columns + count; columns != end; ++columns) {
    const float* from = panel + *columns * int64_t{kNumber * kLanes};
    vec x[kFull > 0 ? kFull : 1];
    half rest;
#pragma GCC unroll 8
    for (int j = 0; j < kFull; ++j) {
      x[j] = load(from + j * kLanes);
      if (kShared) in_register(x[j]);
    }
    if (kHalf) rest = load_half(from + kFull * kLanes + kHalfLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kQuad; ++r) {
      if (!(kPattern >> r & 1)) continue;
      const vec weight = same(*values++);
#pragma GCC unroll 8
      for (int j = 0; j < kFull; ++j) sums.full[r][j] = multiply_add(weight, x[j], sums.full[r][j]);
      if (kHalf) sums.rest[r] = _mm256_fmadd_ps(half_of(weight), rest, sums.rest[r]);
    }
  }
}

template <int kNumber, bool kHalf, size_t... kPattern>
inline __attribute__((always_inline)) void add_lists(const float* panel, const int16_t* counts, const int16_t*& columns,
                                                     const float*& values, QuadSums<kNumber, kHalf>& sums,
                                                     std::index_sequence<kPattern...>) {
  (add_list<kNumber, kHalf, kPattern + 1>(panel, counts[kPattern + 1], columns, values, sums), ...);
}

// One channel's sums into the output.
template <int kNumber, bool kHalf>
inline __attribute__((always_inline)) void store_channel(const Range& range, const QuadSums<kNumber, kHalf>& sums, int r,
                                                         const float* residual, float* y, int64_t length) {
  constexpr int kFull = kNumber - kHalf;
  if (kNumber == 1) {
    const Part part(0, length);
    store(y, range(residual ? sums.full[r][0] + load(residual, part) : sums.full[r][0]), part);
    return;
  }
  const auto place = [&](int j) { return j < kNumber - 1 ? j * kLanes : length - kLanes; };
  vec v[kFull > 0 ? kFull : 1];
#pragma GCC unroll 8
  for (int j = 0; j < kFull; ++j) v[j] = residual ? sums.full[r][j] + load(residual + place(j)) : sums.full[r][j];
  half rest = sums.rest[r];
  if (kHalf && residual) rest += load_half(residual + length - kHalfLanes);
#pragma GCC unroll 8
  for (int j = 0; j < kFull; ++j) store(y + place(j), range(v[j]));
  if (kHalf) store_half(y + length - kHalfLanes, half_of(range(whole_of(rest))));
}

// `chunk` quads are before the chunk's, `all` are there in all chunks: where their columns begin comes behind their weights.
template <int kNumber, bool kHalf>
void multiply_quads(const Call& c, const Work& work, int64_t chunk, int64_t all) {
  constexpr int kFull = kNumber - kHalf;
  const Range range(c.activation);
  const float* panel = static_cast<const float*>(__builtin_assume_aligned(work.panel, REVNETS_VECTOR));
  const float* values = c.values + work.rows[work.begin];
  const int16_t* columns = c.columns + c.rows[all + 1 + chunk + work.begin];
  const int16_t* counts = c.counts + (chunk + work.begin) * kPatterns;
  float* lines = work.sums;
  for (int64_t q = work.begin; q < work.end; ++q, counts += kPatterns, lines += kQuad * kNumber * kLanes) {
    const int64_t before = (q - work.row) * kQuad, o = work.channel + before;
    const int number = static_cast<int>(std::min<int64_t>(kQuad, work.channels - before));
    QuadSums<kNumber, kHalf> sums;
#pragma GCC unroll 4
    for (int r = 0; r < kQuad; ++r) {
      const float* line = lines + r * kNumber * kLanes;
      const vec bias = same(work.first && c.bias && r < number ? c.bias[o + r] : 0.0f);
#pragma GCC unroll 8
      for (int j = 0; j < kFull; ++j) sums.full[r][j] = work.first ? bias : load(line + j * kLanes);
      sums.rest[r] = work.first || !kHalf ? half_of(bias) : load_half(line + kFull * kLanes);
    }
    add_lists(panel, counts, columns, values, sums, std::make_index_sequence<kPatterns - 1>());
#pragma GCC unroll 4
    for (int r = 0; r < kQuad; ++r) {
      if (!work.last) {
        float* line = lines + r * kNumber * kLanes;
#pragma GCC unroll 8
        for (int j = 0; j < kFull; ++j) store(line + j * kLanes, sums.full[r][j]);
        if (kHalf) store_half(line + kFull * kLanes, sums.rest[r]);
      } else if (r < number) {
        const int64_t at = (o + r) * work.plane;
        store_channel(range, sums, r, work.residual ? work.residual + at : nullptr, work.y + at, work.length);
        finish(work.y + at, work.length, c.activation);
      }
    }
  }
}

template <int kNumber>
void multiply_quads_of(const Call& c, const Work& work, int64_t chunk, int64_t all) {
  const int64_t left = work.length - (kNumber - 1) * kLanes;
  if (kNumber > 1 && left <= kHalfLanes) return multiply_quads<kNumber, (kNumber > 1)>(c, work, chunk, all);
  return multiply_quads<kNumber, false>(c, work, chunk, all);
}

void multiply_quads_any(const Call& c, const Work& work, int64_t chunk, int64_t all) {
  switch ((work.length + kLanes - 1) / kLanes) {
    case 1: return multiply_quads_of<1>(c, work, chunk, all);
    case 2: return multiply_quads_of<2>(c, work, chunk, all);
    case 3: return multiply_quads_of<3>(c, work, chunk, all);
    case 4: return multiply_quads_of<4>(c, work, chunk, all);
    case 5: return multiply_quads_of<5>(c, work, chunk, all);
    default: return multiply_quads_of<kQuadVectors>(c, work, chunk, all);
  }
}

#else

void multiply_quads_any(const Call&, const Work&, int64_t, int64_t) {}  // quads.py makes none

#endif

}  // namespace
