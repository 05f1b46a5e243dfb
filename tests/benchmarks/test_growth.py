"""The cost model counts what is computed, the curves are measured beside it, and the pages say what the commands print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import load_model
from transformers_bagel import BagelConfig


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "growth.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def counted(call) -> tuple[int, int]:
    """Operations of linear layers, and of batched products: the attention's, as its kernels have no formula on a CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    operations = counter.get_flop_counts()["Global"]
    assert set(operations) <= {aten.mm, aten.addmm, aten.bmm}
    return operations.get(aten.mm, 0) + operations.get(aten.addmm, 0), operations.get(aten.bmm, 0)


@pytest.mark.parametrize(("images", "prefix"), [(1, 0), (1, 7), (3, 20)])
def test_operations_of_a_denoising_step(images, prefix):
    import cost
    import growth

    model = load_model()
    run = growth.denoise(model, 16, images=images, prefix=prefix)
    assert sum(counted(run.call)) == run.cost.operations
    assert run.cost.attention == images * 18 * (18 + prefix) * cost.operations_per_pair(model.config)


def test_operations_of_a_prefill_and_of_decoding():
    import cost
    import growth

    model = load_model()
    # Without a kernel that skips what a token does not see.
    expected = cost.prefill(model.config, 24, 24 * 24, itemsize=4)
    assert sum(counted(growth.prefill(model, 24).call)) == expected.operations

    ids = growth.random_ids(3, 1)
    cache = growth.filled_cache(model.config, 9, batch=3)
    products, batched = counted(lambda: model(input_ids=ids, past_key_values=cache))
    assert products + batched == cost.decode(model.config, 9, 3, itemsize=4).operations


def test_operations_of_training():
    import growth

    model = load_model()
    run = growth.training(model, 16)
    products, batched = counted(run.call)
    assert products == run.cost.products
    # Nothing is computed again here.
    assert batched == run.cost.attention * 3 / 3.5


def test_operations_of_the_tower():
    import cost

    model = load_model()
    pixels = torch.randn(12, model.model.vision_tower.patch_dim)
    with torch.no_grad():
        operations = sum(counted(lambda: model.get_image_features(pixels, torch.tensor([[3, 4]]))))
    assert operations == cost.vision(model.config, 12).operations


def test_bytes_are_those_of_the_tensors():
    import cost
    import growth

    model = load_model()
    cache = growth.filled_cache(model.config, 11)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cost.decode(model.config, 11, 1, itemsize=4).cache_bytes
    layers = model.model.language_model.layers
    weights = [
        weight for name, weight in layers.named_parameters() if name.endswith("proj.weight") and "_moe_gen" not in name
    ]
    expected = sum(weight.nbytes for weight in [*weights, model.lm_head.weight])
    assert cost.decode(model.config, 0, 1, itemsize=4).weight_bytes == expected


def test_the_peak_of_tensors_is_counted():
    import growth

    def call() -> None:
        for _ in range(2):
            torch.empty(1000).add(torch.empty(1000))

    assert growth.peak_of_tensors(call) == 3 * 4000


def test_exponents_are_slopes_of_logarithms():
    import growth

    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth.exponent([0, 1, 2], [100, 5, 10]) == pytest.approx(1)


def test_curves_are_measured_drawn_and_drawn_again(tmp_path, capsys):
    import growth

    arguments = ["--width", "golden", "--longest", "1024", "--repeats", "1"]
    growth.main([*arguments, "--output", str(tmp_path / "small")])
    figures = json.loads((tmp_path / "small.json").read_text())
    assert len(figures["curves"]) == len(growth.curves())
    assert all(value > 0 for value in figures["rates"].values())
    steps, *_, training = figures["curves"]
    assert [point["value"] for point in steps["points"]] == [64, 256, 1024]
    assert all(point["peak_bytes"] > 0 and point["seconds"] > 0 for point in training["points"])
    printed = capsys.readouterr().out
    growth.main(["--drawn-from", str(tmp_path / "small.json"), "--output", str(tmp_path / "again")])
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "small.png").read_bytes()


def test_the_page_shows_the_figures_beside_it():
    import cost
    import growth
    from models import make_config

    figures = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))
    assert figures["width"] == "middle"
    for part in (growth.table(figures), growth.rates_line(figures["rates"]), growth.agreement(figures)):
        assert part in PAGE
    assert f"{cost.tokens_of_equal_cost(make_config('middle')):,.0f} keys in this width" in PAGE


def test_the_page_shows_the_estimates():
    import cluster

    page = (RESULTS / "gpus.md").read_text(encoding="utf-8")
    for part in cluster.tables(BagelConfig()):
        assert part in page
