// The facts of this build, for fastdistill.doctor(), and what Python calls. The operators register themselves when the
// library loads.
#include "cpu/short_attention.h"

#include <pybind11/pybind11.h>
#include <torch/version.h>

#define FASTDISTILL_STR_(x) #x
#define FASTDISTILL_STR(x) FASTDISTILL_STR_(x)

namespace fastdistill {
void bind_accumulate_sensitivity(pybind11::module_& m);
} // namespace fastdistill

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "fastdistill's C++ kernels for one instruction set";
  m.attr("isa") = FASTDISTILL_STR(CPU_CAPABILITY);
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("short_keys") = fastdistill::short_attention::kKeys;
  fastdistill::bind_accumulate_sensitivity(m);
}
