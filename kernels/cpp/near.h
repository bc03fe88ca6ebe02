// What near attention's forward and backward pass share: see ops/near.py for what it is.
//
// For a query x (times scale * log2 e) of the grid, with k_j, v_j the tokens j of its window and
// K_c, V_c the sums over the tokens of a cell c, of which the window leaves n_c to it:
//
//   l_j = x . k_j,  l_c = (x . K_c - sum over the window's j in c of l_j) / n_c
//   e_j = 2^(l_j - top),  e_c = 2^(l_c - top)
//   a = (sum_j (e_j - e_c(j)) v_j + sum_c e_c V_c) / (sum_j e_j + sum_c n_c e_c)
//
// which is the softmax with log n_c in the logits. Prefix and suffix tokens, the ends, count as cells
// of one token that no window meets; cells and ends together are the marks. All queries meet the same
// marks, so theirs are products of matrices; the window's are sums over channels, row by row.
//
// Of keys that do not count the rows are zeros, their logits -inf and their gradients zeros; a query
// that sees none that does gets 0.
//
// Queries have places of their own: bands of a few rows of the grid, column by column, so that one
// query's window is mostly the last one's; then the ends, which attend to all tokens.

#pragma once

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "pairs.h"

namespace ttt {

// What Python hands over; near_call.py has the same fields. The gate and its gradient are float32,
// all else as in Call of node.h.
struct NearCall {
  const void *q, *k, *v, *grad, *base;
  const float* gate;  // [H], or null for half of each
  void *out, *grad_q, *grad_k, *grad_v, *grad_base;
  float* grad_gate;  // [B, H]
  const bool* mask;  // [N], the keys that count of the one batch item there is then, or null
  Index strides[20];  // of q, k, v, grad and base: batch, head, token, channel
  Index batch, heads, tokens, dim, value;
  Index grid[3], prefix, side, cells;  // three axes, the leading ones of size 1
  double scale;
  Index threads;
};

// ----------------------------------------------------------------------- sums over channels

// Lane i of the result is a[i] + a[i ^ H], or of b where i has the bit H.
template <Index H, std::size_t... I>
inline Vec folded(Vec a, Vec b, std::index_sequence<I...>) {
  const Vec own = {((Index(I) & H) ? b : a)[I]...};
  const Vec across = {((Index(I) & H) ? b : a)[I ^ H]...};
  return own + across;
}

// The sums of the lanes of G vectors; that of vector i is in the lane i * LANES / G.
template <Index G, Index H = LANES / 2>
inline Vec totals(Vec* x) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
  if constexpr (H == 0) {
    return x[0];
  } else if constexpr (G == 1) {
    x[0] = folded<H>(x[0], x[0], lanes);
    return totals<1, H / 2>(x);
  } else {
    for (Index i = 0; i < G / 2; ++i) x[i] = folded<H>(x[i], x[i + G / 2], lanes);
    return totals<G / 2, H / 2>(x);
  }
}

