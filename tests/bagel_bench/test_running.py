"""Pictures depend on their prompts and on the settings of the run, and on nothing else; none is lost or drawn twice."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bagel_bench import read_pictures, running
from bagel_bench.folder import RunFolder
from bagel_cli import main
from diffusers_bagel import PRESETS, BagelPipeline
from diffusers_bagel.few_steps import FewSteps
from tests.bagel_bench.conftest import (
    GENEVAL,
    pictures_of,
    records_of,
    run_bench,
    write_image,
    write_json,
    write_lines,
)
from tests.conftest import CHECKPOINT
from tests.processes import ROOT, run_script


PROMPTS = [
    GENEVAL[0] | {"prompt": f"a picture of {name}"} for name in ("a cat", "two dogs", "rain", "snow", "the sea")
]


@pytest.fixture(scope="module")
def geneval(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def finished(saved, geneval, tmp_path_factory) -> Path:
    """The folder of one process, one picture at a time, without an interruption."""
    out = tmp_path_factory.mktemp("run") / "alone"
    assert run_bench(saved, "geneval", geneval, out, "--samples", "2") == 0
    return out


@pytest.fixture(scope="module")
def alone(finished) -> dict[str, bytes]:
    return pictures_of(finished)


def run_as(monkeypatch, rank: int, count: int) -> None:
    """Go on as a process of `accelerate launch`."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def drawn_once(folder) -> bool:
    counts = Counter(record["file"] for record in records_of(folder))
    return set(counts.values()) == {1}


def test_batches_change_no_byte(alone, bench, geneval, tmp_path):
    assert bench("geneval", geneval, "many", "--samples", "2", "--batch-size", "8")[0] == 0
    assert len(alone) == 5 * 3 and pictures_of(tmp_path / "many") == alone


@pytest.mark.parametrize("size", ["1", "2"])
def test_on_a_cpu_each_picture_has_one_core_of_however_many(size, bench, geneval, monkeypatch):
    call, cores, before = BagelPipeline.__call__, [], torch.get_num_threads()

    def counted(self, *args, **kwargs):
        cores.append(torch.get_num_threads())
        return call(self, *args, **kwargs)

    monkeypatch.setattr(BagelPipeline, "__call__", counted)
    try:
        torch.set_num_threads(2)
        assert bench("geneval", geneval, "out", "--samples", "1", "--batch-size", size)[0] == 0
        assert set(cores) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_edits_and_plans_are_the_same_in_batches(saved, tmp_path):
    write_image(tmp_path / "1.png")
    row = {"category": "causal", "instruction": "make it red", "image": "1.png"}
    prompts = write_json(tmp_path / "rise.json", [row | {"index": f"causal_{number}"} for number in range(4)])
    pictures, _ = read_pictures("rise", prompts)
    settings = {"preset": "rise", "num_inference_steps": 2, "max_think_tokens": 12}
    pipe = BagelPipeline.from_pretrained(saved)
    for out, at_once in (("one", 1), ("many", 8)):
        folder = RunFolder(tmp_path / out)
        with folder.opened({}):
            running.Run(pipe, folder, settings, seed=0, skips=False).draw(pictures, at_once)
    assert pictures_of(tmp_path / "one") == pictures_of(tmp_path / "many")
    one, many = ({record["file"]: record["plans"] for record in records_of(tmp_path / out)} for out in ("one", "many"))
    assert one == many and len({plan for (plan,) in one.values()}) == 4


def test_processes_share_the_pictures_and_the_last_one_reports(alone, bench, geneval, tmp_path, monkeypatch):
    for rank in (1, 0):
        run_as(monkeypatch, rank, 2)
        code, printed, _ = bench("geneval", geneval, "two", "--samples", "2")
        assert code == 0 and (tmp_path / "two" / "report.json").exists() == (rank == 0) == bool(printed)
    assert pictures_of(tmp_path / "two") == alone and drawn_once(tmp_path / "two")
    assert len(records_of(tmp_path / "two")) == 10


@pytest.mark.slow
def test_two_processes_at_the_same_time(alone, geneval, saved, tmp_path):
    arguments = ["--prompts", str(geneval), "--out", str(tmp_path / "two"), "--model", saved, "--samples", "2"]
    quick = ["--steps", "2", "--dtype", "float32", "--no-think"]
    script = ROOT / "src" / "diffusers_bagel" / "__main__.py"
    printed = run_script(script, "bench", "geneval", *arguments, *quick, num_processes=2)
    assert "10 pictures; see report.json" in printed
    assert pictures_of(tmp_path / "two") == alone and drawn_once(tmp_path / "two")


@pytest.mark.parametrize("size", ["1", "3"])
def test_an_interrupted_run_goes_on_where_it_was(size, alone, bench, geneval, tmp_path, monkeypatch):
    call, calls = BagelPipeline.__call__, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    arguments = ("geneval", geneval, "cut", "--samples", "2", "--batch-size", size)
    with monkeypatch.context() as patch:
        patch.setattr(BagelPipeline, "__call__", interrupted)
        assert bench(*arguments)[0] == 130
    drawn = records_of(tmp_path / "cut")
    assert 4 <= len(drawn) < 10 and not (tmp_path / "cut" / "report.json").exists()
    # What a killed process leaves: half of a picture, and half of a line.
    (tmp_path / "cut" / ".partial" / "0-1.png").write_bytes(b"half")
    with (tmp_path / "cut" / "records-0.jsonl").open("a") as stream:
        stream.write('{"file": "000\n')
    assert bench(*arguments)[0] == 0
    assert pictures_of(tmp_path / "cut") == alone
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["pictures"] == 10
    whole = [record["file"] for record in RunFolder(tmp_path / "cut").records()]
    assert len(whole) == len(set(whole)) == 10


