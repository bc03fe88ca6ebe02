// Near attention's forward on a CPU, joined with the node's output: see near.h.
//
// Keys and values of a pair are copied to float32 rows once; then tiles of queries are independent.

#include "near.h"

namespace ttt {

template <typename T>
struct NearForward : NearPass<T> {
  using NearPass<T>::NearPass, NearPass<T>::call, NearPass<T>::N, NearPass<T>::D, NearPass<T>::V;
  using NearPass<T>::P, NearPass<T>::Q, NearPass<T>::dim, NearPass<T>::value, NearPass<T>::places;
  using NearPass<T>::pitch, NearPass<T>::window, NearPass<T>::marks, NearPass<T>::line;

  // Scratch of one thread: a tile of queries, their rows and their outputs.
  struct Own {
    float *x, *rows, *out, *exact;
    Own(const NearForward& f, Scratch& memory)
        : x(memory.take(TILE * f.D)),
          rows(memory.take(TILE * f.pitch)),
          out(memory.take(TILE * f.V)),
          exact(memory.take(f.places.ends ? EXACT * f.line : 0)) {}
    static Index floats(const NearForward& f) {
      return TILE * (f.D + f.pitch + f.V) + (f.places.ends ? EXACT * f.line : 0) + 4 * 16;
    }
  };

  // Of a pair: its keys and values, and those of the marks.
  struct Kept {
    float *k, *v, *keys, *values;
    Kept(const NearForward& f, Scratch& memory)
        : k(memory.take(f.N * f.P)),
          v(memory.take(f.N * f.Q)),
          keys(memory.take(f.D * f.places.pitch)),
          values(memory.take(f.marks * f.V)) {}
    static Index floats(const NearForward& f) {
      return f.N * (f.P + f.Q) + f.D * f.places.pitch + f.marks * f.V + 4 * 16;
    }
  };

  // Scaled queries of a tile.
  void ask(Index pair, Index at, Index count, float* x) const {
    const auto q = this->tokens(call.q, 0, pair, dim);
    for (Index t = 0; t < count; ++t) {
      if (at + t + AHEAD < N) q.prefetch(places.token[at + t + AHEAD]);
      this->read(q, places.token[at + t], D, float(call.scale * LOG2E), x + t * D);
    }
  }

  // base + gate a of a tile of the grid.
  void answer(Index pair, Index at, Index count, const Kept& kept, const Own& own) const {
    const auto base = this->tokens(call.base, 4, pair, value);
    const float gate = call.gate ? call.gate[this->head(pair)] : 0.5f;
    const float rest = call.gate ? 1.0f : 0.5f;
    ask(pair, at, count, own.x);
    product<false>(own.x, D, 1, kept.keys, places.pitch, own.rows, pitch, count, dim, places.pitch);
    for (Index t = 0; t < count; ++t) {
      this->fetch(kept.k, P, at + t + 2 * BAND);
      this->dot_window(own.x + t * D, kept.k, P, D, at + t, -__builtin_inff(),
                       own.rows + t * pitch);
    }
    float factor[TILE];
    this->weigh(at, count, own.rows, factor);
    for (Index t = 0; t < count; ++t) this->withdraw(at + t, own.rows + t * pitch);
    product<false>(own.rows, pitch, 1, kept.values, V, own.out, V, count, marks, V);
    for (Index t = 0; t < count; ++t) {
      float *row = own.rows + t * pitch, *out = own.out + t * V;
      this->fetch(kept.v, Q, at + t + 2 * BAND);
      if (at + t + AHEAD < N) base.prefetch(places.token[at + t + AHEAD]);
      blend<true>(row + places.pitch, window, this->around(kept.v, Q, at + t), V, out);
      const Index n = places.token[at + t];
      over_channels(base, V, [&](auto vectors, auto inside, Index c) {
        for (Index j = 0; j < vectors.value; ++j) {
          const Vec first = base.template read<inside.value>(n, c + j * LANES);
          float* to = out + c + j * LANES;
          store(to, rest * first + gate * factor[t] * load(to));
        }
      });
      write_tile(out, V, 1, this->result(call.out, pair, n, value), 0, value);
    }
  }

  // Softmax attention of a tile of prefix or suffix tokens.
  void answer_exactly(Index pair, Index at, Index count, const Kept& kept, const Own& own) const {
    ask(pair, at, count, own.x);
    this->dot_all(own.x, D, count, kept.k, P, D, own.exact);
    float factor[EXACT];
    for (Index t = 0; t < count; ++t) factor[t] = this->weigh_all(own.exact + t * line).inverse;
    this->blend_all(own.exact, count, kept.v, Q, V, own.out);
    for (Index t = 0; t < count; ++t) {
      float* out = own.out + t * V;
      for (Index c = 0; c < V; c += LANES) store(out + c, factor[t] * load(out + c));
      write_tile(out, V, 1, this->result(call.out, pair, places.token[at + t], value), 0, value);
    }
  }

  bool run() const {
    Scratch memory(this->kept() * Kept::floats(*this) + this->threads * Own::floats(*this));
    if (!memory.memory) return false;
    std::vector<Kept> all;
    std::vector<Own> owns;
    for (Index i = 0; i < this->kept(); ++i) all.emplace_back(*this, memory);
    for (Index i = 0; i < this->threads; ++i) owns.emplace_back(*this, memory);
#pragma omp parallel num_threads(this->threads)
    {
      const Own& own = owns[omp_get_thread_num()];
      this->in_stages(3, [&](Index stage, Index pair, Index part) {
        const Kept& kept = all[this->place(pair)];
        if (stage == 0) {
          this->copy(this->tokens(call.k, 1, pair, dim), D, P, part, kept.k);
          this->copy(this->tokens(call.v, 2, pair, value), V, Q, part, kept.v);
        }
        if (stage == 1) {
          this->mark(kept.k, P, D, part, nullptr, kept.keys, own.x);
          this->mark(kept.v, Q, V, part, kept.values, nullptr, nullptr);
        }
        if (stage == 2) {
          this->over_grid(part, [&](Index at, Index count) { answer(pair, at, count, kept, own); });
          this->over_ends(part, [&](Index at, Index count) {
            answer_exactly(pair, at, count, kept, own);
          });
        }
      });
    }
    return true;
  }
};

}  // namespace ttt

extern "C" {
bool ttt_float32(const ttt::NearCall* call) { return ttt::near_run<ttt::NearForward<float>>(*call); }
bool ttt_bfloat16(const ttt::NearCall* call) {
  return ttt::near_run<ttt::NearForward<ttt::BFloat16>>(*call);
}
bool ttt_float16(const ttt::NearCall* call) {
  return ttt::near_run<ttt::NearForward<ttt::Half>>(*call);
}
}
