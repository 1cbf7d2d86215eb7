"""k-diffusion's own samplers, as the installed distribution has them: the peer of parity tests and benchmarks."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution


class Unavailable(ImportError):
    """Why the package cannot be loaded."""


@functools.cache
def load() -> types.SimpleNamespace:
    """A namespace with the modules `utils`, `sampling` and `external` of k-diffusion.

    The package imports torchvision and more for training; what its samplers do not use is replaced by empty modules
    while they load.

    Raises:
        Unavailable: naming what is missing.
    """
    try:
        root = distribution("k-diffusion").locate_file("k_diffusion")
    except PackageNotFoundError:
        raise Unavailable("the k-diffusion distribution is not installed (pip install k-diffusion)") from None
    for needed in ("scipy", "torchdiffeq", "torchsde", "tqdm", "PIL", "safetensors"):
        if importlib.util.find_spec(needed) is None:
            raise Unavailable(f"k-diffusion's samplers need {needed}, which is not installed")
    package = types.ModuleType("k_diffusion")
    stubs = ["k_diffusion", "torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    names = [*stubs, *(f"k_diffusion.{name}" for name in ("utils", "sampling", "external"))]
    before = {name: sys.modules.get(name) for name in names}
    try:
        sys.modules |= {name: types.ModuleType(name) for name in stubs} | {"k_diffusion": package}
        sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
        return types.SimpleNamespace(**{name: _load(package, root, name) for name in ("utils", "sampling", "external")})
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _load(package, root, name):
    spec = importlib.util.spec_from_file_location(f"k_diffusion.{name}", root / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    setattr(package, name, module)
    spec.loader.exec_module(module)
    return module
