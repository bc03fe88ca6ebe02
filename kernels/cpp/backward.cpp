// The default node's backward on a CPU, tile by tile like the forward, from q, k, v and W' alone.
//
// With g the output's gradient and everything of forward.cpp computed again, for each pair:
//
//   through o = f_W'(y):    a = y W1', b = y W2', dz = g W3'^T
//                           P1 = sum y^T (dz b silu'(a)), P2 = sum y^T (dz silu(a)),
//                           P3 = sum (silu(a) b)^T g             gradients of W'
//                           dy = (dz b silu'(a)) W1'^T + (dz silu(a)) W2'^T
//   through W' = W + rate G: dW = P + ..., and with S = rate P the gradients of <S, G>, where
//                           G = d/dW sum v . f_W(x), a = x W1, b = x W2, dz = v W3^T,
//                           p = x S1, r = x S2, t = v S3^T:
//                           da = silu''(a) dz b p + silu'(a) (r dz + t b)
//                           db = silu'(a) dz p + silu(a) t,  ddz = silu'(a) b p + silu(a) r
//                           dW1 += sum x^T da, dW2 += sum x^T db, dW3 += sum ddz^T v
//                           dx = (dz b silu'(a)) S1^T + (dz silu(a)) S2^T + da W1^T + db W2^T
//                           dv = (silu(a) b) S3 + ddz W3
//   through the convolutions and the key norm.
//
// dy and then dx are the only things of size N x D beside the results, in float32, for the pairs
// that are being worked on: a convolution's gradient needs its neighbours.

#include "node.h"

namespace ttt {

template <typename T>
struct Backward : Pass<T> {
  using Pass<T>::Pass, Pass<T>::call, Pass<T>::N, Pass<T>::D, Pass<T>::V, Pass<T>::dim;
  using Pass<T>::value, Pass<T>::pairs, Pass<T>::parts, Pass<T>::matrices, Pass<T>::grid;

  // Scratch of one thread: tiles, depthwise kernels, and matrices of the weights' size: W (or W'),
  // W^T, S and S^T.
  struct Own {
    Scratch memory;
    float *x, *g, *out, *a, *b, *dz, *p, *r, *t, *kernel, *mirrored;
    struct Matrices {
      float *one, *two, *three;
      Matrices(Scratch& memory, Index D, Index V)
          : one(memory.take(D * D)), two(memory.take(D * D)), three(memory.take(D * V)) {}
    } w, wt, s, st;
    explicit Own(const Backward& f)
        : memory(TILE * (7 * f.D + 2 * f.V) + 56 * f.D + 4 * f.matrices),
          x(memory.take(TILE * f.D)),
          g(memory.take(TILE * f.V)),
          out(memory.take(TILE * f.V)),
          a(memory.take(TILE * f.D)),
          b(memory.take(TILE * f.D)),
          dz(memory.take(TILE * f.D)),
          p(memory.take(TILE * f.D)),
          r(memory.take(TILE * f.D)),
          t(memory.take(TILE * f.D)),
          kernel(memory.take(28 * f.D)),
          mirrored(memory.take(28 * f.D)),
          w(memory, f.D, f.V),
          wt(memory, f.D, f.V),
          s(memory, f.D, f.V),
          st(memory, f.D, f.V) {}
  };

  // Of a part of a pair, the first part's being the pair's after `collect`.
  struct Sums {
    float *statistics;          // mean, rstd
    float *to_new, *to_old;     // gradients of W', and of W through G
    float *taps_q, *taps_k;     // of the depthwise kernels, [28][D]
    float *normed;              // sums of d khat and of d khat * khat
  };
  Index floats() const { return 2 * D + 2 * matrices + 56 * D + 2 * D; }

  static void pack_both(const float* from, Index rows, Index columns, float* to, float* transposed,
                        Index height, Index pitch) {
    pack(from, rows, columns, to, height, pitch, false);
    pack(from, rows, columns, transposed, pitch, height, true);
  }

