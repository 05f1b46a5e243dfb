# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The page as a Space. `BAGEL_MODEL` names another checkpoint."""

import os


try:
    # Before torch, whose CUDA it stands in for.
    import spaces
except ImportError:
    spaces = None

import torch
from gradio.utils import is_zero_gpu_space

from bagel_demo import GpuCalls, create_page
from bagel_server import Engine
from diffusers_bagel import BagelPipeline


# Longer ones are cut off where a GPU is lent.
SECONDS_OF_AN_ANSWER = 120

has_gpu = torch.cuda.is_available()
model = os.environ.get("BAGEL_MODEL", "ByteDance-Seed/BAGEL-7B-MoT")
pipe = BagelPipeline.from_pretrained(model, dtype=torch.bfloat16 if has_gpu else torch.float32)
pipe.to("cuda" if has_gpu else "cpu")
pipe.set_progress_bar_config(disable=True)
is_lent = spaces is not None and is_zero_gpu_space()
page = create_page(GpuCalls(pipe, spaces.GPU(duration=SECONDS_OF_AN_ANSWER)) if is_lent else Engine(pipe))

if __name__ == "__main__":
    page.launch()
