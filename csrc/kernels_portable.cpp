#define SL_TARGET portable
#include "kernels.inc"

namespace sl {
extern const Kernels kernels_portable = {"portable",     portable::append,   portable::attend,
                                     portable::rope, portable::silu_mul, portable::rms_norm};
}
