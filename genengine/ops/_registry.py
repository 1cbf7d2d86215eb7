"""Where ops are defined and their backends chosen.

`define` gives one schema to three dispatcher namespaces, so that every backend is an ordinary torch op with its own
fake kernel and its own backward:

    torch.ops.genengine.<op>            C++ kernels for CPU and CUDA when the extension is loaded
    torch.ops.genengine_triton.<op>     Triton kernels: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1
    torch.ops.genengine_reference.<op>  the eager reference, on any device

`resolve` picks one of them for a call. A kernel becomes a default on a GPU only once it and its backward are
`verified` there. None has a forward-mode derivative: a tangent is refused, for dropped it would count as zero.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch.autograd import forward_ad

from genengine.ops import _ranges
from genengine.ops._cost import Cost, bytes_alone

BACKENDS = ("reference", "cpu", "triton", "cuda")
NAMESPACES = {
    "reference": "genengine_reference",
    "cpu": "genengine",
    "cuda": "genengine",
    "triton": "genengine_triton",
}
# pt2_compliant: safe under torch.compile. needs_exact_strides: Inductor must not hand a kernel another layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARIES = {name: torch.library.Library(name, "DEF") for name in sorted(set(NAMESPACES.values()))}
# Implemented by the extension alone: sets the instruction set of the CPU loops (-1: only asks), returns the one in use.
_LIBRARIES["genengine"].define("cpu_isa(int wanted) -> int")
# Too: the bytes that `pixelcnn_sample` keeps of a group of images.
_LIBRARIES["genengine"].define("pixelcnn_state(Tensor matrices, int[] fields, int images, bool wavefront) -> int")
# Too: attention_backward for Hopper, whose dq is summed in any order, or deterministic.
_LIBRARIES["genengine"].define(
    "hopper_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, "
    "float scale, bool deterministic) -> (Tensor, Tensor, Tensor)"
)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Op:
    """One dispatcher op: its name, the module that owns it, and whether a kernel of each kind is expected."""

    name: str
    module: str
    kernels: tuple[str, ...]
    cost: Callable[[tuple, object], Cost] = field(compare=False)
    limits: Callable[[str, torch.dtype, tuple | None], str | None] = field(compare=False)
    overloads: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def public(self) -> str:
        """The name users call it by: "normal" of "normal_out"."""
        return self.name.removesuffix("_out")


OPS: dict[str, Op] = {}
_forced: str | None = None  # a module global: torch.compile guards on it, where a ContextVar would break the graph


def define(
    schema: str,
    reference: Callable,
    *,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    module: str,
    kernels: tuple[str, ...] = ("cpu", "triton", "cuda"),
    cpu: Callable | None = None,
    cuda: Callable | None = None,
    cost: Callable[[tuple, object], Cost] = bytes_alone,
    limits: Callable[[str, torch.dtype, tuple | None], str | None] = lambda backend, dtype, arguments: None,
) -> Op:
    """Define one op in all three namespaces.

    schema: "name(Tensor x, ...) -> Tensor". reference: the eager specification. fake: shapes and dtypes only.
    backward(ops, ctx, *grads): gradients, calling other ops through `ops`, the namespace the forward ran in.
    module: the op file this belongs to; its Triton kernels are looked up in `genengine.kernels.<module>`.
    kernels: the backends it is to have kernels for. cpu, cuda: the kernel, where it is torch's own and not C++ of ours.
    cost: cost(arguments, results) of a call, both as the schema orders them. limits(backend, dtype, arguments): why a
    kernel that is there cannot take such arguments (None: any), where it is narrower than the op.
    """
    name = schema[: schema.index("(")]
    for namespace, library in _LIBRARIES.items():
        library.define(schema, tags=_TAGS)
        qualified = f"{namespace}::{name}"
        implementation = _triton_entry(module, name) if namespace == "genengine_triton" else reference
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=library)
        if backward is not None:
            ops = getattr(torch.ops, namespace)
            torch.library.register_autograd(
                qualified, _bind_namespace(name, backward, ops), setup_context=setup_context, lib=library
            )
    for key, kernel in (("CPU", cpu), ("CUDA", cuda)):
        if kernel is not None:
            _LIBRARIES["genengine"].impl(name, kernel, key)
    op = Op(name, module, kernels, cost, limits)
    for backend, namespace in NAMESPACES.items():
        op.overloads[backend] = getattr(getattr(torch.ops, namespace), name).default
    OPS[name] = op
    return op


def _bind_namespace(name, backward, ops):
    def bound(ctx, *grads):
        if forward_ad._current_level >= 0:
            _refuse_tangents(f"{name}_backward", grads)
        if _ranges.kernels is None:
            return backward(ops, ctx, *grads)
        return _ranges.around(_ranges.kernels, f"genengine::{name} backward", backward)(ops, ctx, *grads)

    return bound


def _triton_entry(module, name):
    def entry(*args):
        return getattr(triton_module(module), name)(*args)

    return entry


@lru_cache
def triton_module(module: str):
    """The Triton launchers of one op file; imported on first use, for Triton is an optional dependency."""
    return importlib.import_module(f"genengine.kernels.{module}")


# ---- the compiled extension --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extension:
    """Whether `_C.abi.so` is loaded, from where, and if not, why."""

    path: Path
    loaded: bool
    reason: str | None


def load_extension() -> Extension:
    path = Path(__file__).resolve().parents[1] / "_C.abi.so"
    if not path.exists():
        return Extension(path, False, _build_reason(path))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Extension(path, False, f"{path} does not load: {error}; reinstall genengine against this PyTorch")
    return Extension(path, True, None)


def _build_reason(path: Path) -> str:
    record = path.with_name("_build.json")
    if record.exists():
        reason = json.loads(record.read_text()).get("reason")
        if reason:
            return reason
    return f"{path} was not built; run `pip install --no-build-isolation .` with torch, cmake and g++ installed"


# ---- choosing a backend ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every op of the block on one backend: "reference", "cpu", "triton" or "cuda" (None: the automatic choice).

    A named backend never falls back: an op that it cannot run raises RuntimeError, saying what is missing. Only an op
    that by design has no kernel of that kind (attention has none in CUDA C++) runs as it does without the context, so
    that whole models can run in it. Process-wide, not per thread.
    """
    global _forced
    _check_name("backend", name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def _check_name(op_name, name):
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{op_name}: backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")


def why_not(op: Op, name: str, device_type: str, dtype: torch.dtype, arguments: tuple | None = None) -> str | None:
    """The reason why `name` cannot run `op` on this device and dtype (with these arguments), or None if it can."""
    if name == "reference":
        return None
    if name not in op.kernels:
        return f"{op.public} has no {name} kernel"
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take {', '.join(map(str, KERNEL_DTYPES))}, not {dtype}"
    return _why_no_backend(op, name, device_type) or op.limits(name, dtype, arguments)


def _why_no_backend(op, name, device_type):
    if name == "triton":
        return _why_no_triton(device_type)
    if device_type != name:
        return f"it runs on {name} tensors, these are on {device_type}"
    return missing_kernel(op.name, name)


@torch._dynamo.assume_constant_result  # torch.compile takes the answer as it is, and does not look inside
def missing_kernel(op_name: str, name: str) -> str | None:
    """Why the extension has no kernel of this op for this device, or None if it has."""
    if (op_name, name) not in _kernel_reasons:
        _kernel_reasons[op_name, name] = _look_for_kernel(op_name, name)
    return _kernel_reasons[op_name, name]


_kernel_reasons: dict[tuple[str, str], str | None] = {}


def _look_for_kernel(op_name, name):
    from genengine.ops import EXTENSION

    if torch._C._dispatch_has_kernel_for_dispatch_key(f"genengine::{op_name}", name.upper()):
        return None
    if not EXTENSION.loaded:
        return EXTENSION.reason
    return f"the extension {EXTENSION.path} was built without {name.upper()} kernels (GENENGINE_CUDA=ON adds them)"


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch._dynamo.assume_constant_result
def _why_no_triton(device_type: str) -> str | None:
    return _look_for_triton(device_type)


@lru_cache
def _look_for_triton(device_type):
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install 'genengine[triton]')"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"Triton {triton.__version__} is too old (>= 3.6 needed)"
    if device_type == "cpu" and not triton_interpreted():
        return "Triton has no CPU target; TRITON_INTERPRET=1, set before the import, runs its interpreter"
    return None


