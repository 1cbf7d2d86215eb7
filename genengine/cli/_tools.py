"""The commands about the installation and about other libraries: env, verify, trace."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from genengine.arguments import settings
from genengine.cli._options import (
    add_command,
    chosen_device,
    with_device,
    with_json,
)  # fmt: skip


def add_env(commands):
    with_json(
        add_command(commands, "env", _env, "show which backend runs each op, and why others do not", "genengine env")
    )


def add_verify(commands):
    command = add_command(
        commands, "verify", _verify, "check every kernel against its reference on this machine",
        "genengine verify attention adaln",
    )  # fmt: skip
    command.add_argument("ops", nargs="*", metavar="OP", help="these ops alone, such as attention (default: all)")
    command.add_argument(
        "--skip", action="append", default=[], metavar="OP", help="leave this op out, one whose kernel hangs, say"
    )
    with_device(command)
    with_json(command)


def add_trace(commands):
    command = add_command(
        commands, "trace", _trace, "show a sampler of another library as a table of coefficients",
        "genengine trace diffusers:DPMSolverMultistepScheduler --steps 8 --set use_karras_sigmas=true",
    )  # fmt: skip
    command.add_argument(
        "target", metavar="MODULE:NAME",
        help="a scheduler class, such as diffusers:DDIMScheduler; a loop over noise levels, such as "
        "k_diffusion.sampling:sample_heun; or a step function (x, output, row) -> x' of your own",
    )  # fmt: skip
    command.add_argument("--steps", type=int, default=20, help="number of steps (default 20)")
    command.add_argument("--begin", type=int, default=0, help="index of the first timestep, for schedulers (default 0)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of the scheduler's class, or of the loop or function; JSON or text; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--step", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of the scheduler's every step, such as eta=1.0; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--sigmas", default="0.03,14.6", metavar="MIN,MAX", help="noise levels of a loop, in Karras's spacing"
    )
    with_json(command)


def _env(options):
    from genengine import environment

    report = environment.report()
    print(json.dumps(report, indent=1) if options.json else environment.text(report))


def _verify(options):
    from genengine import environment

    device = chosen_device(options)
    rows = environment.verify(device, None if options.json else print, only=options.ops, skip=options.skip)
    failed = [row for row in rows if row["verdict"] == environment.WRONG]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        count = Counter(row["verdict"] for row in rows)
        parts = [f"{count[environment.RIGHT]} kernels right", f"{len(failed)} wrong"]
        parts += [f"{count[environment.UNCHECKED]} not checked"] if count[environment.UNCHECKED] else []
        print(", ".join([*parts, f"{count[environment.ABSENT]} not available here"]))
    return 1 if failed else 0


def _trace(options):
    import inspect
    from importlib import import_module

    from genengine import schedules
    from genengine.trace import trace

    module, colon, name = options.target.partition(":")
    if not colon:
        raise ValueError(
            f"target must look like MODULE:NAME, diffusers:DDIMScheduler for example, got {options.target!r}"
        )
    sys.path.insert(0, str(Path.cwd()))  # a module of the user's own
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {options.target}: {error}") from error
    arguments, step = settings(options.set), settings(options.step)
    if inspect.isclass(target):
        table = trace(target(**arguments), options.steps, options=step, begin=options.begin)
    elif "sigmas" in inspect.signature(target).parameters:
        low, high = (float(level) for level in options.sigmas.split(","))
        levels = high * schedules.karras(options.steps, low, high)
        table = trace(target, sigmas=levels, options=arguments)
    else:
        table = trace(target, options.steps, options=arguments)
    print(json.dumps(_table_record(table)) if options.json else table.describe())


def _table_record(table):
    from genengine.table import COLUMNS

    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.rows[:, 0].tolist()]
    return {"name": table.name, "init_scale": table.init_scale, "first_c_in": table.first_c_in, "rows": rows}
