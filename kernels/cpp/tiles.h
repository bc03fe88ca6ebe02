// What the node's passes on a CPU are made of: vectors, small products, and q, k, v as tiles of tokens.
//
// Tiles are matrices of float32 in scratch that stays in the cache, one row a token. Rows are padded
// with zeros to whole vectors, so that D and Dv may be any sizes.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

namespace ttt {

using Index = std::int64_t;

// Accumulators of a product fill the registers: ROWS x COLS vectors of LANES floats.
#if defined(__AVX512F__)
constexpr Index LANES = 16, ROWS = 6, COLS = 4;
#elif defined(__AVX2__)
constexpr Index LANES = 8, ROWS = 6, COLS = 2;
#elif defined(__aarch64__)
constexpr Index LANES = 4, ROWS = 6, COLS = 4;
#else
constexpr Index LANES = 4, ROWS = 4, COLS = 2;
#endif
constexpr Index TILE = 64;  // tokens

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Index padded(Index n) { return (n + LANES - 1) / LANES * LANES; }

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "expected two types of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp to about 1 ulp (Cephes' polynomial) between exp(-87) and exp(88), where it is clamped.
inline Vec exponential(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x;
  x = x < -87.0f ? Vec{} - 87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  Vec n = (x * 1.44269504f + magic) - magic;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * bits<Vec>(power);
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// ---------------------------------------------------------------------------------- dtypes

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));

inline Ints loaded_bits(const void* p) {
  Shorts shorts;
  std::memcpy(&shorts, p, sizeof shorts);
  return __builtin_convertvector(shorts, Ints);
}
inline Vec widened(const float* p) { return load(p); }
inline Vec widened(const BFloat16* p) { return bits<Vec>(loaded_bits(p) << 16); }
inline Vec widened(const Half* p) {
  const Ints all = loaded_bits(p), rest = all & 0x7fff;
  // The exponent's bias is 112 less; a product also makes subnormal numbers normal.
  const Ints finite = bits<Ints>(bits<Vec>(rest << 13) * bits<float>(0x77800000));
  const Ints special = (rest << 13) | 0x7f800000;
  return bits<Vec>((rest >= 0x7c00 ? special : finite) | (all & 0x8000) << 16);
}
template <typename T>
inline float widened_one(const T& x) {
  T some[LANES] = {x};
  return widened(some)[0];
}

// To the nearest, ties to even.
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, BFloat16& out) {
  const uint32_t all = bits<uint32_t>(x);
  out.bits = x != x ? 0x7fc0 : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half& out) {
  const uint32_t all = bits<uint32_t>(x), sign = all & 0x80000000, rest = all ^ sign;
  uint32_t half;
  if (rest >= 0x47800000)  // 65536 and more, infinity, NaN
    half = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  else if (rest < 0x38800000)  // subnormal: 0.5 has the same unit in the last place as 2^-24 here
    half = bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000;
  else
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  out.bits = uint16_t(half | sign >> 16);
}

// -------------------------------------------------------------------------------- products

// C (+)= A B for R rows and C vectors of columns; A is read by its strides.
template <Index R, Index C, bool ADD>
inline void block(const float* a, Index row, Index col, const float* b, Index ldb, float* c, Index ldc,
                  Index depth) {
  Vec sum[R][C];
  for (Index i = 0; i < R; ++i)
    for (Index j = 0; j < C; ++j) sum[i][j] = ADD ? load(c + i * ldc + j * LANES) : Vec{};
  for (Index k = 0; k < depth; ++k) {
    Vec line[C];
    for (Index j = 0; j < C; ++j) line[j] = load(b + k * ldb + j * LANES);
    for (Index i = 0; i < R; ++i) {
      const float x = a[i * row + k * col];
      for (Index j = 0; j < C; ++j) sum[i][j] += x * line[j];
    }
  }
  for (Index i = 0; i < R; ++i)
    for (Index j = 0; j < C; ++j) store(c + i * ldc + j * LANES, sum[i][j]);
}

