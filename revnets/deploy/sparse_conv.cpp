// Convolutions with compressed weights: every output channel is a list of (offset, weight) pairs.
//
// The input stays in CHW order, so that one non-zero weight multiplies a run of neighbouring pixels: a block of up to
// eight vectors of them stays in registers while the row's weights are broadcast one at a time, zeros never being
// touched (the layout of Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723). Kernels larger than 1x1, strides and
// padding reduce to the same loop: the image is first copied with its border, split into stride x stride phases, after
// which every tap is a constant offset. A depthwise convolution is a row of k * k weights.
//
// Plain C interface, GCC's vector extensions (also clang's): AVX-512, AVX2, NEON or what else the compiler targets.

#include <cstdint>
#include <cstring>
#include <algorithm>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
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
constexpr int kVectors = 8;                     // of a block
constexpr int64_t kBlock = kVectors * kLanes;   // pixels

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
inline vec same(float value) { return value - vec{}; }
// the order of operands keeps NaN: a comparison with it is false
inline vec clamp(vec v, vec low, vec high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}
inline vec clamp(vec v, float low, float high) { return clamp(v, same(low), same(high)); }

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

// Elements 0, 2, ... of the first vector, then 1, 3, ... of the second.
inline vec even_of(vec a, vec b) {
  ivec index;
  for (int j = 0; j < kLanes; ++j) index[j] = 2 * j < kLanes ? 2 * j : 2 * j + 1;
#if defined(__clang__)
  vec out;
  for (int j = 0; j < kLanes; ++j) out[j] = index[j] < kLanes ? a[index[j]] : b[index[j] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Every other float.
inline void copy_even(float* __restrict to, const float* __restrict from, int64_t length) {
  if (length < kLanes) {
    for (int64_t k = 0; k < length; ++k) to[k] = from[2 * k];
    return;
  }
  for (int64_t k = 0; k < length; k += kLanes) {
    const int64_t start = std::min(k, length - kLanes);
    const float* at = from + 2 * start;  // the second vector starts one earlier: nothing beyond the last is read
    store(to + start, even_of(load(at), load(at + kLanes - 1)));
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

}  // namespace

extern "C" {

enum Activation { kNone = 0, kRelu = 1, kRelu6 = 2, kHardswish = 3, kHardsigmoid = 4, kSilu = 5, kSigmoid = 6 };

// One call. Weights: of output channel o, values[i] at columns[i] of its flattened (C_in / groups, kh, kw), for i from
// rows[o] to rows[o + 1]. bias and residual (of the output's shape, added before the activation) may be null.
struct Call {
  const float* x;
  const float* values;
  const int16_t* columns;
  const int32_t* rows;
  const float* bias;
  const float* residual;
  float* y;
  int64_t n, c_in, h, w;
  int64_t c_out, h_out, w_out;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int64_t activation, threads;
};

const char* revnets_target() { return REVNETS_TARGET; }
int64_t revnets_call_size() { return sizeof(Call); }

}  // extern "C"

namespace {

// ReLU, ReLU6 and none are a range, applied in registers; see also finish.
struct Range {
  vec low, high;
  explicit Range(int64_t activation) {
    const float infinity = __builtin_inff();
    low = same(activation == kRelu || activation == kRelu6 ? 0.0f : -infinity);
    high = same(activation == kRelu6 ? 6.0f : infinity);
  }
  vec operator()(vec v) const { return clamp(v, low, high); }
};

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
  const auto gate = [](vec v) { return clamp(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); };
  switch (activation) {
    case kHardswish: return map(y, length, [&](vec v) { return v * gate(v); });
    case kHardsigmoid: return map(y, length, gate);
    case kSilu: return map(y, length, [](vec v) { return v / (1.0f + exponential(-v)); });
    case kSigmoid: return map(y, length, [](vec v) { return 1.0f / (1.0f + exponential(-v)); });
  }
}

inline void finish(float* y, int64_t length, int64_t activation) {
  if (activation > kRelu6) finish_others(y, length, activation);
}

bool is_pointwise(const Call& c) {
  return c.kh == 1 && c.kw == 1 && c.stride_h == 1 && c.stride_w == 1 && !c.pad_h && !c.pad_w;
}

int64_t phases(int64_t kernel, int64_t stride, int64_t dilation) {
  int64_t most = 0;
  for (int64_t k = 0; k < kernel; ++k) most = std::max(most, k * dilation % stride);
  return most + 1;
}

// Where the pixels of the input lie, once it is padded and split into phases (or as it is, for plain 1x1).
struct Layout {
  bool direct;                 // the input itself: no copy
  bool by_row;                 // blocks are parts of one row of the output, else of all positions in a row
  int64_t phases_h, phases_w;  // those that some tap reads
  int64_t h_out;               // rows of the output that it serves
  int64_t rows, pitch;         // of a phase
  int64_t plane;               // floats per channel
  int64_t positions;           // of the output, in steps of one in a phase; those beyond w_out of a row are dropped

  Layout(const Call& c, int64_t output_rows) : h_out(output_rows) {
    direct = is_pointwise(c) && c.w >= kLanes;
    by_row = direct || c.w_out >= (c.groups > 1 ? 1 : 4) * kLanes;
    phases_h = phases(c.kh, c.stride_h, c.dil_h);
    phases_w = phases(c.kw, c.stride_w, c.dil_w);
    rows = h_out + (c.kh - 1) * c.dil_h / c.stride_h;
    pitch = c.w_out + (c.kw - 1) * c.dil_w / c.stride_w;
    plane = phases_h * phases_w * rows * pitch;
    positions = (h_out - 1) * pitch + c.w_out;
  }

  // tap of a group's weights -> offset
  std::vector<int32_t> table(const Call& c) const {
    std::vector<int32_t> offsets;
    offsets.reserve(c.c_in / c.groups * c.kh * c.kw);
    for (int64_t i = 0; i < c.c_in / c.groups; ++i)
      for (int64_t a = 0; a < c.kh * c.dil_h; a += c.dil_h)
        for (int64_t b = 0; b < c.kw * c.dil_w; b += c.dil_w) {
          const int64_t phase = a % c.stride_h * phases_w + b % c.stride_w;
          offsets.push_back(i * plane + (phase * rows + a / c.stride_h) * pitch + b / c.stride_w);
        }
    return offsets;
  }
};

// One channel into its padded phases, for the rows of the output from first_row.
void unfold_plane(const Call& c, const Layout& l, const float* x, int64_t first_row, float* out) {
  for (int64_t a = 0; a < l.phases_h; ++a)
    for (int64_t b = 0; b < l.phases_w; ++b)
      for (int64_t r = 0; r < l.rows; ++r, out += l.pitch) {
        const int64_t source = (first_row + r) * c.stride_h + a - c.pad_h;
        if (source < 0 || source >= c.h) {
          std::fill(out, out + l.pitch, 0.0f);
          continue;
        }
        const float* line = x + source * c.w + b - c.pad_w;  // its pixel k * stride_w is position k
        const int64_t room = c.w - b + c.pad_w;
        const int64_t begin = std::min(l.pitch, (std::max<int64_t>(c.pad_w - b, 0) + c.stride_w - 1) / c.stride_w);
        const int64_t end = std::max(begin, std::min(l.pitch, (room + c.stride_w - 1) / c.stride_w));
        for (int64_t k = 0; k < begin; ++k) out[k] = 0.0f;
        if (c.stride_w == 1) {
          copy(out + begin, line + begin, end - begin);
        } else if (c.stride_w == 2) {
          copy_even(out + begin, line + 2 * begin, end - begin);
        } else {
          for (int64_t k = begin; k < end; ++k) out[k] = line[k * c.stride_w];
        }
        for (int64_t k = end; k < l.pitch; ++k) out[k] = 0.0f;
      }
}

// A block: neighbouring positions, up to kBlock of them, and what becomes of them.
struct Block {
  const float* x;         // the first position's pixel in the input of the group
  int64_t x_tail;         // where its last vector begins; in the output it ends where the block does
  const int32_t* table;
  int64_t y;              // the first pixel of the run in the output's plane, by_row
  int64_t length;         // positions
  int64_t image;
  int64_t begin, end;     // output channels
  // otherwise: runs of the block that are pixels of the output
  int64_t runs;
  struct Run {
    int64_t from, to, length;  // in the block, in the output's plane
  } run[kBlock];
};

// The runs of a block that starts at a position.
void find_runs(const Call& c, const Layout& l, int64_t start, int64_t first_row, Block& block) {
  block.runs = 0;
  for (int64_t q = start; q < start + block.length;) {
    const int64_t row = q / l.pitch, column = q % l.pitch;
    const int64_t next = std::min(start + block.length, (row + 1) * l.pitch);
    if (column < c.w_out)
      block.run[block.runs++] = {q - start, (first_row + row) * c.w_out + column, std::min(c.w_out - column, next - q)};
    q = next;
  }
}

// Copies the runs of a block from a buffer to the output's plane.
void write_runs(const Block& block, const float* buffer, float* y) {
  if (block.runs == 0) return;
  const Block::Run& last = block.run[block.runs - 1];
  for (int64_t r = 0; r + 1 < block.runs; ++r) {
    const Block::Run& run = block.run[r];
    const int64_t whole = (run.length + kLanes - 1) / kLanes * kLanes;
    if (run.to + whole <= last.to + last.length) {  // whole vectors: what is too much is overwritten by the next runs
      for (int64_t k = 0; k < whole; k += kLanes) store(y + run.to + k, load(buffer + run.from + k));
    } else {
      copy(y + run.to, buffer + run.from, run.length);
    }
  }
  copy(y + last.to, buffer + last.from, last.length);
}

// kNumber vectors; the last one may overlap the one before.
template <int kNumber, bool kRuns>
void run_block(const Call& c, const Block& block) {
  const int64_t x_tail = kRuns ? (kNumber - 1) * kLanes : block.x_tail;
  const int64_t tail = block.length - kLanes;
  const int64_t pixels = c.h_out * c.w_out;
  const Range range(c.activation);
  alignas(64) float buffer[kRuns ? kBlock + kLanes : 1];
  for (int64_t o = block.begin; o < block.end; ++o) {
    vec sum[kNumber];
    const vec first = same(c.bias ? c.bias[o] : 0.0f);
    for (int j = 0; j < kNumber; ++j) sum[j] = first;
    const int32_t end = c.rows[o + 1];
    for (int32_t i = c.rows[o]; i < end; ++i) {
      const float* from = block.x + block.table[c.columns[i]];
      const vec weight = same(c.values[i]);
      for (int j = 0; j < kNumber - 1; ++j) sum[j] += weight * load(from + j * kLanes);
      sum[kNumber - 1] += weight * load(from + x_tail);
    }
    const int64_t plane = (block.image * c.c_out + o) * pixels;
    if (kRuns) {
      if (c.residual) {
        for (int64_t r = 0; r < block.runs; ++r) {
          const Block::Run& run = block.run[r];
          copy(buffer + run.from, c.residual + plane + run.to, run.length);
        }
        for (int j = 0; j < kNumber; ++j) sum[j] += load(buffer + j * kLanes);
      }
      for (int j = 0; j < kNumber; ++j) store(buffer + j * kLanes, range(sum[j]));
      finish(buffer, block.length, c.activation);
      write_runs(block, buffer, c.y + plane);
    } else {
      if (c.residual) {
        const float* residual = c.residual + plane + block.y;
        for (int j = 0; j < kNumber - 1; ++j) sum[j] += load(residual + j * kLanes);
        sum[kNumber - 1] += load(residual + tail);
      }
      float* y = c.y + plane + block.y;
      for (int j = 0; j < kNumber - 1; ++j) store(y + j * kLanes, range(sum[j]));
      store(y + tail, range(sum[kNumber - 1]));
      finish(y, block.length, c.activation);
    }
  }
}

template <bool kRuns>
void run_any(const Call& c, const Block& block) {
  switch ((block.length + kLanes - 1) / kLanes) {
    case 1: return run_block<1, kRuns>(c, block);
    case 2: return run_block<2, kRuns>(c, block);
    case 3: return run_block<3, kRuns>(c, block);
    case 4: return run_block<4, kRuns>(c, block);
    case 5: return run_block<5, kRuns>(c, block);
    case 6: return run_block<6, kRuns>(c, block);
    case 7: return run_block<7, kRuns>(c, block);
    default: return run_block<8, kRuns>(c, block);
  }
}

// How the output of a layout is cut into blocks: lines of so many positions, in vectors, shared out evenly.
struct Blocks {
  int64_t lines, length, vectors, per_line, largest;
  Blocks(const Call& c, const Layout& l) {
    lines = l.by_row ? l.h_out : 1;
    length = l.by_row ? c.w_out : l.positions;
    vectors = (length + kLanes - 1) / kLanes;
    per_line = (vectors + kVectors - 1) / kVectors;
    largest = (vectors + per_line - 1) / per_line;
  }
  int64_t count() const { return lines * per_line; }
  int64_t start(int64_t block) const { return std::min(block * vectors / per_line * kLanes, length); }
};

// Block number `index` of the group whose (padded) input starts at x, for the output channels of `block`.
void run_index(const Call& c, const Layout& l, const Blocks& b, const float* x, int64_t first_row, int64_t index,
               Block& block) {
  const int64_t line = b.per_line == 1 ? index : index / b.per_line, number = index - line * b.per_line;
  const int64_t start = b.start(number);
  block.length = b.start(number + 1) - start;
  block.x = x + line * l.pitch + start;
  if (l.by_row) {
    block.x_tail = block.length - kLanes;
    block.y = (first_row + line) * c.w_out + start;
    run_any<false>(c, block);
  } else {
    find_runs(c, l, start, first_row, block);
    run_any<true>(c, block);
  }
}

// Output channels where part number p of `parts` parts of about equal work begins.
int64_t boundary(const Call& c, int64_t p, int64_t parts) {
  const auto work = [&](int64_t row) { return c.rows[row] + 2 * row; };  // a row costs its weights and its store
  int64_t low = 0, high = c.c_out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work(middle) * parts < work(c.c_out) * p) low = middle + 1; else high = middle;
  }
  return low;
}

// Memory of the thread, kept: allocating pages costs more than a small convolution.
float* scratch(int64_t size) {
  static thread_local std::vector<float> floats;
  size += kBlock + kLanes;  // blocks read beyond the last position
  if (static_cast<int64_t>(floats.size()) < size) floats.resize(size);
  return floats.data();
}

// Groups have few channels: each is unfolded, in strips that stay in the first cache, just before it is read.
void run_grouped(const Call& c) {
  constexpr int64_t kStrip = 4096;  // floats
  const int64_t inputs = c.c_in / c.groups, outputs = c.c_out / c.groups;
  const Layout one(c, 1);
  const int64_t height = std::max<int64_t>(1, std::min(c.h_out, kStrip / (inputs * one.plane / one.rows) - (one.rows - 1)));
  const Layout strip(c, height), rest(c, c.h_out % height ? c.h_out % height : height);
  const std::vector<int32_t> table = strip.table(c), rest_table = rest.table(c);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
  for (int64_t task = 0; task < c.n * c.groups; ++task) {
    const int64_t image = task / c.groups, group = task % c.groups;
    const float* x = c.x + (image * c.c_in + group * inputs) * c.h * c.w;
    Block block;
    block.image = image;
    block.begin = group * outputs;
    block.end = block.begin + outputs;
    for (int64_t row = 0; row < c.h_out; row += height) {
      const bool whole = row + height <= c.h_out;
      const Layout& l = whole ? strip : rest;
      const Blocks blocks(c, l);
      const float* pixels = x;
      if (!l.direct) {
        float* copy = scratch(inputs * l.plane);
        for (int64_t i = 0; i < inputs; ++i) unfold_plane(c, l, x + i * c.h * c.w, row, copy + i * l.plane);
        pixels = copy;
      }
      block.table = (whole ? table : rest_table).data();
      for (int64_t index = 0; index < blocks.count(); ++index) run_index(c, l, blocks, pixels, row, index, block);
    }
  }
}

// Calls work(image, block, first and last output channel) for all of them, in parallel.
template <typename Work>
void share_out(const Call& c, const Blocks& blocks, Work work) {
  const int64_t pieces = c.n * blocks.count();
  // few blocks: output channels are shared out, too
  const int64_t parts = c.threads > 1 ? std::max<int64_t>(1, std::min(c.c_out, 4 * c.threads / pieces)) : 1;
#pragma omp parallel for schedule(dynamic) num_threads(c.threads) if (c.threads > 1)
  for (int64_t task = 0; task < pieces * parts; ++task) {
    const int64_t part = task % parts, piece = task / parts;
    work(piece / blocks.count(), piece % blocks.count(), boundary(c, part, parts), boundary(c, part + 1, parts));
  }
}

// Pointwise, planes that do not fill whole cache lines: the blocks of all channels are gathered first, so that no load
// touches two lines.
void run_packed(const Call& c) {
  const Layout l(c, c.h_out);
  const Blocks blocks(c, l);
  const int64_t stride = blocks.largest * kLanes, size = c.c_in * stride;
  float* packed = scratch(c.n * blocks.count() * size);
  packed += -reinterpret_cast<uintptr_t>(packed) / sizeof(float) % kLanes;
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
  for (int64_t i = 0; i < c.n * c.c_in; ++i) {
    const float* x = c.x + i * c.w;
    for (int64_t block = 0; block < blocks.count(); ++block) {
      float* to = packed + (i / c.c_in * blocks.count() + block) * size + i % c.c_in * stride;
      for (int64_t p = blocks.start(block); p < blocks.start(block + 1); p += kLanes, to += kLanes)
        store(to, load(x + std::min(p, c.w - kLanes)));
    }
  }
  std::vector<int32_t> table;
  table.reserve(c.c_in);
  for (int64_t i = 0; i < c.c_in; ++i) table.push_back(i * stride);
  share_out(c, blocks, [&](int64_t image, int64_t index, int64_t begin, int64_t end) {
    Block block;
    block.image = image;
    block.table = table.data();
    block.begin = begin;
    block.end = end;
    block.y = blocks.start(index);
    block.length = blocks.start(index + 1) - block.y;
    block.x = packed + (image * blocks.count() + index) * size;
    block.x_tail = (block.length + kLanes - 1) / kLanes * kLanes - kLanes;
    run_any<false>(c, block);
  });
}

void run_whole(const Call& c) {
  const Layout l(c, c.h_out);
  const Blocks blocks(c, l);
  const std::vector<int32_t> table = l.table(c);
  const float* x = c.x;
  const int64_t stride = c.c_in * (l.direct ? c.w : l.plane);
  if (!l.direct) {
    float* copy = scratch(c.n * stride);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
    for (int64_t i = 0; i < c.n * c.c_in; ++i) unfold_plane(c, l, c.x + i * c.h * c.w, 0, copy + i * l.plane);
    x = copy;
  }
  share_out(c, blocks, [&](int64_t image, int64_t index, int64_t begin, int64_t end) {
    Block block;
    block.image = image;
    block.table = table.data();
    block.begin = begin;
    block.end = end;
    run_index(c, l, blocks, x + image * stride, 0, index, block);
  });
}

// --- depthwise: dense weights of k x k, four rows of the output at a time --------------------------------------------

constexpr int kRows = 4;

// Part of a line that is shorter than a vector, at the end of the plane.
__attribute__((noinline)) void store_end(const Range& range, vec v, const float* residual, float* y, int64_t length) {
  alignas(64) float buffer[kLanes] = {};
  if (residual) std::memcpy(buffer, residual, length * sizeof(float));
  store(buffer, range(v + load(buffer)));
  std::memcpy(y, buffer, length * sizeof(float));
}

// What the rows of a plane have in common.
struct Plane {
  const float* x;
  const float* weights;
  float bias;
  float* y;
  const float* residual;
};

inline ivec inside(const ivec& lanes, int64_t offset, int64_t width) {
  const int32_t first = -offset, last = width - offset;
  return (lanes >= first) & (lanes < last);
}

// kCount rows of the output from `row`, for one vector of each. kEdge: some of the pixels may lie beside the image.
template <int kSize, int kStride, int kCount, bool kEdge>
inline void depthwise_vector(const Call& c, const Plane& plane, const Range& range, const float* const* lines,
                             int64_t row, int64_t column) {
  const int64_t end = c.h_out * c.w_out;
  const int64_t offset = column * kStride - c.pad_w;
  ivec masks[kSize];
  if (kEdge) {
    ivec lanes;
    for (int j = 0; j < kLanes; ++j) lanes[j] = j * kStride;
    for (int b = 0; b < kSize; ++b) masks[b] = inside(lanes, offset + b, c.w);
  }
  vec sum[kCount];
  for (int r = 0; r < kCount; ++r) sum[r] = same(plane.bias);
#pragma GCC unroll 16
  for (int a = 0; a < kCount * kStride + kSize - kStride; ++a) {
#pragma GCC unroll 8
    for (int b = 0; b < kSize; ++b) {
      const float* from = lines[a] + offset + b;
      vec pixels = kStride == 1 ? load(from) : even_of(load(from), load(from + kLanes - 1));
      if (kEdge) pixels = masks[b] ? pixels : same(0.0f);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const int tap = a - r * kStride;
        if (tap >= 0 && tap < kSize) sum[r] += same(plane.weights[tap * kSize + b]) * pixels;
      }
    }
  }
  // lines shorter than a vector write too much, which the next lines overwrite, except at the end of the plane
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    const int64_t p = (row + r) * c.w_out + column;
    if (p + kLanes > end) {
      store_end(range, sum[r], plane.residual ? plane.residual + p : nullptr, plane.y + p, end - p);
    } else {
      if (plane.residual) sum[r] += load(plane.residual + p);
      store(plane.y + p, range(sum[r]));
    }
  }
}

