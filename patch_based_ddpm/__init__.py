"""Diffusion models that train and sample in patches, exactly, in a fraction of the memory.

After "Memory Efficient Diffusion Probabilistic Models via Patch-based Generation" (Arakawa et al., CVPRW 2023).
"""

from patch_based_ddpm.checkpoint import load_diffusion
from patch_based_ddpm.config import Config
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.unet import UNet

__all__ = ["Config", "GaussianDiffusion", "UNet", "load_diffusion"]
