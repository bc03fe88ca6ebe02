// Near attention's backward on a CPU, from q, k, v and the gate alone: see near.h for the forward.
//
// With g the output's gradient, r = gate / (sum_j e_j + sum_c n_c e_c), and the forward's e again:
//
//   u_j = g . v_j,  u_c = g . V_c - sum over the window's j in c of u_j
//   along = (sum_j e_j u_j + sum_c e_c u_c) / (sum_j e_j + sum_c n_c e_c)      = g . a
//   w_c = r e_c,  s_c = w_c (u_c / n_c - along)                                of V_c and of x . K_c
//   w_j = r e_j - w_c(j),  s_j = r e_j (u_j - along) - s_c(j)                  of v_j and of x . k_j
//   dx = sum_j s_j k_j + sum_c s_c K_c,  dK_c += s_c x,  dV_c += w_c g,  dgate += along
//
// A second pass goes over keys: each adds up s_j x and w_j g of the queries in whose windows it is,
// and has its cell's dK_c and dV_c. What the ends' softmax gives to it is computed there again, from
// the ends' maxima and sums. So no two threads add to one place.

#include "near.h"

namespace ttt {

template <typename T>
struct NearBackward : NearPass<T> {
  using NearPass<T>::call, NearPass<T>::N, NearPass<T>::D, NearPass<T>::V, NearPass<T>::parts;
  using NearPass<T>::P, NearPass<T>::Q, NearPass<T>::dim, NearPass<T>::value, NearPass<T>::places;
  using NearPass<T>::pitch, NearPass<T>::window, NearPass<T>::marks, NearPass<T>::line;

  const Index own_pitch = padded(window);
  const Index sums = marks * (D + V);  // floats of dK and dV
  // For each axis and position the first query in whose window it is, and the one after the last.
  struct Seen {
    std::vector<Index> first, last;
    explicit Seen(const Axis& axis) : first(axis.size, axis.size), last(axis.size, 0) {
      for (Index i = 0; i < axis.size; ++i)
        for (Index p = axis.first(i); p < axis.first(i) + axis.wide; ++p) {
          if (i < first[p]) first[p] = i;
          last[p] = i + 1;
        }
    }
    Index most() const {
      Index all = 0;
      for (std::size_t p = 0; p < first.size(); ++p)
        if (last[p] - first[p] > all) all = last[p] - first[p];
      return all;
    }
  };
  const Seen z{places.z}, y{places.y}, x{places.x};
  const Index seers = window ? padded(z.most() * y.most() * x.most()) : 0;

  explicit NearBackward(const NearCall& given) : NearPass<T>(given) {}

  // Scratch of one thread: a tile of rows and of results, and the queries that see a token.
  struct Own {
    float *rows, *slopes, *one, *two, *exact, *slope, *s, *w;
    Index* seer;
    Own(const NearBackward& b, Scratch& memory)
        : rows(memory.take(TILE * b.pitch)),
          slopes(memory.take(TILE * b.pitch)),
          one(memory.take(TILE * b.D)),
          two(memory.take(TILE * b.V)),
          exact(memory.take(b.places.ends ? b.exact_floats() : 0)),
          slope(memory.take(b.places.ends ? b.exact_floats() : 0)),
          s(memory.take(b.seers)),
          w(memory.take(b.seers)),
          seer(reinterpret_cast<Index*>(memory.take(2 * b.seers))) {}
    static Index floats(const NearBackward& b) {
      return TILE * (2 * b.pitch + b.D + b.V) + (b.places.ends ? 2 * b.exact_floats() : 0) +
             4 * b.seers + 9 * 16;
    }
  };
  // Rows for all tokens of EXACT ends, or TILE tokens of TILE ends.
  Index exact_floats() const {
    return EXACT * line > TILE * TILE ? EXACT * line : TILE * TILE;
  }