def test_a_run_may_go_on_with_another_number_of_processes(alone, bench, geneval, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        run_as(patch, 1, 3)
        bench("geneval", geneval, "cut", "--samples", "2")
    assert len(records_of(tmp_path / "cut")) == 3
    bench("geneval", geneval, "cut", "--samples", "2")
    assert pictures_of(tmp_path / "cut") == alone and drawn_once(tmp_path / "cut")


def test_a_finished_run_draws_nothing_again(finished, saved, geneval, monkeypatch, capsys):
    monkeypatch.setattr(BagelPipeline, "__call__", lambda *args, **kwargs: pytest.fail("drawn again"))
    assert run_bench(saved, "geneval", geneval, finished, "--samples", "2") == 0
    assert "10 pictures" in capsys.readouterr().out


def test_seeds_follow_from_prompts_and_from_the_seed_of_the_run(alone, finished, bench, tmp_path):
    fewer = write_lines(tmp_path / "fewer.jsonl", PROMPTS[:2])
    bench("geneval", fewer, "fewer", "--samples", "1")
    few = pictures_of(tmp_path / "fewer")
    assert few.items() <= alone.items() and len(set(alone.values())) == 15
    bench("geneval", fewer, "other", "--samples", "1", "--seed", "1")
    assert not set(pictures_of(tmp_path / "other").values()) & {few["00000/samples/00000.png"]}
    seeds = [seed for record in records_of(finished) for seed in record["seeds"]]
    assert len(set(seeds)) == 10


def test_a_picture_is_what_the_pipeline_draws_with_the_preset(finished, saved):
    record = records_of(finished)[0]
    generator = torch.Generator().manual_seed(record["seeds"][0])
    pipe = BagelPipeline.from_pretrained(saved)
    drawn = pipe(record["prompt"], preset="geneval", num_inference_steps=2, generator=generator).images[0]
    difference = np.asarray(drawn, dtype=int) - np.asarray(Image.open(finished / "images" / record["file"]), dtype=int)
    # Here several cores may add up in another order.
    assert abs(difference).max() <= 1


def test_the_report_holds_settings_versions_and_times(finished):
    report = json.loads((finished / "report.json").read_text())
    published = json.loads(json.dumps(dict(PRESETS["geneval"].settings)))
    assert report["settings"] == published | {"preset": "geneval", "num_inference_steps": 2, "think": False}
    assert report["versions"] == running.versions() and report["device"] == "cpu" and report["dtype"] == "float32"
    assert 0 < report["time"]["pipeline_seconds"] <= report["time"]["seconds"]
    assert report["pictures"] == 10 and report["skipped"] == {}


@pytest.mark.parametrize(("asked", "steps"), [([], 3), (["--steps", "2"], 2)], ids=["its own", "asked for"])
def test_the_report_says_in_which_few_steps_a_model_drew(asked, steps, saved, tmp_path, capsys):
    pipe = BagelPipeline.from_pretrained(saved)
    pipe.transformer.config.few_steps = FewSteps(3, [1.0, 0.6, 0.3], 1.0, 1.0, 5.0).merged()
    pipe.save_pretrained(tmp_path / "model")
    prompts = write_lines(tmp_path / "prompts.jsonl", GENEVAL[:1])
    place = ["--prompts", str(prompts), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    assert main(["bench", "geneval", *place, "--samples", "1", "--dtype", "float32", *asked]) == 0
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["timestep_shift"]) == (
        steps,
        1.0,
        5.0,
    )
    assert settings.get("sigmas") == ([1.0, 0.6, 0.3] if steps == 3 else None)
    record = records_of(tmp_path / "out")[0]
    generator = torch.Generator().manual_seed(record["seeds"][0])
    drawn = BagelPipeline.from_pretrained(tmp_path / "model")(
        record["prompt"], generator=generator, **settings
    ).images[0]
    difference = np.asarray(drawn, dtype=int) - np.asarray(
        Image.open(tmp_path / "out" / "images" / record["file"]), dtype=int
    )
    assert abs(difference).max() <= 1


def test_checkpoints_differ_by_their_weights_and_not_by_their_place(tmp_path):
    same = running.checkpoint_hash(CHECKPOINT)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.name != "ema.safetensors":
            os.link(file, moved / file.name)
    weights = bytearray((CHECKPOINT / "ema.safetensors").read_bytes())
    (moved / "ema.safetensors").write_bytes(weights)
    assert running.checkpoint_hash(moved) == same
    weights[-1] ^= 1
    (moved / "ema.safetensors").write_bytes(weights)
    assert running.checkpoint_hash(moved) != same


def test_what_a_run_costs_beside_its_calls_is_measured(saved, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_overhead

    bench_overhead.main(["--model", saved, "--steps", "2", "--num", "2", "--repeats", "1"])
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("calls ") and last.startswith("median +")
