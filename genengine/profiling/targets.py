"""What `genengine profile TARGET` runs: an op, a part of a model family, or a function of the user's own."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from genengine import models, ops
from genengine.profiling import inputs

PARTS = {
    "step": "one evaluation of the network",
    "sample": "a whole sampling run",
    "train": "one training step, optimiser and moving average too",
}
_FLOW_GUIDANCE = 2.0


@dataclass(frozen=True)
class Request:
    """The options of the command; None where the user said nothing."""

    device: torch.device
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    num: int | None = None
    steps: int | None = None
    eager: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """A function of no arguments, its name in the report, and what it runs on."""

    name: str
    function: Callable[[], object]
    description: str


def resolve(target: str, request: Request) -> Target:
    """The target of that name. Raises ValueError, listing what there is, for a name that is none of them."""
    if ":" in target:
        return _users(target, request)
    family, dot, part = target.partition(".")
    if dot and family in models.FAMILIES and part in parts(family):
        return _of_family(family, part, request)
    if target in inputs.OPS:
        return _op(target, request)
    raise ValueError(f"there is no target {target!r}; {available()}")


def parts(family: str) -> list[str]:
    """What of a family can be profiled; "step" where a sampling run is evaluations of one network net(x, t, y)."""
    return [part for part in PARTS if part != "step" or hasattr(models.FAMILIES[family], "velocity")]


def available() -> str:
    """One sentence with every target."""
    families = ", ".join(f"{family}.{part}" for family in models.FAMILIES for part in parts(family))
    return f"targets are an op ({', '.join(sorted(inputs.OPS))}), a part of a family ({families}), or module:function"


def _refuse(target, request, *allowed):
    for name in ("shape", "dtype", "num", "steps", "eager"):
        if name not in allowed and getattr(request, name):
            raise ValueError(f"--{name} means nothing for {target}; leave it out")


# ---- ops -------------------------------------------------------------------------------------------------------------


def _op(name, request):
    _refuse(name, request, "shape", "dtype", "eager")
    dtype = request.dtype or torch.float32
    args, kwargs, text = inputs.build(name, request.shape, dtype, request.device, request.seed)
    if not request.eager:
        return Target(name, _inference(lambda: getattr(ops, name)(*args, **kwargs)), text)
    from genengine.benchmarks import eager

    if name not in eager.PLAIN:
        raise ValueError(f"{name} has no eager twin to profile; ops that have one: {', '.join(sorted(eager.PLAIN))}")
    plain = eager.calling(lambda: getattr(ops, name)(*args, **kwargs))
    return Target(f"{name}, eager", _inference(plain), text)


def _inference(function):
    def run():
        with torch.no_grad():
            return function()

    return run


# ---- model families --------------------------------------------------------------------------------------------------


def _of_family(family, part, request):
    target = f"{family}.{part}"
    if part == "train":
        _refuse(target, request, "num", "eager")
        made = _train(family, request)
    else:
        has_steps = any(option.name == "steps" for option in models.FAMILIES[family].options)
        _refuse(target, request, "num", "eager", *(("steps",) if has_steps and part == "sample" else ()))
        model = models.family(family).pretrained("digits", device=request.device)
        made = _step(model, request) if part == "step" else _sample(model, request)
    if not request.eager:
        return Target(target, *made)
    from genengine.benchmarks import eager

    return Target(f"{target}, eager", eager.calling(made[0]), made[1])


def _step(model, request):
    num = request.num or 64
    x = ops.normal((num, *model.image_shape), seed=request.seed, device=model.device)
    t = torch.linspace(0.05, 0.95, num, device=model.device)
    labels = torch.arange(num, device=model.device) % model.num_classes if model.num_classes else None
    return _inference(lambda: model.net(x, t, labels)), f"the shipped network on {num} images, {_shape(model)}"


def _sample(model, request):
    num, options = request.num or 16, model.defaults()
    if request.steps is not None:
        options["steps"] = request.steps
    if model.family == "flow":
        return _sample_flow(model, num, options["steps"], request)
    settings = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    text = f"the shipped model, {num} images, {_shape(model)}" + (f", {settings}" if settings else "")
    if request.eager and "step" in parts(model.family):
        text += "; the sampler's own rows stay fused"
    return lambda: model.sample(num, seed=request.seed, **options), text


def _sample_flow(model, num, steps, request):
    """Euler's method with guidance, so that the eager twin is the loop as people write it."""
    text = f"the shipped model, {num} images, {_shape(model)}, {steps} Euler steps, guidance {_FLOW_GUIDANCE:g}"
    if not request.eager:
        options = {"steps": steps, "solver": "euler", "guidance": _FLOW_GUIDANCE, "seed": request.seed}
        return lambda: model.sample(num, **options), text
    from genengine.benchmarks.bench_flow import eager_pipeline

    x = ops.normal((num, *model.image_shape), seed=request.seed, device=model.device)
    labels = torch.arange(num, device=model.device) % model.num_classes
    null = torch.full_like(labels, model.net.null_class)
    return _inference(lambda: eager_pipeline(model.net, x, labels, null, steps, _FLOW_GUIDANCE)), text


