// What every instruction set implements; kernels_*.cpp compile kernels.inc once for each.
#pragma once
#include <cstdint>

namespace sl {

// One row of a sub-batch in one step. Token t of the row's n_new new ones sits at line
// first_token + t of q, k, v and out, and at position start + t of the row's KV.
//
// Position p of (k or v, head) lies at
//   base + chunks[first_chunk + p / chunk_positions]
//     + (p % chunk_positions) * position_stride + head * head_stride + (v ? kv_stride : 0)
// so one description serves every memory order of the slabs. All strides in bytes.
struct Row {
  int64_t first_token, n_new, start;
  int64_t chunk_positions, first_chunk;
  int64_t kv_stride, head_stride, position_stride;
};

// The numbers of a weight; arithmetic is in float32, which holds each of them exactly.
enum class Dtype {
  float32, bfloat16, float16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, mxfp4,
  int4_g32, int4_g64, int4_g128, int4_g32_sym, int4_g64_sym, int4_g128_sym,
  int4_g32_min, int4_g64_min, int4_g128_min,
  int8_g32, int8_g64, int8_g128, int8_g32_sym, int8_g64_sym, int8_g128_sym,
  fp8_g32, fp8_g64, fp8_g128
};
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Blocks of GGUF files: a number is d * q, or d * q + m, with q of so many bits. In blocks of 256 d
// and m of each part of 32 (q6_k: 16) are a half times a small integer.
struct q4_0 {
  f16 d;
  uint8_t qs[16];  // numbers 0 to 15 in the lower halves, 16 to 31 in the upper ones
};
struct q4_1 {
  f16 d, m;
  uint8_t qs[16];
};
struct q5_0 {
  f16 d;
  uint8_t qh[4];  // the fifth bits
  uint8_t qs[16];
};
struct q5_1 {
  f16 d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct q8_0 {
  f16 d;
  int8_t qs[32];
};
struct q4_k {
  f16 d, m;
  uint8_t scales[12];  // 8 of 6 bits for d, 8 for m
  uint8_t qs[128];     // parts in pairs: the lower halves of 32 bytes, then the upper ones
};
struct q5_k {
  f16 d, m;
  uint8_t scales[12];
  uint8_t qh[32];  // bit s: the fifth bits of part s
  uint8_t qs[128];
};
struct q6_k {
  uint8_t ql[128];  // lower four bits
  uint8_t qh[64];   // upper two
  int8_t scales[16];
  f16 d;
};
// 4-bit floats (E2M1) that share a power of two: a number is 2^(e - 127) times one of them.
struct mxfp4 {
  uint8_t e;
  uint8_t qs[16];  // as q4_0's
};

// Groups of integers that share a scale, sl_serve/weights/groups.py: a number is d * q, or with a
// zero d * q - d * zero, which is exact. Signed bytes, and half bytes in parts of 32: 16 lower ones,
// then 16 upper ones, 0 to 15, or without a zero 8 more than what they stand for.
template <int kBits, int kGroup, bool kZero> struct ints {
  uint8_t head[4];  // d as a float; with a zero, that is its last byte, a signed one
  uint8_t qs[kGroup * kBits / 8];
};

// Groups of half bytes that share a scale and a minimum: d * q + m, packed as above.
template <int kGroup> struct int4_min {
  f16 d, m;
  uint8_t qs[kGroup / 2];
};

// Groups of e4m3fn numbers (OCP 8-bit floating point) that share a scale.
template <int kGroup> struct fp8 {
  uint8_t head[4];  // d as a float
  uint8_t qs[kGroup];
};

struct AttentionArgs {
  float* q;  // (tokens, n_heads, head_dim), lines q_stride floats apart
  const float* k;
  const float* v;  // (tokens, n_kv_heads, head_dim), lines kv_line_stride floats apart
  float* out;      // (tokens, n_heads, head_dim), lines out_stride floats apart
  int64_t q_stride, kv_line_stride, out_stride;
  const Row* rows;
  int64_t n_rows;
  const int64_t* chunks;  // bytes from base, row included
  int64_t base;           // address of the layer's region
  int64_t n_heads, n_kv_heads, head_dim;
  float scale;
  int64_t window;       // a token sees so many positions, its own included
  float softcap;        // 0: none; else a score s becomes softcap * tanh(s / softcap)
  const float* slopes;  // null, or of each head: a score gets slope * (position - token's)
  const float* sinks;   // null, or of each head: a score that takes weight and gives no value
  Dtype kv_dtype;       // plain, q8_0 or q4_1; lines of whole blocks
  int n_threads;
};

// 32 numbers of a row, rounded: d * q.
struct RoundedPart {
  int8_t q[32];
  float d;
  float sum, sums[2];  // d times the sum of all q, and of each half
};

// c (m, n) = a (m, k) b^T, or c += a b^T; b is (n, k), as checkpoints have it. Strides in elements,
// b's in blocks where it has blocks.
struct GemmArgs {
  const float* a;
  const void* b;
  float* c;
  int64_t a_stride, b_stride, c_stride;
  int64_t m, n, k;
  Dtype b_dtype;
  bool accumulate;
  bool same_order;  // of sums whatever m is, so that a row has the same bits in any company
  int n_threads;
  RoundedPart* rounded;  // null, or room for a in 8 bits (m, k / 32), for gemm_rounded
};

struct Kernels {
  const char* name;
  // Writes the new k and v of every row into its slab.
  void (*append)(const AttentionArgs&);
  // Causal attention of every new token over its row's slab, itself included (append first).
  void (*attend)(const AttentionArgs&);
  // Rotates pairs (i, i + n_dims/2) of n_heads heads a line, in place (RoFormer, arXiv
  // 2104.09864). cos, sin: (n_lines, n_dims/2).
  void (*rope)(float* x, int64_t line_stride, int64_t head_stride, int64_t n_lines, int64_t n_heads,
               int64_t n_dims, const float* cos, const float* sin, int n_threads);
  // out[l, i] = silu(gate_up[l, i]) * gate_up[l, width + i]
  void (*silu_mul)(const float* gate_up, float* out, int64_t n_lines, int64_t width,
                   int n_threads);
  // out = x / sqrt(mean(x^2) + eps) * weight, per line (arXiv 1910.07467)
  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t n_lines, int64_t width,
                   float eps, int n_threads);
  void (*gemm)(const GemmArgs&);
  // With a rounded to 8 bits; b in blocks of at most 6 bits.
  void (*gemm_rounded)(const GemmArgs&);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
void gemm_rounded_avx512vnni(const GemmArgs&);
#endif

}  // namespace sl
