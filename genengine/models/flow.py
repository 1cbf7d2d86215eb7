"""Flow matching: a network that predicts the velocity along a path from data to noise.

Lipman et al., Flow Matching for Generative Modeling, 2023; Liu et al., Flow Straight and Fast, 2023;
logit-normal training times: Esser et al. 2024; classifier-free guidance: Ho & Salimans 2022.
"""

from __future__ import annotations

import torch

from genengine import ops, paths, prediction, schedules, solvers
from genengine.models._guided import Guided
from genengine.models.base import Option

SOLVERS = ("euler", "heun")
TIMES = ("logit_normal", "uniform", "shifted")
# The entries of a config beside net and path.
DEFAULTS = {"times": TIMES, "time_mean": 0.0, "time_std": 1.0, "time_shift": 3.0, "class_drop": 0.1, "num_levels": 256}


class FlowMatching(Guided):
    """A network, a path, `loss` and `sample`.

    Args:
        net: module net(x, t, y) -> output with x's shape; has `config` with image_size, in_channels and
            num_classes (`DiT` and `UNet` do).
        path: path from data (t = 0) to noise (t = 1); default RectifiedFlow().
        times: how training times are drawn: "logit_normal", "uniform", or "shifted" towards noise.
        time_mean, time_std: of "logit_normal": t = sigmoid(time_mean + time_std z), z ~ N(0, 1); time_std > 0.
        time_shift: of "shifted": t = time_shift u / (1 + (time_shift - 1) u), u uniform; > 0.
        class_drop: probability in [0, 1) of hiding the label in training, needed for guidance.
        num_levels: values of a pixel, see `Model`.
    Raises:
        ValueError: a network with a learned variance, or parameters out of range.
    """

    family = "flow"
    likelihood = "bound"
    presets = {
        "digits": {
            "model": {
                "net": {"name": "dit", "config": "tiny"}, "time_mean": 0.0, "time_std": 1.0, "class_drop": 0.1,
            },
        },
        "images": {
            "model": {
                "net": {"name": "dit", "dim": 384, "depth": 12, "num_heads": 6, "patch_size": 2, "learn_sigma": False},
            },
            "steps": 100_000, "lr": 3e-4, "warmup": 1000, "ema_decay": 0.9999,
        },
        "smoke": {
            "model": {"net": {"name": "dit", "config": "tiny"}},
            "steps": 60, "batch_size": 64, "warmup": 10, "ema_decay": 0.9,
        },
    }  # fmt: skip
    options = (
        Option("steps", 15, "solver steps; heun evaluates the network twice a step", int),
        Option("solver", "heun", "solver", str, SOLVERS),
        Option("guidance", 1.0, "classifier-free guidance scale; 1 is none"),
    )

    def __init__(
        self, net, path=None, *, times="logit_normal", time_mean=0.0, time_std=1.0, time_shift=3.0, class_drop=0.1,
        num_levels=256,
    ):  # fmt: skip
        if getattr(net.config, "learn_sigma", False):
            raise ValueError("models/FlowMatching: net must have learn_sigma=False; a velocity has no variance")
        if times not in TIMES:
            raise ValueError(f"models/FlowMatching: times must be one of {', '.join(TIMES)}, got {times!r}")
        if not time_std > 0 or not time_shift > 0:
            raise ValueError(
                f"models/FlowMatching: time_std must be > 0, and so must time_shift, got time_std={time_std}, "
                f"time_shift={time_shift}"
            )
        super().__init__(net, paths.RectifiedFlow() if path is None else path, class_drop, num_levels)
        self.times, self.time_mean, self.time_std, self.time_shift = times, time_mean, time_std, time_shift

    def draw_times(self, num, *, seed, sample_ids=None, step=0):
        """Training times, (num,) float32 on the CPU, a function of (seed, sample, step)."""
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step, "stream": "time"}
        if self.times == "logit_normal":
            return schedules.logit_normal_times(ops.normal((num, 1), **draw)[:, 0], self.time_mean, self.time_std)
        u = ops.uniform((num, 1), **draw)[:, 0]
        return u if self.times == "uniform" else schedules.shifted_times(u, self.time_shift)

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """Mean squared error of the velocity.

        x_t = alpha(t) x0 + sigma(t) eps, target = alpha'(t) x0 + sigma'(t) eps; mean over all elements. Arguments as
        of `loss`.
        """
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step}
        t = self.draw_times(len(x0), **draw)
        row = self.path.coefficients(t.double().numpy())
        coefficients = (*row[:2], *prediction.target("velocity", *row))
        x_t, target, labels = self._noised(x0, labels, coefficients, **draw)
        output = self.net(x_t, t.to(x0.device), labels)
        return {"loss": (output.float() - target.float()).square().mean()}

    def sample(
        self, num, labels=None, *, steps=50, guidance=1.0, seed=0, solver="heun", first_id=0, callback=None,
        progress=False, check_finite=False, extensions=(),
    ):  # fmt: skip
        """Draw images by integrating dx/dt = velocity from noise (t = 1) to data (t = 0) on a uniform grid.

        Sample i is a function of (seed, first_id + i) and its label alone, up to rounding in products
        whose shape depends on the batch.

        Args:
            num: number of images, 0 too.
            labels: int, or num ints (sequence or tensor) in 0 .. num_classes - 1; None takes the classes
                in turn.
            steps: solver steps; "euler" costs one network evaluation per step, "heun" two.
            guidance: w in out_0 + w (out_1 - out_0), out_0 without and out_1 with the class; 1 is plain
                conditional and costs half; a number, or (num,) for one weight per sample.
            seed: int in [0, 2^64).  solver: "euler" or "heun".
            first_id: global index of the first sample, in [0, 2^32 - num].
            callback: called with a `sampler.StepInfo` after each row of the solver's table.
            progress: show a progress bar.
            check_finite: look at every output of the network; costs a synchronisation per step on a GPU.
            extensions: pieces of `genengine.extensions`.
        Returns:
            (num, C, H, W) float32 on the network's device, nominally in [-1, 1], not clipped.
        Raises:
            ValueError: unknown solver; labels, guidance or first_id out of range or of the wrong number.
            TypeError: labels that are not integers, a num or first_id that is no int.
            FloatingPointError: with check_finite, an output of the network that is not finite.
        """
        if solver not in SOLVERS:
            raise ValueError(f"models/FlowMatching.sample: solver must be one of {SOLVERS}, got {solver!r}")
        sample_ids = self._sample_ids(num, first_id)
        labels = self._labels(num, labels)
        guidance = self._guidance(num, guidance)
        table = getattr(solvers, solver)(
            self.path, schedules.uniform(steps), prediction="velocity", guidance_scale=guidance
        )
        return self._run_table(
            table, self.net, num, labels, guidance, seed=seed, sample_ids=sample_ids, callback=callback,
            progress=progress, check_finite=check_finite, extensions=extensions,
        )  # fmt: skip

    def velocity(self, x, t, labels=None):
        """The network's output at (x, t): x (B, C, H, W), t a float, labels (B,) int64 or None."""
        return self.net(x, torch.full((len(x),), t, device=x.device), labels)

    def log_prob(self, x0, labels=None, *, seed=0, **options):
        """A lower bound of log p(x0 | labels) of the discrete image in nats, (B,); see `ode_log_prob`, which takes the
        options. Of the density itself the ODE gives the exact value; spreading the discrete pixels makes it a bound."""
        return self.ode_log_prob(x0, labels, seed=seed, **options)

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        return self._describe() | {name: getattr(self, name) for name in DEFAULTS}

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        Raises:
            ValueError: another family, an unknown network, path or entry, an entry of the wrong type.
        """
        net, path, rest = cls._rebuild(config, DEFAULTS, seed)
        return cls(net, path, **rest)
