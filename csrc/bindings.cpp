// The one file that knows Python. Addresses come as integers; the callers in sl_serve/ops and
// sl_serve/weights own the memory, check its shapes and keep it alive, for the length of the call or
// until what was begun has ended.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.hpp"
#include "reader.hpp"

namespace nb = nanobind;
using sl::AttentionArgs;
using sl::Dtype;
using sl::Kernels;
using sl::Row;

namespace {

// Best first; only what this processor can run.
std::vector<Kernels> supported() {
  std::vector<Kernels> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512vnni")) {
      Kernels with_vnni = sl::kernels_avx512;
      with_vnni.name = "avx512vnni";
      with_vnni.gemm_rounded = sl::gemm_rounded_avx512vnni;
      found.push_back(with_vnni);
    }
    found.push_back(sl::kernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.push_back(sl::kernels_avx2);
#endif
  found.push_back(sl::kernels_portable);
  return found;
}

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Kernels& k : supported()) names.emplace_back(k.name);
  return names;
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

// The kernels of one instruction set, with a fixed number of threads.
class Core {
 public:
  Core(const std::string& target, int n_threads) : n_threads_(n_threads) {
    for (const Kernels& k : supported())
      if (target == k.name) kernels_ = k;
    if (kernels_.name == nullptr) throw std::invalid_argument("no such target here: " + target);
  }

  void append(uintptr_t k, uintptr_t v, int64_t line_stride, uintptr_t rows, int64_t n_rows,
              uintptr_t chunks, int64_t base, int64_t n_kv_heads, int64_t head_dim,
              Dtype kv_dtype) const {
    AttentionArgs a{};
    a.k = floats(k);
    a.v = floats(v);
    a.kv_line_stride = line_stride;
    set_rows(a, rows, n_rows, chunks, base);
    a.n_kv_heads = n_kv_heads;
    a.head_dim = head_dim;
    a.kv_dtype = kv_dtype;
    kernels_.append(a);
  }

  void attend(uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, uintptr_t rows,
              int64_t n_rows, uintptr_t chunks, int64_t base, int64_t n_heads,
              int64_t n_kv_heads, int64_t head_dim, Dtype kv_dtype, float scale, int64_t window,
              float softcap, uintptr_t slopes, uintptr_t sinks) const {
    AttentionArgs a{};
    a.q = floats(q);
    a.q_stride = q_stride;
    a.out = floats(out);
    a.out_stride = out_stride;
    set_rows(a, rows, n_rows, chunks, base);
    a.n_heads = n_heads;
    a.n_kv_heads = n_kv_heads;
    a.head_dim = head_dim;
    a.kv_dtype = kv_dtype;
    a.scale = scale;
    a.window = window;
    a.softcap = softcap;
    a.slopes = floats(slopes);
    a.sinks = floats(sinks);
    kernels_.attend(a);
  }

  void rope(uintptr_t x, int64_t line_stride, int64_t head_stride, int64_t n_lines,
            int64_t n_heads, int64_t n_dims, uintptr_t cos, uintptr_t sin) const {
    kernels_.rope(floats(x), line_stride, head_stride, n_lines, n_heads, n_dims, floats(cos),
                   floats(sin), n_threads_);
  }

  void silu_mul(uintptr_t gate_up, uintptr_t out, int64_t n_lines, int64_t width) const {
    kernels_.silu_mul(floats(gate_up), floats(out), n_lines, width, n_threads_);
  }

  void rms_norm(uintptr_t x, uintptr_t weight, uintptr_t out, int64_t n_lines, int64_t width,
                float eps) const {
    kernels_.rms_norm(floats(x), floats(weight), floats(out), n_lines, width, eps, n_threads_);
  }

  void gemm(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride, Dtype b_dtype,
            uintptr_t c, int64_t c_stride, bool accumulate, bool same_order, uintptr_t rounded,
            int64_t m, int64_t n, int64_t k) const {
    const auto multiply = rounded ? kernels_.gemm_rounded : kernels_.gemm;
    multiply({floats(a), reinterpret_cast<const void*>(b), floats(c), a_stride, b_stride, c_stride,
              m, n, k, b_dtype, accumulate, same_order, n_threads_,
              reinterpret_cast<sl::RoundedPart*>(rounded)});
  }

