// 1x1 convolutions of images by pixel (channels last), and linear layers: (pixels, channels) in, likewise out.
//
// A block of pixels is transposed in registers on its way into a panel, a line per input channel, and its sums on their
// way out: no transposed copy of an image is ever in memory. Sums are those of convolution.h to the bit.

#pragma once

#include "transpose.h"
#include "weight_grad.h"
#include "windows.h"

extern "C" {

// Structure as in Call.
struct PixelCall {
  const float* x;
  const float* values;
  const int16_t* columns;
  const int32_t* rows;
  const float* bias;  // may be null
  float* y;
  int64_t pixels, c_in, c_out, groups, chunk;
};

}  // extern "C"

namespace {

// The member's blocks of pixels, or, where there are few, its output channels in all of them.
void run_pixels(const PixelCall& c, const Member& member) {
  const int64_t inputs = c.c_in / c.groups, outputs = c.c_out / c.groups;
  const int64_t chunks = std::max<int64_t>(1, (inputs + c.chunk - 1) / c.chunk), height = std::min(c.chunk, inputs);
  const int64_t most = std::max<int64_t>(4, std::min<int64_t>(8, kWindowPanel / kLanes / std::max<int64_t>(1, height)));
  const int64_t vectors = (c.pixels + kLanes - 1) / kLanes, blocks = (vectors + most - 1) / most;
  const bool by_block = blocks >= 2 * member.size;
  const int64_t first_block = by_block ? member.begin(blocks) : 0, last_block = by_block ? member.end(blocks) : blocks;
  const int64_t first = by_block ? 0 : boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id, member.size);
  const int64_t last = by_block ? c.c_out : boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id + 1, member.size);
  float* panel = scratch((height + outputs) * most * kLanes);
  float* sums = panel + height * most * kLanes;
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t from = vectors * b / blocks, to = vectors * (b + 1) / blocks, start = from * kLanes;
    const int64_t length = std::min(to * kLanes, c.pixels) - start, pitch = (to - from) * kLanes;
    for (int64_t g = first / outputs; g * outputs < last; ++g) {
      const int64_t begin = std::max(first, g * outputs), end = std::min(last, (g + 1) * outputs);
      for (int64_t j = 0; j < chunks; ++j) {
        const int64_t channel = j * c.chunk, count = std::min(c.chunk, inputs - channel);
        pack_pixels(c.x, c.c_in, start, length, g * inputs + channel, count, panel, pitch);
        multiply_lines_any<8>(to - from, c, c.rows + j * c.c_out, begin, end, panel, j == 0, sums);
      }
      transpose_part(sums, pitch, end - begin, length, c.y + start * c.c_out + begin, c.c_out);
    }
  }
}

// The member's part of numbers that are picked out of others.
void run_gather(const float* from, const int32_t* places, int64_t count, float* to, const Member& member) {
  const int64_t end = member.end(count);
  for (int64_t k = member.begin(count); k < end; ++k) to[k] = from[places[k]];
}

// The member's part of weight * mask: a tenth of what torch takes, which makes numbers of the mask first.
void run_mask(const float* weight, const uint8_t* mask, int64_t count, float* y, const Member& member) {
  const int64_t end = member.end(count);
#pragma GCC ivdep
  for (int64_t k = member.begin(count); k < end; ++k) y[k] = weight[k] * static_cast<float>(mask[k]);
}

}  // namespace
