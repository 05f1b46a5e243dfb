# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""cache-dit leaves out most layers in most steps, by `BlockAdapter`: `pip install cache-dit`."""

from collections import Counter
from typing import Any

import cache_dit
import torch
from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig

from diffusers_bagel import BagelPipeline


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    pipe = BagelPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    calls: Counter[int] = Counter()

    def draw(prompt: str = "a red circle", **settings: Any) -> Any:
        calls.clear()
        return pipe(prompt, num_inference_steps=24, generator=torch.Generator().manual_seed(0), **settings).images[0]

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["routing"] is not None:
            # Branches of guidance share a forward where nothing is left out.
            calls.update({module.layer_idx: len(list(kwargs["routing"].block_slices()))})

    for attention in (layer.self_attn for layer in pipe.transformer.model.language_model.layers):
        attention.register_forward_pre_hook(note, with_kwargs=True)
    plain, plain_calls = draw(), dict(calls)
    planned = draw(think=True)

    # A list of layers for each branch of guidance, each of which gets a state of its own. Texts do not go through them.
    layers = pipe.denoising_layers
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=layers,
        blocks=[layers.full, layers.no_text, layers.no_image],
        forward_pattern=[ForwardPattern.Pattern_3] * 3,
    )
    cache_dit.enable_cache(
        adapter,
        cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.12),
        calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    cached, cached_calls = draw(), dict(calls)
    assert draw().tobytes() == cached.tobytes()
    draw("a small green star")
    assert draw(think=True).tobytes() != planned.tobytes()
    assert draw().tobytes() == cached.tobytes()
    cache_dit.disable_cache(adapter)
    again = draw()

    print(f"computed of each layer, of two branches: plain {plain_calls}, cached {cached_calls}")
    assert (
        cached_calls[0] == plain_calls[0] and max(cached_calls[index] for index in range(1, 6)) < plain_calls[5] / 1.5
    )
    assert cached.tobytes() != plain.tobytes() == again.tobytes()


if __name__ == "__main__":
    main()