def _train(family, request):
    from genengine import train

    overrides = {"seed": request.seed} | ({"batch_size": request.num} if request.num else {})
    config = train.preset(family, "digits", **overrides)
    run = train.Run(config, request.device)
    return run.train_step, f"the preset digits, batches of {config.batch_size} images, {_shape(run.model)}"


def _shape(model):
    return "x".join(map(str, model.image_shape))


# ---- the user's own --------------------------------------------------------------------------------------------------


def _users(target, request):
    """module:function, or module:name.name: a function without arguments, or one that makes such a function."""
    _refuse(target, request)
    function = _found(target)
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"{target} must be a function, got {_kind(function)}")
    _check_callable(target, function)
    try:
        result = function()
    except Exception as error:
        raise Failed(target, error) from error
    if inspect.isgenerator(result) or inspect.iscoroutine(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise ValueError(
            f"{target} returned a {_kind(result)}, which runs later; wrap it in a function that uses it up"
        )
    if callable(result) and not isinstance(result, (type, torch.Tensor)):
        _check_callable(f"what {target} returns", result)
        return Target(target, _named(target, result), f"the {_kind(result)} that {target} returned")
    return Target(target, _named(target, function), f"{target} without arguments")


class Failed(RuntimeError):
    """The user's own code raised: `__cause__` is what, the message says where."""

    def __init__(self, target: str, error: BaseException):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _of_ours(frame.filename)]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        super().__init__(f"{target} raised {type(error).__name__}: {error}{where}")


def _of_ours(filename) -> bool:
    """Whether the code is torch's, genengine's or the interpreter's: no place for a user to look."""
    roots = (Path(__file__).parents[1], Path(torch.__file__).parent)
    return filename.startswith("<") or any(root in Path(filename).parents for root in roots)


def _found(target):
    """What the target names. "cannot find" only where it is not there: what fails while it is imported says so."""
    module, _, path = target.partition(":")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"cannot find {target}: it must look like module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ValueError(f"cannot find {target}: {error}") from error
        raise Failed(target, error) from error
    except Exception as error:
        raise Failed(target, error) from error
    for name in path.split("."):
        if not hasattr(found, name):
            of = getattr(found, "__name__", _kind(found))
            raise ValueError(f"cannot find {target}: {of} has no attribute {name!r}")
        found = getattr(found, name)
    return found


def _kind(thing) -> str:
    return type(thing).__name__


def _named(target, function):
    """The function; what it raises says so, and where."""

    def run():
        try:
            return function()
        except Exception as error:
            raise Failed(target, error) from error

    return run


def _check_callable(what, function):
    """Refuse what needs arguments, or only makes a generator or coroutine."""
    code = function.forward if isinstance(function, torch.nn.Module) else function
    if inspect.isgeneratorfunction(code) or inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        raise ValueError(
            f"{what} must be a plain function, not a generator or coroutine; wrap it in one that uses it up"
        )
    try:
        parameters = inspect.signature(code).parameters.values()
    except ValueError:  # some builtins tell no signature
        return
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    if needed:
        raise ValueError(
            f"{what} must take no arguments, but needs {', '.join(needed)}; wrap it in a function that does not"
        )
