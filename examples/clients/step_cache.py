# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""cache-dit leaves out most layers in most steps, by `BlockAdapter`: `pip install cache-dit`."""

from collections import Counter
from typing import Any

import cache_dit
import torch
from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern

from diffusers_bagel import BagelPipeline


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    pipe = BagelPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    language_model = pipe.transformer.model.language_model
    calls: Counter[str] = Counter()

    def draw() -> Any:
        calls.clear()
        return pipe("a red circle", num_inference_steps=24, generator=torch.Generator().manual_seed(0)).images[0]

    for name, layer in {"first": language_model.layers[0], "last": language_model.layers[-1]}.items():
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    plain, plain_calls = draw(), dict(calls)
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=language_model,
        blocks=language_model.layers,
        forward_pattern=ForwardPattern.Pattern_3,
    )
    # The prompt is a forward, too; with `think=True` so is each token of the plan.
    cache_dit.enable_cache(
        adapter, cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=8, residual_diff_threshold=0.3)
    )
    cached, cached_calls = draw(), dict(calls)
    cache_dit.disable_cache(adapter)
    again = draw()

    print(f"plain: {plain_calls}, cached: {cached_calls}")
    assert cached_calls["first"] == plain_calls["first"] and cached_calls["last"] < plain_calls["last"]
    assert cached.tobytes() != plain.tobytes() == again.tobytes()


if __name__ == "__main__":
    main()
