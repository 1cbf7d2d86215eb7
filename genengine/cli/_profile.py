"""The command about where time goes: profile."""

from __future__ import annotations

import contextlib
import json
import sys

from genengine.cli._options import add_command, chosen_device, with_device, with_json, with_seed, with_threads


def add_profile(commands):
    command = add_command(
        commands, "profile", _profile, "show where the time of an op, a model or your own function goes",
        "genengine profile flow.sample --num 16 --steps 8 --html profile.html",
    )  # fmt: skip
    command.add_argument(
        "target", metavar="TARGET",
        help="an op, such as adaln; FAMILY.step, FAMILY.sample or FAMILY.train, such as flow.sample; or "
        "module:function, which takes no arguments (module:object.method, too)",
    )  # fmt: skip
    command.add_argument("--shape", default=None, metavar="N,N,...", help="of an op's main input, such as 16,256,1152")
    command.add_argument("--dtype", default=None, help="of an op: float32, float16 or bfloat16 (default float32)")
    command.add_argument("--num", type=int, default=None, help="images of a model's batch (default: the target's)")
    command.add_argument("--steps", type=int, default=None, help="sampling steps (default: the family's)")
    command.add_argument("--eager", action="store_true", help="the same work in plain PyTorch, without our kernels")
    command.add_argument("--trace", default=None, metavar="FILE", help="also write a Chrome trace (Perfetto reads it)")
    command.add_argument("--html", default=None, metavar="FILE", help="also write a page: flame view and roofline")
    command.add_argument("--top", type=int, default=12, help="kernels to show (default 12)")
    command.add_argument("--no-ceilings", action="store_true", help="do not measure what this machine can do")
    with_seed(command)
    with_threads(command)
    with_device(command)
    with_json(command)


def _profile(options):
    from genengine.benchmarks import ceilings, svg
    from genengine.profiling import page, profile, targets, timeline

    shape, dtype = _shape_and_dtype(options)
    for name in ("num", "steps", "top"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    device = chosen_device(options)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    for path in filter(None, (options.trace, options.html)):
        timeline.check_writable(path)
    if options.html:
        svg.check()  # before the work: Matplotlib may be missing
    request = targets.Request(device, shape, dtype, options.num, options.steps, options.eager, options.seed)
    measure = None if options.no_ceilings else ceilings.measure
    with contextlib.redirect_stdout(sys.stderr), _forked_seed(device, options.seed):  # stdout is the report's
        target = targets.resolve(options.target, request)
        wanted = None if ":" in options.target and options.device is None else device
        report = profile(target.function, device=wanted, ceilings=measure, name=target.name, trace=options.trace)
    report.notes.insert(0, target.description)
    print(json.dumps(report.to_json(), indent=1) if options.json else report.table(options.top))
    if options.html:
        page.write(report, options.html)
    for path in filter(None, (options.trace, options.html)):
        print(f"saved: {path}", file=sys.stderr)


@contextlib.contextmanager
def _forked_seed(device, seed):
    """Inside, the random numbers of the CPU and of this device follow from the seed; after it, they go on as before."""
    import torch

    places = [] if device.type == "cpu" else [device.index if device.index is not None else torch.cuda.current_device()]
    with torch.random.fork_rng(devices=places):
        torch.manual_seed(seed)
        yield


def _shape_and_dtype(options):
    import torch

    dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    if options.dtype is not None and options.dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {options.dtype!r}")
    try:
        shape = None if options.shape is None else tuple(int(part) for part in options.shape.split(","))
    except ValueError:
        raise ValueError(f"--shape must look like 16,256,1152, got {options.shape!r}") from None
    if shape is not None and min(shape) < 1:
        raise ValueError(f"--shape must hold numbers of at least 1, got {options.shape}")
    return shape, None if options.dtype is None else dtypes[options.dtype]
