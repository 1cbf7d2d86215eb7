"""Exit status 0 if the extension in this checkout loads and holds CUDA kernels."""

import sys

import torch

torch.library.Library("genengine", "FRAGMENT")
try:
    torch.ops.load_library("genengine/_C.abi.so")
except OSError:
    sys.exit(1)
sys.exit(0 if torch._C._dispatch_has_kernel_for_dispatch_key("genengine::normal_out", "CUDA") else 1)
