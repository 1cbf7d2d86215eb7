"""`genengine demo`: the main job in a few minutes, on the machine at hand."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from genengine import data, evaluate, gallery, images
from genengine.models.flow import FlowMatching

TRAIN_STEPS = 150
SAMPLER = {"solver": "euler", "steps": 50, "guidance": 1.5}
GAINS = ("CFG + Euler row", "CFG + Euler row with x_in", "CFG + DDPM row with noise", "flow sampler, tiny DiT, CFG")


def run(out: Path, *, seed: int = 0) -> None:
    """Sample digits from the shipped model, train a model a little, time the fused sampler against eager PyTorch."""
    images.check_suffix(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is tiny: a second thread gains little, and loses much on a busy machine
    try:
        sample_digits(out, seed)
        train_briefly(seed)
        show_gain()
        show_families(out.parent / "gallery", seed)
    finally:
        torch.set_num_threads(threads)


def sample_digits(out: Path, seed: int) -> None:
    print("1. Sampling handwritten digits from the shipped class-conditional flow-matching transformer")
    model = FlowMatching.pretrained("digits")
    labels = [i // 10 for i in range(100)]
    start = time.perf_counter()
    samples = model.sample(100, labels, **SAMPLER, seed=seed, progress="   sampling")
    seconds = time.perf_counter() - start
    path = images.save(out, data.to_uint8(samples))
    report = evaluate.evaluate_samples(samples, torch.tensor(labels))
    print(f"   100 digits, one row per class, in {seconds:.2f} s: {path}")
    print(f"   read as the class asked for by a nearest-neighbour classifier: {100 * report['knn_accuracy']:.0f} %\n")


def train_briefly(seed: int) -> None:
    from genengine import train

    print(f"2. Training the same network from nothing for {TRAIN_STEPS} steps (the shipped model had more)")
    config = train.preset("flow", steps=TRAIN_STEPS, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        train.train(config, folder, log_every=10)
        lines = (Path(folder) / train.LOG_FILE).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    print(f"   loss {losses[0]:.3f} -> {losses[-1]:.3f}; the whole run: genengine train flow --data digits\n")


def show_gain() -> None:
    from genengine.benchmarks import registry, suite

    print("3. What fusion gains here: one thread, CPU time, interleaved (median ratio, 95 % interval)")
    options = suite.Options(budget=1.5, compile_modes=())  # to compile takes longer than this whole demo
    for name in GAINS:
        entry = registry.find(name)
        print(gain_line(suite.time_one(entry, next(entry.cases("cpu")), options)), flush=True)
    print("   the whole suite, torch.compile included: genengine bench all")


def show_families(folder: Path, seed: int) -> None:
    print("\n4. All families on one page: DDPM, flow matching, VAE, VQ-VAE, GAN, PixelCNN")
    try:
        page, picture = gallery.write(folder, seed=seed)
    except RuntimeError as error:  # Matplotlib is an extra
        print(f"   left out: {error}")
        return
    print(f"   {page} (open it in a browser) and {picture}")


def gain_line(row: dict) -> str:
    """One row of the table: the work, and how many times longer each eager variant takes."""
    if "error" in row:
        return f"   {row['name']}: {row['error']}"
    from genengine.benchmarks import table

    eager = {name: entry for name, entry in row["ratios"].items() if name.startswith("eager")}
    ratios = ", ".join(
        f"{entry['ratio']:.2f}x ({entry['low']:.2f}-{entry['high']:.2f}) faster than {name}"
        for name, entry in eager.items()
    )
    return f"   {row['name']:28} {table.work(row):38} {ratios}"
