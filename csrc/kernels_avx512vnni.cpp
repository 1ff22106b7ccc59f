#define SL_TARGET avx512vnni
#define SL_LANES 16
#define SL_ROUNDED_ONLY
#include "kernels.inc"

namespace sl {
void gemm_rounded_avx512vnni(const GemmArgs& g) { avx512vnni::gemm_rounded(g); }
}