  // Of a pair: q (scaled) and the gradient by place, k and v by token, the marks, s_j and w_j by
  // place, the parts' dK and dV, the ends' softmax, and the parts' sums of `along`.
  struct Kept {
    float *q, *g, *k, *v, *keys, *values, *keys_t, *values_t, *s, *w, *sums, *ends, *along;
    Kept(const NearBackward& b, Scratch& memory)
        : q(memory.take(b.N * b.P)),
          g(memory.take(b.N * b.Q)),
          k(memory.take(b.N * b.P)),
          v(memory.take(b.N * b.Q)),
          keys(memory.take(b.marks * b.D)),
          values(memory.take(b.marks * b.V)),
          keys_t(memory.take(b.D * b.places.pitch)),
          values_t(memory.take(b.V * b.places.pitch)),
          s(memory.take(b.places.count * b.own_pitch)),
          w(memory.take(b.places.count * b.own_pitch)),
          sums(memory.take(b.parts * b.sums)),
          ends(memory.take(3 * b.places.ends)),
          along(memory.take(b.parts)) {}
    static Index floats(const NearBackward& b) {
      return 2 * b.N * (b.P + b.Q) + (b.marks + b.places.pitch) * (b.D + b.V) +
             2 * b.places.count * b.own_pitch + b.parts * (b.sums + 1) + 3 * b.places.ends +
             13 * 16;
    }
  };

  // A part of q and the gradient by place, and the gradient of base.
  void prepare(Index pair, Index part, const Kept& kept) const {
    const auto q = this->tokens(call.q, 0, pair, dim), g = this->tokens(call.grad, 3, pair, value);
    const auto mine = this->share(N, part);
    const float rest = call.gate ? 1.0f : 0.5f;
    for (Index i = mine.first; i < mine.last; ++i) {
      const Index n = places.token[i];
      if (i + BAND < N) {
        q.prefetch(places.token[i + BAND]);
        g.prefetch(places.token[i + BAND]);
      }
      this->read(q, n, D, float(call.scale * LOG2E), kept.q + i * P);
      this->read(g, n, V, 1.0f, kept.g + i * Q);
      T* to = this->result(call.grad_base, pair, n, value);
      for (Index c = 0; c < value; ++c)
        narrow(i < places.count ? rest * kept.g[i * Q + c] : 0.0f, to[c]);
    }
  }

  void write_query(Index pair, Index place, float* dx) const {
    for (Index c = 0; c < D; c += LANES) store(dx + c, float(call.scale) * load(dx + c));
    write_tile(dx, D, 1, this->result(call.grad_q, pair, places.token[place], dim), 0, dim);
  }

  // Through a tile of queries of the grid: dq, s_j and w_j, and a part of dK, dV and of g . a.
  void through_queries(Index pair, Index at, Index count, const Kept& kept, float* sums,
                       float& along, const Own& own) const {
    const float gate = call.gate ? call.gate[this->head(pair)] : 0.5f;
    const float *x = kept.q + at * P, *g = kept.g + at * Q;
    product<false>(x, P, 1, kept.keys_t, places.pitch, own.rows, pitch, count, dim, places.pitch);
    product<false>(g, Q, 1, kept.values_t, places.pitch, own.slopes, pitch, count, value,
                   places.pitch);
    for (Index t = 0; t < count; ++t) {
      this->dot_window(x + t * P, kept.k, P, D, at + t, -__builtin_inff(), own.rows + t * pitch);
      this->dot_window(g + t * Q, kept.v, Q, V, at + t, 0.0f, own.slopes + t * pitch);
    }
    float inverses[TILE];
    this->weigh(at, count, own.rows, inverses);
    for (Index t = 0; t < count; ++t) this->exclude(at + t, own.slopes + t * pitch);
    for (Index t = 0; t < count; ++t) {
      const Index place = at + t;
      float *row = own.rows + t * pitch, *slope = own.slopes + t * pitch;
      const float inverse = inverses[t], factor = gate * inverse;
      Vec sum = {};
      for (Index c = 0; c < pitch; c += LANES) sum += load(row + c) * load(slope + c);
      const float mean = total(sum) * inverse;
      along += mean;
      const auto left = this->left(place);
      for (Index c = 0; c < places.pitch; c += LANES) {
        const Vec n = c < places.counted ? left(c) : load(places.size.data() + c);
        const Vec w = factor * load(row + c), u = n > 0.0f ? load(slope + c) / n : 0.0f;
        store(row + c, w);
        store(slope + c, w * (u - mean));
      }
      for (Index c = places.pitch; c < pitch; c += LANES) {
        const Vec w = factor * load(row + c);
        store(row + c, w);
        store(slope + c, w * (load(slope + c) - mean));
      }
      this->withdraw(place, row);
      this->withdraw(place, slope);
      std::memcpy(kept.w + place * own_pitch, row + places.pitch, own_pitch * sizeof(float));
      std::memcpy(kept.s + place * own_pitch, slope + places.pitch, own_pitch * sizeof(float));
    }
    product<false>(own.slopes, pitch, 1, kept.keys, D, own.one, D, count, marks, D);
    for (Index t = 0; t < count; ++t) {
      blend<true>(own.slopes + t * pitch + places.pitch, window, this->around(kept.k, P, at + t), D,
                  own.one + t * D);
      write_query(pair, at + t, own.one + t * D);
    }
    product<true>(own.slopes, 1, pitch, x, P, sums, D, marks, count, D);
    product<true>(own.rows, 1, pitch, g, Q, sums + marks * D, V, marks, count, V);
  }

