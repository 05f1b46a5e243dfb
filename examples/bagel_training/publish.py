# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Model cards of trained models, and their way to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder


CARD = """---
{{ card_data }}
---

# {{ name }}

{{ description }}

```python
from diffusers_bagel import BagelPipeline

{{ usage }}
```

## Training

{% for name, value in settings %}- {{ name }}: {{ value }}
{% endfor %}
"""

SETTINGS = (
    "train_batch_size",
    "max_tokens",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "mixed_precision",
    "timestep_shift",
    "seed",
)


def write_card(
    args: argparse.Namespace, description: str, usage: str, tags: list[str], metrics: dict[str, float]
) -> None:
    """Write README.md into OUTPUT_DIR: what was trained, how to load it, the settings, the last validation pictures.

    Args:
        args (`argparse.Namespace`): See `arguments.py`.
        description (`str`): What was trained.
        usage (`str`): Python lines that load it.
        tags (`list[str]`): For the Hub's search.
        metrics (`dict[str, float]`): The last step's.
    """
    output_dir = Path(args.output_dir)
    step = int(metrics["step"])
    pictures = sorted(output_dir.glob(f"validation/step_{step}_*.png")) if args.validation_prompt else []
    widget = [
        {"text": args.validation_prompt, "output": {"url": str(picture.relative_to(output_dir))}}
        for picture in pictures
    ]
    data = ModelCardData(
        base_model=args.pretrained_model_name_or_path,
        library_name="diffusers",
        license="apache-2.0",
        tags=tags,
        widget=widget or None,
        instance_prompt=args.instance_prompt,
    )
    settings = [(name, getattr(args, name)) for name in SETTINGS if getattr(args, name) is not None]
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        name=output_dir.resolve().name,
        description=description,
        usage=usage,
        settings=settings + [(f"{name}, last step", f"{value:.6g}") for name, value in metrics.items()],
    )
    card.save(output_dir / "README.md")


def push(args: argparse.Namespace) -> str:
    """Upload OUTPUT_DIR without checkpoints, caches and logs; returns the repository's id."""
    output_dir = Path(args.output_dir)
    repo_id = create_repo(args.hub_model_id or output_dir.resolve().name, exist_ok=True, token=args.hub_token).repo_id
    upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        commit_message="End of training",
        token=args.hub_token,
        ignore_patterns=["checkpoint-*", ".checkpoint-*", "latents/*", f"{args.logging_dir}/*"],
    )
    return repo_id
