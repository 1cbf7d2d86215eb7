"""The `genengine` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from genengine import data
from genengine.arguments import parse_labels, settings

HELD_OUT = {"train": "test", "train_fit": "validation"}  # training split -> the images it has not seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit status 2, not a traceback."""
    options = _parser().parse_args(arguments)
    try:
        _check_seed(getattr(options, "seed", None))
        _set_threads(getattr(options, "threads", None))
        return options.run(options) or 0
    except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"genengine {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngenengine {options.command}: interrupted", file=sys.stderr)
        return 130


# ---- parsers -----------------------------------------------------------------------------------------------------


def _parser():
    import genengine

    parser = argparse.ArgumentParser(
        prog="genengine",
        description="Fused kernels for generative models: sample, train, evaluate, benchmark.",
        epilog="Example: genengine sample flow --num 100 --labels 0-9 --out digits.png",
    )
    parser.add_argument("--version", action="version", version=f"genengine {genengine.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_env, _add_verify, _add_demo, _add_train, _add_sample, _add_evaluate, _add_gallery, _add_bench, _add_trace,
        _add_profile,
    ):  # fmt: skip
        add(commands)
    return parser


def _command(commands, name, run, summary, example):
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"Example: {example}"
    )
    command.set_defaults(run=run, command=name)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _with_json(command):
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def _with_device(command):
    command.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")


def _with_threads(command):
    command.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")


def _with_seed(command):
    command.add_argument("--seed", type=int, default=0, help="an integer in [0, 2^64) (default 0)")


def _with_data(command):
    command.add_argument(
        "--data", default="digits",
        help="digits; a folder of images, one subfolder per class; an .npz archive (arr_0 uint8 NHWC, arr_1 labels); "
        "shapes-N or textures-N, drawn at N x N (default digits)",
    )  # fmt: skip
    command.add_argument(
        "--on-bad", choices=data.ON_BAD, default="refuse",
        help="what to do about unreadable or odd-sized files of a folder (default refuse)",
    )  # fmt: skip


def _with_family(command):
    from genengine import models

    command.add_argument("family", metavar="FAMILY", help=f"one of {', '.join(models.FAMILIES)}")


def _with_model(command):
    """The family, its checkpoint, and every option that some family's `sample` has."""
    _with_family(command)
    command.add_argument(
        "--checkpoint", default=None, metavar="FILE",
        help="model.safetensors, the folder it is in, or the name of a shipped model (default: digits)",
    )  # fmt: skip
    for name, offers in _sampling_options().items():
        kinds = "; ".join(f"{', '.join(families)}: {text}" for text, families in _texts(offers).items())
        choices = sorted({choice for _, option in offers for choice in option.choices})
        command.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=offers[0][1].type, default=None,
            metavar="|".join(choices) if choices else None, help=kinds,
        )  # fmt: skip


def _sampling_options():
    """option name -> [(family, Option)] of all families."""
    from genengine import models

    offers = {}
    for family, model in models.FAMILIES.items():
        for option in model.options:
            offers.setdefault(option.name, []).append((family, option))
    return offers


def _texts(offers):
    """help text -> the families that say it."""
    texts = {}
    for family, option in offers:
        default = "" if option.default is None else f" (default {option.default})"  # None: the text says what it means
        texts.setdefault(option.help + default, []).append(family)
    return texts


def _chosen(options, model):
    """The keyword arguments of the model's `sample`: what the user gave, defaults for the rest."""
    known = {option.name: option for option in model.options}
    for name in _sampling_options():
        if getattr(options, name) is not None and name not in known:
            flags = ", ".join(f"--{other.replace('_', '-')}" for other in known) or "none"
            raise ValueError(
                f"--{name.replace('_', '-')} is no option of {model.family}, which has {flags}; leave it out"
            )
    chosen = {}
    for name, option in known.items():
        value = option.default if getattr(options, name) is None else getattr(options, name)
        if option.choices and value not in option.choices:
            raise ValueError(f"--{name.replace('_', '-')} must be one of {', '.join(option.choices)}, got {value!r}")
        chosen[name] = value
    return chosen


