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
{% if pictures %}
<Gallery />

{% for prompt, picture in pictures %}![{{ prompt }}]({{ picture }})
{% endfor %}{% endif %}
With the package `transformers-bagel`, pictures:

```python
{{ drawing }}
```

and text:

```python
{{ talking }}
```

## Training

{% for name, value in settings %}- {{ name }}: {{ value }}
{% endfor %}
"""

# What comes after the lines that load a model and its processor.
TALKING = """messages = [{"role": "user", "content": [{"type": "text", "text": "What is a circle?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

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
    args: argparse.Namespace,
    description: str,
    pipeline: str,
    model: str,
    tags: list[str],
    metrics: dict[str, float],
) -> None:
    """Write README.md into OUTPUT_DIR: what was trained, how to load it, the settings, the last validation pictures.

    Args:
        args (`argparse.Namespace`): See `arguments.py`.
        description (`str`): What was trained.
        pipeline (`str`): Python lines that load it as `pipe`.
        model (`str`): Python lines that load it as `model` and `processor`.
        tags (`list[str]`): For the Hub's search.
        metrics (`dict[str, float]`): The last step's.
    """
    output_dir, base_model = Path(args.output_dir), args.pretrained_model_name_or_path
    step = int(metrics["step"])
    pictures = sorted(output_dir.glob(f"validation/step_{step}_*.png")) if args.validation_prompt else []
    shown = [(args.validation_prompt, picture.relative_to(output_dir).as_posix()) for picture in pictures]
    widget = [{"text": prompt, "output": {"url": picture}} for prompt, picture in shown]
    prompt = args.validation_prompt or args.instance_prompt or "a red circle"
    data = ModelCardData(
        # A folder of this machine is nothing for the Hub.
        base_model=None if Path(base_model).exists() else base_model,
        library_name="diffusers",
        license="apache-2.0",
        tags=tags,
        widget=widget or None,
        instance_prompt=args.instance_prompt,
    )
    settings = [(name, getattr(args, name)) for name in SETTINGS if getattr(args, name, None) is not None]
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        name=output_dir.resolve().name,
        description=description,
        pictures=shown,
        drawing=f"from diffusers_bagel import BagelPipeline\n\n{pipeline}\npicture = pipe({prompt!r}).images[0]",
        talking=f"{model}\n{TALKING}",
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
        ignore_patterns=["checkpoint-*", ".checkpoint-*", ".replaced-*", "latents/*", f"{args.logging_dir}/*"],
    )
    return repo_id
