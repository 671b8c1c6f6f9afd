// Convolutions of bytes with compressed weights: every output channel is a list of blocks of four input channels.
//
// The plan is that of convolution.h: a block of up to eight vectors of pixels is packed into a panel of aligned lines, one
// per tap and four input channels, as many as fit into the first cache; every output channel multiplies the lines that
// its blocks name. Four output channels at a time become bytes, which are neighbours in memory. Groups are zeros.

#pragma once

#include "bytes.h"

namespace {

#if defined(REVNETS_BYTE_VECTOR)
constexpr int kByteVectors = 8;  // of a block, at most
#else
constexpr int kByteVectors = 4;
#endif
constexpr int64_t kByteBlock = kByteVectors * kPixels;  // pixels
constexpr int64_t kBytePanel = 57344 / kBytes;          // vectors of a panel, about

struct ByteBlocks {
  int64_t pixels, vectors, count, largest;
  explicit ByteBlocks(const Call& c) {
    pixels = c.h_out * c.w_out;
    vectors = (pixels + kPixels - 1) / kPixels;
    const int64_t most = std::max<int64_t>(4, std::min<int64_t>(kByteVectors, kBytePanel / c.chunk));
    count = (vectors + most - 1) / most;
    largest = (vectors + count - 1) / count;
  }
  int64_t first_vector(int64_t block) const { return block * vectors / count; }
};

// --- packing ---------------------------------------------------------------------------------------------------------

// Lanes of a vector that come from one line of the image: lane k is pixel from + k * stride.
struct BytePiece {
  int64_t from;
  int32_t first, last;
};

#if defined(REVNETS_BYTE_VECTOR)
// The lanes of a piece: of one vector, or of two for every other pixel.
struct ByteMasks {
  Lanes all, low, high;
  ByteMasks() = default;
  explicit ByteMasks(const BytePiece& piece) {
    const uint32_t bits = (1u << piece.last) - (1u << piece.first);
    all = Lanes(bits);
    low = Lanes(spread(bits));
    high = Lanes(spread(bits >> kPixels / 2));
  }
  // Eight bits, each followed by a 0.
  static uint32_t spread(uint32_t bits) {
    bits &= 0xFF;
    bits = (bits | bits << 4) & 0x0F0F;
    bits = (bits | bits << 2) & 0x3333;
    return (bits | bits << 1) & 0x5555;
  }
};
#endif

// Where the vectors of a block lie in the image, for one tap.
class BytePieces {
 public:
  BytePieces(const Call& c, int64_t start, int64_t length) : c_(c), length_(length), row_(start / c.w_out) {
    column_ = start - row_ * c.w_out;
  }
  void at_tap(int64_t tap_h, int64_t tap_w) {
    count_ = 0;
    starts_[0] = 0;
    int64_t lane = 0, row = row_, column = column_, vector = 0;
    while (lane < length_) {
      const int64_t run = std::min(length_ - lane, c_.w_out - column);
      const int64_t line = row * c_.stride_h + tap_h - c_.pad_h, x = column * c_.stride_w + tap_w - c_.pad_w;
      if (line >= 0 && line < c_.h) {
        const int64_t begin = x < 0 ? std::min(run, (-x + c_.stride_w - 1) / c_.stride_w) : 0;
        const int64_t end = std::max(begin, std::min(run, x >= c_.w ? 0 : (c_.w - x + c_.stride_w - 1) / c_.stride_w));
        for (int64_t k = lane + begin; k < lane + end;) {
          const int64_t next = std::min(lane + end, (k / kPixels + 1) * kPixels);
          while (vector < k / kPixels) starts_[++vector] = count_;
          const int64_t base = vector * kPixels;
          pieces_[count_++] = {line * c_.w + x + (base - lane) * c_.stride_w, static_cast<int32_t>(k - base),
                               static_cast<int32_t>(next - base)};
          k = next;
        }
      }
      lane += run;
      column = 0;
      ++row;
    }
    while (vector < (length_ + kPixels - 1) / kPixels) starts_[++vector] = count_;
  }
  // Lines of the panel, of the planes of four channels from x on.
  void pack(const uint8_t* x, int64_t lines, int64_t vectors, int64_t pitch, uint8_t* to) const {
    for (int64_t v = 0; v < vectors; ++v, to += kBytes) {
      const BytePiece* pieces = pieces_ + starts_[v];
      const int32_t count = starts_[v + 1] - starts_[v];
#if defined(REVNETS_BYTE_VECTOR)
      if (count == 1 && c_.stride_w == 1) pack_vectors<1>(x, pieces, 1, lines, pitch, to);
      else if (count == 2 && c_.stride_w == 1) pack_vectors<1>(x, pieces, 2, lines, pitch, to);
      else if (count <= kPieces && c_.stride_w == 1) pack_vectors<1>(x, pieces, count, lines, pitch, to);
      else if (count == 1 && c_.stride_w == 2) pack_vectors<2>(x, pieces, 1, lines, pitch, to);
      else if (count <= kPieces && c_.stride_w == 2) pack_vectors<2>(x, pieces, count, lines, pitch, to);
      else
#endif
        for (int64_t k = 0; k < lines; ++k) pack_pixels(x + k * plane(), pieces, count, to + k * pitch);
    }
  }

