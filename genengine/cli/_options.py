"""What the commands share: the options that several of them take, and how they are read."""

from __future__ import annotations

from pathlib import Path

from genengine import data


def add_command(commands, name, run, summary, example):
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"Example: {example}"
    )
    command.set_defaults(run=run, command=name)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def with_json(command):
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def with_device(command):
    command.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")


def with_threads(command):
    command.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")


def with_seed(command):
    command.add_argument("--seed", type=int, default=0, help="an integer in [0, 2^64) (default 0)")


def with_data(command):
    command.add_argument(
        "--data", default="digits",
        help="digits; a folder of images, one subfolder per class; an .npz archive (arr_0 uint8 NHWC, arr_1 labels); "
        "shapes-N or textures-N, drawn at N x N (default digits)",
    )  # fmt: skip
    command.add_argument(
        "--on-bad", choices=data.ON_BAD, default="refuse",
        help="what to do about unreadable or odd-sized files of a folder (default refuse)",
    )  # fmt: skip


def with_family(command):
    from genengine import models

    command.add_argument("family", metavar="FAMILY", help=f"one of {', '.join(models.FAMILIES)}")


def with_model(command):
    """The family, its checkpoint, and every option that some family's `sample` has."""
    with_family(command)
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


def chosen_options(options, model):
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


def check_seed(seed):
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"--seed must be in [0, 2^64), got {seed}")


def set_threads(threads):
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)


def chosen_device(options):
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # in which torch lists every kind there is
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {name} asked for, but torch {torch.__version__} sees no CUDA device")
    return device


def load_model(options):
    from genengine import models

    device, family = chosen_device(options), models.family(options.family)
    if options.checkpoint is None:
        return family.pretrained("digits", device=device)
    path = Path(options.checkpoint)
    if path.is_file() or path.suffix == ".safetensors":  # of which `load` says that it is missing
        return family.load(path, device=device)
    return family.from_pretrained(options.checkpoint, device=device)
