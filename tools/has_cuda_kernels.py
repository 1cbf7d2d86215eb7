"""Exit status 0 if the extension named on the command line loads here and holds CUDA kernels."""

import sys
from pathlib import Path

import torch

path = Path(sys.argv[1])
torch.library.Library("genengine", "FRAGMENT")
try:
    if path.exists():
        torch.ops.load_library(str(path))
except OSError as error:
    print(f"{path} does not load: {error}", file=sys.stderr)
sys.exit(0 if torch._C._dispatch_has_kernel_for_dispatch_key("genengine::normal_out", "CUDA") else 1)
