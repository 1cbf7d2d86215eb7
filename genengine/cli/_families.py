"""The commands about models: demo, train, sample, evaluate, gallery."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from genengine import data
from genengine.arguments import parse_labels, settings
from genengine.cli._options import (
    add_command,
    chosen_device,
    chosen_options,
    load_model,
    with_data,
    with_device,
    with_family,
    with_json,
    with_model,
    with_seed,
    with_threads,
)  # fmt: skip

HELD_OUT = {"train": "test", "train_fit": "validation"}  # training split -> the images it has not seen


def add_demo(commands):
    command = add_command(
        commands, "demo", _demo, "sample digits, train a little, and show what fusion gains", "genengine demo"
    )
    command.add_argument(
        "--out", default="out/digits.png", metavar="FILE", help="picture to write (default out/digits.png)"
    )
    with_seed(command)


def add_train(commands):
    command = add_command(
        commands, "train", _train, "train a model on the embedded digits or on your own images",
        "genengine train vae --data photos/ --set batch_size=64 --set model.beta=0.5 --out runs/vae",
    )  # fmt: skip
    with_family(command)
    with_data(command)
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
    with_threads(command)
    with_device(command)
    with_json(command)


def add_sample(commands):
    command = add_command(
        commands, "sample", _sample, "draw images into a PNG grid or an .npz archive",
        "genengine sample flow --num 100 --labels 0-9 --seed 1 --out digits.png",
    )  # fmt: skip
    with_model(command)
    command.add_argument("--num", type=int, default=100, help="number of images (default 100)")
    command.add_argument("--labels", default=None, help="classes, taken in turn: 7, 0-9 or 1,3,5 (default all)")
    command.add_argument(
        "--out", required=True, metavar="FILE", help=".png (a grid) or .npz (arr_0 uint8 NHWC, arr_1 labels)"
    )
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    with_seed(command)
    with_threads(command)
    with_device(command)


def add_evaluate(commands):
    command = add_command(
        commands, "evaluate", _evaluate, "measure sample quality and memorisation", "genengine evaluate flow --seeds 5"
    )
    with_model(command)
    command.add_argument(
        "--split", choices=tuple(HELD_OUT), default="train",
        help="what the model was trained on: train, measured against test, or train_fit, against validation "
        "(default train)",
    )  # fmt: skip
    with_data(command)
    command.add_argument("--seeds", type=int, default=5, help="number of sampling seeds (default 5, at least 2)")
    command.add_argument("--no-progress", action="store_true", help="no progress bars")
    command.add_argument("--no-baselines", action="store_true", help="leave out the baselines")
    command.add_argument(
        "--density", default=None, metavar="DATA",
        help="instead, report which images of a folder or .npz are unlikely or too likely under the model",
    )  # fmt: skip
    with_threads(command)
    with_device(command)
    with_json(command)


def add_gallery(commands):
    from genengine import models

    command = add_command(
        commands, "gallery", _gallery, "render one page of all families: samples, curves, metrics, speed",
        "genengine gallery --out gallery",
    )  # fmt: skip
    command.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(models.FAMILIES)} (default all)")
    command.add_argument("--out", default="out/gallery", metavar="FOLDER", help="where to write (default out/gallery)")
    with_seed(command)
    with_threads(command)
    with_device(command)


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
        config, out, resume=options.resume, device=chosen_device(options), progress=not options.no_progress,
        dataset=images, tensorboard=options.tensorboard,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"model": str(model), "log": str(out / train.LOG_FILE)}))
    else:
        print(f"model: {model}\nnext:  genengine sample {options.family} --checkpoint {model} --out samples.png")


def _sample(options):
    import numpy as np

    from genengine import images

    if options.num < 0:
        raise ValueError(f"--num must be at least 0, got {options.num}")
    images.check_suffix(options.out, options.num)
    model = load_model(options)
    labels = None
    if model.num_classes:
        cycle = parse_labels(options.labels or f"0-{model.num_classes - 1}", model.num_classes)
        labels = np.resize(np.array(cycle, dtype=np.int64), options.num)  # the cycle again and again
    elif options.labels is not None:
        raise ValueError(f"--labels must be left out for a model without classes, got {options.labels}")
    samples = model.sample(
        options.num, labels, seed=options.seed, progress=not options.no_progress, check_finite=True,
        **chosen_options(options, model),
    )  # fmt: skip
    path = images.save(options.out, data.to_uint8(samples, model.num_levels), labels)
    print(f"{options.num} samples: {path}")


def _evaluate(options):
    from genengine import evaluate

    model = load_model(options)
    chosen = chosen_options(options, model)
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
        options.out, families=options.families, seed=options.seed, device=chosen_device(options), report=print
    )
    print("\n".join(map(str, paths)))
