"""Every form of our ops that people write is found, with its bytes; what only looks like one is not."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from genengine.benchmarks import eager
from genengine.benchmarks.bench_adaln import eager_adaln, eager_gated_adaln
from genengine.nets.dit import DiT
from genengine.profiling import forms, fusions, targets
from genengine.profiling.record import record

B, N, D = 3, 5, 16


def draw(*shape):
    return torch.randn(*shape)


def rows(count=3):
    return draw(B, 6 * D).chunk(6, dim=1)[:count]


def found(function, *args):
    """op -> the recorded names of its kernels, of every match."""
    recording = record(lambda: function(*args))
    return [
        (match.form.op, sorted(step.name.removeprefix("aten::") for step in match.steps))
        for match in fusions.search(recording)
    ]


def ran(function):
    """The one row of the report, had every recorded step run."""
    recording = record(function)
    (row,) = fusions.find(recording, {step.index: 1e-6 for step in recording.steps})
    return row


def one(function, *args):
    (match,) = found(function, *args)
    return match


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_adaln():
    scale, shift = rows(2)
    assert one(eager_adaln, draw(B, N, D), scale, shift) == ("adaln", ["add", "add", "mul", "native_layer_norm"])


@pytest.mark.parametrize(
    "write",
    [
        lambda y, scale, shift: y + y * scale + shift,
        lambda y, scale, shift: torch.addcmul(shift, y, 1 + scale),
        lambda y, scale, shift: y.mul_(1 + scale).add_(shift),
        lambda y, scale, shift: shift + (scale + 1) * y,
        lambda y, scale, shift: y * scale + shift,
    ],
)
def test_adaln_however_it_is_written(write):
    scale, shift = (row[:, None] for row in rows(2))
    name, kernels = one(lambda x: write(F.layer_norm(x, (D,)), scale, shift), draw(B, N, D))
    assert name == "adaln" and "native_layer_norm" in kernels


def test_adaln_with_affine_weights_and_through_a_cast():
    scale, shift = (row[:, None].bfloat16() for row in rows(2))
    weight, bias = torch.nn.Parameter(draw(D)), torch.nn.Parameter(draw(D))

    def write(x):
        return F.layer_norm(x.float(), (D,), weight, bias).bfloat16() * (1 + scale) + shift

    name, kernels = one(write, draw(B, N, D).bfloat16())
    assert name == "adaln" and kernels.count("_to_copy") == 1  # that of the result; x.float() is read elsewhere too


def test_gated_adaln_keeps_the_sum():
    gate, scale, shift = rows()
    name, kernels = one(eager_gated_adaln, draw(B, N, D), draw(B, N, D), gate, scale, shift)
    assert name == "gated_adaln" and kernels == ["add", "add", "add", "mul", "mul", "native_layer_norm"]


def test_the_bytes_saved_are_those_of_the_formula():
    scale, shift = (row.contiguous() for row in rows(2))
    x = draw(B, N, D)
    (match,) = fusions.search(record(lambda: eager_adaln(x, scale, shift)))
    big, row, statistics = 4 * x.numel(), 4 * scale.numel(), 4 * 2 * B * N
    assert match.bytes == (2 * big + statistics) + 2 * row + (2 * big + row) + (2 * big + row)
    assert match.fused_bytes == 2 * big + 2 * row


def test_a_result_used_elsewhere_is_counted():
    gate, scale, shift = (row.contiguous() for row in rows())
    x, branch = draw(B, N, D), draw(B, N, D)
    (match,) = fusions.search(record(lambda: eager_gated_adaln(x, branch, gate, scale, shift)))
    assert match.fused_bytes == 4 * (4 * x.numel() + 3 * gate.numel())
    (match,) = fusions.search(record(lambda: eager_gated_adaln(x, branch, gate, scale, shift)[1]))
    assert match.fused_bytes == 4 * (3 * x.numel() + 3 * gate.numel())  # the sum itself is not returned


def test_group_norm_silu_plain_and_modulated():
    x, weight, bias = draw(B, 8, 4, 4), draw(8), draw(8)
    scale, shift = draw(B, 16).chunk(2, dim=1)
    assert one(eager.group_norm_silu, x, weight, bias, 2) == ("group_norm_silu", ["native_group_norm", "silu"])
    name, kernels = one(eager.group_norm_silu, x, weight, bias, 2, scale, shift)
    assert name == "group_norm_silu" and kernels == ["add", "add", "mul", "native_group_norm", "silu"]


# ---- activations, attention, rotation --------------------------------------------------------------------------------


def test_bias_act_with_gain_and_clamp():
    x, bias = draw(B, 8, 4, 4), draw(8)
    call = lambda **options: one(lambda: eager.bias_act(x, bias, activation="lrelu", **options))  # noqa: E731
    assert call() == ("bias_act", ["add", "leaky_relu"])
    assert call(gain=1.5) == ("bias_act", ["add", "leaky_relu", "mul"])
    assert call(gain=1.5, clamp=256.0) == ("bias_act", ["add", "clamp", "leaky_relu", "mul"])


def test_bias_gelu():
    assert one(eager.bias_gelu, draw(B, N, D), draw(D)) == ("bias_gelu", ["add", "gelu"])


@pytest.mark.parametrize(("function", "act"), [(eager.geglu, "gelu"), (eager.swiglu, "silu")])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_linear_units(function, act, biased):
    name, kernels = one(function, draw(B, N, 2 * D), draw(2 * D) if biased else None)
    assert name == function.__name__ and kernels == sorted(["add"] * biased + [act, "mul"])


def test_attention():
    def write(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1) @ v

    name, kernels = one(write, *(draw(B, 2, N, D) for _ in range(3)))
    assert name == "attention" and kernels == ["_softmax", "bmm", "bmm", "mul"]


def test_attention_takes_in_the_copies_of_its_heads():
    packed = draw(B, N, 3, 2, D)

    def write():
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        return torch.softmax((q @ k.mT) / D**0.5, dim=-1) @ v

    name, kernels = one(write)
    assert name == "attention" and kernels.count("clone") == 3


def in_pairs(y, cos, sin):
    a, b = y.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(y.dtype)


def as_complex(y, cos, sin):
    pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [in_pairs, as_complex])
def test_qk_norm_rope_of_both_queries_and_keys(rotate, dtype):
    qkv, weight = draw(2, N, 3, 2, 8).to(dtype), draw(8).to(dtype)
    cos, sin = draw(N, 1, 4), draw(N, 1, 4)

    def write():
        q, k, v = qkv.unbind(2)
        rotated = (rotate(F.rms_norm(part, (8,), weight, 1e-6), cos, sin) for part in (q, k))
        return torch.stack((*rotated, v), 2)

    assert [name for name, _ in found(write)] == ["qk_norm_rope", "qk_norm_rope"]


def test_qk_norm_rope_with_rotated_halves():
    cos, sin, weight = draw(N, 1, 8), draw(N, 1, 8), draw(8)

    def write(q):
        y = F.rms_norm(q, (8,), weight, 1e-6)
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-second, first), dim=-1) * sin

    name, kernels = one(write, draw(B, N, 2, 8))
    assert name == "qk_norm_rope" and "neg" in kernels and "rsqrt" in kernels


def test_qk_norm_rope_with_rotated_neighbours():
    cos, sin = draw(N, 1, 8), draw(N, 1, 8)

    def write(q):
        y = F.rms_norm(q, (8,), None, 1e-6)
        first, second = y.unflatten(-1, (-1, 2)).unbind(-1)
        return (y.float() * cos + torch.stack((-second, first), dim=-1).flatten(-2).float() * sin).to(q.dtype)

    for dtype in (torch.float32, torch.bfloat16):
        assert one(write, draw(B, N, 2, 8).to(dtype))[0] == "qk_norm_rope"


# ---- noise, guidance, updates ----------------------------------------------------------------------------------------


def test_reparameterize_with_its_divergence():
    def write(mean, logvar):
        std = torch.exp(0.5 * logvar)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return mean + std * torch.randn_like(std), kl.flatten(1).sum(1)

    name, kernels = one(write, draw(B, 4), draw(B, 4))
    assert name == "reparameterize" and "sum" in kernels and "randn_like" in kernels and kernels.count("exp") == 2


def test_reparameterize_alone():
    mean, logvar = draw(B, 8).chunk(2, dim=1)
    name, kernels = one(lambda: mean + torch.randn_like(mean) * (0.5 * logvar).exp())
    assert name == "reparameterize" and kernels == ["add", "exp", "mul", "mul", "randn_like"]


@pytest.mark.parametrize(
    "target",
    [
        lambda x0, eps, t: eps - x0,
        lambda x0, eps, t: eps,
        lambda x0, eps, t: (1 - t) * eps - t * x0,
    ],
)
def test_diffuse_with_its_target(target):
    x0, t = draw(B, 2, 4, 4), torch.rand(B, 1, 1, 1)

    def write():
        eps = torch.randn_like(x0)
        return (1 - t) * x0 + t * eps, target(x0, eps, t)

    name, kernels = one(write)
    everything = [step.name.removeprefix("aten::") for step in record(write).steps]
    assert name == "diffuse" and kernels == sorted(kernel for kernel in everything if kernel != "rsub")  # of 1 - t


def test_sampler_step_row_by_row():
    def write(output, x):
        for _ in range(3):
            u, c = torch.tanh(output * x.mean()).chunk(2)  # stands for a network that sees x
            x = x + 0.1 * (u + 2.0 * (c - u))
        return x

    matches = found(write, draw(2 * B, 4), draw(B, 4))
    assert matches == [("sampler_step", ["add", "add", "mul", "mul", "sub"])] * 3


def test_sampler_step_of_ddim_with_noise():
    def write(u, c, x):
        eps = u + 3.0 * (c - u)
        x0 = ((x - 0.6 * eps) / 0.8).clamp(-1, 1)
        return 0.9 * x0 + 0.4 * eps + 0.1 * torch.randn_like(x)

    recording = record(lambda: write(draw(B, 4), draw(B, 4), draw(B, 4)))
    (match,) = fusions.search(recording)
    assert match.form.op == "sampler_step" and sum(step.name == "aten::clamp" for step in match.steps) == 1


def test_guidance_moments():
    def write(u, c):
        guided = u + 7.5 * (c - u)
        return c.std((1, 2)), guided.std((1, 2))

    name, kernels = one(write, draw(B, 4, 4), draw(B, 4, 4))
    assert name == "guidance_moments" and kernels == ["add", "mul", "std", "std", "sub"]


def test_ema_update_is_one_launch_for_all():
    averages, values = [draw(7) for _ in range(6)], [draw(7) for _ in range(6)]
    row = ran(lambda: eager.ema_update(averages, values, 0.9))
    assert row.op == "ema_update" and row.places == 6 and row.launches == 1
    assert row.kernels == {"aten::mul_": 6, "aten::add_": 6} and row.saved == 6 * 7 * 4 * 2

    def interpolate():
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, 0.1)

    row = ran(interpolate)
    assert row.op == "ema_update" and row.saved == 0 and row.launches == 1


def test_outputs_given_make_no_difference():
    u, c, x, out = (draw(B, 4) for _ in range(4))

    def write():
        torch.sub(c, u, out=out)
        out.mul_(2.0).add_(u)
        return torch.add(x, out, alpha=-0.1, out=out)

    name, kernels = one(write)
    assert name == "sampler_step" and kernels == ["add", "add_", "mul_", "sub"]


def test_attention_with_its_scale_in_the_product():
    q, k, v = (draw(B, N, D) for _ in range(3))

    def write():
        return torch.softmax(torch.baddbmm(torch.empty(B, N, N), q, k.mT, beta=0, alpha=0.25), dim=-1) @ v

    assert one(write) == ("attention", ["_softmax", "baddbmm", "bmm"])


# ---- what is none ----------------------------------------------------------------------------------------------------

X, Y, SMALL = draw(B, N, D), draw(B, N, D), draw(B, N, 2 * D)
LONG, WIDE = draw(B, 2, 8200), draw(B, N, 260)
SCALE, SHIFT, STATE = draw(B, 1, D), draw(B, 1, D), draw(B, N, D)
NEAR_MISSES = {
    "layer norm with weights, no modulation": lambda: F.layer_norm(X, (D,), draw(D), draw(D)),
    "a modulation by weights, the same for all samples": lambda: F.layer_norm(X, (D,)) * (1 + draw(D)) + draw(D),
    "a modulation of every token": lambda: F.layer_norm(X, (D,)) * (1 + X) + Y,
    "scale and shift of no norm": lambda: torch.sin(X) * (1 + SCALE) + SHIFT,
    "a scale without a shift": lambda: F.layer_norm(X, (D,)) * (1 + SCALE),
    "the normed x is used elsewhere": lambda: (lambda y: (y * (1 + SCALE) + SHIFT, y.sum()))(F.layer_norm(X, (D,))),
    "the normed x is returned": lambda: (lambda y: (y * (1 + SCALE) + SHIFT, y))(F.layer_norm(X, (D,))),
    "group norm and another activation": lambda: torch.relu(F.group_norm(X, 5)),
    "a residual and an activation": lambda: F.gelu(X + Y),
    "a bias without an activation": lambda: X + draw(D),
    "an activation of a product with its bias": lambda: F.gelu(F.linear(X, draw(8, D), draw(8))),
    "two tensors gated": lambda: F.silu(X) * Y,
    "one half gated by itself": lambda: (lambda h: F.silu(h) * h)(SMALL.chunk(2, dim=-1)[0]),
    "another gate": lambda: (lambda h, g: torch.sigmoid(g) * h)(*SMALL.chunk(2, dim=-1)),
    "softmax over the queries": lambda: torch.softmax(X @ Y.mT, dim=1) @ X,
    "attention with an added bias": lambda: torch.softmax(X @ Y.mT + draw(N, N), dim=-1) @ X,
    "weights that are used elsewhere": lambda: (lambda w: (w @ X, w))(torch.softmax(X @ Y.mT, dim=-1)),
    "rms norm without rotation": lambda: F.rms_norm(X, (D,), draw(D)),
    "a standard deviation that is given": lambda: X + Y * torch.randn_like(X),
    "exp(logvar), not half of it": lambda: X + torch.exp(Y) * torch.randn_like(X),
    "one noise level for all": lambda: 0.8 * X + 0.6 * torch.randn_like(X),
    "a mixture of two data": lambda: (lambda t: (1 - t) * X + t * Y)(torch.rand(B, 1, 1)),
    "guidance without an update": lambda: X + 2.0 * (Y - X),
    "a residual after an interpolation by weights": lambda: draw(B, N, D) + (X + draw(D) * (Y - X)),
    "a norm's second result": lambda: torch.native_layer_norm(X, (D,), None, None, 1e-6)[1] * (1 + SCALE) + SHIFT,
    "standard deviations of channels": lambda: (lambda m: (Y.std(2), m.std(2)))(X + 2.0 * (Y - X)),
    "sums of lists": lambda: torch._foreach_add([X, Y], [Y, X], alpha=2.0),
    "sums of three": lambda: X + Y + draw(B, N, D),
    "weights that do not add up": lambda: STATE.mul_(0.9).add_(Y, alpha=0.2),
    "an average that is no state": lambda: X * 0.9 + Y * 0.1,
    "an interpolation and a sum": lambda: STATE + torch.lerp(X, Y, 0.3),
    "adaln in float64, which no kernel takes": lambda: F.layer_norm(X.double(), (D,)) * (1 + SCALE) + SHIFT,
    "bias_act in float64": lambda: torch.relu(X.double() + draw(D)),
    "an activation of integers": lambda: torch.relu(torch.arange(6)) * 2,
    "an activation of one number": lambda: torch.tanh(torch.tensor(0.5)) * 2.0,
    "a norm over two dimensions": lambda: F.layer_norm(X, (N, D)) * (1 + SCALE) + SHIFT,
    "a norm of rows that are too long": lambda: F.layer_norm(LONG, (8200,)) * (1 + LONG[:, :1]) + LONG[:, 1:],
    "attention with heads that are too wide": lambda: torch.softmax(WIDE @ WIDE.mT, dim=-1) @ WIDE,
    "attention with values of another width": lambda: torch.softmax(X @ Y.mT, dim=-1) @ SMALL,
    "rotation of heads that are too wide": lambda: in_pairs(F.rms_norm(WIDE, (260,)), *draw(2, N, 130)),
    "rotation after a norm over two dimensions": lambda: in_pairs(F.rms_norm(X, (N, D)), *draw(2, N, D // 2)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    assert [op for op, _ in found(NEAR_MISSES[name])] == []


def test_an_optimiser_is_no_moving_average():
    weight = torch.nn.Parameter(draw(4))
    weight.grad = draw(4)
    optimizer = torch.optim.Adam([weight], foreach=False)
    optimizer.step()
    assert found(optimizer.step) == []


def test_what_is_fused_already_gives_nothing_and_its_eager_twin_does():
    net = DiT.from_config("tiny")
    x, t, y = draw(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        assert found(net, x, t, y) == []
        names = {name for name, _ in found(eager.calling(net), x, t, y)}
    assert names == {"adaln", "gated_adaln", "bias_gelu"}


def test_what_autograd_keeps_is_no_use_elsewhere():
    scale, shift = rows(2)
    x = draw(B, N, D).requires_grad_()
    ((name, _),) = found(lambda: eager_adaln(x, scale, shift).sum().backward())
    assert name == "adaln"


SHAPES = {
    "adaln": (2, 3, 16), "gated_adaln": (2, 3, 16), "bias_act": (2, 8, 4, 4), "bias_gelu": (2, 3, 16),
    "geglu": (2, 3, 16), "swiglu": (2, 3, 16), "group_norm_silu": (2, 8, 4, 4), "diffuse": (2, 3, 4, 4),
    "reparameterize": (2, 3, 4, 4), "ema_update": (3, 7),
}  # fmt: skip
# What an op moves beside: a seed in an int64, the mean and deviation of (B, groups) for its backward.
BESIDE = {"diffuse": 8, "reparameterize": 8, "group_norm_silu": 4 * 2 * (2 * 8)}


@pytest.mark.parametrize("name", SHAPES)
def test_our_op_in_place_of_a_match_moves_what_was_promised(name):
    request = targets.Request(torch.device("cpu"), shape=SHAPES[name])
    plain = targets.resolve(name, dataclasses.replace(request, eager=True))
    matches = fusions.search(record(plain.function))
    assert matches and {match.form.op for match in matches} == {name}
    ours = record(targets.resolve(name, request).function).steps[-1]
    assert ours.name.startswith("genengine")
    assert ours.cost.bytes == sum(match.fused_bytes for match in matches) + BESIDE.get(name, 0)


def test_every_op_with_an_eager_twin_and_a_form_is_compared():
    assert SHAPES.keys() == eager.PLAIN.keys() & {form.op for form in forms.FORMS} - {"attention"}


def test_what_did_not_run_as_recorded_is_not_reported():
    scale, shift = rows(2)
    x = draw(B, N, D)
    recording = record(lambda: eager_adaln(x, scale, shift))
    assert fusions.find(recording, {step.index: 1e-6 for step in recording.steps[:-1]}) == []
