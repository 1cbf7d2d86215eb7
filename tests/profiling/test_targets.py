"""Every target resolves and runs; what is none is answered with what there is."""

import dataclasses
import sys

import pytest
import torch

from genengine import models, ops
from genengine.benchmarks import eager
from genengine.profiling import inputs, targets
from genengine.profiling.record import record

SMALL = {
    "adaln": (2, 3, 16), "gated_adaln": (2, 3, 16), "attention": (2, 3, 2, 8), "qk_norm_rope": (2, 3, 2, 8),
    "group_norm_silu": (2, 8, 4, 4), "bias_act": (2, 8, 4, 4), "bias_gelu": (2, 3, 16), "geglu": (2, 3, 16),
    "swiglu": (2, 3, 16), "diffuse": (2, 3, 4, 4), "reparameterize": (2, 3, 4, 4), "sampler_step": (2, 3, 4, 4),
    "patch_step": (2, 3, 4, 4), "add_group_norm_silu": (2, 8, 4, 4),
    "guidance_moments": (2, 3, 4, 4), "ema_update": (3, 7), "logistic_mixture_log_prob": (2, 3, 4, 4),
    "logistic_mixture_sample": (2, 3, 4, 4), "transformer_sample": (2, 5, 16),
    "pixelcnn_sample": (2, 1, 4), "normal": (2, 3, 4, 4),
    "uniform": (2, 3, 4, 4),
}  # fmt: skip
CPU = targets.Request(torch.device("cpu"))
PARTS = [f"{family}.{part}" for family in models.FAMILIES for part in targets.parts(family)]


def request(**options):
    return dataclasses.replace(CPU, **options)


def test_every_public_op_is_a_target():
    functions = {name for name in ops.__all__ if name[0].islower() and not name.startswith("pack_")}
    assert set(inputs.OPS) == functions - {"advance", "backend"}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_op_runs_as_itself(name, dtype):
    target = targets.resolve(name, request(shape=SMALL[name], dtype=dtype))
    names = [
        step.name.removeprefix("genengine::").removeprefix("genengine_reference::")
        for step in record(target.function).steps
    ]
    wanted = {"bias_gelu": "bias_act", "geglu": "glu", "swiglu": "glu", "attention": "aten::_scaled_dot_product"}
    assert any(step.startswith(wanted.get(name, name)) for step in names), names
    assert str(dtype).removeprefix("torch.") in target.description and str(SMALL[name][0]) in target.description


@pytest.mark.parametrize("name", sorted(eager.PLAIN.keys() & SMALL.keys()))
def test_an_eager_op_has_no_kernel_of_ours(name):
    target = targets.resolve(name, request(shape=SMALL[name], eager=True))
    assert target.name == f"{name}, eager"
    names = [step.name for step in record(target.function).steps]
    assert names and not [step for step in names if step.startswith("genengine")]


@pytest.mark.parametrize("name", [part for part in PARTS if not part.endswith("train")])
def test_a_part_of_a_family_runs(name):
    steps = {"steps": 2} if name in ("flow.sample", "ddpm.sample") else {}
    target = targets.resolve(name, request(num=2, **steps))
    assert record(target.function).steps and "2 images" in target.description


def test_a_training_step_has_a_backward_and_an_optimiser():
    target = targets.resolve("flow.train", request(num=4))
    kinds = {(step.backward, step.optimizer) for step in record(target.function).steps}
    assert kinds >= {(False, False), (True, False), (False, True)} and "batches of 4" in target.description


def test_the_eager_flow_sampler_is_the_loop_as_people_write_it():
    ours, plain = (
        targets.resolve("flow.sample", request(num=2, steps=3, eager=is_eager)) for is_eager in (False, True)
    )
    assert not [step for step in record(plain.function).steps if step.name.startswith("genengine")]
    assert (ours.function() - plain.function()).abs().max() < 1e-3  # the same samples


