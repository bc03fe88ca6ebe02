// What the node's forward and backward pass share: the call's arguments, tiles and sums.

#pragma once

#include "pairs.h"

namespace ttt {

// What Python hands over; call.py has the same fields. Parameters and their gradients are float32
// and contiguous, q, k, v and grad have strides, results are [B, N, H, width] in q's dtype.
struct Call {
  const void *q, *k, *v, *grad;                      // grad: of the output
  const float *w1, *w2, *w3;                         // [H, D, D], [H, D, D], [H, D, Dv]
  const float *conv_q, *bias_q, *conv_k, *bias_k;    // [H*D, 3 ** axes], [H*D]; null without
  float *new1, *new2, *new3;                         // W', with a batch axis
  void *out, *grad_q, *grad_k, *grad_v;
  float *grad1, *grad2, *grad3;                      // of W, with a batch axis
  float *grad_conv_q, *grad_bias_q, *grad_conv_k, *grad_bias_k;  // the same
  Index strides[16];  // of q, k, v and grad: batch, head, token, channel
  Index batch, heads, tokens, dim, value;
  Index axes, grid[3], prefix;
  double scale, eps;
  Index threads;
};

// A part of a pair is a run of whole tiles of its tokens.
template <typename T>
struct Pass : Pairs<T, Call> {
  using Pairs<T, Call>::call, Pairs<T, Call>::N, Pairs<T, Call>::D, Pairs<T, Call>::V;
  using Pairs<T, Call>::dim, Pairs<T, Call>::value, Pairs<T, Call>::parts;

  const Index matrices = 2 * D * D + D * V;  // floats of the three weights, padded
  const float rate = float(call.scale / double(N));
  Grid grid{{1, 1, 1}, call.prefix};
  Index length;

  explicit Pass(const Call& given) : Pairs<T, Call>(given) {
    for (Index i = 0; i < call.axes; ++i) grid.size[3 - call.axes + i] = call.grid[i];
    const Index tiles = (N + TILE - 1) / TILE;
    // A part that is no longer than its sums are large gains nothing.
    if (parts > N / (2 * D)) parts = N / (2 * D);
    if (parts < 1) parts = 1;
    length = (tiles + parts - 1) / parts * TILE;
    parts = (N + length - 1) / length;
  }

  Index first(Index part) const { return part * length; }
  Index last(Index part) const { return first(part) + length < N ? first(part) + length : N; }

  // f(at, count) for the tiles of a part.
  template <typename F>
  void over_tiles(Index part, F f) const {
    for (Index at = first(part); at < last(part); at += TILE)
      f(at, last(part) - at < TILE ? last(part) - at : TILE);
  }

  // The key statistics of a part: mean, sum of squares around it.
  void measure(Index pair, Index part, float* statistics) const {
    const auto k = this->tokens(call.k, 1, pair, dim);
    over_channels(k, D, [&](auto vectors, auto inside, Index c) {
      moments<vectors.value, inside.value>(k, first(part), last(part), c, statistics,
                                           statistics + D);
    });
  }

  // The parts' statistics, 2 D each, as mean and 1 / sqrt(var + eps) in the first one's place.
  void settle(float* statistics) const {
    for (Index c = 0; c < D; ++c) {
      float mean = 0, spread = 0;
      for (Index part = 0; part < parts; ++part) {
        const float* from = statistics + part * 2 * D;
        const float count = float(last(part) - first(part)), both = float(last(part));
        const float delta = from[c] - mean;
        mean += delta * (count / both);
        spread += from[D + c] + delta * delta * (float(first(part)) * count / both);
      }
      statistics[c] = mean;
      statistics[D + c] = 1.0f / __builtin_sqrtf(spread / float(N) + float(call.eps));
    }
  }

  // The sums of all parts, `size` floats each, in the first one's place; always in their order.
  void collect(float* sums, Index size) const {
    for (Index part = 1; part < parts; ++part)
      for (Index i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  }

  // f(matrix, width, offset, pitch) for each weight: [D, width] and where its padded sums lie.
  template <typename F>
  void over_weights(F f) const {
    f(0, dim, Index(0), D);
    f(1, dim, D * D, D);
    f(2, value, 2 * D * D, V);
  }
};

}  // namespace ttt
