"""diffusers schedulers whose `step` is one fused row of a traced table."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings

from torch import Tensor

from genengine._registers import NotAffine
from genengine.integrations.diffusers._outputs import LazyTuple, lazy_output
from genengine.integrations.diffusers._run import Run, Unfit
from genengine.integrations.diffusers._schedule import Schedule, decides, schedule_of

NOISES = ("torch", "philox")


class Fused:
    """Mixed into a scheduler class by `fused_class`: state of its own per object, `step` as one fused row.

    Whatever the row does not cover (a backward pass through the step, latents edited between a predictor and its
    corrector, options that change during a run) is left to the scheduler's own `step`, with its state brought up to
    date first, and a warning that names the reason, once per object.
    """

    genengine_noise = "torch"
    _schedule: Schedule | None = None
    _run: Run | None = None
    _given_up: str | None = None

    def __getattr__(self, name):
        run = self.__dict__.get("_run")
        if run is not None and name in run.lazy_names:
            return run.materialise(name)
        return super().__getattr__(name)

    def __setattr__(self, name, value):
        if self._schedule is not None:
            self._before_setting(name, value)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo):
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._plain_state(), memo))
        return twin

    def __reduce__(self):
        return _rebuild, (type(self).__mro__[2], self.genengine_noise, self._plain_state())

    # ---- the state of a run ----------------------------------------------------------------------------------

    def _reset(self):
        self.__dict__.update(_schedule=None, _run=None, _given_up=None)

    def _before_setting(self, name, value):
        """Somebody sets an attribute: a run that relied on the old one ends."""
        run, old = self._run, self.__dict__.get(name)
        reads = decides(name, value) or name == "_internal_dict"
        if reads and (value is old or _moved(value, old)):
            return
        if reads:
            self.__dict__["_schedule"] = None
        if run is not None and (reads or name == "_step_index" or name in run.lazy_names):
            self._sync()
            if run.plan.has_history or name in run.plan.lazy[-1]:
                what = "the config" if name == "_internal_dict" else name
                self.__dict__["_given_up"] = f"{what} was set during a run"

    def _plain_state(self) -> dict:
        """All attributes as the scheduler's own steps would have left them: what a copy needs."""
        state = {name: value for name, value in vars(self).items() if name not in ("_schedule", "_run", "_config_key")}
        run = self._run
        if run is not None:
            state |= {name: run.materialise(name) for name in run.lazy_names}
            if run.plan.has_history:
                state["_given_up"] = "it was copied in the middle of a run"
        return state

    def _sync(self):
        """Give the scheduler all the state that its own step would have left, and end the fused run."""
        run = self.__dict__.get("_run")
        if run is not None:
            for name in run.lazy_names:
                self.__dict__[name] = run.materialise(name)
            self.__dict__["_run"] = None

    def _warn_once(self):
        if "_warned" not in self.__dict__:
            self.__dict__["_warned"] = True
            warnings.warn(
                f"genengine: {type(self).__name__}.step is not fused from here on, until set_timesteps is called: "
                f"{self._given_up}",
                stacklevel=3,
            )

    def _leave(self, reason: str, step):
        """Take the scheduler's own step, this time and from here on; if it raises, nothing has happened."""
        run = self._run
        self._sync()
        try:
            result = step()
        except Exception:
            self.__dict__["_run"] = run
            for name in run.lazy_names if run is not None else ():
                self.__dict__.pop(name, None)
            raise
        self.__dict__["_given_up"] = reason
        self._warn_once()
        return result

    def _current_schedule(self) -> Schedule:
        if self._schedule is None:
            self.__dict__["_schedule"] = schedule_of(self, type(self).__mro__[2])
        return self._schedule


def _moved(value, old) -> bool:
    """Whether a tensor is what it was, on another device: `add_noise` moves alphas_cumprod to the samples'."""
    both = isinstance(value, Tensor) and isinstance(old, Tensor)
    return both and value.device != old.device and (value.dtype, value.shape) == (old.dtype, old.shape)