inline float total(Vec x) { return totals<1>(&x)[0]; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
template <Index H = LANES / 2, std::size_t... I>
inline float largest(Vec x, std::index_sequence<I...> lanes) {
  if constexpr (H == 0) {
    return x[0];
  } else {
    const Vec across = {x[I ^ H]...};
    return largest<H / 2>(larger(across, x), lanes);
  }
}
inline float largest(Vec x) { return largest(x, std::make_index_sequence<LANES>()); }

// 2^x to about 1 ulp (Cephes' polynomial) for x of at most 0; from -126 on downwards it is 2^-126.
inline Vec power(Vec x) {
  x = x < -126.0f ? Vec{} - 126.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = x + magic, r = x - (shifted - magic);
  Vec p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.0f;
  return p * bits<Vec>((bits<Ints>(shifted) << 23) + (127 << 23));
}

// out[j] = x . row(j) for the rows from `first` to `last`, G at a time, and then fewer.
template <Index G, typename Row>
inline void dots(const float* x, Index width, Row row, Index first, Index last, float* out) {
  for (; first + G <= last; first += G) {
    const float* at[G];
    for (Index i = 0; i < G; ++i) at[i] = row(first + i);
    Vec sum[G] = {};
    for (Index c = 0; c < width; c += LANES) {
      const Vec line = load(x + c);
      for (Index i = 0; i < G; ++i) sum[i] += line * load(at[i] + c);
    }
    const Vec all = totals<G>(sum);
    if constexpr (G == LANES) {
      store(out + first, all);
    } else {
      for (Index i = 0; i < G; ++i) out[first + i] = all[i * (LANES / G)];
    }
  }
  if constexpr (G > 1) dots<G / 2>(x, width, row, first, last, out);
}

// out (+)= sum_j weights[j] row(j), C vectors of channels at a time, and then fewer.
template <Index C, bool ADD, typename Weights, typename Row>
inline void blend(Weights weights, Index count, Row row, Index c, Index width, float* out) {
  for (; c + C * LANES <= width; c += C * LANES) {
    Vec sum[C];
    for (Index i = 0; i < C; ++i) sum[i] = ADD ? load(out + c + i * LANES) : Vec{};
    for (Index j = 0; j < count; ++j) {
      const float* from = row(j) + c;
      for (Index i = 0; i < C; ++i) sum[i] += weights[j] * load(from + i * LANES);
    }
    for (Index i = 0; i < C; ++i) store(out + c + i * LANES, sum[i]);
  }
  if constexpr (C > 1) blend<C / 2, ADD>(weights, count, row, c, width, out);
}
template <bool ADD, typename Weights, typename Row>
inline void blend(Weights weights, Index count, Row row, Index width, float* out) {
  blend<8, ADD>(weights, count, row, 0, width, out);
}
struct Ones {
  float operator[](Index) const { return 1.0f; }
};

// ---------------------------------------------------------------------------------- places

// An axis of the grid: `wide` positions are in a window, its cells are `cells`, none is empty.
struct Axis {
  Index size, wide, cells;
  Axis(Index size, Index side, Index count)
      : size(size),
        wide(side < size ? side : size),
        cells(count < size ? count : size),
        side(side) {}
  Index first(Index position) const {  // of the window around it
    const Index wanted = position - side / 2, most = size - wide;
    return wanted < 0 ? 0 : wanted > most ? most : wanted;
  }
  Index cell(Index position) const { return position * cells / size; }
  Index begin(Index cell) const { return (cell * size + cells - 1) / cells; }  // its first position
  Index met(Index position, Index cell) const {  // how much of a cell is in a window
    const Index from = first(position), to = from + wide;
    const Index low = from > begin(cell) ? from : begin(cell);
    const Index high = to < begin(cell + 1) ? to : begin(cell + 1);
    return high > low ? high - low : 0;
  }

 private:
  Index side;
};

constexpr Index BAND = 4;  // rows

// Who sees whom; the same for all pairs.
struct Places {
  const Axis z, y, x;
  const Index prefix, count, ends;          // tokens before, on and off the grid
  const Index window, cells, marks;         // how many of each a query meets
  const Index counted, pitch;               // cells and marks, padded
  std::vector<int32_t> token, place, start; // of each place, of each token, of a place's window
  std::vector<Index> line, column;          // of a place, as far as they are in rows and columns
  std::vector<int32_t> cell;                // of each token of the grid
  std::vector<Index> step;                  // from a window's start to each of its tokens
  // Tokens that count of marks; of cells in windows: z and y, x; with a mask in rows alone.
  std::vector<float> size, rows, columns;

  explicit Places(const NearCall& call)
      : z(call.grid[0], call.side, call.cells),
        y(call.grid[1], call.side, call.cells),
        x(call.grid[2], call.side, call.cells),
        prefix(call.prefix),
        count(z.size * y.size * x.size),
        ends(call.tokens - count),
        window(call.side ? z.wide * y.wide * x.wide : 0),
        cells(call.cells ? z.cells * y.cells * x.cells : 0),
        marks(cells + ends),
        counted(padded(cells)),
        pitch(padded(marks)),
        token(call.tokens),
        place(call.tokens),
        start(count),
        line(count),
        column(count),
        cell(call.tokens),
        step(window),
        size(pitch),
        rows((call.mask ? count : z.size * y.size) * counted),
        columns(x.size * counted) {
    Index at = 0;
    for (Index i = 0; i < z.size; ++i)
      for (Index band = 0; band < y.size; band += BAND)
        for (Index k = 0; k < x.size; ++k)
          for (Index j = band; j < band + BAND && j < y.size; ++j, ++at) {
            token[at] = int32_t(number(i, j, k));
            start[at] = int32_t(number(z.first(i), y.first(j), x.first(k)));
            line[at] = (call.mask ? at : i * y.size + j) * counted;
            column[at] = call.mask ? 0 : k * counted;
          }
    for (Index i = 0; i < ends; ++i) token[count + i] = int32_t(end(i));
    for (Index i = 0; i < call.tokens; ++i) place[token[i]] = int32_t(i);
    if (window) {
      Index slot = 0;
      for (Index i = 0; i < z.wide; ++i)
        for (Index j = 0; j < y.wide; ++j)
          for (Index k = 0; k < x.wide; ++k) step[slot++] = number(i, j, k) - prefix;
    }
    auto counts = [&](Index n) { return !call.mask || call.mask[n]; };
    for (Index i = 0; i < ends; ++i) size[cells + i] = counts(end(i));
    if (!cells) return;
    each(z.size, y.size, x.size, [&](Index i, Index j, Index k) {
      const Index its = (z.cell(i) * y.cells + y.cell(j)) * x.cells + x.cell(k);
      cell[number(i, j, k)] = int32_t(its);
      size[its] += counts(number(i, j, k));
    });
    if (!window) return;
    if (call.mask) {
      std::fill_n(columns.begin(), counted, 1.0f);
      for (Index at = 0; at < count; ++at)
        for (const Index n : step)
          if (counts(start[at] + n)) rows[line[at] + cell[start[at] + n]] += 1;
      return;
    }
    each(z.cells, y.cells, x.cells, [&](Index a, Index b, Index c) {
      const Index its = (a * y.cells + b) * x.cells + c;
      for (Index i = 0; i < z.size; ++i)
        for (Index j = 0; j < y.size; ++j)
          rows[(i * y.size + j) * counted + its] = float(z.met(i, a) * y.met(j, b));
      for (Index k = 0; k < x.size; ++k) columns[k * counted + its] = float(x.met(k, c));
    });
  }

  Index number(Index i, Index j, Index k) const { return prefix + (i * y.size + j) * x.size + k; }
  // The i-th token of prefix and suffix.
  Index end(Index i) const { return i < prefix ? i : i + count; }

  template <typename F>
  static void each(Index a, Index b, Index c, F f) {
    for (Index i = 0; i < a; ++i)
      for (Index j = 0; j < b; ++j)
        for (Index k = 0; k < c; ++k) f(i, j, k);
  }
};

// ------------------------------------------------------------------------------------ pass

constexpr Index EXACT = 8;  // queries that see all tokens, at a time
constexpr Index AHEAD = 16;  // rows that are fetched before they are read
constexpr double LOG2E = 1.4426950408889634;

template <typename T>
struct NearPass : Pairs<T, NearCall> {
  using Pairs<T, NearCall>::call, Pairs<T, NearCall>::N, Pairs<T, NearCall>::D;
  using Pairs<T, NearCall>::V, Pairs<T, NearCall>::dim, Pairs<T, NearCall>::value;
  using Pairs<T, NearCall>::parts;

  const Places places;
  const Index marks = places.marks, window = places.window;
  const Index pitch = places.pitch + padded(window);  // of a query's row: marks, then the window
  const Index line = padded(N);                       // of a row for all tokens
  // Rows of keys and values are apart so that those of a power of two do not meet in the cache.
  const Index P = D + LANES, Q = V + LANES;
  std::vector<Index> steps_k, steps_v;  // as places.step, in floats of rows that far apart

  explicit NearPass(const NearCall& given) : Pairs<T, NearCall>(given), places(given) {
    for (const Index step : places.step) {
      steps_k.push_back(step * P);
      steps_v.push_back(step * Q);
    }
    const Index tiles = (N + TILE - 1) / TILE;
    if (parts > tiles) parts = tiles;
  }

  // Of `count` things those from first to last are a part's.
  struct Share {
    Index first, last;
  };
  Share share(Index count, Index part) const {
    return {count * part / parts, count * (part + 1) / parts};
  }
  // f(first place, how many) for the tiles of a part: those of the grid, and those of the ends.
  template <typename F>
  void over_grid(Index part, F f) const {
    over(0, places.count, TILE, part, f);
  }
  template <typename F>
  void over_ends(Index part, F f) const {
    over(places.count, places.ends, EXACT, part, f);
  }
  template <typename F>
  void over(Index from, Index count, Index tile, Index part, F f) const {
    const Share mine = share((count + tile - 1) / tile, part);
    for (Index i = mine.first; i < mine.last; ++i)
      f(from + i * tile, count - i * tile < tile ? count - i * tile : tile);
  }

  // Token n in float32, times `scale`, zeros beyond its width.
  static void read(const Tokens<T>& in, Index n, Index width, float scale, float* out) {
    over_channels(in, width, [&](auto vectors, auto inside, Index c) {
      for (Index j = 0; j < vectors.value; ++j)
        store(out + c + j * LANES, in.template read<inside.value>(n, c + j * LANES) * scale);
    });
  }

  bool counts(Index n) const { return !call.mask || call.mask[n]; }

  // A part of a tensor's tokens as rows.
  void copy(const Tokens<T>& in, Index width, Index apart, Index part, float* rows) const {
    const Share mine = share(N, part);
    for (Index n = mine.first; n < mine.last; ++n) {
      in.prefetch(n + AHEAD);
      if (counts(n))
        read(in, n, width, 1.0f, rows + n * apart);
      else
        std::memset(rows + n * apart, 0, width * sizeof(float));
    }
  }

  // Row j of rows side by side.
  struct Rows {
    const float* from;
    Index apart;
    const float* operator()(Index j) const { return from + j * apart; }
  };

  // A part of the marks: sums of a cell's rows, or an end's row; as [marks][width], or transposed,
  // [width][places.pitch], or both.
  void mark(const float* rows, Index apart, Index width, Index part, float* plain,
            float* transposed, float* space) const {
    const Share mine = share(marks, part);
    const Places& p = places;
    for (Index m = mine.first; m < mine.last; ++m) {
      float* to = plain ? plain + m * width : space;
      if (m >= p.cells) {
        std::memcpy(to, rows + p.end(m - p.cells) * apart, width * sizeof(float));
      } else {
        const Index a = m / (p.y.cells * p.x.cells), b = m / p.x.cells % p.y.cells;
        const Index c = m % p.x.cells;
        std::memset(to, 0, width * sizeof(float));
        for (Index i = p.z.begin(a); i < p.z.begin(a + 1); ++i)
          for (Index j = p.y.begin(b); j < p.y.begin(b + 1); ++j)
            blend<true>(Ones(), p.x.begin(c + 1) - p.x.begin(c),
                        Rows{rows + p.number(i, j, p.x.begin(c)) * apart, apart}, width, to);
      }
      if (transposed)
        for (Index d = 0; d < width; ++d) transposed[d * p.pitch + m] = to[d];
    }
    if (transposed && part == 0)
      for (Index d = 0; d < width; ++d)
        for (Index m = marks; m < p.pitch; ++m) transposed[d * p.pitch + m] = 0;
  }

  // Row j of the window of the query at a place.
  struct Around {
    const float* from;
    const Index* step;
    const float* operator()(Index j) const { return from + step[j]; }
  };
  Around around(const float* rows, Index apart, Index place) const {
    return {rows + places.start[place] * apart, apart == P ? steps_k.data() : steps_v.data()};
  }

  // Fetches what the window of a place has beside that of the one before.
  void fetch(const float* rows, Index apart, Index place) const {
    if (!window || place >= places.count) return;
    const Index wide = places.x.wide, start = places.start[place];
    const bool below = place && start - places.start[place - 1] == places.x.size;
    for (Index j = below ? window - 1 : wide - 1; j < window; j += wide) {
      const float* row = rows + (start + places.step[j]) * apart;
      for (Index c = 0; c < apart; c += 16) __builtin_prefetch(row + c);
    }
  }

  // x . row of the window, into its part of the query's row, `with` behind it.
  void dot_window(const float* x, const float* rows, Index apart, Index width, Index place,
                  float with, float* row) const {
    if (!window) return;
    float* own = row + places.pitch;
    store(row + pitch - LANES, Vec{} + with);
    dots<LANES>(x, width, around(rows, apart, place), 0, window, own);
  }

  // Takes what the window has out of its cells: lines of it that are in the same cells together.
  void exclude(Index place, float* row) const {
    if (!places.cells || !window) return;
    const int32_t* cell = places.cell.data() + places.start[place];
    const Index *step = places.step.data(), wide = places.x.wide, lines = window / wide;
    const float* own = row + places.pitch;
    for (Index c = 0; c < wide; c += LANES)
      for (Index i = 0; i < lines;) {
        const int32_t* its = cell + step[i * wide];
        Vec sum = load(own + i * wide + c);
        for (++i; i < lines && cell[step[i * wide]] == *its; ++i) sum += load(own + i * wide + c);
        float sums[LANES];
        store(sums, sum);
        for (Index j = 0; j < LANES && c + j < wide; ++j) row[its[c + j]] -= sums[j];
      }
  }
  // The same the other way: own - cell.
  void withdraw(Index place, float* row) const {
    if (!places.cells) return;
    const int32_t* cell = places.cell.data() + places.start[place];
    float* own = row + places.pitch;
    for (Index j = 0; j < window; ++j) own[j] -= row[cell[places.step[j]]];
  }

  // Gives keys of the window that do not count no weight.
  void hide(Index place, float* row) const {
    if (!call.mask) return;
    float* own = row + places.pitch;
    for (Index j = 0; j < window; ++j)
      if (!counts(places.start[place] + places.step[j])) own[j] = -__builtin_inff();
  }
  // What is taken from logits before they are powers; with a mask all may be -inf.
  float level(float top) const { return call.mask && top == -__builtin_inff() ? 0.0f : top; }
  float inverse(float sum) const { return call.mask && sum == 0.0f ? 0.0f : 1.0f / sum; }

  // How many tokens the window leaves to the cells, LANES of them from c on.
  struct Left {
    const float *size, *rows, *columns;
    Vec operator()(Index c) const { return load(size + c) - load(rows + c) * load(columns + c); }
  };
  Left left(Index place) const {
    return {places.size.data(), places.rows.data() + places.line[place],
            places.columns.data() + places.column[place]};
  }

  // Rows of a tile, x . K and x . k, as e_c and e_j; factors[t] = 1 / (sum_j e_j + sum_c n_c e_c).
  // One step at a time for all of them: a query's own steps wait for each other.
  void weigh(Index at, Index count, float* rows, float* factors) const {
    for (Index t = 0; t < count; ++t) exclude(at + t, rows + t * pitch);
    float top[TILE];
    for (Index t = 0; t < count; ++t) hide(at + t, rows + t * pitch);
    for (Index t = 0; t < count; ++t) top[t] = level(average(at + t, rows + t * pitch));
    for (Index t = 0; t < count; ++t)
      factors[t] = inverse(raise(at + t, rows + t * pitch, top[t]));
  }
  // Sums over cells as means; returns the largest logit.
  float average(Index place, float* row) const {
    const Left left = this->left(place);
    const float none = -__builtin_inff();
    Vec top = Vec{} + none;
    for (Index c = 0; c < places.counted; c += LANES) {
      const Vec count = left(c), sum = load(row + c);
      const Vec mean = count > 0.0f ? sum / count : none;
      store(row + c, mean);
      top = larger(mean, top);
    }
    for (Index c = places.counted; c < places.pitch; c += LANES) {
      const Vec one = load(places.size.data() + c) > 0.0f ? load(row + c) : none;
      store(row + c, one);
      top = larger(one, top);
    }
    for (Index c = places.pitch; c < pitch; c += LANES) top = larger(load(row + c), top);
    return largest(top);
  }
  // Logits as powers; returns their sum.
  float raise(Index place, float* row, float top) const {
    const Left left = this->left(place);
    Vec sum = {};
    auto step = [&](Index c) {
      const Vec e = power(load(row + c) - top);
      store(row + c, e);
      return e;
    };
    for (Index c = 0; c < places.counted; c += LANES) sum += left(c) * step(c);
    for (Index c = places.counted; c < places.pitch; c += LANES)
      sum += load(places.size.data() + c) * step(c);
    for (Index c = places.pitch; c < pitch; c += LANES) sum += step(c);
    return total(sum);
  }

  // x . k of all tokens, for queries whose rows are `step` apart; blocks of keys stay in the cache.
  void dot_all(const float* x, Index step, Index count, const float* rows, Index apart, Index width,
               float* out) const {
    for (Index at = 0; at < N; at += TILE)
      for (Index i = 0; i < count; ++i)
        dots<LANES>(x + i * step, width, Rows{rows + at * apart, apart}, 0,
                    N - at < TILE ? N - at : TILE, out + i * line + at);
  }
  // out = sum over all tokens of weights and rows.
  void blend_all(const float* weights, Index count, const float* rows, Index apart, Index width,
                 float* out) const {
    std::memset(out, 0, count * width * sizeof(float));
    for (Index at = 0; at < N; at += TILE)
      for (Index i = 0; i < count; ++i)
        blend<true>(weights + i * line + at, N - at < TILE ? N - at : TILE,
                    Rows{rows + at * apart, apart}, width, out + i * width);
  }

  struct Sum {
    float top, inverse;  // of softmax: 2^(l - top) * inverse
  };
  // 2^(logit - top) of all tokens.
  Sum weigh_all(float* row) const {
    for (Index n = 0; n < line; ++n)
      if (n >= N || !counts(n)) row[n] = -__builtin_inff();
    Vec top = load(row), sum = {};
    for (Index n = LANES; n < line; n += LANES) top = larger(load(row + n), top);
    const float most = level(largest(top));
    for (Index n = 0; n < line; n += LANES) {
      const Vec e = power(load(row + n) - most);
      store(row + n, e);
      sum += e;
    }
    return {most, inverse(total(sum))};
  }
};

// Whether there was memory for a pass.
template <typename P>
bool near_run(const NearCall& call) {
  try {
    return P(call).run();
  } catch (const std::bad_alloc&) {
    return false;
  } catch (const std::length_error&) {  // more than a vector can have
    return false;
  }
}

}  // namespace ttt
