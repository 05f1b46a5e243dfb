# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""
VLMEvalKit needs torchvision, of which BAGEL needs nothing. PyPI's build, which is for GPUs, does not load beside a torch without
them, nor then does anything that imports it: two names are missing that its library would have declared. They are declared here.
"""

import torch


try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