 private:
  void set_rows(AttentionArgs& a, uintptr_t rows, int64_t n_rows, uintptr_t chunks,
                int64_t base) const {
    a.rows = reinterpret_cast<const Row*>(rows);
    a.n_rows = n_rows;
    a.chunks = reinterpret_cast<const int64_t*>(chunks);
    a.base = base;
    a.n_threads = n_threads_;
  }

  Kernels kernels_{};
  int n_threads_;
};

using PieceTuple = std::tuple<int, bool, int64_t, int64_t, uintptr_t>;
using FailureTuple = std::tuple<int64_t, int64_t, int>;

std::shared_ptr<sl::Reading> begin(sl::Reader& reader, const std::vector<PieceTuple>& tuples) {
  std::vector<sl::Piece> pieces;
  for (const auto& [file, is_direct, offset, n_bytes, to] : tuples)
    pieces.push_back({file, is_direct, offset, n_bytes, reinterpret_cast<char*>(to)});
  return reader.begin(std::move(pieces));
}

std::optional<FailureTuple> wait(sl::Reading& reading) {
  const auto failure = reading.wait();
  if (!failure) return std::nullopt;
  return FailureTuple{failure->piece, failure->at_byte, failure->error};
}

}  // namespace

NB_MODULE(_native, m) {
  // Some objects outlive the module where Python ends with threads; that is no news.
  nb::set_leak_warnings(false);
  m.attr("ROUNDED_PART_BYTES") = static_cast<int>(sizeof(sl::RoundedPart));
  m.attr("ROW_FIELDS") = static_cast<int>(sizeof(Row) / sizeof(int64_t));
  m.def("targets", &targets, "Instruction sets this processor can run, best first.");
  nb::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16)
      .value("q4_0", Dtype::q4_0)
      .value("q4_1", Dtype::q4_1)
      .value("q5_0", Dtype::q5_0)
      .value("q5_1", Dtype::q5_1)
      .value("q8_0", Dtype::q8_0)
      .value("q4_k", Dtype::q4_k)
      .value("q5_k", Dtype::q5_k)
      .value("q6_k", Dtype::q6_k)
      .value("mxfp4", Dtype::mxfp4)
      .value("int4_g32", Dtype::int4_g32)
      .value("int4_g64", Dtype::int4_g64)
      .value("int4_g128", Dtype::int4_g128)
      .value("int4_g32_sym", Dtype::int4_g32_sym)
      .value("int4_g64_sym", Dtype::int4_g64_sym)
      .value("int4_g128_sym", Dtype::int4_g128_sym)
      .value("int4_g32_min", Dtype::int4_g32_min)
      .value("int4_g64_min", Dtype::int4_g64_min)
      .value("int4_g128_min", Dtype::int4_g128_min)
      .value("int8_g32", Dtype::int8_g32)
      .value("int8_g64", Dtype::int8_g64)
      .value("int8_g128", Dtype::int8_g128)
      .value("int8_g32_sym", Dtype::int8_g32_sym)
      .value("int8_g64_sym", Dtype::int8_g64_sym)
      .value("int8_g128_sym", Dtype::int8_g128_sym)
      .value("fp8_g32", Dtype::fp8_g32)
      .value("fp8_g64", Dtype::fp8_g64)
      .value("fp8_g128", Dtype::fp8_g128);
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Core>(m, "Core")
      .def(nb::init<const std::string&, int>())
      .def("append", &Core::append, Release())
      .def("attend", &Core::attend, Release())
      .def("rope", &Core::rope, Release())
      .def("silu_mul", &Core::silu_mul, Release())
      .def("rms_norm", &Core::rms_norm, Release())
      .def("gemm", &Core::gemm, Release());
  nb::class_<sl::Reading>(m, "Reading").def("wait", &wait, Release());
  nb::class_<sl::Reader>(m, "Reader")
      .def(nb::init<const std::vector<uintptr_t>&, int64_t>())
      .def("begin", &begin)
      .def("close", &sl::Reader::close, Release());
}
