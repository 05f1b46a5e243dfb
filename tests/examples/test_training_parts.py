"""Parts of the scripts by themselves: checkpoints with a scaler, and the count of operations."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bagel_training.checkpoints import load_checkpoint, save_checkpoint
from bagel_training.throughput import StepFlops
from torch import nn

from tests.conftest import load_model, training_samples


def trained(accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer and an optimizer after one step of float16's scaling."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    layer = nn.Linear(3, 3)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(layer.parameters()))
    accelerator.backward(layer(torch.ones(3)).sum())
    optimizer.step()
    optimizer.zero_grad()
    return layer, optimizer


def test_the_scaler_of_float16_is_saved_and_left_alone(tmp_path):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    layer, optimizer = trained(accelerator)
    optimizer.scaler.update(16.0)
    save_checkpoint(accelerator, tmp_path, 1, layer, optimizer, {}, None, None)
    resumed, fresh_optimizer = nn.Linear(3, 3), torch.optim.AdamW
    fresh = accelerator.prepare_optimizer(fresh_optimizer(resumed.parameters()))
    accelerator.scaler = torch.amp.GradScaler("cpu")
    fresh.scaler = accelerator.scaler
    load_checkpoint(accelerator, tmp_path / "checkpoint-1", resumed, fresh)
    assert accelerator.scaler.state_dict()["scale"] == 16.0
    assert torch.equal(resumed.weight, layer.weight)
    assert fresh.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("frozen", [(), ("vit",), ("vit", "connector", "und"), ("gen",)])
def test_operations_are_those_of_the_products(frozen, collate):
    model = load_model()
    model.freeze(*frozen)
    batch = collate(return_layout=True)(training_samples("edit", "look"))
    counted = 0

    def count(module: nn.Linear, args: tuple, output: torch.Tensor) -> None:
        nonlocal counted
        product = 2 * args[0].numel() * module.out_features
        # Backward: one for what goes on, if it came with a graph, and one for the weights.
        counted += product * (1 + (output.requires_grad and args[0].requires_grad) + module.weight.requires_grad)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "time_embedder" not in name:
            module.register_forward_hook(count)
    model(**batch, skip_logits=True)
    flops = StepFlops(model)
    attention = flops.attention * batch["document_ids"][0].bincount().square().sum()
    # The first layers of all have nothing before them that a gradient could go to.
    assert float(flops(batch["layout"]) - attention) == pytest.approx(counted, rel=0.06)
