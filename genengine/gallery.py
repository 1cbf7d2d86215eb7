"""`genengine gallery`: one page of all families, as a picture and as a web page that needs nothing else.

Per family: samples by class, what else it can show (`Model.panels`), its training curve, its metrics as recorded when
it was made, and the speed of sampling measured as the page is written.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import time
from pathlib import Path

import numpy as np
import torch

import genengine
from genengine import data, images, models
from genengine.models.base import PRETRAINED

COLUMNS = 10  # samples per class
# family -> its name in print, and what a visitor should know of it
TITLES = {
    "ddpm": (
        "DDPM",
        "A U-Net learns to take noise away, a little at a time, and how sure to be of it: fifteen steps of "
        "DPM-Solver++ give an image, five hundred ancestral ones a bound of its likelihood.",
    ),
    "flow": (
        "Flow matching",
        "A transformer learns the velocity that carries noise to data along straight lines; an ODE solver follows it, "
        "and its divergence gives a likelihood.",
    ),
    "vae": (
        "VAE",
        "An encoder and a decoder with a Gaussian bottleneck, sampled from a mixture of Gaussians that was fitted to "
        "the encoded training images.",
    ),
    "vqvae": (
        "VQ-VAE",
        "The bottleneck is a codebook; a PixelCNN over the grid of codes draws what the decoder then paints.",
    ),
    "gan": (
        "GAN",
        "A generator against a discriminator that sees the class by projection, with R1 and differentiable "
        "augmentation.",
    ),
    "pixelcnn": (
        "PixelCNN",
        "Pixel after pixel, each from its exact distribution given those before it: gated, with two stacks and no "
        "blind spot.",
    ),
}
SHOWN = {  # metric -> what a visitor reads
    "bits_per_dim": "bits/dim", "frechet_distance": "Fréchet distance", "coverage": "coverage",
    "recall": "recall", "knn_accuracy": "read as asked", "nearer_train_share": "nearer to train",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page says of one family; pictures are uint8 (H, W) or (H, W, 3), one screen pixel per image pixel."""

    family: str
    pictures: dict[str, np.ndarray]
    curve_of: str
    curve: list[tuple[int, float]]
    metrics: dict[str, str]
    facts: dict[str, str]
    command: str

    @property
    def title(self) -> str:
        return TITLES[self.family][0]

    @property
    def lines(self) -> dict[str, str]:
        """Metrics and facts, what a reader sees as name and value."""
        return {**self.metrics, **self.facts}


def write(folder, *, families=None, seed: int = 0, device="cpu", report=None) -> list[Path]:
    """Render folder/gallery.html and folder/gallery.png from the shipped models.

    Args:
        folder: made if needed.  families: names, default all that ship a model.  seed: of all samples.
        report: called with a line of text per family.
    Returns:
        The paths written.
    Raises:
        ValueError: an unknown family or one without a shipped model; RuntimeError: Matplotlib or Pillow is missing.
    """
    plotting = _matplotlib()
    names = families or [name for name in models.FAMILIES if (PRETRAINED / f"{name}_digits.safetensors").exists()]
    sections = []
    for name in names:
        start = time.perf_counter()
        sections.append(section(name, seed=seed, device=device))
        if report is not None:
            report(f"{name}: {time.perf_counter() - start:.1f} s")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "gallery.html", folder / "gallery.png"
    page.write_text(web_page(sections), encoding="utf-8")
    plot(sections, picture, plotting)
    return [page, picture]


def section(name: str, *, seed: int = 0, device="cpu") -> Section:
    """Everything the page shows of one family."""
    model = models.family(name).pretrained("digits", device=device)
    record = json.loads((PRETRAINED / f"{name}_digits.json").read_text(encoding="utf-8"))
    options = model.defaults()
    labels = torch.arange(10).repeat_interleave(COLUMNS) if model.num_classes else None
    model.sample(2, **options)  # nothing of the first call's set-up in the time
    start = time.perf_counter()
    samples = model.sample(10 * COLUMNS, labels, seed=seed, **options)
    seconds = time.perf_counter() - start
    pictures = {"one row per class" if model.num_classes else "samples": _grid(model, samples)}
    x0, classes = _examples(model)
    for title, panel in model.panels(x0, classes, seed=seed).items():
        pictures[title] = _grid(model, panel.flatten(0, 1), panel.shape[1])
    threads = torch.get_num_threads()
    where = "one core" if threads == 1 else f"{threads} threads"
    facts = {
        "weights": f"{record['parameters']:,}",
        "training": f"{record['environment']['train_seconds'] / 60:.1f} min, one core",
        "sampling": f"{10 * COLUMNS / seconds:,.0f} images/s, {where}",
    }
    curve = record["curve_of"], record["curve"]
    return Section(name, pictures, *curve, _metrics(model, record), facts, record["command"])


