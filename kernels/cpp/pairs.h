// Who does what in a pass over pairs of a batch item and a head, and where their tensors lie.

#pragma once

#include <omp.h>

#include "tiles.h"

namespace ttt {

// Pairs that do not share the threads evenly are cut into parts. T is the dtype of q, k, v and the
// results; a Call has strides[4 * i] of its tensors: batch, head, token, channel.
template <typename T, typename Call>
struct Pairs {
  const Call& call;
  const Index N = call.tokens, dim = call.dim, value = call.value;
  const Index D = padded(dim), V = padded(value);
  const Index pairs = call.batch * call.heads, threads = call.threads;
  Index parts = 1;

  explicit Pairs(const Call& given) : call(given) {
    if (pairs % threads && pairs < 8 * threads) parts = (8 * threads + pairs - 1) / pairs;
  }

  Index head(Index pair) const { return pair % call.heads; }
  // What a thread keeps of the pair that it works on, or what is kept of all pairs.
  Index kept() const { return parts == 1 ? threads : pairs; }
  Index place(Index pair) const { return parts == 1 ? omp_get_thread_num() : pair; }

  // A tensor of a pair: `which` is the number of its strides.
  Tokens<T> tokens(const void* at, Index which, Index pair, Index width) const {
    const Index* strides = call.strides + 4 * which;
    return {static_cast<const T*>(at) + pair / call.heads * strides[0] + head(pair) * strides[1],
            strides[2], strides[3], N, width};
  }
  // Row n of a pair's result; its rows are `heads * width` apart.
  T* result(void* at, Index pair, Index n, Index width) const {
    return static_cast<T*>(at) +
           ((pair / call.heads * N + n) * call.heads + head(pair)) * width;
  }

  // stage(0, pair, part), stage(1, ...): by one thread for a whole pair, or one after the other for
  // all parts of all pairs. Called by all threads.
  template <typename F>
  void in_stages(Index stages, F stage) const {
    if (parts == 1) {
#pragma omp for schedule(static)
      for (Index pair = 0; pair < pairs; ++pair)
        for (Index i = 0; i < stages; ++i) stage(i, pair, Index(0));
    } else {
      for (Index i = 0; i < stages; ++i) {
#pragma omp for schedule(static)
        for (Index unit = 0; unit < pairs * parts; ++unit) stage(i, unit / parts, unit % parts);
      }
    }
  }
};

}  // namespace ttt