def _rebuild(cls, noise, state):
    scheduler = object.__new__(fused_class(cls, noise))
    scheduler.__dict__.update(state)
    return scheduler


def fused_class(cls: type, noise: str = "torch") -> type:
    """A subclass of a diffusers scheduler class whose `step` runs one fused row.

    It takes and saves the same config, has the same name, attributes, outputs and errors, and a pipeline saved with
    it loads as the original. `step` allocates nothing but its result, and reads nothing from a device. State is
    float32 inside, whatever the dtype of the latents.

    Attributes that hold a sample (`model_outputs`, `sample`) and the further fields of results are computed when they
    are read, from the last inputs, which are kept until the next `set_timesteps`. So give `step` tensors of their own:
    an edit in place raises where it is seen, but in torch.inference_mode, or by a CUDA graph's replay, it is not.
    UniPC and SA-Solver, which correct the last step, are fused under torch.no_grad and not in inference mode.

    Args:
        cls: a scheduler class of diffusers whose step(model_output, timestep, sample, ...) is affine, clamps included.
        noise: "torch" draws exactly what `cls` draws, from the generator that is passed or torch's global one;
            "philox" draws in the kernel, seeded by the generator's initial seed (one per sample in a list; the same in
            every run with that generator) or, without one, once per run by torch's global generator: faster, and
            independent of batch size and device.

    Raises:
        TypeError: where cls is no scheduler class with such a step.
        ValueError: on an unknown noise.
    """
    if noise not in NOISES:
        raise ValueError(f"fused_class: noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if not inspect.isclass(cls) or not hasattr(cls, "set_timesteps") or not hasattr(cls, "step"):
        name = getattr(cls, "__name__", type(cls).__name__)
        raise TypeError(f"fused_class: cls must be a scheduler class with set_timesteps and step, got {name}")
    if issubclass(cls, Fused):
        raise TypeError(f"fused_class: {cls.__name__} is fused already")
    parameters = list(inspect.signature(cls.step).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if required != ["model_output", "timestep", "sample"] or names[:3] != required:
        raise TypeError(
            f"fused_class: {cls.__name__}.step({', '.join(required)}) does not step on (model_output, timestep, "
            "sample) alone; use the class as it is"
        )
    return _fused_class(cls, noise, tuple(names))


@functools.cache
def _fused_class(cls: type, noise: str, names: tuple[str, ...]) -> type:
    members = {
        "step": _make_step(cls, names),
        "set_timesteps": _make_set_timesteps(cls),
        "genengine_noise": noise,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if hasattr(cls, "scale_model_input"):
        members["scale_model_input"] = _make_scale_model_input(cls)
    return type(cls.__name__, (Fused, cls), members)


def _make_set_timesteps(cls):
    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        self._reset()
        cls.set_timesteps(self, *args, **kwargs)
        self._current_schedule()  # reads the timesteps to the host now, not in the first step

    return set_timesteps


def _make_scale_model_input(cls):
    @functools.wraps(cls.scale_model_input)
    def scale_model_input(self, sample, *args, **kwargs):
        timestep = args[0] if args else kwargs.get("timestep")
        run = self._run
        if timestep is None or self._given_up or not isinstance(sample, Tensor):
            return cls.scale_model_input(self, sample, *args, **kwargs)
        try:
            schedule = self._current_schedule()
            index = run.next_index if run is not None and schedule.sequential else _position(self, schedule, timestep)
            factor = schedule.plan(0, {}).c_in[index]
        except (NotAffine, Unfit, IndexError):
            return cls.scale_model_input(self, sample, *args, **kwargs)
        if schedule.sequential and self._step_index is None:
            self.__dict__["_step_index"] = index
        if "is_scale_input_called" in self.__dict__:
            self.__dict__["is_scale_input_called"] = True
        return sample if factor == 1.0 else sample * factor

    return scale_model_input


def _make_step(cls, names):
    original, further = cls.step, names[3:]

    @functools.wraps(original)
    def step(self, model_output, timestep, sample, *args, **options):
        if args:
            if len(args) > len(further):
                raise TypeError(f"{cls.__name__}.step() takes {3 + len(further)} arguments, got {3 + len(args)}")
            options = dict(zip(further, args, strict=False), **options)
        if self._given_up is not None:
            self._warn_once()
            return original(self, _tensor(model_output), timestep, sample, **options)
        return_dict = options.pop("return_dict", True)
        generator, given = options.pop("generator", None), options.pop("variance_noise", None)
        try:
            if given is not None and generator is not None:
                raise Unfit("both generator and variance_noise were given")
            run = self._run
            if run is None or options != run.options:
                run = _begin(self, cls, timestep, sample, options)
            k = run.locate(timestep)
            x = run.step(k, model_output, sample, generator, given)
        except Unfit as reason:
            if not options.keys() <= set(further):
                unknown = ", ".join(sorted(options.keys() - set(further)))
                raise TypeError(f"{cls.__name__}.step() got an unexpected keyword argument: {unknown}") from None
            further_options = {"return_dict": return_dict, "generator": generator, "variance_noise": given} | options
            options = {name: value for name, value in further_options.items() if name in further and value is not None}
            return self._leave(str(reason), lambda: original(self, _tensor(model_output), timestep, sample, **options))
        if not return_dict:
            return LazyTuple(x, run, k) if run.plan.fields[k] else (x,)
        return lazy_output(run.plan.output_class, x, run, k)

    return step


def _begin(scheduler, cls, timestep, sample, options) -> Run:
    """A run from the scheduler's present position, or `Unfit`."""
    if scheduler._run is not None:
        if scheduler._run.plan.has_history:
            raise Unfit("the options of step changed during a run whose rows read earlier ones")
        scheduler._sync()
    _check_timestep(scheduler, timestep)
    for name, value in options.items():
        if not isinstance(value, int | float | bool | str | type(None)):
            raise Unfit(f"step was given {name}, a {type(value).__name__}")
    if getattr(scheduler, "num_inference_steps", 0) is None and hasattr(scheduler, "_step_index"):
        raise Unfit("set_timesteps was not called")
    schedule = scheduler._current_schedule()
    begin = _position(scheduler, schedule, timestep)
    if begin >= len(schedule.times):
        raise Unfit(f"step was called more than {len(schedule.times)} times")
    stateless = not schedule.sequential
    try:
        plan = schedule.plan(0 if stateless else begin, options)
        if plan.has_history and begin and stateless:
            raise Unfit(f"{cls.__name__} starts at timestep {begin} and counts its steps itself")
    except NotAffine as error:
        raise Unfit(str(error)) from None
    run = Run(scheduler, plan, schedule, options)
    scheduler.__dict__["_run"] = run
    return run


def _position(scheduler, schedule, timestep) -> int:
    """The index that the next step is taken from, as the scheduler itself would have it."""
    if schedule.sequential and scheduler.__dict__.get("_step_index") is not None:
        return scheduler.__dict__["_step_index"]
    return schedule.first_index(scheduler.__dict__.get("_begin_index"), timestep)


def _check_timestep(scheduler, timestep):
    """Leave it to the scheduler's own step to refuse integers where its timesteps are floating point."""
    floating = isinstance(timestep, float) or (isinstance(timestep, Tensor) and timestep.is_floating_point())
    timesteps = getattr(scheduler, "timesteps", None)
    if isinstance(timesteps, Tensor) and timesteps.is_floating_point() and not floating:
        raise Unfit("an integer timestep was given, where the timesteps are floating point")


def _tensor(model_output):
    return model_output if isinstance(model_output, Tensor) else model_output.tensor()
