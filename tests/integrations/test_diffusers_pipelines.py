"""Guidance that the row computes, and whole pipelines with fused schedulers."""

import copy
import json
import pickle

import pytest
import torch
from diffusers_support import SHAPE, STRICT, diffusers, distance, fused, make

from genengine.integrations.diffusers import fuse
from genengine.integrations.diffusers._guidance import Branches

pytestmark = STRICT

# ---- guidance in the row, and pipelines --------------------------------------------------------------------------


def test_guidance_is_noted_not_computed():
    stacked = torch.randn(4, 3, 8, 8)
    u, c = Branches(stacked).chunk(2)
    guided = u + 7.5 * (c - u)
    assert guided._value is None and guided.guidance() == (7.5, 0.0)
    exact = stacked[:2] + 7.5 * (stacked[2:] - stacked[:2])
    assert torch.equal(guided.tensor(), exact)
    scheduler, plain = fused("EulerDiscrete", {}), fused("EulerDiscrete", {})
    x = torch.randn(SHAPE)
    for each in (scheduler, plain):
        each.set_timesteps(5)
        each.scale_model_input(x, each.timesteps[0])
    u, c = Branches(stacked).chunk(2)
    guided = u + 7.5 * (c - u)
    ours = scheduler.step(guided, scheduler.timesteps[0], x)[0]
    assert guided._value is None, "the row has done it"
    assert distance(ours, plain.step(exact, plain.timesteps[0], x)[0]) <= 1e-6


def test_three_branches():
    stacked = torch.randn(6, 3, 8, 8)
    a, b, c = Branches(stacked).chunk(3)
    guided = a + 3.0 * (b - a) + 2.0 * (c - b)
    u, v, w = stacked.chunk(3)
    assert guided.guidance() == (3.0, 2.0)
    assert torch.allclose(guided.tensor(), u + 3.0 * (v - u) + 2.0 * (w - v))


def test_a_noted_combination_is_a_tensor_for_everything_else():
    stacked = torch.randn(4, 3, 8, 8)
    branches = Branches(stacked)
    u, c = branches.chunk(2)
    a, b = stacked.chunk(2)
    guided, exact = u + 2.0 * (c - u), a + 2.0 * (b - a)
    assert torch.equal(guided * torch.tensor(2.0), exact * 2) and torch.equal(3 - guided, 3 - exact)
    assert torch.equal(torch.cat([guided, c]), torch.cat([exact, b])) and torch.equal(-guided, -exact)
    assert guided.shape == exact.shape and guided.dtype == exact.dtype and torch.equal(guided[:, 1], exact[:, 1])
    assert torch.equal(guided.std(dim=(1, 2, 3)), exact.std(dim=(1, 2, 3))) and torch.equal(guided.float(), exact)
    assert torch.equal(torch.nn.functional.relu(guided), exact.relu()) and torch.equal(guided / 2, exact / 2)
    assert torch.equal((u * 0.5 + c).tensor(), a * 0.5 + b) and (u * 0.5 + c).guidance() is None
    assert torch.equal(branches + 1, stacked + 1) and branches.shape == stacked.shape
    assert torch.equal(branches.chunk(4)[1], stacked[1:2]) and torch.equal(branches[1], stacked[1])


def tiny_pipeline(scheduler):
    transformers = pytest.importorskip("transformers", reason="diffusers' text-to-image pipelines need transformers")
    del transformers
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, **arguments):
    draw = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 5, 16, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=6,
        generator=torch.Generator().manual_seed(2),        output_type="pt", height=16, width=16, **arguments,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    "name", ["DDIM", "PNDM", "DPMSolverMultistep", "EulerAncestralDiscrete", "UniPCMultistep", "LCM"]
)
@pytest.mark.parametrize(
    "arguments",
    [{"guidance_scale": 5.0}, {"guidance_scale": 1.0}, {"guidance_scale": 4.0, "guidance_rescale": 0.7}],
    ids=str,
)
def test_a_pipeline_makes_the_same_images(name, arguments):
    config = {"skip_prk_steps": True} if name == "PNDM" else {}
    expected = images(tiny_pipeline(make(name, config)), **arguments)
    pipeline = tiny_pipeline(make(name, config))
    ours = fuse(pipeline)
    assert ours is pipeline and type(pipeline).__name__ == "StableDiffusionPipeline"
    assert (images(ours, **arguments) - expected).abs().max() < 1e-5
    assert torch.is_tensor(pipeline.unet(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 5, 16), return_dict=False)[0])


def test_a_fused_pipeline_saves_as_a_plain_one(tmp_path):
    pipeline = fuse(tiny_pipeline(make("DDIM", {})), noise="philox")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"] and index["_class_name"] == "StableDiffusionPipeline"
    assert fuse(pipeline) is pipeline and torch.isfinite(images(pipeline)).all()


def test_an_unconditional_pipeline_too():
    unet = lambda: torch.manual_seed(0) and diffusers.UNet2DModel(  # noqa: E731
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    results = []
    for change in (lambda p: p, fuse):
        pipeline = change(diffusers.DDPMPipeline(unet(), make("DDPM", {})))
        pipeline.set_progress_bar_config(disable=True)
        results.append(
            pipeline(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
        )
    assert abs(results[0] - results[1]).max() < 1e-5


def test_what_is_done_to_a_noted_combination_in_place_is_not_lost():
    stacked, x = torch.randn(4, 3, 8, 8), torch.randn(SHAPE)

    def halved(value):
        value.mul_(0.5)

    def masked(value):
        value[:, 1:] = 0

    for edit in (halved, masked):
        (u, c), (a, b) = Branches(stacked).chunk(2), stacked.chunk(2)
        guided, exact = u + 2.0 * (c - u), a + 2.0 * (b - a)
        assert guided.shape == exact.shape and guided.guidance() is not None
        edit(guided)
        edit(exact)
        results = []
        for output in (guided, exact):
            scheduler = fused("DDIM", {})
            scheduler.set_timesteps(5)
            results.append(scheduler.step(output, scheduler.timesteps[0], x)[0])
        assert distance(*results) < 1e-6


def test_a_noted_combination_is_copied_and_pickled_as_a_tensor():
    stacked = torch.randn(4, 3, 8, 8)
    (u, c), (a, b) = Branches(stacked).chunk(2), stacked.chunk(2)
    guided, exact = u + 2.0 * (c - u), a + 2.0 * (b - a)
    for twin in (pickle.loads(pickle.dumps(guided)), copy.deepcopy(guided)):
        assert type(twin) is torch.Tensor and torch.equal(twin, exact)
    assert torch.equal(guided % 2, exact % 2) and torch.equal(2**guided, 2**exact) and torch.equal(+guided, exact)


def test_a_fused_pipeline_is_pickled_and_copied():
    pipeline = fuse(tiny_pipeline(make("DDIM", {})))
    expected = images(pipeline)
    for twin in (pickle.loads(pickle.dumps(pipeline)), copy.deepcopy(pipeline)):
        assert type(twin) is type(pipeline) and torch.equal(images(twin), expected)


@pytest.mark.parametrize("compiled", [lambda unet: unet.compile(backend="eager"), None])
def test_a_compiled_denoiser_makes_the_same_images(compiled):
    pipeline = tiny_pipeline(make("DDIM", {}))
    expected = images(pipeline, guidance_scale=5.0)
    if compiled:
        compiled(pipeline.unet)
    else:
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert (images(fuse(pipeline), guidance_scale=5.0) - expected).abs().max() < 1e-5