  // Through a tile of the ends' softmax: dq, and what the keys need of it.
  void through_ends(Index pair, Index at, Index count, const Kept& kept, const Own& own) const {
    this->dot_all(kept.q + at * P, P, count, kept.k, P, D, own.exact);
    this->dot_all(kept.g + at * Q, Q, count, kept.v, Q, V, own.slope);
    for (Index t = 0; t < count; ++t) {
      float *row = own.exact + t * line, *slope = own.slope + t * line;
      const auto softmax = this->weigh_all(row);
      for (Index n = N; n < line; ++n) slope[n] = 0;
      Vec sum = {};
      for (Index n = 0; n < line; n += LANES) sum += load(row + n) * load(slope + n);
      const float mean = total(sum) * softmax.inverse;
      for (Index n = 0; n < line; n += LANES)
        store(slope + n, softmax.inverse * load(row + n) * (load(slope + n) - mean));
      float* end = kept.ends + 3 * (at + t - places.count);
      end[0] = softmax.top, end[1] = softmax.inverse, end[2] = mean;
    }
    this->blend_all(own.slope, count, kept.k, P, D, own.one);
    for (Index t = 0; t < count; ++t) write_query(pair, at + t, own.one + t * D);
  }

  // Sums of all parts in the first one's place, in their order; a part does a share of them.
  void collect(Index part, float* sums) const {
    const auto mine = this->share(marks, part);
    const Index from = mine.first * (D + V), to = mine.last * (D + V);
    for (Index other = 1; other < parts; ++other)
      for (Index i = from; i < to; ++i) sums[i] += sums[other * this->sums + i];
  }

  // Adds what the queries that have the token in their windows give to it.
  void from_windows(Index n, const Kept& kept, float* dk, float* dv, const Own& own) const {
    const Index on_grid = n - places.prefix, width = places.x.size, height = places.y.size;
    const Index a = on_grid / (width * height), b = on_grid / width % height, c = on_grid % width;
    Index count = 0;
    for (Index i = z.first[a]; i < z.last[a]; ++i)
      for (Index j = y.first[b]; j < y.last[b]; ++j) {
        const Index above = (a - places.z.first(i)) * places.y.wide + b - places.y.first(j);
        for (Index k = x.first[c]; k < x.last[c]; ++k) {
          const Index place = places.place[places.number(i, j, k)];
          const Index slot = place * own_pitch + above * places.x.wide + c - places.x.first(k);
          own.s[count] = kept.s[slot];
          own.w[count] = kept.w[slot];
          own.seer[count++] = place;
        }
      }
    blend<true>(own.s, count, [&](Index i) { return kept.q + own.seer[i] * P; }, D, dk);
    blend<true>(own.w, count, [&](Index i) { return kept.g + own.seer[i] * Q; }, V, dv);
  }

