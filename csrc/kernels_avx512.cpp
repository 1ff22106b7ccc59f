#define SL_TARGET avx512
#define SL_LANES 16
#include "kernels.inc"

namespace sl {
extern const Kernels kernels_avx512 = {"avx512",     avx512::append,   avx512::attend,
                                     avx512::rope, avx512::silu_mul, avx512::rms_norm, avx512::gemm,
                                     avx512::gemm_rounded};
}
