"""Make a diffusers pipeline faster with one line: the same images, from the same seed.

    pip install genengine[interop] transformers
    python examples/diffusers_pipeline.py

The pipeline is a tiny Stable Diffusion with random weights, built here, so nothing is downloaded; with your own, only
the line with `fuse` changes.
"""

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

from genengine.integrations.diffusers import fuse


def tiny_pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, None, None, unet, DPMSolverMultistepScheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline):
    draw = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 5, 16, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=5.0, num_inference_steps=20, height=16,
        width=16, generator=torch.Generator().manual_seed(2), output_type="pt",
    ).images  # fmt: skip


def main():
    """Returns the images of the plain and of the fused pipeline."""
    pipeline = tiny_pipeline()
    before = images(pipeline)
    pipeline = fuse(pipeline)  # the one line
    return before, images(pipeline)


if __name__ == "__main__":
    before, after = main()
    print(f"{len(after)} images; largest difference of a pixel in [0, 1]: {(before - after).abs().max():.1e}")