  // dk and dv of a tile of tokens, in the order of places too: the queries that see them are near.
  void through_keys(Index pair, Index at, Index count, const Kept& kept, const Own& own) const {
    const float *keys = kept.sums, *values = kept.sums + marks * D;
    for (Index t = 0; t < count; ++t) {
      const Index place = at + t, n = places.token[place];
      float *dk = own.one + t * D, *dv = own.two + t * V;
      const bool on_grid = place < places.count;
      const Index mark = on_grid ? places.cell[n] : places.cells + place - places.count;
      if (on_grid && !places.cells) {
        std::memset(dk, 0, D * sizeof(float));
        std::memset(dv, 0, V * sizeof(float));
      } else {
        std::memcpy(dk, keys + mark * D, D * sizeof(float));
        std::memcpy(dv, values + mark * V, V * sizeof(float));
      }
      if (on_grid && window) from_windows(n, kept, dk, dv, own);
    }
    for (Index from = 0; from < places.ends; from += TILE) {
      const Index ends = places.ends - from < TILE ? places.ends - from : TILE;
      const float* q = kept.q + (places.count + from) * P;
      const float* g = kept.g + (places.count + from) * Q;
      for (Index i = 0; i < ends; ++i) {
        float *row = own.exact + i * TILE, *slope = own.slope + i * TILE;
        const float* end = kept.ends + 3 * (from + i);
        const int32_t* token = places.token.data() + at;
        dots<LANES>(q + i * P, D, [&](Index j) { return kept.k + token[j] * P; }, 0, count, row);
        dots<LANES>(g + i * Q, V, [&](Index j) { return kept.v + token[j] * Q; }, 0, count, slope);
        for (Index n = 0; n < count; n += LANES) {
          const Vec p = power(load(row + n) - end[0]) * end[1];
          store(row + n, p);
          store(slope + n, p * (load(slope + n) - end[2]));
        }
      }
      product<true>(own.slope, 1, TILE, q, P, own.one, D, count, ends, D);
      product<true>(own.exact, 1, TILE, g, Q, own.two, V, count, ends, V);
    }
    // The gradients are those of natural logits.
    for (Index i = 0; i < count * D; i += LANES)
      store(own.one + i, float(1 / LOG2E) * load(own.one + i));
    for (Index t = 0; t < count; ++t) {
      const Index n = places.token[at + t];
      if (!this->counts(n)) {
        std::memset(own.one + t * D, 0, D * sizeof(float));
        std::memset(own.two + t * V, 0, V * sizeof(float));
      }
      write_tile(own.one + t * D, D, 1, this->result(call.grad_k, pair, n, dim), 0, dim);
      write_tile(own.two + t * V, V, 1, this->result(call.grad_v, pair, n, value), 0, value);
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
      this->in_stages(5, [&](Index stage, Index pair, Index part) {
        const Kept& kept = all[this->place(pair)];
        if (stage == 0) {
          prepare(pair, part, kept);
          this->copy(this->tokens(call.k, 1, pair, dim), D, P, part, kept.k);
          this->copy(this->tokens(call.v, 2, pair, value), V, Q, part, kept.v);
        }
        if (stage == 1) {
          this->mark(kept.k, P, D, part, kept.keys, kept.keys_t, nullptr);
          this->mark(kept.v, Q, V, part, kept.values, kept.values_t, nullptr);
        }
        if (stage == 2) {
          float *its = kept.sums + part * sums, along = 0;
          std::memset(its, 0, sums * sizeof(float));
          this->over_grid(part, [&](Index at, Index count) {
            through_queries(pair, at, count, kept, its, along, own);
          });
          kept.along[part] = along;
          this->over_ends(part, [&](Index at, Index count) {
            through_ends(pair, at, count, kept, own);
          });
        }
        if (stage == 3) {
          collect(part, kept.sums);
          if (part == 0 && call.gate) {
            float whole = 0;
            for (Index i = 0; i < parts; ++i) whole += kept.along[i];
            call.grad_gate[pair] = whole;
          }
        }
        if (stage == 4)
          this->over(0, N, TILE, part, [&](Index at, Index count) {
            through_keys(pair, at, count, kept, own);
          });
      });
    }
    return true;
  }
};

}  // namespace ttt

extern "C" {
bool ttt_float32(const ttt::NearCall* call) {
  return ttt::near_run<ttt::NearBackward<float>>(*call);
}
bool ttt_bfloat16(const ttt::NearCall* call) {
  return ttt::near_run<ttt::NearBackward<ttt::BFloat16>>(*call);
}
bool ttt_float16(const ttt::NearCall* call) {
  return ttt::near_run<ttt::NearBackward<ttt::Half>>(*call);
}
}