template <Index C, bool ADD>
void panel(const float* a, Index row, Index col, const float* b, Index ldb, float* c, Index ldc,
           Index rows, Index depth) {
  Index i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    block<ROWS, C, ADD>(a + i * row, row, col, b, ldb, c + i * ldc, ldc, depth);
  if (i + 4 <= rows && ROWS > 4) {
    block<4, C, ADD>(a + i * row, row, col, b, ldb, c + i * ldc, ldc, depth);
    i += 4;
  }
  for (; i + 2 <= rows; i += 2)
    block<2, C, ADD>(a + i * row, row, col, b, ldb, c + i * ldc, ldc, depth);
  if (i < rows) block<1, C, ADD>(a + i * row, row, col, b, ldb, c + i * ldc, ldc, depth);
}

// C (+)= A B, A [rows, depth] with any strides, B and C with rows of whole vectors.
template <bool ADD>
void product(const float* a, Index row, Index col, const float* b, Index ldb, float* c, Index ldc,
             Index rows, Index depth, Index columns) {
  Index vectors = columns / LANES;
  for (Index j = 0; j < vectors;) {
    // As equal as they go: five vectors are three and two.
    Index left = vectors - j, count = (left + (left + COLS - 1) / COLS - 1) / ((left + COLS - 1) / COLS);
    const float* from = b + j * LANES;
    float* to = c + j * LANES;
    if (COLS >= 4 && count == 4)
      panel<COLS >= 4 ? 4 : 1, ADD>(a, row, col, from, ldb, to, ldc, rows, depth);
    else if (COLS >= 3 && count == 3)
      panel<COLS >= 3 ? 3 : 1, ADD>(a, row, col, from, ldb, to, ldc, rows, depth);
    else if (count == 2)
      panel<2, ADD>(a, row, col, from, ldb, to, ldc, rows, depth);
    else
      panel<1, ADD>(a, row, col, from, ldb, to, ldc, rows, depth);
    j += count;
  }
}

// ---------------------------------------------------------------------------------- inputs

// One of q, k, v of one pair (batch item, head): [N, width] with strides.
template <typename T>
struct Tokens {
  const T* at;
  Index token, channel, count, width;

  // Row n's channels from c on, those past the width zero; INSIDE: there are LANES, side by side.
  template <bool INSIDE>
  Vec read(Index n, Index c) const {
    const T* p = at + n * token + c * channel;
    if (INSIDE) return widened(p);
    Vec v = {};
    for (Index i = 0; i < LANES && c + i < width; ++i) v[i] = widened_one(p[i * channel]);
    return v;
  }
  void prefetch(Index n) const {
    const char* p = reinterpret_cast<const char*>(at + (n < count ? n : count - 1) * token);
    for (Index i = 0; i < width * Index(sizeof(T)); i += 64) __builtin_prefetch(p + i);
  }
};

template <Index N>
using Number = std::integral_constant<Index, N>;

// Calls f(how many vectors, whether all channels exist and lie side by side, first channel).
template <typename T, typename F>
inline void over_channels(const Tokens<T>& in, Index pitch, F f) {
  Index c = 0;
  if (in.channel == 1) {
    for (; c + 4 * LANES <= in.width; c += 4 * LANES) f(Number<4>(), Number<true>(), c);
    for (; c + LANES <= in.width; c += LANES) f(Number<1>(), Number<true>(), c);
  }
  for (; c < pitch; c += LANES) f(Number<1>(), Number<false>(), c);
}

struct Grid {
  Index size[3], prefix;  // three axes, the leading ones of size 1 where there are fewer
  Index cells() const { return size[0] * size[1] * size[2]; }
};

// Depthwise kernel of one head, by tap: taps[27][pitch], bias[pitch]; taps is null without one.
struct Kernel {
  const float *taps, *bias;
};

// The neighbours of a token on the grid and which taps of the kernel they meet.
struct Near {
  Index token[27], tap[27], count;
};

// Goes through the grid's cells in row-major order.
struct Cell {
  const Index* size;
  Index z, y, x;
  Cell(const Grid& grid, Index n)
      : size(grid.size), z(n / (size[1] * size[2])), y(n / size[2] % size[1]), x(n % size[2]) {}
  void next() {
    if (++x == size[2]) {
      x = 0;
      if (++y == size[1]) y = 0, ++z;
    }
  }
  void neighbours(Index n, Near& near) const {
    near.count = 0;
    for (Index i = z ? -1 : 0; i <= (z + 1 < size[0] ? 1 : 0); ++i)
      for (Index j = y ? -1 : 0; j <= (y + 1 < size[1] ? 1 : 0); ++j)
        for (Index k = x ? -1 : 0; k <= (x + 1 < size[2] ? 1 : 0); ++k) {
          near.token[near.count] = n + (i * size[1] + j) * size[2] + k;
          near.tap[near.count++] = ((i + 1) * 3 + j + 1) * 3 + k + 1;
        }
  }
};