def resolve(op: Op, device: torch.device, dtype: torch.dtype, name: str | None = None):
    """The overload that will run `op` for tensors of this device and dtype, on the backend that `choose` names.

    It raises RuntimeError where forward-mode AD hands it a tangent.
    """
    return overload(op, choose(op, device, dtype, name))


def choose(
    op: Op, device: torch.device, dtype: torch.dtype, name: str | None = None, arguments: tuple | None = None
) -> str:
    """The name of the backend that will run `op` for tensors of this device and dtype.

    name: a backend asked for by the caller; None takes the enclosing `backend(...)` block's if the op is to have such a
    kernel, else the fastest that is verified on the device. arguments: of the call, where the op's kernels have limits.
    Raises RuntimeError if a named backend cannot run.
    """
    name = name or named(op)
    if name is None:
        return automatic(op, device, dtype, arguments)
    _check_name(op.name, name)
    if reason := why_not(op, name, device.type, dtype, arguments):
        raise RuntimeError(f"{op.public}: backend {name!r} cannot run here: {reason}")
    return name


def named(op: Op) -> str | None:
    """The backend that the enclosing `backend(...)` block names for this op."""
    return _forced if _forced in ("reference", *op.kernels) else None


def direct(op: Op, device: torch.device, dtype: torch.dtype) -> Callable:
    """`resolve` for loops of tiny calls: positional arguments alone, without the overload's Python wrapper."""
    run = resolve(op, device, dtype)
    return getattr(run, "_op", run)


