"""One run of a fused scheduler through its rows: the tensors it steps with, and the state not yet written back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genengine.extensions.threshold import threshold
from genengine.integrations.diffusers._guidance import Guided
from genengine.integrations.diffusers._plan import Affine, Plan
from genengine.integrations.diffusers._schedule import Unfit
from genengine.ops import _layout, _registry, normal
from genengine.ops.sampler_step import SAMPLER_STEP

_R = 5  # the column r
_HALF = (torch.float16, torch.bfloat16)


class Run:
    """The rows of a plan, applied one after the other to a scheduler's samples."""

    def __init__(self, scheduler, plan: Plan, schedule, options):
        self.plan, self.options = plan, options
        self.next_index = plan.begin
        self._scheduler, self._schedule = scheduler, schedule
        self._shape = self._dtype = self._model_shape = self._model_dtype = self._device = None
        self._inputs: deque = deque(maxlen=plan.memory)
        self._row = self._last = self._last_version = None
        self._philox = scheduler.genengine_noise == "philox"
        self._seed = self._generator = self._noise_sampler = None

    def locate(self, timestep) -> int:
        """The row of this call. Schedulers that count their steps ignore all timesteps but the first, and so do we."""
        if self._schedule.sequential:
            index = self.next_index
        else:
            index = self._schedule.index(timestep)
            if self.plan.has_history and index != self.next_index:
                raise Unfit(f"timestep {timestep} does not follow the one before")
        k = index - self.plan.begin
        if k >= self.plan.num_rows:
            raise Unfit(f"step was called more than {self.plan.num_rows} times")
        return k

    def step(self, k, model_output, sample, generator, given) -> Tensor:
        """Apply row k."""
        output, branches, guidance = _output_of(model_output)
        plan = self.plan
        if torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad):
            raise Unfit("a gradient is to flow through the step")
        if plan.chained[k] and k and not self._is_last(sample):
            edited = "the sample was edited between a predictor's step and its correction"
            unseen = "; in inference mode this cannot be seen, use torch.no_grad()" if sample.is_inference() else ""
            raise Unfit(edited + unseen)
        if not self._prepared_for(sample, output):
            self._prepare(sample, output, branches)
        x, outputs, variance = sample, (output,), None
        if not (self._plain and output.is_contiguous() and (sample is self._last or sample.is_contiguous())):
            x, outputs, variance = self._operands(sample, output, branches)
        noise = self._drawn = self._noise(k, x, generator, given) if plan.draws[k][0] else None
        if plan.draws[k][1] is None:
            noise = None  # drawn to keep the generator's place, and for the scheduler's state
        table = self._tables.get(guidance)
        if table is None:
            table = self._tables[guidance] = plan.table_on(self._device, self._accumulated, guidance)
        if plan.dynamic[k]:
            table = self._with_threshold(table, k, x, _tensor(model_output))
        out = torch.empty_like(x)
        self._kernel(
            x, outputs, table, self._steps[k], self._history, self._seed, self._sample_ids, noise, variance, out, None
        )
        if out.dtype is not self._rule.out:
            out = out.to(self._rule.out)
        self._finish(k, sample, model_output, out)
        return out

    # ---- operands --------------------------------------------------------------------------------------------

    def _prepared_for(self, sample, output) -> bool:
        known = sample is self._last
        if not known and (sample.shape != self._shape or sample.dtype is not self._dtype):
            return False
        if output.shape != self._model_shape or output.dtype is not self._model_dtype:
            return False
        return known or sample.device == self._device

    def _prepare(self, sample, output, branches):
        here = sample.shape, sample.dtype, sample.device
        if self.plan.has_history and self._shape is not None and here != (self._shape, self._dtype, self._device):
            raise Unfit("shape, dtype or device of the sample changed during a run")
        self._check_shapes(sample, output, branches)
        moved = here != (self._shape, self._dtype, self._device)
        self._shape, self._dtype, self._device = here
        self._model_shape, self._model_dtype = output.shape, output.dtype
        self._tables = {}
        self._rule = self.plan.rule(sample.dtype, output.dtype)
        mixed = sample.dtype != output.dtype and not (sample.dtype == torch.float32 and output.dtype in _HALF)
        self._wide = torch.promote_types(sample.dtype, output.dtype) if mixed else None
        self._plain = self._wide is None and output.shape[1:] == sample.shape[1:]
        self._accumulated = torch.float64 if torch.float64 in (self._dtype, self._wide) else torch.float32
        self._kernel = _registry.direct(SAMPLER_STEP, sample.device, self._wide or sample.dtype)
        self._steps = self.plan.steps_on(sample.device, sample.shape[0])
        if not moved:  # only the model's output changed, from guided to not, say
            return
        self._history = _layout.registers(self.plan.table.num_history, sample, self._accumulated)
        self._sample_ids = None

    def _check_shapes(self, sample, output, branches):
        single = (output.shape[0] // branches, *output.shape[1:])
        doubled = single[1:2] == (2 * sample.shape[1],) and single[2:] == sample.shape[2:]
        if single != sample.shape and not (self.plan.doubled and doubled and single[0] == sample.shape[0]):
            name = type(self._scheduler).__name__
            raise ValueError(
                f"{name}.step: model_output must be {tuple(sample.shape)} like sample, got {single}; reshape it, or "
                "drop the channels of a learned variance unless variance_type says 'learned_range'"
            )

    def _operands(self, sample, output, branches):
        """x, one output per branch and the learned variance, in dtypes and layouts that the kernel takes."""
        if self._wide is not None:
            sample, output = sample.to(self._wide), output.to(self._wide)
        if not (_layout.dense(sample) or _layout.channels_last(sample)):
            sample = sample.contiguous()
        outputs, variance = output.chunk(branches), None
        if output.shape[1:] != sample.shape[1:]:
            channels = sample.shape[1]
            variance = outputs[-1][:, channels:] if self.plan.learned else None
            outputs = [each[:, :channels] for each in outputs]
        return sample, [_layout.like(each, sample) for each in outputs], variance

    def _with_threshold(self, table, k, x, m):
        """The table with a row k per sample: r = the quantile of |x0|, from 1 to sample_max_value (Saharia 2022)."""
        p, q = self.plan.table.rows[k, 0, 3:5].tolist()
        config = self._scheduler.config
        size = (p * x.float() + q * m[:, : x.shape[1]].float()).abs().flatten(1)
        table = table.repeat(1, x.shape[0], 1)
        table[k, :, _R] = threshold(size, table[k, :, _R], config.dynamic_thresholding_ratio, config.sample_max_value)
        return table

    # ---- noise -----------------------------------------------------------------------------------------------

    def _noise(self, k, x, generator, given):
        """What the scheduler itself would draw in row k, also where the row adds none; None if the kernel draws."""
        if given is not None:
            return _layout.like(given.to(self._accumulated), x)
        if self._philox:
            if self._seed is None or k <= self._row or generator != self._generator:  # a run of its own
                self._seed_from(generator, x.device)
            return None
        count, used = self.plan.draws[k]
        if self.plan.noise_calls[k]:
            drawn = [self._brownian(generator)(*call) for call in self.plan.noise_calls[k]]
        else:
            dtypes = self._rule.draws
            drawn = [
                randn_tensor(self._shape, generator=generator, device=x.device, dtype=dtypes[min(i, len(dtypes) - 1)])
                for i in range(count)
            ]
        return _layout.like(drawn[used or 0].to(self._accumulated), x)

    def _seed_from(self, generator, device):
        self._generator = generator
        self._sample_ids = None
        if isinstance(generator, list | tuple):
            seeds = [each.initial_seed() for each in generator]
            self._sample_ids = torch.zeros(len(seeds), dtype=torch.int64, device=device)
        else:
            seeds = torch.randint(0, 2**63 - 1, ()).item() if generator is None else generator.initial_seed()
        seed = torch.tensor(seeds, dtype=torch.uint64).view(torch.int64)
        self._seed = seed.to(device, non_blocking=True)

    def _brownian(self, generator):
        """The Brownian tree that the scheduler's own step would make."""
        if self._noise_sampler is None:
            scheduler = self._scheduler
            module = __import__(type(scheduler).__module__, fromlist=["BrownianTreeNoiseSampler"])
            if "noise_sampler_seed" in scheduler.config:
                levels = self._schedule.host.sigmas
                arguments = levels[levels > 0].min().item(), levels.max().item(), scheduler.config.noise_sampler_seed
            else:
                seeds = [each.initial_seed() for each in generator] if isinstance(generator, list) else None
                seed = seeds or (None if generator is None else generator.initial_seed())
                arguments = scheduler.config.sigma_min, scheduler.config.sigma_max, seed
            like = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._noise_sampler = module.BrownianTreeNoiseSampler(like, *arguments)
        return self._noise_sampler

    # ---- the scheduler's state -------------------------------------------------------------------------------

    @property
    def lazy_names(self):
        return self.plan.lazy[self._row].keys() if self._row is not None else ()

    def materialise(self, name: str):
        """An attribute that the scheduler's own step would have left, computed from the last inputs."""
        return _evaluate(self.plan.lazy[self._row][name], self._inputs_of(self._inputs))

    def fields_of(self, k: int) -> Callable[[], dict[str, Tensor]]:
        """A function that computes the further fields of the result of row k, the last one, at any later time."""
        fields, kept = self.plan.fields[k], tuple(self._inputs)

        def evaluate():
            inputs = self._inputs_of(kept)
            return {name: _evaluate(value, inputs) for name, value in fields.items()}

        return evaluate

    def _inputs_of(self, kept) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(x, m, z) of the rows kept, in float32 at least."""
        inputs = []
        for k, x, model_output, versions, noise, seed in kept:
            now = _versions(x, model_output)
            if now != versions:
                what = "sample" if now[0] != versions[0] else "model_output"
                raise RuntimeError(
                    f"{type(self._scheduler).__name__}: the {what} given to step was edited in place, so what the "
                    "scheduler keeps of it cannot be computed any more; give step a tensor of its own, or read the "
                    "attribute first"
                )
            if noise is None and seed is not None:
                draw = {"seed": seed, "sample_ids": self._sample_ids, "step": k, "stream": "step"}
                noise = normal(x.shape, **draw, device=x.device)
            m = _tensor(model_output)
            m = m[:, : x.shape[1]] if m.shape != x.shape else m
            inputs.append((x.float() if x.dtype in _HALF else x, m, noise))
        return inputs

    def _finish(self, k, sample, model_output, out):
        plan, state = self.plan, self._scheduler.__dict__
        self._row, self.next_index = k, k + plan.begin + 1
        if plan.remembers:
            self._inputs.append((k, sample, model_output, _versions(sample, model_output), self._drawn, self._seed))
            self._last_version = _version(out)
        # the next step most often gets it back, and then need not look at its shape and dtype again
        self._last = out if out.dtype is self._dtype and out.is_contiguous() else None
        state.update(plan.states[k])
        for name in plan.hidden[k]:
            state.pop(name, None)

    def _is_last(self, sample) -> bool:
        return sample is self._last and not sample.is_inference() and _version(sample) == self._last_version


def _output_of(model_output):
    """The tensor that holds the branches, their number and (g1, g2), or the one output, 1 and None."""
    if type(model_output) is Guided:
        guidance = model_output.guidance()
        if guidance is not None:
            return model_output.stacked, model_output.branches, guidance
    return _tensor(model_output), 1, None


def _tensor(model_output):
    return model_output if isinstance(model_output, Tensor) else model_output.tensor()


def _version(tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _versions(sample, model_output) -> tuple[int | None, int | None]:
    return _version(sample), _version(model_output if isinstance(model_output, Tensor) else model_output.stacked)


def _evaluate(value, inputs):
    """An attribute with every `Affine` in it computed."""
    if isinstance(value, Affine):
        return value.evaluate(inputs)
    if isinstance(value, list | tuple):
        return type(value)(_evaluate(item, inputs) for item in value)
    return value
