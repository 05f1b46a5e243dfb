# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The training loop of both scripts."""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from diffusers.optimization import get_scheduler
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.optimization import get_wsd_schedule

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelDataCollator, BagelDataLoader
from transformers_bagel.errors import some
from transformers_bagel.training.losses import loss_totals

from .checkpoints import checkpoint_to_resume, delete_oldest, load_checkpoint, save_checkpoint
from .data import source_of
from .ema import ShardedEma
from .models import training_processor
from .muon import MuonWithAdamW, split_parameters
from .output import check_same_training, discard_replaced, set_aside, training_of
from .settings import check_base, compare_settings, settings_of
from .throughput import StepFlops, measured_peak
from .validation import Validation
from .watch import StepWatch, check_finite


logger = get_logger(__name__)


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """
    Accelerator, after `--seed` has been set. Nothing is written yet.

    Raises:
        ValueError, OSError: if the checkpoint to resume is none, or is of a training with other settings.
    """
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU. Take no or bf16 on the CPU.")
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is not None:
        check_same_training(output_dir, checkpoint)
        compare_settings(checkpoint, settings_of(args, accelerator.mixed_precision))
    set_seed(args.seed)
    if args.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def begin_output(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Make the output folder and its trackers, and set aside what is to be overwritten."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.overwrite_output_dir and accelerator.is_main_process:
        set_aside(output_dir)
    if args.report_to != "none":
        hidden = ("hub_token",)
        settings = {name: str(value) for name, value in vars(args).items() if name not in hidden}
        accelerator.init_trackers("bagel", config=settings)


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers and the processes' group; to be called when nothing of the model is left."""
    # Whatever holds the group keeps its threads alive into the interpreter's end. One that lets go of a tensor there
    # aborts the process, which the launcher takes for a failed training.
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def make_collator(args: argparse.Namespace, pipe: BagelPipeline) -> BagelDataCollator:
    """What learns the samples as they are."""
    timestep_shift = pipe.transformer.config.timestep_shift if args.timestep_shift is None else args.timestep_shift
    return BagelDataCollator(
        vae=pipe.vae,
        text_dropout=args.text_dropout,
        vit_dropout=args.vit_dropout,
        vae_dropout=args.vae_dropout,
        timestep_shift=timestep_shift,
        timestep_law="logit_normal" if args.weighting_scheme == "logit_normal" else "uniform",
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        noised_copies=args.noised_copies,
        next_action=args.next_action,
        **collator_settings(args, pipe),
    )


def collator_settings(args: argparse.Namespace, pipe: BagelPipeline) -> dict[str, Any]:
    """Arguments of every collator."""
    return {
        "processor": training_processor(pipe, args.resolution),
        "max_tokens": args.max_tokens,
        "cache_dir": Path(args.output_dir) / "latents" if args.cache_latents else None,
        "on_error": args.on_error,
        "return_layout": True,
        "max_positions": max_positions(pipe.transformer.config),
    }


def make_loader(
    args: argparse.Namespace, accelerator: Accelerator, samples: Any, collator: BagelDataCollator
) -> BagelDataLoader:
    """This rank's batches."""
    batch_size = args.train_batch_size
    if batch_size is None and args.max_tokens is None:
        batch_size = 1
    return BagelDataLoader(
        samples,
        collator,
        batch_size=batch_size,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
    )


def max_positions(config: BagelConfig) -> int | None:
    """Rope positions that a model knows, unless its rope is scaled to go beyond them."""
    text_config = config.get_text_config()
    return text_config.max_position_embeddings if text_config.rope_parameters["rope_type"] == "default" else None


def make_optimizer(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the arguments name, over what is trained of a model."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * (args.train_batch_size or 1) * accelerator.num_processes
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "muon":
        # Embeddings, heads and projections into the model are not layers that Muon is made for.
        outside = [name for name, _ in model.named_modules() if ".layers." not in name]
        return MuonWithAdamW(*split_parameters(model, outside), **settings)
    kind: Any = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], **settings)


