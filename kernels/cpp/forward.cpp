// The default node's forward on a CPU: one pass over tiles of tokens that stay in the cache.
//
// inner "swiglu", inner_loss "dot", key_norm "instance", locality "dwc_qk" or "none". For each pair
// (batch item, head), with rate = s / N and everything in float32:
//
//   x = k_hat + conv_k(k_hat)          k_hat = (k - mean) / sqrt(var + eps), over the N tokens
//   a = x W1, b = x W2, dz = v W3^T
//   W1' = W1 + rate sum x^T (dz b silu'(a)),  W2' = W2 + rate sum x^T (dz silu(a)),
//   W3' = W3 + rate sum (silu(a) b)^T v
//   y = q + conv_q(q),  o = (silu(y W1') (y W2')) W3'
//
// Nothing of size N is written but the output. Sums over tokens are taken tile by tile, and over the
// parts that threads share in a fixed order: results do not depend on which thread did what.

#include <omp.h>

#include "tiles.h"

namespace ttt {

// What Python hands over (library.py has the same fields).
struct Call {
  const void *q, *k, *v;
  void* out;                     // [B, N, H, Dv], contiguous
  const float *w1, *w2, *w3;     // [H, D, D], [H, D, D], [H, D, Dv]
  float *new1, *new2, *new3;     // the updated ones, with a batch axis
  const float *conv_q, *bias_q;  // [H*D, 3 ** axes], [H*D]; null without a convolution
  const float *conv_k, *bias_k;
  Index strides[12];  // of q, k and v: batch, head, token, channel
  Index batch, heads, tokens, dim, value;
  Index axes, grid[3], prefix;
  double scale, eps;
  Index threads;
};

template <typename T>
struct Forward {
  const Call& call;
  const Index N = call.tokens, D = padded(call.dim), V = padded(call.value);
  const Index pairs = call.batch * call.heads, threads = call.threads;
  const Index matrices = 2 * D * D + D * V;  // floats of the three weights, padded
  Grid grid{{1, 1, 1}, call.prefix};
  // Pairs that do not share the threads evenly are parted: runs of whole tiles of their tokens.
  Index parts = 1, length;

  explicit Forward(const Call& given) : call(given) {
    for (Index i = 0; i < call.axes; ++i) grid.size[3 - call.axes + i] = call.grid[i];
    const Index tiles = (N + TILE - 1) / TILE;
    if (pairs % threads && pairs < 8 * threads) parts = (8 * threads + pairs - 1) / pairs;
    if (parts > tiles) parts = tiles;
    length = (tiles + parts - 1) / parts * TILE;
    parts = (N + length - 1) / length;
  }

  Index first(Index part) const { return part * length; }
  Index last(Index part) const { return first(part) + length < N ? first(part) + length : N; }

  Tokens<T> tokens(const void* at, Index which, Index pair, Index width) const {
    const Index* strides = call.strides + 4 * which;
    return {static_cast<const T*>(at) + pair / call.heads * strides[0] +
                pair % call.heads * strides[1],
            strides[2], strides[3], N, width};
  }

  // Scratch of one thread: a tile of everything, a depthwise kernel, the weights.
  struct Own {
    Scratch memory;
    float *x, *g, *a, *b, *dz, *kernel, *w1, *w2, *w3;
    explicit Own(const Forward& f)
        : memory(TILE * (4 * f.D + f.V) + 28 * f.D + f.matrices),
          x(memory.take(TILE * f.D)),
          g(memory.take(TILE * f.V)),
          a(memory.take(TILE * f.D)),
          b(memory.take(TILE * f.D)),
          dz(memory.take(TILE * f.D)),
          kernel(memory.take(28 * f.D)),
          w1(memory.take(f.D * f.D)),
          w2(memory.take(f.D * f.D)),
          w3(memory.take(f.D * f.V)) {}
  };