  // Through o = f_W'(y): dy of a part, and its part of the gradients of W'.
  void through_answer(Index pair, Index part, float* grad, float* sums, const Own& own) const {
    const auto q = this->tokens(call.q, 0, pair, dim);
    const auto from = this->tokens(call.grad, 3, pair, value);
    const Kernel kernel =
        kernel_of(call.conv_q, call.bias_q, this->head(pair), call.axes, dim, D, own.kernel);
    pack_both(call.new1 + pair * dim * dim, dim, dim, own.w.one, own.wt.one, D, D);
    pack_both(call.new2 + pair * dim * dim, dim, dim, own.w.two, own.wt.two, D, D);
    pack(call.new3 + pair * dim * value, dim, value, own.wt.three, V, D, true);
    std::memset(sums, 0, matrices * sizeof(float));
    this->over_tiles(part, [&](Index at, Index count) {
      read_tile(q, nullptr, nullptr, kernel, grid, at, count, own.x, D);
      read_plain(from, at, count, own.g, V);
      product<false>(own.x, D, 1, own.w.one, D, own.a, D, count, dim, D);
      product<false>(own.x, D, 1, own.w.two, D, own.b, D, count, dim, D);
      product<false>(own.g, V, 1, own.wt.three, D, own.dz, D, count, value, D);
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
      float* dy = grad + at * D;
      product<false>(own.a, D, 1, own.wt.one, D, dy, D, count, dim, D);
      product<true>(own.dz, D, 1, own.wt.two, D, dy, D, count, dim, D);
    });
  }

  // Through the query's convolution: dq of a part, and its part of the kernel's gradient.
  void through_query(Index pair, Index part, const float* grad, float* taps,
                     const Own& own) const {
    const Kernel kernel = mirrored(call.conv_q, pair, own);
    if (kernel.taps) {
      std::memset(taps, 0, 28 * D * sizeof(float));
      correlate(this->tokens(call.q, 0, pair, dim), nullptr, grad, grid, this->first(part),
                this->last(part), taps, D);
    }
    const Tokens<float> dy{grad, D, 1, N, D};
    this->over_tiles(part, [&](Index at, Index count) {
      read_tile(dy, nullptr, nullptr, kernel, grid, at, count, own.x, D);
      write_tile(own.x, D, count, this->result(call.grad_q, pair, at, dim), call.heads * dim, dim);
    });
  }

  Kernel mirrored(const float* weight, Index pair, const Own& own) const {
    return kernel_of(weight, nullptr, this->head(pair), call.axes, dim, D, own.mirrored, true);
  }