def make_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The course of the learning rate. Until it falls it depends on the step alone, so that a training may be given more
    steps when it is resumed.
    """
    if args.lr_scheduler == "warmup_stable_decay":
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_decay_steps=args.lr_decay_steps,
            num_training_steps=num_steps,
            decay_type="linear",
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def number_of_steps(args: argparse.Namespace, accelerator: Accelerator, num_samples: int) -> int:
    """`--max_train_steps`, or what the epochs take."""
    if args.max_train_steps is not None:
        return args.max_train_steps
    per_step = (args.train_batch_size or 1) * args.gradient_accumulation_steps * accelerator.num_processes
    return args.num_train_epochs * math.ceil(num_samples / per_step)


@dataclass
class Training:
    """A training, ready to run.

    Attributes:
        args (`argparse.Namespace`): See `arguments.py`.
        accelerator (`Accelerator`)
        model (`nn.Module`): As it is called: wrapped for data parallel, or sharded.
        optimizer (`torch.optim.Optimizer`)
        loader (`BagelDataLoader`): This rank's batches.
        flops (`StepFlops`): Of the model.
        validation ([`Validation`]): Draws and answers with the model as it is after a step.
        base (`str`): Fingerprint of the weights that the training begins with.
        ema (`ShardedEma`, *optional*): Average of the weights.
        export (`Callable[[Path], None]`, *optional*): Writes into a checkpoint's folder what inference loads.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: BagelDataLoader
    flops: StepFlops
    validation: Validation
    base: str
    ema: ShardedEma | None = None
    export: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        self.output_dir = Path(self.args.output_dir)
        self.watch = StepWatch(self.args.max_nonfinite_steps)
        self.training = uuid.uuid4().hex
        # The newest checkpoint, until a later step has shown that its weights are good.
        self.newest: Path | None = None

    def run(self) -> dict[str, float]:
        """
        Train to the last step, and return its number and metrics; the model has then its averaged weights. The last
        validation is left to do when they have been saved.

        Raises:
            FloatingPointError: if too many steps in a row are not finite, or if weights are not.
        """
        args, accelerator = self.args, self.accelerator
        num_steps = number_of_steps(args, accelerator, len(self.loader.dataset))
        self.scheduler = make_scheduler(args, self.optimizer, num_steps)
        peak = args.peak_tflops * 1e12 if args.peak_tflops else measured_peak(accelerator.device, self._dtype())
        step = start_step = self._resume()
        batches = iter(self.loader)
        self.model.train()
        if step < num_steps:
            # A model or data that cannot be used leave nothing behind.
            batches = itertools.chain([next(batches)], batches)
        begin_output(args, accelerator)
        logs: dict[str, float] = {}
        is_due, num_updates = False, 0
        progress = tqdm(total=num_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
        while step < num_steps:
            start = time.perf_counter()
            micro_batches, names = self._next(batches)
            logs = self.update(micro_batches)
            step += 1
            progress.update()
            seconds = time.perf_counter() - start
            logs |= self._throughput(micro_batches, seconds, peak)
            progress.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['lr']:.1e}")
            if step % args.logging_steps == 0:
                accelerator.log(logs, step=step)
                logger.info(f"step {step}: " + ", ".join(f"{name} {value:.6g}" for name, value in logs.items()))
            is_due |= step % args.checkpointing_steps == 0
            if self.is_good(step, logs, names, seconds):
                num_updates += 1
                self._keep_newest()
                if is_due:
                    self._save(step)
                    is_due = False
            if step < num_steps and args.validation_steps and step % args.validation_steps == 0:
                self.validate(step)
        progress.close()
        if step > start_step and not num_updates:
            raise FloatingPointError(f"None of the {step - start_step} steps was finite: nothing was learned.")
        if self.ema is not None:
            self.ema.copy_to_model()
            self.ema = None
        check_finite(self._trained(), "The trained model is not saved")
        self._keep_newest()
        self.summary = self._summary()
        logger.info(f"End of the training. {self.summary or 'Nothing was left out.'}")
        return {"step": step} | logs

    def _next(self, batches: Iterator[BatchFeature]) -> tuple[list[BatchFeature], list[str]]:
        """The micro-batches of a step, and the names of their samples."""
        micro_batches: list[BatchFeature] = []
        names: list[str] = []
        for _ in range(self.args.gradient_accumulation_steps):
            micro_batches.append(next(batches).to(self.accelerator.device))
            names += self.loader.names
        return micro_batches, names

    def update(self, micro_batches: list[BatchFeature]) -> dict[str, float]:
        """One update, by the loss of the global batch: of all micro-batches of all ranks. None if that is not finite."""
        args, accelerator = self.args, self.accelerator
        own: Any = sum(loss_totals(batch, args.loss_reduction) for batch in micro_batches)
        totals, num_ranks = accelerator.reduce(own, "sum"), accelerator.num_processes
        sums = torch.zeros(3, device=accelerator.device)
        for index, batch in enumerate(micro_batches):
            with self._gradient_sync(index == len(micro_batches) - 1), accelerator.autocast(), self._sdpa_backend():
                outputs = self.model(**batch, loss_totals=totals)
                # Data parallel takes the mean of the ranks' gradients, where the sum is meant.
                accelerator.backward(num_ranks * outputs.loss)
            sums += torch.stack([outputs.loss, outputs.ce_loss, outputs.mse_loss]).detach()
        norm = self._clip_gradients()
        # The only values that are read back from the device, the same on all ranks.
        losses = num_ranks * accelerator.reduce(sums, "mean")
        loss, ce_loss, mse_loss, grad_norm = torch.cat([losses, norm.to(losses).view(1)]).tolist()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {
            "loss": loss,
            "ce_loss": ce_loss,
            "mse_loss": mse_loss,
            "grad_norm": grad_norm,
            "lr": self.scheduler.get_last_lr()[0],
        }

    def is_good(self, step: int, logs: dict[str, float], names: list[str], seconds: float) -> bool:
        """Whether a step had an update; if it should have had one, that is noted."""
        if math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"]):
            self.watch.good()
            return True
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(logs["loss"]) and scaler.get_scale() >= 1:
            # float16 finds its scale by gradients that overflow.
            return False
        check_finite(self._trained(), f"Step {step} has the loss {logs['loss']:.4g}, since the weights are broken")
        self.watch.bad(step, logs, names, seconds)
        return False

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _summary(self) -> str:
        """What was left out, of all ranks; empty if nothing was."""
        skipped = gather_object([item.name for item in self.loader.collator.skipped])
        parts = []
        if skipped:
            parts.append(f"Samples left out: {len(skipped)} ({some(skipped)}).")
        if self.watch.num_steps:
            parts.append(f"Steps that were not finite: {self.watch.num_steps}, {self.watch.seconds:.1f} s.")
        return " ".join(parts)

    def _gradient_sync(self, last: bool) -> AbstractContextManager:
        # Sharded gradients are reduced each time: kept whole until the last, they would fill the device.
        if last or isinstance(self.model, FSDPModule):
            return nullcontext()
        return self.accelerator.no_sync(self.model)

    def _sdpa_backend(self) -> AbstractContextManager:
        if self.args.sdpa_backend is None:
            return nullcontext()
        return sdpa_kernel(SDPBackend.__members__[self.args.sdpa_backend.upper()])

    def _clip_gradients(self) -> torch.Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _throughput(self, micro_batches: list[BatchFeature], seconds: float, peak: float) -> dict[str, float]:
        tokens = sum(int((batch["layout"].document_ids >= 0).sum()) for batch in micro_batches)
        flops = sum(self.flops(batch["layout"]) for batch in micro_batches)
        # float32, since not every device has float64; these are for the eye.
        work = torch.tensor([tokens, flops], dtype=torch.float32, device=self.accelerator.device)
        tokens, flops = self.accelerator.reduce(work, "sum").tolist()
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (peak * self.accelerator.num_processes),
        }

    def _dtype(self) -> torch.dtype:
        mixed = {"fp16": torch.float16, "bf16": torch.bfloat16}
        return mixed.get(self.accelerator.mixed_precision, next(self.model.parameters()).dtype)

    def _save(self, step: int) -> None:
        own_state = {
            "step": step,
            "loader": self.loader.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "watch": self.watch.state_dict(),
        }
        settings = settings_of(self.args, self.accelerator.mixed_precision)
        settings |= {"training": self.training, "base": self.base}
        self.newest = save_checkpoint(
            self.accelerator,
            self.output_dir,
            step,
            self.model,
            self.optimizer,
            own_state,
            settings,
            self.export,
        )

    def _keep_newest(self) -> None:
        """Delete what the newest checkpoint replaces: the oldest beyond the limit, and an overwritten training."""
        if self.newest is not None and self.accelerator.is_main_process:
            if self.args.checkpoints_total_limit:
                delete_oldest(self.newest, self.args.checkpoints_total_limit)
            discard_replaced(self.output_dir)
        self.newest = None

    def _resume(self) -> int:
        path = checkpoint_to_resume(self.args)
        if path is None:
            if self.args.resume_from_checkpoint:
                logger.info(f"There is no checkpoint in {self.output_dir}: starting from the beginning.")
            return 0
        check_base(path, self.base)
        # The optimizer's and the schedule's settings are this training's, not the checkpoint's.
        groups = [dict(group, params=None) for group in self.optimizer.param_groups]
        own_state = load_checkpoint(self.accelerator, path, self.model, self.optimizer)
        self.training = training_of(path) or self.training
        saved, count = own_state["loader"]["num_samples"], len(self.loader.dataset)
        if saved != count:
            raise ValueError(
                f"'{path}' was written with {saved} samples, but this training has {count} of "
                f"{source_of(self.args)}: its place in the data would be another. Pass the same data, "
                "--max_train_samples and --repeats to go on, or begin a training in another --output_dir."
            )
        self.loader.load_state_dict(own_state["loader"])
        self.scheduler.load_state_dict(own_state["scheduler"] | {"base_lrs": self.scheduler.base_lrs})
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            group |= {name: value for name, value in own.items() if name != "params"}
        # What is left of the course may be another than it was when the rates were saved.
        rates = [
            base * factor(self.scheduler.last_epoch)
            for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.ema is not None:
            if own_state["ema"] is None:
                raise ValueError(f"'{path}' holds no average of the weights. Go on without --ema, as it was begun.")
            self.ema.load_state_dict(own_state["ema"])
        # Those of earlier versions have none.
        self.watch.load_state_dict(own_state.get("watch", {}))
        return own_state["step"]

    def validate(self, step: int) -> None:
        """Validate with the averaged weights, without a trace in the training's random numbers."""
        if not self.validation.is_wanted:
            return
        devices = [] if self.accelerator.device.type == "cpu" else [self.accelerator.device]
        averaged = nullcontext() if self.ema is None else self.ema.in_model()
        self.model.eval()
        with torch.random.fork_rng(devices), averaged:
            self.validation(step)
        if isinstance(self.model, FSDPModule):
            # Without a backward the outermost weights stay gathered, and the next step would take the average's.
            self.model.reshard()
        self.model.train()
        self.accelerator.wait_for_everyone()
