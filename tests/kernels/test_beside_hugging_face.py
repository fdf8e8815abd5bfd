"""Hugging Face libraries look for a package called ``kernels``; finding ours must neither break nor mislead them."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import sys
import kernels
assert "torch" not in sys.modules and "triton" not in sys.modules, "importing our package must cost nothing"
import diffusers, torch, transformers
from diffusers.utils import is_kernels_available as diffusers_finds
from transformers.utils.import_utils import is_kernels_available as transformers_finds
assert not diffusers_finds() and not transformers_finds(), "ours is taken for the Hugging Face package"
from transformers import CLIPTextConfig, CLIPTextModel
text = CLIPTextModel(CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
assert text(torch.zeros((1, 5), dtype=torch.int64))[0].shape == (1, 5, 16)
unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
assert unet(torch.zeros(1, 3, 8, 8), 1).sample.shape == (1, 3, 8, 8)
assert kernels.__file__ in {sys.modules["kernels"].__file__}
print("beside each other")
"""


def test_diffusers_and_transformers_run_beside_our_kernels_package() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "beside each other" in done.stdout