// C vectors of channels from c on of: x + conv(x), x = (token - mean) * rstd.
template <Index C, bool INSIDE, typename T>
inline void convolve(const Tokens<T>& in, const float* mean, const float* rstd,
                     const Kernel& kernel, const Near& near, Index n, Index c, float* out,
                     Index pitch) {
  Vec shift[C], sum[C];
  for (Index j = 0; j < C; ++j) {
    shift[j] = mean ? load(mean + c + j * LANES) : Vec{};
    sum[j] = in.template read<INSIDE>(n, c + j * LANES) - shift[j];
  }
  for (Index i = 0; i < near.count; ++i) {
    const float* taps = kernel.taps + near.tap[i] * pitch + c;
    for (Index j = 0; j < C; ++j)
      sum[j] += load(taps + j * LANES) *
                (in.template read<INSIDE>(near.token[i], c + j * LANES) - shift[j]);
  }
  for (Index j = 0; j < C; ++j) {
    if (rstd) sum[j] *= load(rstd + c + j * LANES);
    if (near.count) sum[j] += load(kernel.bias + c + j * LANES);
    store(out + c + j * LANES, sum[j]);
  }
}

// x + conv(x) of the tokens from `first` on, x = (token - mean) * rstd; zeros beyond the width.
template <typename T>
void read_tile(const Tokens<T>& in, const float* mean, const float* rstd, const Kernel& kernel,
               const Grid& grid, Index first, Index count, float* out, Index pitch) {
  const Index end = kernel.taps ? grid.prefix + grid.cells() : 0;
  Cell cell(grid, first > grid.prefix ? first - grid.prefix : 0);
  Near near;
  for (Index n = first; n < first + count; ++n, out += pitch) {
    near.count = 0;
    if (n >= grid.prefix && n < end) {
      cell.neighbours(n, near);
      cell.next();
    }
    in.prefetch(n + TILE + (near.count ? grid.size[2] : 0));
    over_channels(in, pitch, [&](auto vectors, auto inside, Index c) {
      convolve<vectors.value, inside.value>(in, mean, rstd, kernel, near, n, c, out, pitch);
    });
  }
}

template <typename T>
void read_plain(const Tokens<T>& in, Index first, Index count, float* out, Index pitch) {
  for (Index n = first; n < first + count; ++n, out += pitch) {
    in.prefetch(n + TILE);
    over_channels(in, pitch, [&](auto vectors, auto inside, Index c) {
      for (Index j = 0; j < vectors.value; ++j)
        store(out + c + j * LANES, in.template read<inside.value>(n, c + j * LANES));
    });
  }
}

// Scratch carved from one allocation; `memory` is null where there is not enough.
struct Scratch {
  float* memory;
  float* next;
  explicit Scratch(Index floats)
      : memory(static_cast<float*>(::operator new((floats + 16) * sizeof(float),
                                                  std::align_val_t(64), std::nothrow))),
        next(memory) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory, std::align_val_t(64)); }
  float* take(Index floats) {
    float* p = next;
    next += (floats + 15) / 16 * 16;
    return p;
  }
};

// A [rows, columns] contiguous matrix into rows of `pitch`, zeros around it; transposed on request.
inline void pack(const float* from, Index rows, Index columns, float* to, Index height, Index pitch,
          bool transposed) {
  std::memset(to, 0, height * pitch * 4);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < columns; ++j)
      to[transposed ? j * pitch + i : i * pitch + j] = from[i * columns + j];
}