  // The key statistics of a part: mean, sum of squares around it.
  void measure(Index pair, Index part, float* statistics) const {
    const auto k = tokens(call.k, 1, pair, call.dim);
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

  // sums = d/dW sum_t v_t . f_W(x_t) over the tokens of a part.
  void ascend(Index pair, Index part, const float* statistics, float* sums, const Own& own) const {
    const Index head = pair % call.heads, dim = call.dim, value = call.value;
    const auto k = tokens(call.k, 1, pair, dim), v = tokens(call.v, 2, pair, value);
    const Kernel kernel =
        kernel_of(call.conv_k, call.bias_k, head, call.axes, dim, D, own.kernel);
    pack(call.w1 + head * dim * dim, dim, dim, own.w1, D, D, false);
    pack(call.w2 + head * dim * dim, dim, dim, own.w2, D, D, false);
    pack(call.w3 + head * dim * value, dim, value, own.w3, V, D, true);
    std::memset(sums, 0, matrices * sizeof(float));
    for (Index at = first(part); at < last(part); at += TILE) {
      const Index count = last(part) - at < TILE ? last(part) - at : TILE;
      read_tile(k, statistics, statistics + D, kernel, grid, at, count, own.x, D);
      read_plain(v, at, count, own.g, V);
      product<false>(own.x, D, 1, own.w1, D, own.a, D, count, dim, D);
      product<false>(own.x, D, 1, own.w2, D, own.b, D, count, dim, D);
      product<false>(own.g, V, 1, own.w3, D, own.dz, D, count, value, D);
      for (Index i = 0; i < count * D; i += LANES) {
        const Vec a = load(own.a + i), b = load(own.b + i), dz = load(own.dz + i);
        const Vec sigma = sigmoid(a), s = a * sigma;
        store(own.a + i, dz * b * (sigma + s * (1.0f - sigma)));
        store(own.b + i, s * b);
        store(own.dz + i, dz * s);
      }
      product<true>(own.x, 1, D, own.a, D, sums, D, dim, count, D);
      product<true>(own.x, 1, D, own.dz, D, sums + D * D, D, dim, count, D);
      product<true>(own.b, 1, D, own.g, V, sums + 2 * D * D, V, dim, count, V);
    }
  }

  // W' = W + rate sums, the parts' in their order.
  void update(Index pair, const float* sums) const {
    const Index head = pair % call.heads, dim = call.dim;
    const float rate = float(call.scale / double(N));
    auto add = [&](const float* sums, const float* old, float* updated, Index columns,
                   Index pitch) {
      const Index size = dim * columns;
      for (Index i = 0; i < dim; ++i)
        for (Index j = 0; j < columns; ++j) {
          float sum = 0;
          for (Index part = 0; part < parts; ++part) sum += sums[part * matrices + i * pitch + j];
          const Index at = i * columns + j;
          updated[pair * size + at] = old[head * size + at] + rate * sum;
        }
    };
    add(sums, call.w1, call.new1, dim, D);
    add(sums + D * D, call.w2, call.new2, dim, D);
    add(sums + 2 * D * D, call.w3, call.new3, call.value, V);
  }

  // o = f_W'(y) for the tokens of a part.
  void answer(Index pair, Index part, const Own& own) const {
    const Index head = pair % call.heads, dim = call.dim, value = call.value;
    const auto q = tokens(call.q, 0, pair, dim);
    const Kernel kernel =
        kernel_of(call.conv_q, call.bias_q, head, call.axes, dim, D, own.kernel);
    pack(call.new1 + pair * dim * dim, dim, dim, own.w1, D, D, false);
    pack(call.new2 + pair * dim * dim, dim, dim, own.w2, D, D, false);
    pack(call.new3 + pair * dim * value, dim, value, own.w3, D, V, false);
    for (Index at = first(part); at < last(part); at += TILE) {
      const Index count = last(part) - at < TILE ? last(part) - at : TILE;
      read_tile(q, nullptr, nullptr, kernel, grid, at, count, own.x, D);
      product<false>(own.x, D, 1, own.w1, D, own.a, D, count, dim, D);
      product<false>(own.x, D, 1, own.w2, D, own.b, D, count, dim, D);
      for (Index i = 0; i < count * D; i += LANES) {
        const Vec a = load(own.a + i);
        store(own.a + i, a * sigmoid(a) * load(own.b + i));
      }
      product<false>(own.a, D, 1, own.w3, V, own.g, V, count, dim, V);
      for (Index t = 0; t < count; ++t) {
        T* out = static_cast<T*>(call.out) +
                 ((pair / call.heads * N + at + t) * call.heads + head) * value;
        for (Index c = 0; c < value; ++c) narrow(own.g[t * V + c], out[c]);
      }
    }
  }

  void run() const {
    // One set of sums for each thread, or for each part where a pair has several.
    Scratch shared(pairs * parts * 2 * D + (parts == 1 ? threads : pairs * parts) * matrices);
    float* statistics = shared.take(pairs * parts * 2 * D);
    float* sums = shared.take(0);
#pragma omp parallel num_threads(threads)
    {
      const Own own(*this);
      if (parts == 1) {
        float* mine = sums + omp_get_thread_num() * matrices;
#pragma omp for schedule(static)
        for (Index pair = 0; pair < pairs; ++pair) {
          float* its = statistics + pair * 2 * D;
          measure(pair, 0, its);
          settle(its);
          ascend(pair, 0, its, mine, own);
          update(pair, mine);
          answer(pair, 0, own);
        }
      } else {
        auto its = [&](Index pair) { return statistics + pair * parts * 2 * D; };
#pragma omp for schedule(static)
        for (Index i = 0; i < pairs * parts; ++i)
          measure(i / parts, i % parts, statistics + i * 2 * D);
#pragma omp for schedule(static)
        for (Index pair = 0; pair < pairs; ++pair) settle(its(pair));
#pragma omp for schedule(static)
        for (Index i = 0; i < pairs * parts; ++i)
          ascend(i / parts, i % parts, its(i / parts), sums + i * matrices, own);
#pragma omp for schedule(static)
        for (Index pair = 0; pair < pairs; ++pair) update(pair, sums + pair * parts * matrices);
#pragma omp for schedule(static)
        for (Index i = 0; i < pairs * parts; ++i) answer(i / parts, i % parts, own);
      }
    }
  }
};

}  // namespace ttt

extern "C" {
void ttt_forward_float32(const ttt::Call* call) { ttt::Forward<float>(*call).run(); }
void ttt_forward_bfloat16(const ttt::Call* call) { ttt::Forward<ttt::BFloat16>(*call).run(); }
void ttt_forward_float16(const ttt::Call* call) { ttt::Forward<ttt::Half>(*call).run(); }
}
