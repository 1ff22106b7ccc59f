#define SL_TARGET portable
#define SL_LANES 4
#include "kernels.inc"

namespace sl {
extern const Kernels kernels_portable = {"portable",     portable::append,   portable::attend,
                                     portable::rope, portable::silu_mul, portable::rms_norm, portable::gemm,
                                     portable::gemm_rounded};
}
