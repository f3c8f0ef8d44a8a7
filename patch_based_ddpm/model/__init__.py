"""The model of the paper: the UNet that denoises one patch, and the diffusion model that applies it to whole images.

`diffusion.py` splits, denoises, merges and holds loss and posterior; `unet.py` and `layers.py` are the network;
`patches.py` cuts images into patches and builds their conditioning; `schedule.py` is the noise schedule;
`patch_batching.py` decides how many patches share a forward pass.
"""