template <int kSize, int kStride, int kCount>
void depthwise_rows(const Call& c, const Plane& plane, const Range& range, const float* zeros, int64_t row) {
  constexpr int kLines = kCount * kStride + kSize - kStride;
  const float* lines[kLines];
  for (int a = 0; a < kLines; ++a) {
    const int64_t source = row * kStride + a - c.pad_h;
    lines[a] = source >= 0 && source < c.h ? plane.x + source * c.w : zeros;
  }
  for (int64_t start = 0; start < c.w_out; start += kLanes) {
    // the last vector of a line ends where the line does, unless the line is shorter than a vector
    const int64_t column = c.w_out >= kLanes ? std::min(start, c.w_out - kLanes) : 0;
    const int64_t first = column * kStride - c.pad_w;
    if (first >= 0 && first + (kLanes - 1) * kStride + kSize <= c.w)
      depthwise_vector<kSize, kStride, kCount, false>(c, plane, range, lines, row, column);
    else
      depthwise_vector<kSize, kStride, kCount, true>(c, plane, range, lines, row, column);
  }
}

template <int kSize, int kStride>
void run_depthwise(const Call& c) {
  const Range range(c.activation);
  const int64_t pixels = c.h * c.w, out_pixels = c.h_out * c.w_out, planes = c.n * c.c_in;
  // vectors reach beyond the lines, which are masked; beyond the tensor nothing may be read
  const int64_t before = c.pad_w, after = kStride * kLanes + kSize;
  const std::vector<float> zeros(before + c.w + after);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
  for (int64_t task = 0; task < planes; ++task) {
    const int64_t channel = task % c.c_in;
    const float* x = c.x + task * pixels;
    if (task * pixels < before || (planes - 1 - task) * pixels < after) {
      float* copied = scratch(before + pixels + after) + before;
      copy(copied, x, pixels);
      x = copied;
    }
    const Plane plane = {x, c.values + channel * kSize * kSize, c.bias ? c.bias[channel] : 0.0f,
                         c.y + task * out_pixels, c.residual ? c.residual + task * out_pixels : nullptr};
    int64_t row = 0;
    for (; row + kRows <= c.h_out; row += kRows)
      depthwise_rows<kSize, kStride, kRows>(c, plane, range, zeros.data() + before, row);
    for (; row < c.h_out; ++row) depthwise_rows<kSize, kStride, 1>(c, plane, range, zeros.data() + before, row);
    finish(plane.y, out_pixels, c.activation);
  }
}

}  // namespace

extern "C" int revnets_depthwise_conv(const Call* call) {
  const Call& c = *call;
  if (c.kh != c.kw || c.stride_h != c.stride_w || c.dil_h != 1 || c.dil_w != 1) return 1;
  switch (c.kh * 10 + c.stride_h) {
    case 31: run_depthwise<3, 1>(c); return 0;
    case 32: run_depthwise<3, 2>(c); return 0;
    case 51: run_depthwise<5, 1>(c); return 0;
    case 52: run_depthwise<5, 2>(c); return 0;
    case 71: run_depthwise<7, 1>(c); return 0;
    case 72: run_depthwise<7, 2>(c); return 0;
    default: return 1;
  }
}

extern "C" void revnets_sparse_conv(const Call* call) {
  Call c = *call;
  if (is_pointwise(c)) {  // a plane is one line
    c.w = c.w_out = c.h * c.w;
    c.h = c.h_out = 1;
  }
  if (c.groups > 1) return run_grouped(c);
  if (is_pointwise(c) && c.w >= kLanes && c.w % kLanes) return run_packed(c);
  run_whole(c);
}
