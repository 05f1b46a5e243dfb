# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Train all weights of BAGEL, or those of some of its towers.

    accelerate launch --num_processes 8 examples/train_full.py --fsdp \\
        --pretrained_model_name_or_path ByteDance-Seed/BAGEL-7B-MoT --train_data_file conversations.parquet \\
        --max_tokens 16384 --max_train_steps 10000 --mixed_precision bf16 --gradient_checkpointing \\
        --lr_scheduler cosine --ema --output_dir tuned

See docs/training.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from bagel_training.arguments import add_sample_arguments, add_shared_arguments, check_shared_arguments
from bagel_training.data import TrainingSamples, load_samples
from bagel_training.ema import ShardedEma
from bagel_training.loop import Training, end_training, make_accelerator, make_collator, make_loader, make_optimizer
from bagel_training.models import load_pipeline
from bagel_training.output import discard_replaced
from bagel_training.parallel import shard_model
from bagel_training.publish import push, write_card
from bagel_training.settings import fingerprint
from bagel_training.throughput import StepFlops
from bagel_training.validation import Validation
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from diffusers_bagel import BagelPipeline
from transformers_bagel.training.freezing import FREEZABLE_PARTS


logger = get_logger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, learning_rate=2e-5)
    add_sample_arguments(parser)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--freeze", nargs="+", choices=tuple(FREEZABLE_PARTS), default=[], help="parts that stay as they are"
    )
    group.add_argument("--fsdp", action="store_true", help="shard weights, gradients and optimizer over the processes")
    group.add_argument("--ema", action="store_true", help="keep, validate and save an average of the weights")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group.add_argument(
        "--ema_device", choices=("cpu", "sharded"), default="sharded", help="sharded: beside the weights"
    )
    args = parser.parse_args(arguments)
    try:
        check_shared_arguments(parser, args)
        if set(args.freeze) == set(FREEZABLE_PARTS):
            raise ValueError("--freeze leaves nothing to train.")
        if args.fsdp and args.mixed_precision == "fp16":
            raise ValueError(
                "--fsdp takes --mixed_precision no or bf16: its sharded gradients are not scaled for fp16."
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    samples = load_samples(args)
    accelerator = make_accelerator(args)
    train(args, accelerator, samples)
    end_training(accelerator)


def train(args: argparse.Namespace, accelerator: Accelerator, samples: TrainingSamples) -> None:
    if args.fsdp and accelerator.num_processes == 1:
        raise ValueError("--fsdp shards over processes, and there is one. Start it with `accelerate launch`.")
    pipe = load_pipeline(args, accelerator, torch.float32)
    transformer = pipe.transformer
    base = fingerprint(accelerator, transformer)
    transformer.freeze(*args.freeze)
    logger.info(f"Training on {len(samples)} samples: {samples.task}")
    loader = make_loader(args, accelerator, samples, make_collator(args, pipe))
    flops = StepFlops(transformer)

    model: torch.nn.Module = transformer
    if args.fsdp:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        shard_model(transformer, mesh, torch.bfloat16 if accelerator.mixed_precision == "bf16" else None)
    else:
        model = accelerator.prepare(transformer.to(accelerator.device))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = accelerator.prepare_optimizer(make_optimizer(args, accelerator, transformer))
    ema = None
    # Unless it is sharded, the average is the same everywhere, and the main process validates and saves.
    if args.ema and (args.fsdp or accelerator.is_main_process):
        ema = ShardedEma(parameters, args.ema_decay, torch.device("cpu") if args.ema_device == "cpu" else None)
    validation = Validation(args, accelerator, pipe, on_every_rank=args.fsdp)
    training = Training(args, accelerator, model, optimizer, loader, flops, validation, base, ema)
    metrics = training.run()
    save(args, accelerator, pipe)
    if accelerator.is_main_process:
        discard_replaced(Path(args.output_dir))
    training.validate(int(metrics["step"]))
    if accelerator.is_main_process:
        frozen = f", all but {', '.join(args.freeze)}," if args.freeze else ""
        name = args.hub_model_id or args.output_dir
        write_card(
            args,
            f"BAGEL{frozen} trained for {metrics['step']} steps on {len(samples)} samples ({samples.task}). "
            f"{training.summary}".rstrip(),
            f'pipe = BagelPipeline.from_pretrained("{name}")',
            "from transformers_bagel import BagelForConditionalGeneration, BagelProcessor\n\n"
            f'model = BagelForConditionalGeneration.from_pretrained("{name}", subfolder="transformer")\n'
            f'processor = BagelProcessor.from_pretrained("{name}", subfolder="processor")',
            ["bagel", "any-to-any", "diffusers-training"],
            metrics,
        )
        if args.push_to_hub:
            logger.info(f"Pushed to {push(args)}")


def save(args: argparse.Namespace, accelerator: Accelerator, pipe: BagelPipeline) -> None:
    """Write the pipeline into OUTPUT_DIR, its weights gathered from all processes."""
    weights = get_model_state_dict(pipe.transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not accelerator.is_main_process:
        return
    pipe.save_config(args.output_dir)
    for name in ("vae", "scheduler", "processor"):
        getattr(pipe, name).save_pretrained(Path(args.output_dir) / name)
    pipe.transformer.save_pretrained(Path(args.output_dir) / "transformer", state_dict=weights)


if __name__ == "__main__":
    main(parse_args())
