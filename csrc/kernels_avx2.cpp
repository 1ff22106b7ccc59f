#define SL_TARGET avx2
#define SL_LANES 8
#include "kernels.inc"

namespace sl {
extern const Kernels kernels_avx2 = {"avx2",     avx2::append,   avx2::attend,
                                     avx2::rope, avx2::silu_mul, avx2::rms_norm, avx2::gemm,
                                     avx2::gemm_rounded};
}
