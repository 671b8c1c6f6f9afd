// Matrices transposed, in squares that fit the registers.

#pragma once

#include "call.h"

namespace {

// Lanes of squares of `step` swapped: then those of 2 * step, until row k is column k.
template <int kStep>
inline void swap_squares(vec* rows) {
  ivec low, high;
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & kStep ? kLanes + (j ^ kStep) : j;
    high[j] = j & kStep ? kLanes + j : j ^ kStep;
  }
  for (int k = 0; k < kLanes; ++k) {
    if (k & kStep) continue;
    const vec a = rows[k], b = rows[k + kStep];
    rows[k] = shuffled(a, b, low);
    rows[k + kStep] = shuffled(a, b, high);
  }
  if constexpr (2 * kStep < kLanes) swap_squares<2 * kStep>(rows);
}

// `rows` lines of `columns` numbers, the lines `from_pitch` apart, into columns `pitch` apart.
void transpose_part(const float* x, int64_t from_pitch, int64_t rows, int64_t columns, float* y, int64_t pitch) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    int64_t r = 0;
    if (c + kLanes <= columns) {
      for (; r + kLanes <= rows; r += kLanes) {
        vec square[kLanes];
        for (int k = 0; k < kLanes; ++k) square[k] = load(x + (r + k) * from_pitch + c);
        swap_squares<1>(square);
        for (int k = 0; k < kLanes; ++k) store(y + (c + k) * pitch + r, square[k]);
      }
    }
    for (; r < rows; ++r) {
      for (int64_t k = c; k < std::min(columns, c + kLanes); ++k) y[k * pitch + r] = x[r * from_pitch + k];
    }
  }
}

// The member's share: parts whose lines and columns lie in no more pages than a core remembers.
void run_transpose(const float* x, int64_t height, int64_t width, float* y, const Member& member) {
  constexpr int64_t kSide = 64;
  const int64_t down = (height + kSide - 1) / kSide, across = (width + kSide - 1) / kSide;
  for (int64_t part = member.begin(down * across); part < member.end(down * across); ++part) {
    const int64_t row = part % down * kSide, column = part / down * kSide;
    const int64_t rows = std::min(kSide, height - row), columns = std::min(kSide, width - column);
    transpose_part(x + row * width + column, width, rows, columns, y + column * height + row, height);
  }
}

}  // namespace