  // Through G: dx and dv of a part, and its part of the gradients of W. `to_new`: those of W'.
  void through_step(Index pair, Index part, const float* statistics, const float* to_new,
                    float* grad, float* sums, const Own& own) const {
    const Index head = this->head(pair);
    const auto k = this->tokens(call.k, 1, pair, dim), v = this->tokens(call.v, 2, pair, value);
    const Kernel kernel = kernel_of(call.conv_k, call.bias_k, head, call.axes, dim, D, own.kernel);
    pack_both(call.w1 + head * dim * dim, dim, dim, own.w.one, own.wt.one, D, D);
    pack_both(call.w2 + head * dim * dim, dim, dim, own.w.two, own.wt.two, D, D);
    pack_both(call.w3 + head * dim * value, dim, value, own.w.three, own.wt.three, D, V);
    for (Index i = 0; i < matrices; ++i) own.s.one[i] = this->rate * to_new[i];
    pack(own.s.one, D, D, own.st.one, D, D, true);
    pack(own.s.two, D, D, own.st.two, D, D, true);
    pack(own.s.three, D, V, own.st.three, V, D, true);
    std::memset(sums, 0, matrices * sizeof(float));
    this->over_tiles(part, [&](Index at, Index count) {
      read_tile(k, statistics, statistics + D, kernel, grid, at, count, own.x, D);
      read_plain(v, at, count, own.g, V);
      product<false>(own.x, D, 1, own.w.one, D, own.a, D, count, dim, D);
      product<false>(own.x, D, 1, own.w.two, D, own.b, D, count, dim, D);
      product<false>(own.g, V, 1, own.wt.three, D, own.dz, D, count, value, D);
      product<false>(own.x, D, 1, own.s.one, D, own.p, D, count, dim, D);
      product<false>(own.x, D, 1, own.s.two, D, own.r, D, count, dim, D);
      product<false>(own.g, V, 1, own.st.three, D, own.t, D, count, value, D);
      for (Index i = 0; i < count * D; i += LANES) {
        const Vec a = load(own.a + i), b = load(own.b + i), dz = load(own.dz + i);
        const Vec p = load(own.p + i), r = load(own.r + i), t = load(own.t + i);
        const Vec sigma = sigmoid(a), s = a * sigma, rest = 1.0f - sigma;
        const Vec slope = sigma + s * rest;  // silu'(a)
        const Vec bend = (sigma + slope - sigma * s) * rest;  // silu''(a)
        store(own.a + i, s * b);
        store(own.b + i, dz * b * slope);
        store(own.dz + i, dz * s);
        store(own.p + i, bend * dz * b * p + slope * (r * dz + t * b));
        store(own.r + i, slope * dz * p + s * t);
        store(own.t + i, slope * b * p + s * r);
      }
      product<false>(own.a, D, 1, own.s.three, V, own.out, V, count, dim, V);
      product<true>(own.t, D, 1, own.w.three, V, own.out, V, count, dim, V);
      write_tile(own.out, V, count, this->result(call.grad_v, pair, at, value), call.heads * value,
                 value);
      float* dx = grad + at * D;
      product<false>(own.b, D, 1, own.st.one, D, dx, D, count, dim, D);
      product<true>(own.dz, D, 1, own.st.two, D, dx, D, count, dim, D);
      product<true>(own.p, D, 1, own.wt.one, D, dx, D, count, dim, D);
      product<true>(own.r, D, 1, own.wt.two, D, dx, D, count, dim, D);
      product<true>(own.x, 1, D, own.p, D, sums, D, dim, count, D);
      product<true>(own.x, 1, D, own.r, D, sums + D * D, D, dim, count, D);
      product<true>(own.t, 1, D, own.g, V, sums + 2 * D * D, V, dim, count, V);
    });
  }

  // Through the key's convolution: a part of its kernel's gradient and of the norm's two sums.
  void through_key(Index pair, Index part, const float* statistics, const float* grad, float* taps,
                   float* normed, const Own& own) const {
    const auto k = this->tokens(call.k, 1, pair, dim);
    const Kernel kernel = mirrored(call.conv_k, pair, own);
    if (kernel.taps) {
      std::memset(taps, 0, 28 * D * sizeof(float));
      correlate(k, statistics, grad, grid, this->first(part), this->last(part), taps, D);
    }
    const Tokens<float> dx{grad, D, 1, N, D};
    std::memset(normed, 0, 2 * D * sizeof(float));
    this->over_tiles(part, [&](Index at, Index count) {
      read_tile(dx, nullptr, nullptr, kernel, grid, at, count, own.x, D);
      read_tile(k, statistics, statistics + D, {nullptr, nullptr}, grid, at, count, own.a, D);
      for (Index c = 0; c < D; c += LANES) {
        Vec sum = load(normed + c), along = load(normed + D + c);
        for (Index t = 0; t < count; ++t) {
          const Vec d = load(own.x + t * D + c);
          sum += d;
          along += d * load(own.a + t * D + c);
        }
        store(normed + c, sum);
        store(normed + D + c, along);
      }
    });
  }

  // Through the key norm: dk of a part.
  void through_norm(Index pair, Index part, const float* statistics, const float* grad,
                    const float* normed, const Own& own) const {
    const auto k = this->tokens(call.k, 1, pair, dim);
    const Kernel kernel = mirrored(call.conv_k, pair, own);
    const Tokens<float> dx{grad, D, 1, N, D};
    this->over_tiles(part, [&](Index at, Index count) {
      read_tile(dx, nullptr, nullptr, kernel, grid, at, count, own.x, D);
      read_tile(k, statistics, statistics + D, {nullptr, nullptr}, grid, at, count, own.a, D);
      for (Index c = 0; c < D; c += LANES) {
        const Vec mean = load(normed + c) / float(N), along = load(normed + D + c) / float(N);
        const Vec rstd = load(statistics + D + c);
        for (Index t = 0; t < count; ++t) {
          float* d = own.x + t * D + c;
          store(d, (load(d) - mean - load(own.a + t * D + c) * along) * rstd);
        }
      }
      write_tile(own.x, D, count, this->result(call.grad_k, pair, at, dim), call.heads * dim, dim);
    });
  }

