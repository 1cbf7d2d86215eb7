"""Drop-ins for diffusers: schedulers whose step is one fused row, and pipelines that use them.

    from genengine.integrations import diffusers as fused

    pipeline = fused.fuse(pipeline)                                         # any pipeline: same images, faster
    scheduler = fused.fused_class(DDIMScheduler).from_config(config)        # or a scheduler of your own loop

diffusers is imported by the caller; this module works with the version that is installed.
"""

from genengine.integrations.diffusers._pipeline import fuse
from genengine.integrations.diffusers._scheduler import fused_class

__all__ = ["fuse", "fused_class"]