 private:
  int64_t plane() const { return 4 * c_.h * c_.w; }
#if defined(REVNETS_BYTE_VECTOR)
  static constexpr int32_t kPieces = 8;
  // The same vector of all lines.
  template <int kStride>
  inline __attribute__((always_inline)) void pack_vectors(const uint8_t* x, const BytePiece* pieces, int32_t count,
                                                          int64_t lines, int64_t pitch, uint8_t* to) const {
    const Bytes zero = REVNETS_OF(set1_epi8)(static_cast<char>(c_.zero_in));
    ByteMasks masks[kPieces];
    int64_t from[kPieces];
    for (int32_t i = 0; i < count; ++i) {
      masks[i] = ByteMasks(pieces[i]);
      from[i] = pieces[i].from;
    }
    const int64_t step = plane();
    for (int64_t k = 0; k < lines; ++k, x += step, to += pitch) {
      const int32_t* pixels = reinterpret_cast<const int32_t*>(x);
      Bytes v = zero;
      for (int32_t i = 0; i < count; ++i) {
        if (kStride == 1) {
          v = blended(v, load_lanes(pixels + from[i], masks[i].all), masks[i].all);
        } else {
          const Bytes low = load_lanes(pixels + from[i], masks[i].low);
          const Bytes high = load_lanes(pixels + from[i] + kPixels, masks[i].high);
          v = blended(v, even_lanes(low, high), masks[i].all);
        }
      }
      store_bytes(to, v);
    }
  }
#endif
  // Any number of pieces.
  void pack_pixels(const uint8_t* x, const BytePiece* pieces, int32_t count, uint8_t* to) const {
    std::memset(to, static_cast<int>(c_.zero_in), kBytes);
    for (const BytePiece* piece = pieces; piece < pieces + count; ++piece)
      for (int32_t k = piece->first; k < piece->last; ++k) std::memcpy(to + 4 * k, x + 4 * (piece->from + k * c_.stride_w), 4);
  }

  const Call& c_;
  int64_t length_, row_, column_;
  int32_t count_ = 0;
  int32_t starts_[kByteVectors + 1];
  BytePiece pieces_[kByteBlock + kByteVectors];
};

// Lines `first` to `last` of the panel: tap after tap, of each the blocks of channels.
void pack_bytes(const Call& c, BytePieces& pieces, const uint8_t* x, int64_t first, int64_t last, int64_t vectors,
                int64_t pitch, uint8_t* panel) {
  const int64_t blocks = c.c_in / 4, plane = 4 * c.h * c.w;
  for (int64_t k = first; k < last;) {
    const int64_t tap = k / blocks, end = std::min(last, (tap + 1) * blocks);
    pieces.at_tap(tap / c.kw * c.dil_h, tap % c.kw * c.dil_w);
    pieces.pack(x + (k - tap * blocks) * plane, end - k, vectors, pitch, panel);
    panel += (end - k) * pitch;
    k = end;
  }
}

// --- multiplying -----------------------------------------------------------------------------------------------------

// A chunk of a block.
struct ByteWork {
  const uint8_t* panel;
  int64_t pitch;        // of its lines, in bytes
  const int32_t *rows, *alone;  // of the chunk
  int64_t begin, end;   // output channels, in fours
  Sum* sums;            // of the chunks before
  bool first, last;     // chunk
  int64_t length;       // pixels of the block
  int64_t plane;        // of the output
  int64_t image, start; // the block's first pixel
};

// Four output channels of a block on their way into bytes, or into floats.
#if defined(REVNETS_BYTE_VECTOR)
template <int kNumber>
struct ByteQuad {
  const Call& c;
  const ByteWork& work;
  const ToBytes& to_bytes;
  int64_t place;  // of the first channel's byte of the first pixel
  Bytes first[kNumber], second[kNumber];