def _add_env(commands):
    _with_json(
        _command(commands, "env", _env, "show which backend runs each op, and why others do not", "genengine env")
    )


def _add_verify(commands):
    command = _command(
        commands, "verify", _verify, "check every kernel against its reference on this machine", "genengine verify"
    )
    _with_device(command)
    _with_json(command)


def _add_demo(commands):
    command = _command(
        commands, "demo", _demo, "sample digits, train a little, and show what fusion gains", "genengine demo"
    )
    command.add_argument(
        "--out", default="out/digits.png", metavar="FILE", help="picture to write (default out/digits.png)"
    )
    _with_seed(command)


def _add_train(commands):
    command = _command(
        commands, "train", _train, "train a model on the embedded digits or on your own images",
        "genengine train vae --data photos/ --set batch_size=64 --set model.beta=0.5 --out runs/vae",
    )  # fmt: skip
    _with_family(command)
    _with_data(command)
    command.add_argument(
        "--preset", default=None,
        help="named settings: digits (the shipped model), images (images of your own, on a GPU), smoke (a minute, of "
        "digits), and others (default: digits for --data digits, else images)",
    )  # fmt: skip
    command.add_argument(
        "--out", default=None, metavar="FOLDER", help="folder of model, state and log (default runs/FAMILY)"
    )
    command.add_argument("--resume", action="store_true", help="continue a stopped run, to the same bits")
    command.add_argument(
        "--split", choices=(*HELD_OUT, "all"), default=None,
        help="training images: train, train_fit, which leaves out validation, or all (default: the preset's)",
    )  # fmt: skip
    command.add_argument("--steps", type=int, default=None, help="iterations (default: the preset's)")
    command.add_argument("--batch-size", type=int, default=None, help="images per step (default: the preset's)")
    command.add_argument("--lr", type=float, default=None, help="peak learning rate (default: the preset's)")
    command.add_argument("--precision", choices=("fp32", "bf16"), default=None, help="bf16 trains under autocast")
    command.add_argument("--seed", type=int, default=None, help="an integer in [0, 2^64) (default: the preset's)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other setting, JSON or text, such as ema_decay=0.99 or model.net.dim=128; may be repeated",
    )  # fmt: skip
    command.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard, if installed")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    _with_threads(command)
    _with_device(command)
    _with_json(command)


def _add_sample(commands):
    command = _command(
        commands, "sample", _sample, "draw images into a PNG grid or an .npz archive",
        "genengine sample flow --num 100 --labels 0-9 --seed 1 --out digits.png",
    )  # fmt: skip
    _with_model(command)
    command.add_argument("--num", type=int, default=100, help="number of images (default 100)")
    command.add_argument("--labels", default=None, help="classes, taken in turn: 7, 0-9 or 1,3,5 (default all)")
    command.add_argument(
        "--out", required=True, metavar="FILE", help=".png (a grid) or .npz (arr_0 uint8 NHWC, arr_1 labels)"
    )
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    _with_seed(command)
    _with_threads(command)
    _with_device(command)


def _add_evaluate(commands):
    command = _command(
        commands, "evaluate", _evaluate, "measure sample quality and memorisation", "genengine evaluate flow --seeds 5"
    )
    _with_model(command)
    command.add_argument(
        "--split", choices=tuple(HELD_OUT), default="train",
        help="what the model was trained on: train, measured against test, or train_fit, against validation "
        "(default train)",
    )  # fmt: skip
    _with_data(command)
    command.add_argument("--seeds", type=int, default=5, help="number of sampling seeds (default 5, at least 2)")
    command.add_argument("--no-progress", action="store_true", help="no progress bars")
    command.add_argument("--no-baselines", action="store_true", help="leave out the baselines")
    command.add_argument(
        "--density", default=None, metavar="DATA",
        help="instead, report which images of a folder or .npz are unlikely or too likely under the model",
    )  # fmt: skip
    _with_threads(command)
    _with_device(command)
    _with_json(command)


