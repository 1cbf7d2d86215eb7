"""patch_step: every backend against float64, and against the layer followed by sampler_step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import BACKENDS, skip_unless_available
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from genengine import random, testing
from genengine.ops import _registry, _verify, advance, patch_step, sampler_step
from genengine.ops.patch_step import unpatchify
from genengine.table import COLUMNS
from genengine.testing.patch_step import make_case
from genengine.testing.sampler_step import random_table

NAMESPACES = ["genengine", "genengine_triton", "genengine_reference"]
OP = "patch_step_out"


def row_table(**columns):
    """A table of one row shared by the batch."""
    table = torch.zeros(1, 1, 16)
    for name, value in columns.items():
        table[..., COLUMNS.index(name)] = value
    return table


def steps(batch, value=0):
    return torch.full((batch,), value, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    """Dtypes and mixes, patches of 1 to 8, one to three branches, learned variances, registers, finished samples."""
    device = skip_unless_available(OP, backend)
    assert testing.cases(OP, device)
    assert _verify.run(_registry.OPS[OP], backend, device) == []


def by_hand(x, h, weight, bias, patch, c):
    """The output and its row in float64, a pixel at a time, from the definition of the feature order."""
    batch, channels, height, width = x.shape
    outputs = len(weight) // patch**2
    tokens = np.einsum("bnd,fd->bnf", h, weight) + bias
    image = np.zeros((len(h), outputs, height, width))
    for row, column in np.ndindex(height, width):
        token = (row // patch) * (width // patch) + column // patch
        first = ((row % patch) * patch + column % patch) * outputs
        image[:, :, row, column] = tokens[:, token, first : first + outputs]
    u, cond = image[:batch, :channels], image[batch:, :channels]
    spread = c["s"] * np.exp(c["l"] * image[batch:, channels:])
    return c["a"] * x + c["b"] * (u + c["g1"] * (cond - u)), spread


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guidance_and_a_learned_variance_against_numpy(backend, dtype):
    device = skip_unless_available(OP, backend)
    x, h = torch.randn(2, 3, 6, 10), torch.randn(4, 15, 24).to(dtype)
    weight, bias = (torch.randn(24, 24) / 5).to(dtype), torch.randn(24).to(dtype)
    columns = {"a": 0.9, "b": 0.3, "g1": 2.0, "s": 0.4, "l": 0.7}
    ids = torch.tensor([7, 3])
    got = patch_step(
        x.to(device), h.to(device), weight.to(device), bias.to(device), row_table(**columns).to(device),
        steps(2).to(device), patch_size=2, seed=11, sample_ids=ids.to(device), backend=backend,
    ).cpu()  # fmt: skip
    mean, spread = by_hand(*(t.double().numpy() for t in (x, h, weight, bias)), 2, columns)
    z = [random.normal(180, seed=11, sample=int(i), step=0, stream="step").reshape(3, 6, 10) for i in ids]
    exact = torch.from_numpy(mean + spread * np.stack(z).astype(np.float64))
    output = unpatchify(F.linear(h, weight, bias), (3, 5), 2, 6)
    eager = sampler_step(
        x, output[:, :3], row_table(**columns), steps(2), seed=11, sample_ids=ids, variance=output[2:, 3:],
        backend="reference",
    )  # fmt: skip
    testing.assert_as_good_as_eager(got, eager, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_it_is_the_layer_and_then_sampler_step(backend, patch):
    """Registers, x_in and the step of every sample as sampler_step has them; by exact sums, so bit for bit."""
    device = skip_unless_available(OP, backend)
    generator = torch.Generator().manual_seed(patch)
    small = lambda *size: torch.randint(-3, 4, size, generator=generator).float().to(device)  # noqa: E731
    x, h, weight, bias = small(3, 2, 8, 4), small(6, 32 // patch**2, 11), small(2 * patch**2, 11), small(2 * patch**2)
    table = random_table(generator, 3, 3, 2, 2).to(device)
    step = torch.tensor([2, 3, 0], dtype=torch.int32, device=device)
    results = []
    for fused in (True, False):
        history, x_in = torch.ones(2, *x.shape, device=device), torch.zeros(6, 2, 8, 4, device=device)
        if fused:
            out = patch_step(
                x, h, weight, bias, table, step, history, patch_size=patch, seed=3, x_in=x_in, backend=backend
            )
        else:
            output = unpatchify(F.linear(h, weight, bias), (8 // patch, 4 // patch), patch, 2)
            out = sampler_step(x, output, table, step, history, seed=3, x_in=x_in, backend="reference")
        results.append((out, history, x_in))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_does_not_depend_on_the_patch(backend):
    device = skip_unless_available(OP, backend)
    x, table = torch.zeros(2, 4, 8, 8, device=device), row_table(s=1.0).to(device)
    expected = sampler_step(x, x, table, steps(2).to(device), seed=9, backend="reference")
    for patch in (1, 2, 4, 8):
        h = torch.randn(2, 64 // patch**2, 5, device=device)
        weight = torch.randn(4 * patch**2, 5, device=device)
        got = patch_step(x, h, weight, None, table, steps(2).to(device), patch_size=patch, seed=9, backend=backend)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_coefficients_let_no_nan_through(backend):
    """Branches without a weight, v without noise, uninitialised history: skipped, not multiplied by 0."""
    device = skip_unless_available(OP, backend)
    good, nan = torch.randn(2, 4, 5), torch.full((2, 4, 5), float("nan"))
    weight, x = torch.randn(8, 5).to(device), torch.randn(2, 1, 4, 4).to(device)
    history = torch.full((1, *x.shape), float("nan"), device=device)

    def run(branches, **columns):
        h, step = torch.cat(branches).to(device), steps(2).to(device)
        return patch_step(
            x, h, weight, None, row_table(**columns).to(device), step, history, patch_size=2, seed=1, backend=backend
        )

    alone = run([good], a=1.0, b=1.0)
    assert alone.isfinite().all() and torch.equal(run([good, nan, nan], a=1.0, b=1.0), alone)
    assert torch.equal(run([nan], a=2.0), 2 * x)
    assert run([good, nan], a=1.0, b=1.0, g1=1.0).isnan().all()
    assert run([good, nan], b=1.0, s=1.0, l=1.0).isnan().all(), "v is the last branch's"


@pytest.mark.parametrize("backend", BACKENDS)
def test_finished_samples_are_left_alone(backend):
    device = skip_unless_available(OP, backend)
    x, h, weight = (torch.randn(*size, device=device) for size in ((2, 1, 4, 4), (2, 4, 5), (4, 5)))
    table, step = row_table(a=0.5, c_in=1.0, flags=8.0).to(device), torch.tensor([1, 0], dtype=torch.int32).to(device)
    history, x_in = torch.full((1, *x.shape), 2.0, device=device), torch.full((4, 1, 4, 4), 3.0, device=device)
    out = patch_step(x, h, weight, None, table, step, history, patch_size=2, x_in=x_in, backend=backend)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1], 0.5 * x[1])
    assert (history[0, 0] == 2).all() and torch.equal(history[0, 1], x[1])
    assert (x_in[[0, 2]] == 3).all() and torch.equal(x_in[1], out[1]) and torch.equal(x_in[3], out[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_strided_inputs(backend):
    device = skip_unless_available(OP, backend)
    x, h, weight = (torch.randn(*size, device=device) for size in ((2, 2, 4, 6), (4, 6, 10), (8, 10)))
    table, step = row_table(a=0.9, b=-0.2, g1=3.0).to(device), steps(2).to(device)
    run = lambda x, h, weight, **options: patch_step(  # noqa: E731
        x, h, weight, None, table, step, patch_size=2, backend=backend, **options
    )
    expected = run(x, h, weight)
    assert torch.equal(run(x, h.transpose(1, 2).contiguous().transpose(1, 2), weight.T.contiguous().T), expected)
    apart = torch.zeros(4, 12, 13, device=device)[:, ::2, 2:12].copy_(h)
    assert torch.equal(run(x.contiguous(memory_format=torch.channels_last), apart, weight), expected)
    state = x.clone()
    assert run(state, h, weight, out=state) is state and torch.equal(state, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    device = skip_unless_available(OP, backend)
    x, h, weight = (torch.zeros(*size, device=device) for size in ((0, 1, 4, 4), (0, 4, 3), (4, 3)))
    out = patch_step(x, h, weight, None, row_table().to(device), steps(0).to(device), patch_size=2, backend=backend)
    assert out.shape == (0, 1, 4, 4)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (0, 1, 4, 4)], ids=["plain", "empty"])
def test_opcheck(namespace, shape):
    case = make_case(
        torch.Generator().manual_seed(0), torch.device("cpu"), torch.float32, torch.float32, shape, 2, 6,
        2, 0, "drawn learned", True,
    )  # fmt: skip
    opcheck(getattr(getattr(torch.ops, namespace), OP).default, case.args)


def test_fullgraph_compile_once_for_all_rows():
    torch._dynamo.reset()
    counter = CompileCounter()
    h, weight, table = torch.randn(2, 4, 6), torch.randn(4, 6), torch.randn(20, 1, 16).abs()
    table[..., 15] = 0

    def loop_body(x, step, t):
        state = patch_step(x, h, weight, None, table, step, patch_size=2, seed=3)
        advance(step, table, t)
        return state

    compiled = torch.compile(loop_body, fullgraph=True, backend=counter)
    x, eager_step, step = torch.randn(2, 1, 4, 4), steps(2), steps(2)
    with torch.no_grad():
        for _ in range(20):
            assert torch.equal(compiled(x, step, torch.zeros(2)), loop_body(x, eager_step, torch.zeros(2)))
    assert counter.frame_count <= 2


def test_no_silent_zero_gradient():
    weight = torch.randn(4, 3, requires_grad=True)
    arguments = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 3), weight, None, row_table(), steps(2)
    with pytest.raises(RuntimeError, match="patch_step: has no backward"):
        patch_step(*arguments, patch_size=2)
    with torch.no_grad():
        assert not patch_step(*arguments, patch_size=2).requires_grad


def test_a_named_backend_does_not_fall_back():
    arguments = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 3), torch.zeros(4, 3), None, row_table(), steps(2)
    with pytest.raises(RuntimeError, match="patch_step: backend 'cuda' cannot run here: patch_step has no cuda kernel"):
        patch_step(*arguments, patch_size=2, backend="cuda")


X, H = torch.zeros(2, 1, 4, 4), torch.zeros(4, 4, 3)
BAD = [
    ({"x": X[0]}, ValueError, "x must be \\(B, C, H, W\\), got \\(1, 4, 4\\)"),
    ({"x": X.long()}, TypeError, "x must have dtype"),
    ({"patch_size": 3}, ValueError, "patch_size must divide H and W = \\(4, 4\\), got 3"),
    ({"patch_size": 2.0}, ValueError, "patch_size must be an int >= 1, got 2.0"),
    ({"h": H[:3]}, ValueError, "h must be \\(k B, N, D\\) with B = 2, k <= 3, N = 4, got \\(3, 4, 3\\)"),
    ({"h": H.repeat(2, 1, 1)}, ValueError, "h must be \\(k B, N, D\\)"),
    ({"h": H[:, :3]}, ValueError, "h must be \\(k B, N, D\\)"),
    ({"h": H[0]}, ValueError, "h must be \\(k B, N, D\\)"),
    ({"h": H.double()}, TypeError, "h must have x's dtype torch.float32"),
    ({"h": H.to("meta")}, ValueError, "h must be on cpu like x, got meta"),
    ({"weight": torch.zeros(4, 3).half()}, TypeError, "weight must have dtype torch.float32 like h"),
    ({"weight": torch.zeros(6, 3)}, ValueError, "\\(p p C or p p 2C, D\\) = \\(4 or 8, 3\\), got \\(6, 3\\)"),
    ({"weight": torch.zeros(4, 5)}, ValueError, "weight must be"),
    ({"bias": torch.zeros(5)}, ValueError, "bias must be \\(weight.shape\\[0\\],\\) = \\(4,\\), got \\(5,\\)"),
    ({"table": torch.zeros(1, 1, 15)}, ValueError, "table must be \\(R, B or 1, 16\\)"),
    ({"step": steps(3)}, ValueError, "step must be \\(B,\\) = \\(2,\\), got \\(3,\\)"),
    ({"history": X}, ValueError, "history must be \\(K, 2, 1, 4, 4\\)"),
    ({"seed": 1, "noise": X}, ValueError, "seed and noise exclude each other"),
    ({"noise": X[:1]}, ValueError, "noise must be x's shape"),
    ({"x_in": X.half()}, TypeError, "x_in must have dtype torch.float32 like h"),
    ({"out": X.clone().transpose(2, 3)}, ValueError, "out must be contiguous, got strides"),
    ({"out": X[:1]}, ValueError, "out must be x's shape"),
    ({"history": torch.zeros(1, 1, 1, 4, 4).expand(1, 2, 1, 4, 4)}, ValueError, "history must not be expanded"),
    ({"x_in": X}, ValueError, "x_in must not overlap x; pass a tensor of its own"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    good = {"x": X, "h": H, "weight": torch.zeros(4, 3), "bias": None, "table": row_table(a=1.0), "step": steps(2)}
    with pytest.raises(error, match=f"patch_step: .*{message}"):
        patch_step(**({"patch_size": 2} | good | arguments))
