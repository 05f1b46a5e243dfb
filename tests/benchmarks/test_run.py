"""The benchmarks of speed measure what their table says, beside a floor that is the same computation's."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CompileConfig

from tests.processes import CONTEXT


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_repeats_the_products_and_attentions_of_a_run(backward):
    from floor import Attention, Product, floor_of, recording

    layer = nn.Linear(8, 4)
    states = torch.randn(1, 2, 5, 4)
    with recording(layer) as calls:
        layer(torch.randn(2, 3, 8))
        functional.scaled_dot_product_attention(states, states, states)
        layer(torch.randn(0, 8))
    assert calls == [Product(6, layer, "none"), Attention(((1, 2, 5, 4),) * 3, {})]

    run = floor_of(calls, torch.float32, torch.device("cpu"), backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::mm"] == (3 if backward else 1)
    assert counts["aten::scaled_dot_product_attention"] == 1
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu_backward" in counts) == backward


@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_repeats_convolutions(backward):
    from floor import Convolution, floor_of, recording

    layer = nn.Conv2d(3, 4, 3, padding=1)
    with recording(layer) as calls:
        layer(torch.randn(1, 3, 8, 8))
    assert calls == [Convolution((1, 3, 8, 8), layer)]
    run = floor_of(calls, torch.float32, torch.device("cpu"), backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::convolution"] == 1
    assert ("aten::convolution_backward" in counts) == backward
    assert layer.weight.grad is None


def test_functions_take_turns_after_a_call_to_warm_up():
    from timing import seconds_of

    called = []
    first, second = seconds_of((lambda: called.append(1), lambda: called.append(2)), 3, torch.device("cpu"))
    assert called == [1, 2] * 4
    assert len(first) == len(second) == 3


def kind(case) -> tuple:
    """What decides which code a case runs: its function, its switches, and whether its numbers are one."""
    settings = case.make.keywords
    return case.make.func, *(
        (name, value if isinstance(value, bool) or name == "branches" else value > 1)
        for name, value in settings.items()
    )


@pytest.mark.slow
def test_every_kind_of_case_runs_at_the_golden_size(monkeypatch):
    import cases
    from models import make_pipeline

    # The compiler itself takes a minute; what it is given is traced here, too.
    monkeypatch.setattr(cases, "CompileConfig", partial(CompileConfig, backend="eager"))
    found = list(cases.cases())
    assert len({(case.group, case.name) for case in found}) == len(found)
    kinds = {kind(case): case for case in reversed(found)}
    assert {case.group for case in kinds.values()} == {case.group for case in found}
    for case in kinds.values():
        work = case.make(make_pipeline("golden", torch.float32, torch.device("cpu")))
        work.run()
        work.floor()
        assert work.count > 0, case.name


@pytest.mark.slow
def test_a_case_is_measured_in_a_process_of_its_own_and_written(tmp_path, monkeypatch, capsys):
    import run

    monkeypatch.setattr(run.multiprocessing, "get_context", lambda method: CONTEXT)
    file = tmp_path / "figures.json"
    arguments = ["--widths", "golden", "--dtypes", "bfloat16", "--groups", "denoise", "--repeats", "2"]
    run.main([*arguments, "--only", "256 px, 1", "--threads", "1", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["threads"] == 1 and written["torch"] == torch.__version__
    (row,) = written["rows"]
    assert (row["width"], row["dtype"], row["unit"]) == ("golden", "bfloat16", "step")
    assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    assert row["rate"] == pytest.approx(1 / row["seconds"])
    # The interpreter and the libraries alone take more than this.
    assert row["peak_bytes"] > 100 * 2**20
    assert "text to image, 256 px, 1 branch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--only", "no such case"], ["--repeats", "0"], ["--widths", "wide"]], ids=lambda words: words[0]
)
def test_bad_arguments_are_named(arguments, capsys):
    import run

    with pytest.raises(SystemExit):
        run.main(arguments)
    assert arguments[0] in capsys.readouterr().err