// Mean and sum of (x - mean)^2 of C vectors of channels, by tiles (Chan, Golub, LeVeque, 1979).
template <Index C, bool INSIDE, typename T>
void moments(const Tokens<T>& k, Index first, Index last, Index c, float* mean, float* square) {
  Vec total[C] = {}, spread[C] = {};
  for (Index at = first; at < last; at += TILE) {
    const Index count = last - at < TILE ? last - at : TILE;
    Vec sum[C] = {}, around[C] = {};
    for (Index n = at; n < at + count; ++n) {
      k.prefetch(n + TILE);
      for (Index j = 0; j < C; ++j) sum[j] += k.template read<INSIDE>(n, c + j * LANES);
    }
    for (Index j = 0; j < C; ++j) sum[j] /= float(count);
    for (Index n = at; n < at + count; ++n)
      for (Index j = 0; j < C; ++j) {
        const Vec d = k.template read<INSIDE>(n, c + j * LANES) - sum[j];
        around[j] += d * d;
      }
    const float seen = float(at - first), both = seen + float(count);
    for (Index j = 0; j < C; ++j) {
      const Vec delta = sum[j] - total[j];
      total[j] += delta * (float(count) / both);
      spread[j] += around[j] + delta * delta * (seen * float(count) / both);
    }
  }
  for (Index j = 0; j < C; ++j) {
    store(mean + c + j * LANES, total[j]);
    store(square + c + j * LANES, spread[j]);
  }
}

// A head's depthwise kernel [D, taps] as [27][pitch], its taps in the last axes of three. Mirrored,
// without the bias, it is the kernel of the gradients.
inline Kernel kernel_of(const float* weight, const float* bias, Index head, Index axes, Index dim,
                        Index pitch, float* space, bool mirrored = false) {
  if (!weight) return {nullptr, nullptr};
  const Index taps = axes == 1 ? 3 : axes == 2 ? 9 : 27, skip = (27 - taps) / 2;
  std::memset(space, 0, 28 * pitch * sizeof(float));
  for (Index d = 0; d < dim; ++d) {
    for (Index i = 0; i < taps; ++i) {
      const Index tap = mirrored ? 26 - skip - i : skip + i;
      space[tap * pitch + d] = weight[(head * dim + d) * taps + i];
    }
    if (!mirrored) space[27 * pitch + d] = bias[head * dim + d];
  }
  return {space, space + 27 * pitch};
}

// sums[tap] += sum_n grad[n] (x[n'] - mean), n' the neighbour that the tap meets; sums[27] += sum_n
// grad[n]; for the grid tokens of a part, where grad [N][pitch] is that of x + conv(x).
template <typename T>
void correlate(const Tokens<T>& in, const float* mean, const float* grad, const Grid& grid,
               Index first, Index last, float* sums, Index pitch) {
  const Index end = grid.prefix + grid.cells();
  if (first < grid.prefix) first = grid.prefix;
  if (last > end) last = end;
  Cell cell(grid, first < last ? first - grid.prefix : 0);
  Near near;
  for (Index n = first; n < last; ++n) {
    cell.neighbours(n, near);
    cell.next();
    over_channels(in, pitch, [&](auto vectors, auto inside, Index c) {
      constexpr Index C = vectors.value;
      Vec d[C], shift[C];
      for (Index j = 0; j < C; ++j) {
        d[j] = load(grad + n * pitch + c + j * LANES);
        shift[j] = mean ? load(mean + c + j * LANES) : Vec{};
        float* bias = sums + 27 * pitch + c + j * LANES;
        store(bias, load(bias) + d[j]);
      }
      for (Index i = 0; i < near.count; ++i)
        for (Index j = 0; j < C; ++j) {
          float* tap = sums + near.tap[i] * pitch + c + j * LANES;
          const Vec x = in.template read<inside.value>(near.token[i], c + j * LANES);
          store(tap, load(tap) + d[j] * (x - shift[j]));
        }
    });
  }
}

// Rows of a tile, without their padding, in the dtype of the results, `stride` apart.
template <typename T>
void write_tile(const float* tile, Index pitch, Index count, T* out, Index stride, Index width) {
  for (Index t = 0; t < count; ++t) {
    if (std::is_same_v<T, float>)
      std::memcpy(out + t * stride, tile + t * pitch, width * sizeof(T));
    else
      for (Index c = 0; c < width; ++c) narrow(tile[t * pitch + c], out[t * stride + c]);
  }
}

}  // namespace ttt
