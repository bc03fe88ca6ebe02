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

#include "node.h"

namespace ttt {

template <typename T>
struct Forward : Pass<T> {
  using Pass<T>::Pass, Pass<T>::call, Pass<T>::N, Pass<T>::D, Pass<T>::V, Pass<T>::dim;
  using Pass<T>::value, Pass<T>::pairs, Pass<T>::parts, Pass<T>::matrices, Pass<T>::grid;

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

  // sums = d/dW sum_t v_t . f_W(x_t) over the tokens of a part.
  void ascend(Index pair, Index part, const float* statistics, float* sums, const Own& own) const {
    const Index head = this->head(pair);
    const auto k = this->tokens(call.k, 1, pair, dim), v = this->tokens(call.v, 2, pair, value);
    const Kernel kernel = kernel_of(call.conv_k, call.bias_k, head, call.axes, dim, D, own.kernel);
    pack(call.w1 + head * dim * dim, dim, dim, own.w1, D, D, false);
    pack(call.w2 + head * dim * dim, dim, dim, own.w2, D, D, false);
    pack(call.w3 + head * dim * value, dim, value, own.w3, V, D, true);
    std::memset(sums, 0, matrices * sizeof(float));
    this->over_tiles(part, [&](Index at, Index count) {
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
    });
  }

  // W' = W + rate sums.
  void update(Index pair, const float* sums) const {
    const float* old[] = {call.w1, call.w2, call.w3};
    float* updated[] = {call.new1, call.new2, call.new3};
    this->over_weights([&](int w, Index width, Index offset, Index pitch) {
      const float* from = old[w] + this->head(pair) * dim * width;
      float* to = updated[w] + pair * dim * width;
      for (Index i = 0; i < dim; ++i)
        for (Index j = 0; j < width; ++j)
          to[i * width + j] = from[i * width + j] + this->rate * sums[offset + i * pitch + j];
    });
  }

  // o = f_W'(y) for the tokens of a part.
  void answer(Index pair, Index part, const Own& own) const {
    const auto q = this->tokens(call.q, 0, pair, dim);
    const Kernel kernel =
        kernel_of(call.conv_q, call.bias_q, this->head(pair), call.axes, dim, D, own.kernel);
    pack(call.new1 + pair * dim * dim, dim, dim, own.w1, D, D, false);
    pack(call.new2 + pair * dim * dim, dim, dim, own.w2, D, D, false);
    pack(call.new3 + pair * dim * value, dim, value, own.w3, D, V, false);
    this->over_tiles(part, [&](Index at, Index count) {
      read_tile(q, nullptr, nullptr, kernel, grid, at, count, own.x, D);
      product<false>(own.x, D, 1, own.w1, D, own.a, D, count, dim, D);
      product<false>(own.x, D, 1, own.w2, D, own.b, D, count, dim, D);
      for (Index i = 0; i < count * D; i += LANES) {
        const Vec a = load(own.a + i);
        store(own.a + i, a * sigmoid(a) * load(own.b + i));
      }
      product<false>(own.a, D, 1, own.w3, V, own.g, V, count, dim, V);
      write_tile(own.g, V, count, this->result(call.out, pair, at, value), call.heads * value,
                 value);
    });
  }

  // Whether there was memory for it.
  bool run() const {
    Scratch shared(this->kept() * parts * (2 * D + matrices));
    if (!shared.memory) return false;
    float* all_statistics = shared.take(this->kept() * parts * 2 * D);
    float* all_sums = shared.take(0);
#pragma omp parallel num_threads(this->threads)
    {
      const Own own(*this);
      this->in_stages(5, [&](Index stage, Index pair, Index part) {
        float* statistics = all_statistics + this->place(pair) * parts * 2 * D;
        float* sums = all_sums + this->place(pair) * parts * matrices;
        if (stage == 0) this->measure(pair, part, statistics + part * 2 * D);
        if (stage == 1 && part == 0) this->settle(statistics);
        if (stage == 2) ascend(pair, part, statistics, sums + part * matrices, own);
        if (stage == 3 && part == 0) {
          this->collect(sums, matrices);
          update(pair, sums);
        }
        if (stage == 4) answer(pair, part, own);
      });
    }
    return true;
  }
};

}  // namespace ttt

extern "C" {
bool ttt_float32(const ttt::Call* call) { return ttt::Forward<float>(*call).run(); }
bool ttt_bfloat16(const ttt::Call* call) { return ttt::Forward<ttt::BFloat16>(*call).run(); }
bool ttt_float16(const ttt::Call* call) { return ttt::Forward<ttt::Half>(*call).run(); }
}