  // The pair's gradients of the parameters.
  void hand_over(Index pair, const Sums& all) const {
    float* to[] = {call.grad1, call.grad2, call.grad3};
    this->over_weights([&](int w, Index width, Index offset, Index pitch) {
      for (Index i = 0; i < dim; ++i)
        for (Index j = 0; j < width; ++j) {
          const Index at = offset + i * pitch + j;
          to[w][(pair * dim + i) * width + j] = all.to_new[at] + all.to_old[at];
        }
    });
    if (call.conv_q) {
      hand_over(pair, all.taps_q, nullptr, call.grad_conv_q, call.grad_bias_q);
      hand_over(pair, all.taps_k, all.statistics + D, call.grad_conv_k, call.grad_bias_k);
    }
  }
  void hand_over(Index pair, const float* sums, const float* rstd, float* taps, float* bias) const {
    const Index count = call.axes == 1 ? 3 : call.axes == 2 ? 9 : 27, skip = (27 - count) / 2;
    for (Index d = 0; d < dim; ++d) {
      for (Index i = 0; i < count; ++i)
        taps[(pair * dim + d) * count + i] = sums[(skip + i) * D + d] * (rstd ? rstd[d] : 1.0f);
      bias[pair * dim + d] = sums[27 * D + d];
    }
  }

  // Whether there was memory for it.
  bool run() const {
    Scratch shared(this->kept() * (parts * floats() + N * D));
    if (!shared.memory) return false;
    float* all = shared.take(this->kept() * parts * floats());
    float* grads = shared.take(0);
#pragma omp parallel num_threads(this->threads)
    {
      const Own own(*this);
      this->in_stages(9, [&](Index stage, Index pair, Index part) {
        // Side by side for the parts of a pair, so that `collect` finds them.
        float* next = all + this->place(pair) * parts * floats();
        auto take = [&](Index size) {
          float* its = next;
          next += parts * size;
          return its;
        };
        float *statistics = take(2 * D), *to_new = take(matrices), *to_old = take(matrices);
        float *taps_q = take(28 * D), *taps_k = take(28 * D), *normed = take(2 * D);
        float* grad = grads + this->place(pair) * N * D;
        if (stage == 0) this->measure(pair, part, statistics + part * 2 * D);
        if (stage == 1 && part == 0) this->settle(statistics);
        if (stage == 2) through_answer(pair, part, grad, to_new + part * matrices, own);
        if (stage == 3) through_query(pair, part, grad, taps_q + part * 28 * D, own);
        if (stage == 4 && part == 0) this->collect(to_new, matrices);
        if (stage == 5)
          through_step(pair, part, statistics, to_new, grad, to_old + part * matrices, own);
        if (stage == 6)
          through_key(pair, part, statistics, grad, taps_k + part * 28 * D, normed + part * 2 * D,
                      own);
        if (stage == 7 && part == 0) {
          this->collect(normed, 2 * D);
          this->collect(to_old, matrices);
          if (call.conv_q) {
            this->collect(taps_q, 28 * D);
            this->collect(taps_k, 28 * D);
          }
          hand_over(pair, {statistics, to_new, to_old, taps_q, taps_k, normed});
        }
        if (stage == 8) through_norm(pair, part, statistics, grad, normed, own);
      });
    }
    return true;
  }
};

}  // namespace ttt

extern "C" {
bool ttt_float32(const ttt::Call* call) { return ttt::Backward<float>(*call).run(); }
bool ttt_bfloat16(const ttt::Call* call) { return ttt::Backward<ttt::BFloat16>(*call).run(); }
bool ttt_float16(const ttt::Call* call) { return ttt::Backward<ttt::Half>(*call).run(); }
}