def _add_gallery(commands):
    from genengine import models

    command = _command(
        commands, "gallery", _gallery, "render one page of all families: samples, curves, metrics, speed",
        "genengine gallery --out gallery",
    )  # fmt: skip
    command.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(models.FAMILIES)} (default all)")
    command.add_argument("--out", default="out/gallery", metavar="FOLDER", help="where to write (default out/gallery)")
    _with_seed(command)
    _with_threads(command)
    _with_device(command)


def _add_bench(commands):
    command = _command(
        commands,
        "bench",
        _bench,
        "time the fused kernels against eager PyTorch and torch.compile",
        "genengine bench quick",
    )
    command.add_argument(
        "what", nargs="?", default="quick", help="quick, models, peers, all, or one name (see --list); default quick"
    )
    command.add_argument("--list", action="store_true", help="list what can be timed")
    command.add_argument("--budget", type=float, default=2.0, help="seconds of timing per row (default 2)")
    command.add_argument(
        "--save", default=None, metavar="FOLDER", help="also write FOLDER/<device>/<date>-<commit>-<suite>.json"
    )
    _with_device(command)
    _with_json(command)


def _add_trace(commands):
    command = _command(
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
    _with_json(command)


def _add_profile(commands):
    command = _command(
        commands, "profile", _profile, "show where the time of an op, a model or your own function goes",
        "genengine profile flow.sample --num 16 --steps 8 --html profile.html",
    )  # fmt: skip
    command.add_argument(
        "target", metavar="TARGET",
        help="an op, such as adaln; FAMILY.step, FAMILY.sample or FAMILY.train, such as flow.sample; or "
        "module:function, which takes no arguments",
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
    _with_seed(command)
    _with_threads(command)
    _with_device(command)
    _with_json(command)


def _check_seed(seed):
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"--seed must be in [0, 2^64), got {seed}")


def _set_threads(threads):
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)


# ---- commands ----------------------------------------------------------------------------------------------------


def _device(options):
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # in which torch lists every kind there is
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {name} asked for, but torch {torch.__version__} sees no CUDA device")
    return device


def _env(options):
    from genengine import environment

    report = environment.report()
    print(json.dumps(report, indent=1) if options.json else environment.text(report))


def _verify(options):
    from genengine import environment

    device = _device(options)
    rows = environment.verify(device, report=None if options.json else print)
    failed = [row for row in rows if row["verdict"] == "wrong"]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        right = sum(row["verdict"] == "right" for row in rows)
        print(f"{right} kernels right, {len(failed)} wrong, {len(rows) - right - len(failed)} not available here")
    return 1 if failed else 0


def _demo(options):
    from genengine import demo

    demo.run(Path(options.out), seed=options.seed)


def _train(options):
    from genengine import train

    names = ("split", "steps", "batch_size", "lr", "precision", "seed")
    overrides = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    overrides = settings(options.set) | overrides | {"dataset": options.data}
    usual = "digits" if options.data == "digits" else "images"
    config = train.preset(options.family, options.preset or usual, **overrides)
    out = Path(options.out or f"runs/{options.family}")
    images = data.load(
        options.data, config.split, on_bad=options.on_bad, report=lambda text: print(text, file=sys.stderr)
    )
    model = train.train(
        config, out, resume=options.resume, device=_device(options), progress=not options.no_progress, dataset=images,
        tensorboard=options.tensorboard,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"model": str(model), "log": str(out / train.LOG_FILE)}))
    else:
        print(f"model: {model}\nnext:  genengine sample {options.family} --checkpoint {model} --out samples.png")


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


def _model(options):
    from genengine import models

    device, family = _device(options), models.family(options.family)
    if options.checkpoint is None:
        return family.pretrained("digits", device=device)
    path = Path(options.checkpoint)
    if path.is_file() or path.suffix == ".safetensors":  # of which `load` says that it is missing
        return family.load(path, device=device)
    return family.from_pretrained(options.checkpoint, device=device)