@pytest.fixture
def module(tmp_path, monkeypatch):
    text = """
        import functools, torch
        def work(): return torch.ones(2) + 1
        def make(): return lambda: torch.ones(3) * 2
        def partial(): return functools.partial(torch.ones, 4)
        def needs(a): return a
        def makes_needy(): return lambda a: a
        number = 3
        class Net(torch.nn.Module):
        \tdef __init__(self, needy):
        \t\tsuper().__init__()
        \t\tself.forward = self.needs if needy else self.free
        \tdef needs(self, x): return x
        \tdef free(self): return torch.ones(5) * 3
        def model(): return Net(False)
        def needy_model(): return Net(True)
        class Run:
        \tdef step(self): return torch.ones(6) + 1
        run = Run()
        def odd():
        \treturn {}["x"]
        def makes_odd(): return odd
        def yields(): yield torch.ones(1)
        def makes_generator(): return (x for x in [1])
        async def waits(): return 1
    """
    (tmp_path / "my_profile_target.py").write_text("\n".join(line.strip(" ") for line in text.splitlines()))
    (tmp_path / "my_broken_target.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "my_importing_target.py").write_text("import nothing_such_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield "my_profile_target"
    for name in ("my_profile_target", "my_broken_target", "my_importing_target"):
        sys.modules.pop(name, None)


def test_a_function_of_the_users(module):
    assert targets.resolve(f"{module}:work", CPU).function().tolist() == [2, 2]
    assert targets.resolve(f"{module}:make", CPU).function().tolist() == [2, 2, 2]
    assert targets.resolve(f"{module}:partial", CPU).function().shape == (4,)
    assert targets.resolve(f"{module}:run.step", CPU).function().tolist() == [2] * 6


def test_a_model_that_a_function_returns_is_what_is_profiled(module):
    target = targets.resolve(f"{module}:model", CPU)
    assert target.function().tolist() == [3] * 5 and "the Net that" in target.description


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_profile_target:odd", r"my_profile_target:odd raised KeyError: 'x' at my_profile_target.py:\d+"),
        (
            "my_broken_target:f",
            "my_broken_target:f raised ZeroDivisionError: division by zero at my_broken_target.py:2",
        ),
        ("my_importing_target:f", "raised ModuleNotFoundError: No module named 'nothing_such_at_all' at my_importing"),
    ],
)
def test_errors_of_the_users_code_say_where(module, name, message):
    with pytest.raises(targets.Failed, match=message):
        targets.resolve(name, CPU)


def test_an_error_while_it_is_profiled_says_where(module):
    target = targets.resolve(f"{module}:makes_odd", CPU)
    with pytest.raises(targets.Failed, match=r"makes_odd raised KeyError: 'x' at my_profile_target.py:\d+") as caught:
        target.function()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs", "must take no arguments, but needs a; wrap it"),
        ("makes_needy", "must take no arguments, but needs a"),
        ("number", "must be a function, got int"),
        ("nothing", "cannot find .*has no attribute 'nothing'"),
        ("run.nothing", "cannot find .*Run has no attribute 'nothing'"),
        ("Run", "must be a function, got type"),
        ("needy_model", "what .*:needy_model returns must take no arguments, but needs x"),
        ("yields", "must be a plain function, not a generator or coroutine"),
        ("waits", "must be a plain function, not a generator or coroutine"),
        ("makes_generator", "returned a generator, which runs later"),
        ("", "must look like module:function"),
    ],
)
def test_a_function_that_does_not_fit(module, name, message):
    with pytest.raises(ValueError, match=message):
        targets.resolve(f"{module}:{name}", CPU)


def test_a_module_that_does_not_exist():
    with pytest.raises(ValueError, match="cannot find nothing_such:f: No module named"):
        targets.resolve("nothing_such:f", CPU)


@pytest.mark.parametrize("name", ["nothing", "flow", "flow.fly", "vae.step", "", "adaln.step", "."])
def test_an_unknown_target_is_answered_with_what_there_is(name):
    with pytest.raises(ValueError, match=r"targets are an op \(adaln, .*flow\.step, .*module:function"):
        targets.resolve(name, CPU)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adaln", {"num": 3}, "--num means nothing for adaln"),
        ("flow.step", {"steps": 3}, "--steps means nothing for flow.step"),
        ("gan.sample", {"steps": 3}, "--steps means nothing for gan.sample"),
        ("flow.sample", {"shape": (3,)}, "--shape means nothing for flow.sample"),
        ("adaln", {"shape": (3, 4)}, r"--shape of adaln must be \(B, N, D\), such as 16,256,1152, got 3,4"),
        ("sampler_step", {"eager": True}, "no eager twin to profile; ops that have one: adaln, "),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        targets.resolve(name, request(**options))
