// The facts of this build, for fastdistill.doctor(). The operators register themselves when the library loads.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#define FASTDISTILL_STR_(x) #x
#define FASTDISTILL_STR(x) FASTDISTILL_STR_(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "fastdistill's C++ kernels for one instruction set";
  m.attr("isa") = FASTDISTILL_STR(CPU_CAPABILITY);
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = TORCH_VERSION;
}