def overload(op: Op, name: str):
    """The overload of one backend, guarded against forward-mode AD."""
    run = guarded(op, op.overloads[name])
    return run if _ranges.kernels is None else ranged(op, name, run)


def ranged(op: Op, name: str, run: Callable) -> Callable:
    """`run` within a profiler's range that names op and backend; call it where such ranges are on."""
    return _ranges.around(_ranges.kernels, f"genengine::{op.public} [{name}]", run)


def guarded(op: Op, run: Callable) -> Callable:
    """`run`, refusing tangents while forward-mode AD is on (torch.func.jvp, forward_ad.dual_level)."""
    if forward_ad._current_level < 0:
        return run
    return lambda *args: _run_guarded(op.public, run, args)


@torch.compiler.disable  # traced tensors show no tangent: look at the real ones (fullgraph=True then refuses by itself)
def _run_guarded(op_name, run, args):
    _refuse_tangents(op_name, args)
    return run(*args)


def _refuse_tangents(op_name, args):
    """The dispatcher would run the op on the primals alone: a silent zero derivative."""
    for argument in args:
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"{op_name}: has no forward-mode derivative; use reverse mode (torch.autograd.grad, .backward()), "
                    "or detach its inputs"
                )


def with_backward(op: Op) -> tuple[Op, ...]:
    """The op, its backward op, and that one's: gradients run on the forward's backend, so all must be right."""
    backward = OPS.get(f"{op.name}_backward")
    return (op,) if backward is None else (op, *with_backward(backward))


def automatic(op: Op, device: torch.device, dtype: torch.dtype, arguments: tuple | None = None) -> str:
    """The name of the backend used when none is asked for.

    On a GPU that is the first verified one in the order of `_fastest`. Where a kernel that is there cannot take the
    arguments, the next one does; that is told once.
    """
    if device.type == "cpu":
        return "reference" if why_not(op, "cpu", "cpu", dtype, arguments) else "cpu"
    if device.type == "cuda":
        from genengine.ops import _fastest, _verify

        passed_over = None
        shape = None if arguments is None or torch.compiler.is_compiling() else arguments[0].shape
        for name in _fastest.order(op.name, device, dtype, shape):
            if name == "reference":  # torch's own op was faster
                break
            parts = with_backward(op)
            if any(why_not(part, name, "cuda", dtype, arguments if part is op else None) for part in parts):
                passed_over = passed_over or _limit(op, name, dtype, arguments)
                continue
            if all(_verify.verified(part.name, name, str(device)) for part in parts):
                _tell_once(op.public, passed_over, name)
                return name
        _tell_once(op.public, passed_over, "reference")
    return "reference"


def _limit(op, name, dtype, arguments):
    """Why a kernel that is there is passed over."""
    if name not in op.kernels or dtype not in KERNEL_DTYPES or _why_no_backend(op, name, "cuda"):
        return None
    reason = op.limits(name, dtype, arguments)
    return reason and f"its {name} kernel cannot run: {reason}"


_told: set[tuple[str, str]] = set()


def _tell_once(op_name, reason, name):
    if reason is None or torch.compiler.is_compiling() or (op_name, reason) in _told:
        return
    _told.add((op_name, reason))
    warnings.warn(f"{op_name}: {reason}; {name} runs instead", stacklevel=4)