def _sample(options):
    import numpy as np

    from genengine import images

    if options.num < 0:
        raise ValueError(f"--num must be at least 0, got {options.num}")
    images.check_suffix(options.out, options.num)
    model = _model(options)
    labels = None
    if model.num_classes:
        cycle = parse_labels(options.labels or f"0-{model.num_classes - 1}", model.num_classes)
        labels = np.resize(np.array(cycle, dtype=np.int64), options.num)  # the cycle again and again
    elif options.labels is not None:
        raise ValueError(f"--labels must be left out for a model without classes, got {options.labels}")
    samples = model.sample(
        options.num, labels, seed=options.seed, progress=not options.no_progress, check_finite=True,
        **_chosen(options, model),
    )  # fmt: skip
    path = images.save(options.out, data.to_uint8(samples, model.num_levels), labels)
    print(f"{options.num} samples: {path}")


def _evaluate(options):
    from genengine import evaluate

    model = _model(options)
    chosen = _chosen(options, model)
    if options.density is not None:
        _density(options, model)
        return
    seen, unseen = (
        data.load(options.data, part, on_bad=options.on_bad) for part in (options.split, HELD_OUT[options.split])
    )
    result = evaluate.evaluate_model(
        model, seen, unseen, seeds=range(options.seeds), options=chosen, with_baselines=not options.no_baselines,
        progress=not (options.json or options.no_progress),
    )  # fmt: skip
    print(json.dumps(result, indent=1) if options.json else evaluate.text(result))


def _density(options, model):
    """Which images of a folder or archive the model finds odd, against the held-out images of its own data."""
    from genengine import evaluate

    images = data.load(options.density, "all", on_bad=options.on_bad, report=lambda text: print(text, file=sys.stderr))
    usual = data.load(options.data, HELD_OUT[options.split], on_bad=options.on_bad)
    images, usual = (part.with_levels(model.num_levels) for part in (images, usual))
    report = evaluate.outliers(model, images, usual)
    print(json.dumps(report, indent=1) if options.json else evaluate.outlier_text(report))


def _gallery(options):
    from genengine import gallery

    paths = gallery.write(
        options.out, families=options.families, seed=options.seed, device=_device(options), report=print
    )
    print("\n".join(map(str, paths)))


def _bench(options):
    from genengine.benchmarks import harness, suite

    device = _device(options).type
    if options.list:
        print("\n".join((*suite.SUITES, *suite.names())))
        return
    suite.restart_with_malloc_settings()
    head = iter([suite.TABLE_HEAD])  # above the first row: a bad option leaves no table

    def show(row):
        print(*head, suite.table_row(row), sep="\n", flush=True)

    report = suite.run(options.what, device, budget=options.budget, report_row=None if options.json else show)
    if options.json:
        print(json.dumps(report, indent=1))
    if options.save:
        print(f"saved: {harness.save(report, Path(options.save))}", file=sys.stderr)


def _profile(options):
    import torch

    from genengine.profiling import page, profile, targets

    shape, dtype = _shape_and_dtype(options)
    for name in ("num", "steps", "top"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    device = _device(options)
    plotting = page.matplotlib() if options.html else None  # before the work: it may be missing
    request = targets.Request(device, shape, dtype, options.num, options.steps, options.eager, options.seed)
    target = targets.resolve(options.target, request)
    ceilings = None if options.no_ceilings else _ceilings(device)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        report = profile(target.function, device=device, ceilings=ceilings, name=target.name, trace=options.trace)
    report.notes.insert(0, target.description)
    print(json.dumps(report.to_json(), indent=1) if options.json else report.table(options.top))
    if options.html:
        page.write(report, options.html, plotting)
    for path in filter(None, (options.trace, options.html)):
        print(f"saved: {path}", file=sys.stderr)


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


def _ceilings(device):
    """What this machine can do, measured now."""
    import torch

    from genengine.benchmarks import ceilings

    return ceilings.measure(device, (torch.float32, torch.bfloat16))


if __name__ == "__main__":
    sys.exit(main())