def _examples(model):
    """One real image of each class that the model has not seen, and their labels."""
    held_out = data.load("digits", "test")
    pick = torch.stack([(held_out.labels == label).nonzero()[0, 0] for label in range(held_out.num_classes)])
    x0, labels, _ = held_out.with_levels(model.num_levels).batch(pick)
    return x0.to(model.device), labels.to(model.device) if model.num_classes else None


def _grid(model, pixels, columns=COLUMNS):
    """Images (N, C, H, W) in [-1, 1] as one picture, a pixel between them; grey ones as ink on paper."""
    tiles = data.to_uint8(pixels, model.num_levels)
    canvas = images.grid(tiles, columns, scale=1, gap=1, invert=tiles.shape[-1] == 1)
    return canvas[..., 0] if canvas.shape[-1] == 1 else canvas


def _metrics(model, record):
    """What visitors are shown of the recorded test metrics, as text with the spread over sampling seeds."""
    test, found = record["test"], {}
    for name, title in SHOWN.items():
        if name in test["measured"]:
            bound = "≤ " if model.likelihood == "bound" else ""
            found[title] = f"{bound}{test['measured'][name]['held_out']:.3f}"
        elif name in test["samples"]["mean"]:
            found[title] = f"{test['samples']['mean'][name]:.3f} ± {test['samples']['std'][name]:.3f}"
    return found


# ---- the web page ----------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1b19; --paper: #faf8f4; --faint: #8a857b; --line: #ddd7cb; --mark: #b3472d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e4dc; --paper: #191816; --faint: #98928a; --line: #3a3733; --mark: #e08a6d }
  img { filter: invert(1) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 3rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif }
