"""What a denoising step of the pipeline allocates, waits for, and makes anew."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.transformers_bagel.test_cache import allocated
from transformers_bagel import BagelModel


def test_a_guided_step_allocates_the_same_for_a_longer_prompt(pipe, monkeypatch):
    bytes_of_steps = {}
    predict = pipe._predict_velocity

    # Above the block size of the attention kernel, whose scratch space grows up to it.
    for words in (1000, 3000):
        steps: list[int] = []

        def measured(*args, steps=steps):
            result = []
            steps.append(allocated(lambda: result.append(predict(*args))))
            return result[0]

        monkeypatch.setattr(pipe, "_predict_velocity", measured)
        pipe("a " * words, height=32, width=32, num_inference_steps=3, output_type="latent")
        bytes_of_steps[words] = steps[-2]
    # Tokens, keys and values, layers, heads, head_dim, float32.
    prefix_bytes = 2000 * 2 * 3 * 2 * 16 * 4
    assert bytes_of_steps[3000] - bytes_of_steps[1000] < 0.01 * prefix_bytes


class Reads(TorchDispatchMode):
    """Counts the values of tensors that the host asks for: each makes it wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("taylorseer", [False, True])
def test_between_steps_the_host_reads_noise_levels_only(pipe, taylorseer, monkeypatch):
    # As on a GPU, where this is asked for behind the last step. On a CPU nothing waits for it.
    monkeypatch.setattr(pipe, "_check_finite", lambda *args: None)
    if taylorseer:
        pipe.enable_taylorseer(interval=2, warmup_steps=2)
    counts = []
    with Reads() as reads:
        pipe(
            ["a red circle", "blue"],
            height=32,
            width=32,
            num_inference_steps=9,
            cfg_interval=(0.0, 1.0),
            output_type="latent",
            callback_on_step_end=lambda pipe, step, timestep, kwargs: counts.append(reads.count) or {},
        )
    pipe.disable_taylorseer()
    # Whether guidance is on, which each image asks of its level; that lies on the CPU.
    assert set(numpy.diff(counts)) == {2}


def test_what_steps_share_is_made_once(pipe, monkeypatch):
    made = []
    blocks = BagelModel._blocks
    monkeypatch.setattr(BagelModel, "_blocks", lambda self, *args: made.append(1) or blocks(self, *args))
    pipe("a red circle", height=32, width=32, num_inference_steps=9, cfg_interval=(0.5, 1.0), output_type="latent")
    # With guidance, and without.
    assert len(made) == 2
