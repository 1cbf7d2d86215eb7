"""The eager twin that benchmarks compare with computes what the fused ops compute."""

import pytest
import torch

from genengine import data, ops
from genengine.benchmarks import eager
from genengine.models import FlowMatching


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(c=8):
    return rand(3, c, 5, 7, seed=1)


CASES = {
    "adaln": lambda: ops.adaln(rand(2, 5, 16), rand(2, 16, seed=1), rand(2, 16, seed=2)),
    "gated_adaln": lambda: torch.cat(
        ops.gated_adaln(rand(2, 5, 16), rand(2, 5, 16, seed=5), *(rand(2, 16, seed=i) for i in range(3)))
    ),
    "attention": lambda: ops.attention(*(rand(2, 6, 2, 8, seed=i) for i in range(3)), causal=True),
    "bias_act": lambda: ops.bias_act(image(), rand(8), activation="lrelu", gain=1.4, clamp=1.5),
    "bias_gelu": lambda: ops.bias_gelu(rand(4, 8), rand(8, seed=1), approximate="tanh"),
    "geglu": lambda: ops.geglu(rand(4, 8), gate_first=False),
    "swiglu": lambda: ops.swiglu(rand(4, 8), rand(8, seed=1)),
    "group_norm_silu": lambda: ops.group_norm_silu(image(), rand(8), rand(8, seed=1), 4),
    "group_norm_silu, modulated": lambda: ops.group_norm_silu(
        image(), rand(8), rand(8, seed=1), 4, rand(3, 8, seed=2), rand(3, 8, seed=3), silu=False
    ),
    "add_group_norm_silu": lambda: torch.cat(
        ops.add_group_norm_silu(image(), rand(3, 8, 5, 7, seed=4), rand(8), rand(8, seed=1), 4)
    ),
    "diffuse": lambda: torch.cat(
        ops.diffuse(image(), *(rand(3, seed=i) for i in range(4)), seed=5, sample_ids=torch.tensor([4, 1, 7]), step=2)
    ),
    "reparameterize": lambda: torch.cat(
        [t.flatten() for t in ops.reparameterize(rand(3, 8), rand(3, 8, seed=1), seed=5, free_bits=0.2)]
    ),
    "reparameterize, monte carlo": lambda: torch.cat(
        [t.flatten() for t in ops.reparameterize(rand(3, 8), rand(3, 8, seed=1), seed=5, step=3, kl="monte_carlo")]
    ),
    "logistic_mixture_log_prob": lambda: ops.logistic_mixture_log_prob(
        data.from_levels(data.to_levels(image(3))), 0.3 * rand(3, 20, 5, 7), bins=17
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plain_form_is_the_op(name):
    fused, op = CASES[name](), getattr(ops, name.split(",")[0])
    with eager.ops(same_noise=True):
        assert getattr(ops, name.split(",")[0]) is not op  # something was swapped
        plain = CASES[name]()
    assert getattr(ops, name.split(",")[0]) is op
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_every_op_that_a_model_differentiates_has_a_plain_form():
    functions = {name for name in ops.__all__ if name[0].islower() and not name.startswith("pack_")}
    sampling = {"logistic_mixture_sample", "patch_step", "pixelcnn_sample", "sampler_step", "transformer_sample"}
    assert functions - set(eager.PLAIN) == {"backend", "qk_norm_rope", "advance", "guidance_moments"} | sampling


def test_a_whole_model_has_a_twin():
    model = FlowMatching.pretrained()
    x0 = rand(4, 1, 8, 8).clamp(-1, 1)
    draw = {"labels": torch.arange(4), "seed": 3, "step": 1}
    fused = model.loss(x0, **draw)
    with eager.ops(same_noise=True):
        torch.testing.assert_close(model.loss(x0, **draw), fused, rtol=1e-5, atol=1e-6)
    with eager.ops():
        assert model.loss(x0, **draw) != fused  # torch's own noise
    averages, values = [torch.ones(3)], [torch.zeros(3)]
    with eager.ops():
        ops.ema_update(averages, values, 0.9)
    assert torch.allclose(averages[0], torch.full((3,), 0.9))