h1 { font-size: 2.4rem; margin: 0; letter-spacing: -.02em } h2 { font-size: 1.5rem; margin: 0 }
header p { max-width: 46rem; color: var(--faint) }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.5rem }
.summary { color: var(--faint); margin: .2rem 0 1.2rem; max-width: 46rem }
.row { display: flex; flex-wrap: wrap; gap: 1.6rem 2rem; align-items: flex-start }
.told { margin-top: 1.4rem }
figure { margin: 0 } figcaption { color: var(--faint); font-size: .85rem; margin-top: .35rem }
img { image-rendering: pixelated; display: block; max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
td { padding: .12rem 0; vertical-align: top } td:first-child { color: var(--faint); padding-right: 1.2rem }
code { font: .8rem/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere }
svg { display: block; overflow: visible } svg text { font-size: 11px; fill: var(--faint) }
path { fill: none; stroke: var(--mark); stroke-width: 1.5 } line { stroke: var(--line) }
"""


def web_page(sections: list[Section]) -> str:
    """The whole page as one HTML document: styles, pictures and curves within it, no script, nothing fetched."""
    body = "\n".join(_section_html(part) for part in sections)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>genengine: the families on 8x8 digits</title><style>{STYLE}</style></head><body>
<header><h1>genengine</h1>
<p>Every family of generative models here, trained on 1,437 handwritten digits of 8x8 pixels on one CPU core, sampled
through the same fused kernels. Metrics are those of the test images, recorded when the model was made; speeds were
measured as this page was written, with genengine {html.escape(genengine.__version__)}.</p></header>
{body}
</body></html>
"""


def _section_html(part):
    figures = "\n".join(_figure(title, picture) for title, picture in part.pictures.items())
    return f"""<section id="{part.family}"><h2>{part.title}</h2>
<p class="summary">{html.escape(TITLES[part.family][1])}<br><code>{html.escape(part.command)}</code></p>
<div class="row">
{figures}
</div><div class="row told">
<figure>{_curve_svg(part.curve)}<figcaption>{html.escape(part.curve_of)} by step</figcaption></figure>
{_table(part.metrics)}
{_table(part.facts)}
</div></section>"""


def _table(lines):
    rows = (f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in lines.items())
    return f"<table>{''.join(rows)}</table>"


def _figure(title, picture, scale=3):
    height, width = picture.shape[:2]
    text = html.escape(title)
    return (
        f'<figure><img alt="{text}" width="{scale * width}" height="{scale * height}" '
        f'src="data:image/png;base64,{_png(picture)}"><figcaption>{text}</figcaption></figure>'
    )


def _png(picture):
    buffer = io.BytesIO()
    images.pillow().fromarray(picture).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _curve_svg(curve, width=260, height=120):
    """The loss against the step, as an inline drawing."""
    steps, losses = (np.array(column, dtype=float) for column in zip(*curve, strict=True))
    low, high = losses.min(), np.quantile(losses, 0.98)
    x = width * (steps - steps[0]) / max(steps[-1] - steps[0], 1.0)
    y = height * (1.0 - (np.minimum(losses, high) - low) / max(high - low, 1e-12))
    points = " L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    return f"""<svg width="{width + 46}" height="{height + 20}" role="img" aria-label="loss by step">
<line x1="0" y1="{height}" x2="{width}" y2="{height}"/><path d="M{points}"/>
<text x="{width + 6}" y="{y[-1] + 4:.1f}">{losses[-1]:.3g}</text>
<text x="0" y="{height + 15}">{steps[0]:.0f}</text>
<text x="{width}" y="{height + 15}" text-anchor="end">{steps[-1]:.0f}</text></svg>"""


# ---- the picture -----------------------------------------------------------------------------------------------------


def _matplotlib():
    try:
        import matplotlib.figure as figure
    except ImportError as error:
        raise RuntimeError("the gallery needs Matplotlib: pip install 'genengine[plot,image]'") from error
    images.pillow()
    return figure


INK, FAINT, MARK, PAPER = "#1c1b19", "#8a857b", "#b3472d", "#faf8f4"
WIDTH, ROW, SCALE = 15.0, 2.75, 0.0205  # inches: of the page, of a family, of an image pixel


def plot(sections: list[Section], path, figure_module) -> None:
    """The same page as one PNG: a row per family, its pictures, its curve, its numbers."""
    height = ROW * len(sections) + 0.2
    figure = figure_module.Figure(figsize=(WIDTH, height), dpi=110, facecolor=PAPER)
    for place, part in enumerate(sections):
        top, left = height - ROW * place - 0.15, 0.25
        figure.text(left / WIDTH, top / height, part.title, size=15, weight="bold", color=INK, va="top")
        for title, picture in part.pictures.items():
            rows, columns = picture.shape[:2]
            wide, high = SCALE * columns, SCALE * rows
            axis = figure.add_axes((left / WIDTH, (top - 0.55 - high) / height, wide / WIDTH, high / height))
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
            axis.axis("off")
            axis.set_title(title, size=8, color=FAINT, loc="left", pad=3)
            left += max(wide, 1.3) + 0.3
        axis = figure.add_axes(((WIDTH - 5.1) / WIDTH, (top - 2.35) / height, 1.9 / WIDTH, 1.75 / height))
        _plot_curve(axis, part)
        for line, (name, value) in enumerate(part.lines.items()):
            y = (top - 0.45 - 0.215 * line) / height
            figure.text((WIDTH - 2.85) / WIDTH, y, name, size=8, color=FAINT, va="top")
            figure.text((WIDTH - 1.65) / WIDTH, y, value, size=8, color=INK, va="top")
    figure.savefig(path)


def _plot_curve(axis, part):
    steps, losses = zip(*part.curve, strict=True)
    axis.set_facecolor("none")
    axis.plot(steps, losses, color=MARK, linewidth=1.0)
    axis.set_ylim(min(losses), float(np.quantile(losses, 0.98)))
    axis.set_title(part.curve_of, size=8, color=FAINT, loc="left", pad=3)
    axis.tick_params(labelsize=6, colors=FAINT, length=2)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