  ByteQuad(const Call& call, const ByteWork& one, const ToBytes& some, int64_t at)
      : c(call), work(one), to_bytes(some), place(at) {}
  inline void take(int channel, int64_t o, const Sum* sums) {
    const Reals scale = REVNETS_OF(set1_ps)(c.scales[o]);
    REVNETS_UNROLLED
    for (int j = 0; j < kNumber; ++j) {
      Reals t = product(REVNETS_OF(cvtepi32_ps)(sums[j].v), scale);
      if (c.residual) {
        const Bytes four = load_lanes(bytes_of(c.residual) + place + j * kBytes, lanes(j));
        const Bytes one = both(REVNETS_OF(srli_epi32)(four, 8 * channel), REVNETS_OF(set1_epi32)(255));
        const Bytes r = REVNETS_OF(sub_epi32)(one, REVNETS_OF(set1_epi32)(static_cast<int>(c.zero_residual)));
        t = REVNETS_OF(add_ps)(t, product(REVNETS_OF(cvtepi32_ps)(r), REVNETS_OF(set1_ps)(c.residual_scale)));
      }
      if (c.to_float) {
        if (o < c.count) store_some(c.y + (work.image * c.count + o) * work.plane + work.start + j * kPixels, t, lanes(j));
        continue;
      }
      const Bytes q = REVNETS_OF(cvtps_epi32)(t);
      Bytes& pair = channel < 2 ? first[j] : second[j];
      pair = channel % 2 ? REVNETS_OF(packs_epi32)(pair, q) : q;
    }
  }
  inline void store() {
    if (c.to_float) return;
    REVNETS_UNROLLED
    for (int j = 0; j < kNumber; ++j)
      store_lanes(bytes_of(c.y) + place + j * kBytes, transposed_fours(to_bytes(first[j], second[j])), lanes(j));
  }
  inline Lanes lanes(int j) const { return j < kNumber - 1 ? all_lanes() : first_lanes(work.length - j * kPixels); }
};
#else
struct ToBytes {
  explicit ToBytes(const Call&) {}
};
template <int kNumber>
struct ByteQuad {
  const Call& c;
  const ByteWork& work;
  const ToBytes& to_bytes;
  int64_t place;

