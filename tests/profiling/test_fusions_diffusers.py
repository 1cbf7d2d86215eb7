"""What the networks of diffusers would gain: the forms are found in code that was not written for us."""

import pytest
import torch

from genengine.profiling import fusions
from genengine.profiling.record import record

diffusers = pytest.importorskip("diffusers", reason="its networks are what is profiled")


def found(function):
    with torch.no_grad():
        return [match.form.op for match in fusions.search(record(function))]


def test_a_diffusion_transformer():
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    ).eval()
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    assert sorted(found(lambda: net(x, timestep=t, class_labels=t).sample)) == ["adaln"] + ["gated_adaln"] * 4


def test_a_unet():
    net = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    names = found(lambda: net(x, torch.tensor([1, 2])).sample)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in net.modules())
    attention = sum(type(module).__name__ == "Attention" for module in net.modules())  # its norm has no activation
    assert names == ["group_norm_silu"] * (norms - attention)


def test_a_pipelines_guidance_and_scheduler_step():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(3)
    net, noise = torch.nn.Conv2d(3, 3, 3, padding=1), torch.randn(2, 3, 8, 8)

    def pipeline():
        x = noise
        for t in scheduler.timesteps:
            u, c = net(torch.cat([x, x])).chunk(2)
            x = scheduler.step(u + 7.5 * (c - u), t, x).prev_sample
        return x

    assert found(pipeline) == ["sampler_step"] * 3
