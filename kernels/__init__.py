"""Fused Triton kernels for diffusion networks, each beside its plain-torch reference.

Importing this package imports neither torch nor triton: Hugging Face libraries look for a package of this name, and finding
ours must cost them nothing. Import an operation from its module: ``from kernels.group_norm_silu import group_norm_silu``.
"""