  ByteQuad(const Call& call, const ByteWork& one, const ToBytes& some, int64_t at)
      : c(call), work(one), to_bytes(some), place(at) {}
  void take(int channel, int64_t o, const Sum* sums) {
    int32_t all[kNumber * kPixels];
    for (int j = 0; j < kNumber; ++j) std::memcpy(all + j * kPixels, sums[j].v, sizeof(sums[j].v));
    for (int64_t k = 0; k < work.length; ++k) {
      float t = rounded_product(static_cast<float>(all[k]), c.scales[o]);
      const int64_t at = place + 4 * k + channel;
      if (c.residual)
        t += rounded_product(static_cast<float>(bytes_of(c.residual)[at] - c.zero_residual), c.residual_scale);
      if (!c.to_float) bytes_of(c.y)[at] = byte_of(c, t);
      else if (o < c.count) c.y[(work.image * c.count + o) * work.plane + work.start + k] = t;
    }
  }
  inline void store() {}
};
#endif

template <int kNumber>
inline void sum_row(const Call& c, const ByteWork& work, int64_t o, Sum* sum) {
  Sum* kept = work.sums + (o - work.begin) * kNumber;
  REVNETS_UNROLLED
  for (int j = 0; j < kNumber; ++j) sum[j] = work.first ? sum_of(reinterpret_cast<const int32_t*>(c.bias)[o]) : kept[j];
  const PanelBlocks blocks = {work.panel, work.pitch, c.columns, reinterpret_cast<const int32_t*>(c.values)};
#if defined(REVNETS_BYTE_PAIRS)
  add_row<kNumber>(sum, blocks, work.rows[o], work.alone[o], work.rows[o + 1]);
#else
  add_row<kNumber>(sum, blocks, work.rows[o], work.rows[o + 1]);
#endif
  if (!work.last)
    for (int j = 0; j < kNumber; ++j) kept[j] = sum[j];
}

template <int kNumber>
void multiply_bytes(const Call& c, const ByteWork& work) {
  const ToBytes to_bytes(c);
  for (int64_t o = work.begin; o < work.end; o += 4) {
    const int64_t place = 4 * ((work.image * (c.c_out / 4) + o / 4) * work.plane + work.start);
    ByteQuad<kNumber> quad(c, work, to_bytes, place);
    REVNETS_UNROLLED
    for (int i = 0; i < 4; ++i) {
      Sum sum[kNumber];
      sum_row<kNumber>(c, work, o + i, sum);
      if (work.last) quad.take(i, o + i, sum);
    }
    if (work.last) quad.store();
  }
}

void multiply_bytes_any(const Call& c, const ByteWork& work) {
  switch ((work.length + kPixels - 1) / kPixels) {
    case 1: return multiply_bytes<1>(c, work);
    case 2: return multiply_bytes<2>(c, work);
    case 3: return multiply_bytes<3>(c, work);
#if defined(REVNETS_BYTE_VECTOR)
    case 4: return multiply_bytes<4>(c, work);
    case 5: return multiply_bytes<5>(c, work);
    case 6: return multiply_bytes<6>(c, work);
    case 7: return multiply_bytes<7>(c, work);
#endif
    default: return multiply_bytes<kByteVectors>(c, work);
  }
}

// --- sharing out -----------------------------------------------------------------------------------------------------

// The member's share: whole blocks, of the first and the last perhaps a part of the output channels.
void run_byte_convolution(const Call& c, const Member& member) {
  const int64_t lines = c.c_in / 4 * c.kh * c.kw, chunks = std::max<int64_t>(1, (lines + c.chunk - 1) / c.chunk);
  const ByteBlocks blocks(c);
  const int64_t pitch = blocks.largest * kBytes, panel_size = std::min(c.chunk, lines) * pitch;
  const int64_t sums_size = chunks > 1 ? c.c_out * blocks.largest * static_cast<int64_t>(sizeof(Sum)) : 0;
  uint8_t* panel = byte_scratch(panel_size + sums_size);
  const int64_t total = c.n * blocks.vectors;
  const int64_t begin = total * member.id, end = total * (member.id + 1);  // in vectors / member.size
  for (int64_t piece = begin / member.size / blocks.vectors * blocks.count; piece < c.n * blocks.count; ++piece) {
    const int64_t index = piece % blocks.count, image = piece / blocks.count;
    const int64_t vectors = blocks.first_vector(index + 1) - blocks.first_vector(index);
    const int64_t from = (image * blocks.vectors + blocks.first_vector(index)) * member.size;
    if (from >= end) break;
    const int64_t all = vectors * member.size;
    if (from + all <= begin) continue;
    const auto part = [&](int64_t share) {
      return std::min(c.c_out, round_up(boundary(c.rows, c.c_out, chunks, 0, c.c_out, share, all), 4));
    };
    ByteWork work;
    work.panel = panel;
    work.pitch = pitch;
    work.begin = part(begin - from);
    work.end = part(end - from);
    work.sums = reinterpret_cast<Sum*>(panel + panel_size);
    work.start = blocks.first_vector(index) * kPixels;
    work.length = std::min(vectors * kPixels, blocks.pixels - work.start);
    work.plane = blocks.pixels;
    work.image = image;
    BytePieces pieces(c, work.start, work.length);
    for (int64_t j = 0; j < chunks; ++j) {
      pack_bytes(c, pieces, bytes_of(c.x) + image * c.c_in * c.h * c.w, j * c.chunk, std::min(lines, (j + 1) * c.chunk),
                 vectors, pitch, panel);
      work.rows = c.rows + j * c.c_out;
      work.alone = work.rows + chunks * c.c_out + 1;
      work.first = j == 0;
      work.last = j + 1 == chunks;
      multiply_bytes_any(c, work);
    }
  }
}

}  // namespace
