"""DDPM: a chain of denoising steps, trained by its variational bound or a reweighting of it.

Ho et al., Denoising Diffusion Probabilistic Models, 2020; learned variances: Nichol & Dhariwal 2021; v: Salimans & Ho
2022; min-SNR weights: Hang et al. 2023; P2 weights: Choi et al. 2022; zero terminal SNR: Lin et al. 2024.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from genengine import ops, paths, prediction, schedules, solvers
from genengine.models import variational
from genengine.models._guided import Guided
from genengine.models.base import Option
from genengine.models.evaluating import evaluating
from genengine.models.variational import VariationalTerms

PREDICTIONS = ("eps", "x0", "v")
LOSSES = ("simple", "min_snr", "p2", "vlb")
VARIANCES = ("small", "large", "learned")
GRIDS = ("uniform", "karras", "logit_normal")
# The entries of a config beside net and path.
DEFAULTS = {
    "num_timesteps": 1000, "prediction": PREDICTIONS, "loss": LOSSES, "gamma": 5.0, "vlb_weight": 0.001,
    "variance": VARIANCES, "class_drop": 0.1, "num_levels": 256,
}  # fmt: skip


class DDPM(Guided):
    """A network, a variance-preserving path cut in num_timesteps, `loss`, `sample` and a lower bound of the likelihood.

    Args:
        net: module net(x, t, y) -> output with x's shape, or twice its channels with a learned variance; has `config`
            with image_size, in_channels and num_classes (`UNet` and `DiT` do). It is given t in (0, 1].
        path: a variance-preserving path; default Cosine(). A discrete one must have num_timesteps betas.
        num_timesteps: T; training times are t = (n + 1)/T, n = 0 .. T - 1.
        prediction: what the network predicts: "eps", "x0" or "v" = alpha eps - sigma x0.
        loss: the weight of the squared error of the prediction: "simple" 1; "min_snr" min(SNR, gamma) on that of x0;
            "p2" (1 + SNR)^-gamma on that of eps; or "vlb", the full variational bound in bits per dimension.
        gamma: of "min_snr" (there 5 is usual) and "p2" (there 1).
        vlb_weight: with a learned variance, what is added to the loss of the bound in bits per dimension, through
            which only the variance learns (Nichol & Dhariwal 2021, eq. 16; there 0.001).
        variance: of p(x_s | x_t): "small" is the posterior's, beta tilde; "large" is beta; "learned" lies between, at
            exp(f log beta + (1 - f) log beta tilde) with f = (v + 1)/2, v the second half of the network's output;
            default "learned" where net.config.learn_sigma, else "large".
        class_drop: probability in [0, 1) of hiding the label in training, needed for guidance.
        num_levels: values of a pixel, see `Model`.
    Raises:
        ValueError: parameters that are out of range or do not fit each other.
    """

    family = "ddpm"
    likelihood = "bound"
    presets = {
        "digits": {
            "model": {
                "net": {"name": "unet", "config": "tiny", "learn_sigma": True, "fourier": [3, 4]},
                "path": {"name": "Cosine", "s": 0.02}, "num_timesteps": 500, "prediction": "v", "loss": "simple",
                "vlb_weight": 0.001, "class_drop": 0.1,
            },
            "steps": 2500, "batch_size": 64, "storage": "float16",
        },
        "images": {
            "model": {"net": {"name": "unet", "config": "cifar"}, "num_timesteps": 1000, "prediction": "v"},
            "steps": 200_000, "lr": 2e-4, "warmup": 5000, "ema_decay": 0.9999,
        },
        "smoke": {
            "model": {"net": {"name": "unet", "config": "tiny"}, "num_timesteps": 100, "prediction": "v"},
            "steps": 60, "batch_size": 64, "warmup": 10, "ema_decay": 0.9,
        },
    }  # fmt: skip
    options = (
        Option("steps", 15, "solver steps", int),
        Option("solver", "dpmpp_2m", "solver", str, tuple(solvers.SOLVERS)),
        Option("grid", "uniform", "spacing of the times", str, GRIDS),
        Option("guidance", None, "classifier-free guidance scale; 1 is none; default 1.1, or 1 without classes"),
        Option("clip", None, "radius that x0 is clamped to; 0 for none, default 1 where the solver can"),
    )
    bars = {**Guided.bars, "bits_per_dim": ("<=", 1.95)}

    def __init__(
        self, net, path=None, *, num_timesteps=1000, prediction="eps", loss="simple", gamma=5.0, vlb_weight=0.001,
        variance=None, class_drop=0.1, num_levels=256,
    ):  # fmt: skip
        learned = bool(getattr(net.config, "learn_sigma", False))
        path = paths.Cosine() if path is None else path
        variance = ("learned" if learned else "large") if variance is None else variance
        super().__init__(net, path, class_drop, num_levels)
        for name, value, allowed in (
            ("prediction", prediction, PREDICTIONS), ("loss", loss, LOSSES), ("variance", variance, VARIANCES),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"models/DDPM: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if learned != (variance == "learned"):
            raise ValueError(
                f"models/DDPM: variance must be 'learned' if and only if the network has learn_sigma=True, got "
                f"{variance!r} and learn_sigma={learned}"
            )
        if not 0 < gamma < math.inf or not 0 <= vlb_weight < math.inf:
            raise ValueError(
                f"models/DDPM: gamma must be > 0 and vlb_weight >= 0, got gamma={gamma}, vlb_weight={vlb_weight}"
            )
        _check_path(path, num_timesteps, prediction)
        self.num_timesteps, self.prediction, self.variance = num_timesteps, prediction, variance
        self.loss_name, self.gamma, self.vlb_weight = loss, gamma, vlb_weight
        self.steps = variational.Steps.of(path, num_timesteps)

    # ---- training ----------------------------------------------------------------------------------------------

    def draw_steps(self, num, *, seed, sample_ids=None, step=0):
        """Training steps n uniform in 0 .. T - 1, (num,) int64 on the CPU, a function of (seed, sample, step)."""
        u = ops.uniform((num, 1), seed=seed, sample_ids=sample_ids, step=step, stream="time")[:, 0]
        return (u.double() * self.num_timesteps).long()

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """The loss under "loss", and where they exist "simple", the weighted squared error, and "vlb", an unbiased
        estimate of the bound in bits per dimension (without the prior's part, which has no parameters)."""
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step}
        n = self.draw_steps(len(x0), **draw)
        row = self._path_at(n)
        c_x0, c_eps = prediction.target(self.prediction, *row)
        x_t, target, labels = self._noised(x0, labels, (*row[:2], c_x0, c_eps), **draw)
        t = torch.from_numpy(self.steps.t[n.numpy()].astype(np.float32)).to(x0.device)
        output, v = self._split(self.net(x_t, t, labels).float())
        terms = {}
        if self.loss_name != "vlb":
            error = (output - target.float()).square().flatten(1).mean(1)
            terms["simple"] = (error * self._column(self._weights(n), error)).mean()
        if self.loss_name == "vlb" or (v is not None and self.vlb_weight):
            mean_output = output if self.loss_name == "vlb" else output.detach()
            nats = self._step_terms(x0.float(), x_t.float(), mean_output, v, n)
            terms["vlb"] = self.num_timesteps * nats.mean() / (math.log(2.0) * math.prod(self.image_shape))
        if self.loss_name == "vlb":
            return {"loss": terms["vlb"], **terms}
        loss = terms["simple"] + self.vlb_weight * terms["vlb"] if "vlb" in terms else terms["simple"]
        return {"loss": loss, **terms}

    def _path_at(self, n):
        """(alpha, sigma, d_alpha, d_sigma), each (B,) float64, at steps n (B,) int64 on the CPU."""
        return tuple(getattr(self.steps, name)[n.numpy()] for name in ("alpha", "sigma", "d_alpha", "d_sigma"))

    def _weights(self, n):
        """The weight of the squared error of the prediction at steps n (B,), float64."""
        alpha, sigma, *_ = self._path_at(n)
        if self.loss_name == "simple":
            return np.ones_like(alpha)
        snr = (alpha / sigma) ** 2
        # the squared error of x0 is that of the output times unit
        unit = {"x0": 1.0, "eps": 1.0 / np.maximum(snr, 1e-12), "v": sigma**2}[self.prediction]
        if self.loss_name == "min_snr":
            return np.minimum(snr, self.gamma) * unit
        return snr * unit / (1.0 + snr) ** self.gamma

    def _split(self, output):
        """(prediction, v or None) of the network's output."""
        if self.variance != "learned":
            return output, None
        return output.chunk(2, dim=1)

    def _step_terms(self, x0, x_t, output, v, n, clip=False):
        """The term of the bound of steps n (B,) int64, in nats, summed over pixels: (B,). clip: x0 to [-1, 1]."""
        steps, at, column = self.steps, n.numpy(), lambda values: self._column(values, x0)
        pair = prediction.to_x0(self.prediction, *self._path_at(n))
        guess = column(pair[0]) * x_t + column(pair[1]) * output
        guess = guess.clamp(-1.0, 1.0) if clip else guess
        small, large = column(steps.log_small[at]), column(steps.log_large[at])
        if v is None:
            log_var = small if self.variance == "small" else large
        else:
            share = 0.5 * (v + 1.0)
            log_var = share * large + (1.0 - share) * small
        kl = variational.gaussian_kl(column(steps.c_x0[at]) * (x0 - guess), small, log_var)
        first = (n == 0).to(x0.device)
        if not bool((n == 0).any()):
            return kl.flatten(1).sum(1)
        # the mean of the last step is the guess: there alpha_s = 1 and sigma_s = 0
        decoder = -variational.discretised_gaussian(x0, guess, log_var, self.num_levels)
        return torch.where(first, decoder.flatten(1).sum(1), kl.flatten(1).sum(1))

    @staticmethod
    def _column(values, like):
        """Float64 values (B,) as a tensor that broadcasts against like (B, ...)."""
        tensor = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(like.device, like.dtype)
        return tensor.reshape(-1, *[1] * (like.dim() - 1))

    # ---- likelihood --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def variational_terms(self, x0, labels=None, *, seed=0, sample_ids=None) -> VariationalTerms:
        """Every term of the bound -log p(x0) <= sum, each step with one draw of its noise.

        The noise of step n is that of (seed, sample, step n, stream "diffuse"); x0 as the network predicts it is
        clamped to [-1, 1], which is part of the model whose bound this is.

        Args:
            x0: (B, C, H, W) in [-1, 1].
            labels: int or (B,) ints, for log p(x0 | label); None for that of no class.
            seed: int in [0, 2^64).  sample_ids: (B,) int64, default 0 .. B - 1.
        Returns:
            VariationalTerms in nats, float32: prior (B,), diffusion (B, T - 1), decoder (B,).
        """
        self._check_images(x0, "variational_terms")
        x0, b, steps = x0.to(self.device).float(), len(x0), self.steps
        labels = self._class_or_none(b, labels, "variational_terms")
        if sample_ids is not None:
            sample_ids = sample_ids.to(x0.device)
        times = torch.from_numpy(steps.t.astype(np.float32)).to(x0.device)
        with evaluating(self.net):
            run = self.net.for_schedule(times[:, None].expand(-1, b), **({} if labels is None else {"y": labels}))
            columns = []
            for n in range(self.num_timesteps):
                row = torch.full((b,), n, dtype=torch.int64)
                alpha, sigma = (torch.full((b,), float(c[n]), device=x0.device) for c in (steps.alpha, steps.sigma))
                x_t, _ = ops.diffuse(x0, alpha, sigma, alpha, sigma, seed=seed, sample_ids=sample_ids, step=n)
                output, v = self._split(run(x_t, row.to(x0.device)).float())
                columns.append(self._step_terms(x0, x_t, output, v, row, clip=True))
        prior = variational.prior_kl(x0, float(steps.alpha[-1]), float(steps.sigma[-1]))
        diffusion = torch.stack(columns[1:], 1) if len(columns) > 1 else x0.new_zeros(b, 0)
        return VariationalTerms(prior, diffusion, columns[0])

    def log_prob(self, x0, labels=None, *, seed=0, sample_ids=None):
        """A lower bound of log p(x0 | labels) of the discrete image in nats, (B,): minus the sum of
        `variational_terms`, whose arguments it takes; unbiased, one draw of the noise of every step."""
        return -self.variational_terms(x0, labels, seed=seed, sample_ids=sample_ids).total

    def velocity(self, x, t, labels=None):
        """dx/dt of the probability-flow ODE: x (B, C, H, W), t a float in (0, 1], labels (B,) int64 or None."""
        output, _ = self._split(self.net(x, torch.full((len(x),), t, device=x.device), labels))
        p, q = prediction.to_velocity(self.prediction, *(float(c) for c in self.path.coefficients(t)), t=t)
        return p * x + q * output

    def measure(self, x0, labels=None, *, seed=0):
        """bits_per_dim, and the parts it is the sum of: of the prior, of all steps but the last, and of the decoder."""
        terms, unit = self.variational_terms(x0, labels, seed=seed), math.log(2.0) * math.prod(self.image_shape)
        parts = {"prior": terms.prior, "diffusion": terms.diffusion.sum(1), "decoder": terms.decoder}
        return {"bits_per_dim": terms.total / unit} | {f"{k}_bits_per_dim": v / unit for k, v in parts.items()}

    # ---- sampling ----------------------------------------------------------------------------------------------

    def sample(
        self, num, labels=None, *, steps=15, solver="dpmpp_2m", grid="uniform", guidance=None, clip=None, seed=0,
        first_id=0, callback=None, progress=False, check_finite=False, extensions=(),
    ):  # fmt: skip
        """Draw images by a solver from noise (t = 1) to data (t = 0).

        Sample i is a function of (seed, first_id + i) and its label alone, up to rounding in products
        whose shape depends on the batch.

        Args:
            num: number of images, 0 too.
            labels: int, or num ints (sequence or tensor) in 0 .. num_classes - 1; None takes the classes
                in turn.
            steps: solver steps, at most num_timesteps with the uniform grid; "heun" and "dpm_2" evaluate the
                network twice a step, "rk4" four times.
            solver: a name in `solvers.SOLVERS`. "ddpm" is ancestral sampling with the variance of the model, a learned
                one too; all others use the network's prediction alone.
            grid: "uniform" in time, at training times; "karras" in noise level^(1/7); "logit_normal".
            guidance: w in out_0 + w (out_1 - out_0), out_0 without and out_1 with the class; 1 is plain
                conditional and costs half; a number, or (num,) for one weight per sample; default 1.1, or 1 without
                classes.
            clip: radius that the predicted x0 is clamped to, 0 for none; default 1 (but none for solvers that
                cannot, such as "lms").
            seed: int in [0, 2^64).
            first_id: global index of the first sample, in [0, 2^32 - num].
            callback: called with a `sampler.StepInfo` after each row of the solver's table.
            progress: show a progress bar.
            check_finite: look at every output of the network; costs a synchronisation per step on a GPU.
            extensions: pieces of `genengine.extensions`; the path is `self.path`, the prediction `self.prediction`.
        Returns:
            (num, C, H, W) float32 on the network's device, nominally in [-1, 1], not clipped.
        Raises:
            ValueError: unknown solver or grid; steps, clip, labels, guidance or first_id out of range or of the wrong
                number.
            TypeError: labels that are not integers, a num or first_id that is no int.
            FloatingPointError: with check_finite, an output of the network that is not finite.
        """
        sample_ids = self._sample_ids(num, first_id)
        labels = self._labels(num, labels)
        usual = 1.1 if self.num_classes else 1.0
        guidance = self._guidance(num, usual if guidance is None else guidance)
        times = self._grid(solver, grid, steps)
        arguments = {"prediction": self.prediction, "guidance_scale": guidance} | self._clip(solver, clip)
        if solver == "ddpm" and self.variance != "small":
            arguments["variance"] = {"learned": "learned_range"}.get(self.variance, self.variance)
        table = solvers.SOLVERS[solver](self.path, times, **arguments)
        learns = self.variance == "learned" and not table.learned_variance
        denoiser = _MeanHalf(self.net) if learns else self.net
        return self._run_table(
            table, denoiser, num, labels, guidance, seed=seed, sample_ids=sample_ids, callback=callback,
            progress=progress, check_finite=check_finite, extensions=extensions,
        )  # fmt: skip

    def _clip(self, solver, clip):
        can = solvers.SOLVERS[solver].clips
        if clip is None:
            return {"clip": 1.0} if can else {}
        if not 0 <= clip < math.inf or (clip and not can):
            what = "a finite radius, or 0 for none" if can else f"0, as {solver} cannot clip"
            raise ValueError(f"models/DDPM.sample: clip must be {what}, got {clip!r}")
        return {"clip": float(clip)} if clip else {}

    def _grid(self, solver, grid, steps):
        """The times of a sampling run, from 1 (or the last training time before it) to 0."""
        if solver not in solvers.SOLVERS:
            raise ValueError(f"models/DDPM.sample: solver must be one of {', '.join(solvers.SOLVERS)}, got {solver!r}")
        if grid not in GRIDS:
            raise ValueError(f"models/DDPM.sample: grid must be one of {', '.join(GRIDS)}, got {grid!r}")
        total = self.num_timesteps
        starts_inside = solvers.SOLVERS[solver].needs_signal and self.path.alpha(1.0) == 0
        if grid == "karras":
            last = (total - 1) / total if self.path.alpha(1.0) == 0 else 1.0
            high, low = (math.exp(-0.5 * float(self.path.log_snr(t))) for t in (last, 1 / total))
            return schedules.karras(steps, low, min(high, 80.0), path=self.path)
        if grid == "logit_normal":
            times = schedules.logit_normal(steps)
        else:
            times = schedules.uniform(steps)
            if steps > total:
                raise ValueError(
                    f"models/DDPM.sample: steps must be at most num_timesteps = {total} on a uniform grid, got {steps}"
                )
            times = np.round(times * total) / total
        if starts_inside:
            times[0] = 0.5 * (1.0 + times[1]) if times[1] >= 1 - 1 / total else 1 - 1 / total
        return times

    # ---- description -------------------------------------------------------------------------------------------

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        return (
            self._describe()
            | {name: getattr(self, name) for name in DEFAULTS if name != "loss"}
            | {"loss": self.loss_name}
        )

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        Raises:
            ValueError: another family, an unknown network, path or entry, an entry of the wrong type.
        """
        net, path, rest = cls._rebuild(config, DEFAULTS, seed)
        return cls(net, path, **rest)


class _MeanHalf:
    """The network with its prediction alone as output, for solvers that do without its variance."""

    def __init__(self, net):
        self.net, self.parameters = net, net.parameters

    def __eq__(self, other):
        return isinstance(other, _MeanHalf) and other.net is self.net

    def __hash__(self):
        return hash((_MeanHalf, self.net))

    def __call__(self, x, t, y=None):
        return self.net(x, t, y).chunk(2, dim=1)[0]

    def for_schedule(self, t_rows, y=None):
        return _MeanHalfOfStep(self.net.for_schedule(t_rows, y))


class _MeanHalfOfStep:
    """Likewise of what `for_schedule` returned."""

    def __init__(self, step_fn):
        self._step_fn = step_fn

    def __call__(self, x, row):
        return self._step_fn(x, row).chunk(2, dim=1)[0]

    def update(self, t_rows, y=None):
        return self._step_fn.update(t_rows, y)


def _check_path(path, num_timesteps, prediction):
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise ValueError(f"models/DDPM: num_timesteps must be an int >= 1, got {num_timesteps!r}")
    if not isinstance(path, paths.VariancePreserving):
        raise ValueError(
            f"models/DDPM: path must be variance preserving (alpha^2 + sigma^2 = 1), got {type(path).__name__}; use "
            "FlowMatching for others"
        )
    if isinstance(path, paths.Discrete) and len(path.betas) != num_timesteps:
        raise ValueError(
            f"models/DDPM: path must have num_timesteps = {num_timesteps} betas, got {len(path.betas)}; make both equal"
        )
    if prediction == "eps" and path.alpha(1.0) == 0:
        raise ValueError(
            "models/DDPM: prediction must be v or x0 on a path with alpha(1) = 0, where eps says nothing of the data, "
            "got 'eps'; or use DDPMCosine, whose alpha stays above 0"
        )
