"""What the sampling loop asks of a denoiser: its dtype and device, its weights, and how it was compiled."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LONG = 100  # elements of a list that is data and not looked through for modules


def first_parameter(denoiser: Callable) -> Tensor | None:
    """The first floating-point parameter, where the denoiser has a method `parameters`."""
    parameters = getattr(denoiser, "parameters", None)
    if not callable(parameters):
        return None
    return next((p for p in parameters() if p.is_floating_point()), None)


def model_dtype(denoiser: Callable) -> torch.dtype:
    parameter = first_parameter(denoiser)
    return parameter.dtype if parameter is not None else torch.float32


def compiled(denoiser: Callable) -> bool:
    """True for torch.compile'd modules, whose attributes are those of the module that was not compiled."""
    optimized = isinstance(denoiser, torch._dynamo.OptimizedModule)
    return optimized or getattr(denoiser, "_compiled_call_impl", None) is not None


def scheduled(denoiser: Callable) -> bool:
    """Whether the loop calls `for_schedule` before it starts."""
    return hasattr(denoiser, "for_schedule") and not compiled(denoiser)


def parts(denoiser: Callable) -> list[object]:
    """The denoiser and what it visibly uses: the object of a bound method, arguments of a partial, what a function
    encloses or names of its own file, attributes of a callable that is no module, what was compiled, tensors; of
    modules the roots, of lists, tuples and dicts those that a person wrote."""
    found, waiting = {}, [denoiser]
    while waiting:
        part = waiting.pop()
        known = id(part) in found or isinstance(part, type)
        if known or not (callable(part) or isinstance(part, (Tensor, list, tuple, dict))):
            continue
        found[id(part)] = part
        waiting += _inside(part)
    return list(found.values())


def _inside(part):
    if isinstance(part, (nn.Module, Tensor)):
        return []
    if isinstance(part, (list, tuple, dict)):
        return [] if len(part) > LONG else list(part.values() if isinstance(part, dict) else part)
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, types.MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, types.FunctionType):
        return [getattr(part, "_torchdynamo_orig_callable", None), *_enclosed(part)]
    return list(getattr(part, "__dict__", {}).values())


def _enclosed(function):
    """What a function finds outside itself: variables of outer functions, and by name in its file modules, tensors,
    functions of that file, and compiled ones."""
    if (function.__module__ or "").partition(".")[0] == "torch":
        return []
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not bound yet
            found.append(cell.cell_contents)
    around = function.__globals__
    for value in (around[name] for name in function.__code__.co_names if name in around):
        own = isinstance(value, types.FunctionType) and value.__globals__ is around
        if own or isinstance(value, (nn.Module, Tensor)) or hasattr(value, "_torchdynamo_orig_callable"):
            found.append(value)
    return found


def fingerprint(denoiser: Callable) -> tuple[tuple, tuple]:
    """(modes, weights) of the modules and tensors within: which are training; where weights lie, and as what.

    A captured graph reads the weights where they were. Their values are no part of it: training in place may go on.
    """
    modes, weights = [], []
    for part in parts(denoiser):
        if isinstance(part, Tensor):
            weights.append(_where(part))
        for module in part.modules() if isinstance(part, nn.Module) else ():
            modes.append(module.training)
            for kept in (module._parameters, module._buffers, vars(module)):
                weights += [_where(value) for value in kept.values() if isinstance(value, Tensor)]
    return tuple(modes), tuple(weights)


def _where(tensor):
    if is_traceable_wrapper_subclass(tensor):  # quantised weights, say: the tensors inside
        return tuple(_where(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def captures_itself(denoiser: Callable) -> bool:
    """Whether it, or a module in it, was compiled to CUDA graphs of its own: mode="reduce-overhead", "max-autotune"."""
    for part in parts(denoiser):
        inside = part.modules() if isinstance(part, nn.Module) else (part,)
        if any(_graphs_of_its_own(compiled_part) for compiled_part in inside):
            return True
    return False


def _graphs_of_its_own(part):
    if isinstance(part, torch._dynamo.OptimizedModule):
        return _asks_for_graphs(part.dynamo_ctx.callback)
    call = getattr(part, "_compiled_call_impl", None) if isinstance(part, nn.Module) else part
    if getattr(call, "_torchdynamo_orig_callable", None) is None:
        return False
    enclosed = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=False))
    return "callback" in enclosed and _asks_for_graphs(enclosed["callback"].cell_contents)


def _asks_for_graphs(callback):
    """Look for the options of Inductor behind the callbacks that dynamo wraps around it."""
    while callback is not None:
        if isinstance(callback, torch._TorchCompileInductorWrapper):
            from torch._inductor import config  # slow to import, unless such a wrapper exists

            return bool(callback.config.get("triton.cudagraphs", config.triton.cudagraphs))
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return False
