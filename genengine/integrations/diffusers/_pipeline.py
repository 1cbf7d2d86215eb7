"""`fuse`: a pipeline, or a scheduler, with its step fused in place."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import Tensor

from genengine.integrations.diffusers._guidance import Branches
from genengine.integrations.diffusers._scheduler import Fused, fused_class

_DENOISERS = ("unet", "transformer", "prior", "decoder")
_PLAIN_CFG = re.compile(r"(\w+) \+ (?:self\.)?_?guidance_scale \* \(\s*\w+ - \1\s*\)")


def fuse(pipeline_or_scheduler: Any, noise: str = "torch") -> Any:
    """Make a diffusers pipeline step with fused rows, in place.

    The scheduler becomes an object of `fused_class` with the same config and state. Where the pipeline's loop
    combines two branches of its denoiser by plain classifier-free guidance, the combine is left to the row as well:
    during a call the denoiser returns an object whose `chunk` and arithmetic are noted instead of computed, and which
    is a tensor for all other purposes.

    Args:
        pipeline_or_scheduler: a pipeline with a `scheduler`, or a scheduler.
        noise: as for `fused_class`.

    Returns:
        The same pipeline, or for a scheduler, the fused one.

    Raises:
        TypeError: where there is no scheduler whose step can be fused.
    """
    scheduler = getattr(pipeline_or_scheduler, "scheduler", pipeline_or_scheduler)
    if not hasattr(scheduler, "set_timesteps"):
        raise TypeError(
            "fuse: expected a diffusers pipeline with a scheduler, or a scheduler, got "
            f"{type(pipeline_or_scheduler).__name__}"
        )
    if not isinstance(scheduler, Fused):
        fused = fused_class(type(scheduler), noise).from_config(scheduler.config)
        fused.__dict__.update(vars(scheduler))
        if vars(scheduler).get("_step_index") is not None:
            fused.__dict__["_given_up"] = "it was fused in the middle of a run"
        scheduler = fused
    if pipeline_or_scheduler is getattr(pipeline_or_scheduler, "scheduler", None) or not hasattr(
        pipeline_or_scheduler, "scheduler"
    ):
        return scheduler
    pipeline_or_scheduler.scheduler = scheduler
    if _combines_plainly(pipeline_or_scheduler):
        pipeline_or_scheduler.__class__ = _folding_class(type(pipeline_or_scheduler))
    return pipeline_or_scheduler


def _combines_plainly(pipeline) -> bool:
    """Whether the source of the pipeline's loop holds u + guidance_scale * (c - u) over the chunks of its denoiser."""
    if isinstance(pipeline, _Folding) or not any(hasattr(pipeline, name) for name in _DENOISERS):
        return False
    try:
        source = inspect.getsource(type(pipeline).__call__)
    except (OSError, TypeError):
        return False
    return ".chunk(2)" in source and _PLAIN_CFG.search(source) is not None


class _Folding:
    """Mixed into a pipeline's class: during a call, its denoiser's output notes guidance instead of computing it."""

    def __call__(self, *args, **kwargs):
        modules = [getattr(self, name, None) for name in _DENOISERS]
        hooks = [module.register_forward_hook(_note_guidance) for module in modules if _takes_hooks(module)]
        try:
            return super().__call__(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def __reduce__(self):
        return _rebuild, (type(self).__mro__[2], vars(self))


def _rebuild(cls, state):
    pipeline = object.__new__(_folding_class(cls))
    pipeline.__dict__.update(state)
    return pipeline


def _takes_hooks(module) -> bool:
    """A module compiled in place would compile the hook with it, which knows tensors alone."""
    return hasattr(module, "register_forward_hook") and getattr(module, "_compiled_call_impl", None) is None


@functools.cache
def _folding_class(cls):
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Folding, cls), members)


def _note_guidance(module, inputs, output):
    if isinstance(output, tuple) and output and type(output[0]) is Tensor and output[0].shape[0] % 2 == 0:
        return (Branches(output[0]), *output[1:])
    return output
