# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A model sharded over all processes (FSDP2)."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from transformers_bagel import BagelForConditionalGeneration


def shard_model(
    model: BagelForConditionalGeneration, mesh: DeviceMesh, param_dtype: torch.dtype | None = None
) -> BagelForConditionalGeneration:
    """
    Shard the weights, gradients and optimizer states of a model, layer by layer, in place.

    accelerate's own FSDP2 needs an accelerator device; this runs on a CPU mesh too.

    Args:
        model ([`BagelForConditionalGeneration`]):
            With float32 master weights. Those of the first process count; the others' may be on the meta device.
        mesh (`DeviceMesh`): The processes, in one dimension.
        param_dtype (`torch.dtype`, *optional*): Computation takes place in it; gradients are reduced in float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=None if param_dtype is None else torch.float32, cast_forward_inputs=False
    )
    weights = model.state_dict()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in weights}
    model.to("meta")
    layers = list(model.model.language_model.layers)
    if model.model.vision_tower is not None:
        layers += list(model.model.vision_tower.encoder.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=mesh.device_type)
    for name, buffer in unsaved.items():
        model.get_buffer(name).copy_(buffer)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model
