"""What `test_distributed.py` starts in two processes: `worker.py MODE`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import MagCacheConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor


ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "examples")]

from bagel_training.models import empty_model  # noqa: E402
from bagel_training.parallel import shard_model  # noqa: E402

from diffusers_bagel import BagelPipeline  # noqa: E402
from diffusers_bagel.loading import load_original_vae  # noqa: E402
from tests.conftest import CHECKPOINT, golden_image, load_model, load_processor, turn  # noqa: E402
from transformers_bagel import BagelDataCollator, PrefixCache, SplitPrefixCache, loss_totals  # noqa: E402


def samples_of_ranks() -> list[list[list[dict]]]:
    """For each step what each rank gets; the ranks differ in what they lack."""
    square, wide = golden_image("square"), golden_image("wide")
    draw = {"messages": [turn("user", "a red circle"), turn("assistant", square)]}
    edit = {"messages": [turn("user", square, "make it green"), turn("assistant", square)]}
    look = {"messages": [turn("user", wide, "how many shapes?"), turn("assistant", "three shapes, I think")]}
    talk = {"messages": [turn("user", "hello"), turn("assistant", "hi")]}
    return [
        [[draw, edit, look], [look, draw]],
        [[draw, edit], [look]],
        [[talk], [edit]],
        [[talk], [look, talk]],
        [[talk], [talk, talk]],
    ]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare_training(mode: str) -> None:
    """Losses and gradients of two processes against those of one for the same global batch."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    collator = BagelDataCollator(load_processor(), vae=load_original_vae(CHECKPOINT))
    reference, trained = load_model().train(), load_model().train()
    if mode == "fsdp":
        if rank > 0:
            # Only the first process reads the weights of a sharded model.
            trained = empty_model(str(CHECKPOINT)).train()
            assert all(parameter.is_meta for parameter in trained.parameters())
        model = shard_model(trained, init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    else:
        model, optimizer = accelerator.prepare(trained, torch.optim.SGD(trained.parameters(), lr=0.0))
    for step, samples in enumerate(samples_of_ranks()):
        encoded = [
            [collator.encode(sample, seed=100 * step + 10 * owner + index) for index, sample in enumerate(own)]
            for owner, own in enumerate(samples)
        ]
        batch = collator.pack(encoded[0] + encoded[1])
        expected = reference(**batch, loss_totals=loss_totals(batch))
        reference.zero_grad()
        expected.loss.backward()

        optimizer.zero_grad()
        own = collator.pack(encoded[rank])
        outputs = model(**own, loss_totals=accelerator.reduce(loss_totals(own), "sum"))
        accelerator.backward(accelerator.num_processes * outputs.loss)
        for name in ("loss", "ce_loss", "mse_loss"):
            total = accelerator.reduce(getattr(outputs, name).detach(), "sum")
            assert abs(float(total - getattr(expected, name))) <= 1e-5, (step, name, total, getattr(expected, name))
        ours = dict(trained.named_parameters())
        for name, parameter in reference.named_parameters():
            grad = ours[name].grad
            assert grad is not None, (step, name)
            error = float((full(grad) - parameter.grad).abs().max())
            assert error <= 1e-5, (step, name, error)


def compare_tensor_parallel() -> None:
    """Everything that a model split over two processes computes, against the whole one."""
    torch.distributed.init_process_group("gloo")
    whole, split = load_model(), load_model(tp_plan="auto")
    suffixes = [f"{name}_proj{expert}" for name in "qkvo" for expert in ("", "_moe_gen")]
    layer = split.model.language_model.layers[0]
    weights = {name: getattr(layer.self_attn, name).weight for name in suffixes}
    weights |= {
        f"{mlp}.{name}_proj": getattr(getattr(layer, mlp), f"{name}_proj").weight
        for mlp in ("mlp", "mlp_moe_gen")
        for name in ("gate", "up", "down")
    }
    for name, weight in weights.items():
        assert isinstance(weight, DTensor) and weight.to_local().numel() * 2 == weight.numel(), name
    collator = BagelDataCollator(load_processor(), vae=load_original_vae(CHECKPOINT), vae_sample_mode="argmax")
    batch = collator.pack([collator.encode(sample, seed=3) for sample in samples_of_ranks()[0][0]])
    with torch.no_grad():
        expected, outputs = whole(**batch), split(**batch)
    for name in ("logits", "velocity"):
        assert_near(name, full(getattr(outputs, name)), getattr(expected, name))

    for model in (whole, split):
        model(**batch).loss.backward()
    gradients = dict(split.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            assert_near(name, full(gradients[name].grad), parameter.grad)

    question = load_processor()(text="how many shapes?", return_tensors="pt")
    for cache in ("dynamic", "static"):
        texts = [
            model.generate(**question, max_new_tokens=8, do_sample=False, cache_implementation=cache)
            for model in (whole, split)
        ]
        assert torch.equal(*texts), cache
    assert_near("denoised", denoised(split), denoised(whole))
    for task in ({}, {"image": golden_image("wide")}):
        assert_near("pipeline", drawn(split, **task), drawn(whole, **task))


def compare_context_split() -> None:
    """Denoising steps and drawings whose latents are split over two processes, against those of one."""
    torch.distributed.init_process_group("gloo")
    model = load_model()
    group = torch.distributed.group.WORLD
    computed = []
    expert = model.model.language_model.layers[0].mlp_moe_gen
    expert.register_forward_pre_hook(lambda module, args: computed.append(len(args[0])))
    # The second has one token more in the first process, and the third has no token in the second one.
    for grid, own in (((3, 4), (6, 6)), ((3, 5), (8, 7)), ((1, 1), (1, 0))):
        expected = denoised(model, grid)
        found = denoised(model, grid, lambda views, length: SplitPrefixCache(views, [length], group))
        assert_near(str(grid), found, expected)
        assert computed[-2:] == [grid[0] * grid[1], own[group.rank()]]
    edit = {"image": golden_image("wide")}
    tasks = ({}, edit, {"height": 48, "width": 80}, {"taylorseer": True}, {"mag": True})
    for task in (*tasks, edit | {"guidance_tolerance": 0.05}):
        assert_near(str(task), drawn(model, group, **task), drawn(model, **task))


def assert_near(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((actual - expected).abs().max())
    print(f"{name}: {error:.1e}")
    assert actual.shape == expected.shape and error <= 1e-5, (name, error)


@torch.no_grad()
def denoised(model: torch.nn.Module, grid: tuple[int, int] = (3, 4), make_cache: Any = None) -> torch.Tensor:
    """Velocity of a denoising step after a prompt."""
    prompt = torch.arange(5, 12).unsqueeze(0)
    length = grid[0] * grid[1]
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    if make_cache is not None:
        cache = make_cache(PrefixCache.from_cache(cache, scratch=length + 2).views, length)
    return model(
        latents=torch.linspace(-1, 1, length * model.config.latent_dim).view(length, -1),
        latent_grid_hw=torch.tensor([grid]),
        timesteps=torch.tensor([0.7]),
        position_ids=torch.tensor([7]),
        past_key_values=cache,
    ).velocity


def drawn(
    model: torch.nn.Module, group: Any = None, taylorseer: bool = False, mag: bool = False, **task: Any
) -> torch.Tensor:
    """Pictures of a batch of two, `(2, 3, height, width)`, in five steps."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=load_processor())
    pipe.set_progress_bar_config(disable=True)
    if group is not None:
        pipe.enable_context_split(group)
    if taylorseer:
        pipe.enable_taylorseer(warmup_steps=2)
    if mag:
        pipe.enable_cache(MagCacheConfig(threshold=1.0, num_inference_steps=5, mag_ratios=[1.0] * 5))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    if "image" in task:
        task["image"] = [[task["image"]]] * 2
    else:
        task = {"height": 64, "width": 64} | task
    out = pipe(
        ["a red circle", "make it green"], num_inference_steps=5, generator=generators, output_type="pt", **task
    )
    return out.images


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1] == "tp":
        compare_tensor_parallel()
    elif sys.argv[1] == "split":
        compare_context_split()
    else:
        compare_training(sys.argv[1])
    # See `end_training` of the examples.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
