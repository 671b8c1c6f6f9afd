// Batch norm and activation in training, forwards and backwards, in as few passes over the maps as that takes.
//
// Maps are planes, or by pixel. A sum per channel is made in floats for so many pixels as lose nothing by it, and of
// those in doubles; always in one order, since threads share out channels. Values and gradients are computed from the
// input alone: neither the norm's output nor the activation's is read again.

#pragma once

#include "norms_by_pixel.h"
#include "norms_of_planes.h"

namespace {

// Of the member's channels: nothing of one depends on another.
template <typename Act, bool kByPixel>
void run_norm_act(const NormCall& c, int64_t work, const Member& member) {
  if (work & kStatistics) kByPixel ? pixel_statistics(c, member) : plane_statistics(c, member);
  if (work & kPlaneSums) kByPixel ? pixel_planes<Act>(c, member) : plane_planes<Act>(c, member);
  if (work & kNormed) kByPixel ? pixel_normed<Act>(c, member) : plane_normed<Act>(c, member);
  if (work & kAffineSums) kByPixel ? pixel_affine_sums<Act>(c, member) : plane_affine_sums<Act>(c, member);
  if (work & kNormGrad) kByPixel ? pixel_gradient<Act>(c, member) : plane_gradient<Act>(c, member);
}

void run_norm(const NormCall& c, int64_t work, const Member& member) {
  with_activation(c.activation, [&](auto act) {
    using Which = decltype(act);
    c.by_pixel ? run_norm_act<Which, true>(c, work, member) : run_norm_act<Which, false>(c, work, member);
  });
}

}  // namespace
