"""What a command loads on a machine of a given size, and what it says of that."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_cli import fitting, main
from bagel_cli.files import CommandError, save_picture
from diffusers_bagel.few_steps import FewSteps
from tests.conftest import CHECKPOINT, golden_image, load_model
from tests.quantization import torchao_int8
from transformers_bagel import BagelConfig


CPU = torch.device("cpu")
# By the published shapes, in bytes: to draw and to answer.
NEEDS = {
    "float32": (61.4e9, 33.2e9),
    "bfloat16": (32.2e9, 17.1e9),
    "int8": (18.8e9, 10.2e9),
    "4 bits": (13.3e9, 7.5e9),
}


@pytest.fixture
def memory(monkeypatch):
    """`memory(count)`: a machine with so many bytes free."""

    def make(count: float) -> None:
        for module in ("fitting", "information"):
            monkeypatch.setattr(f"bagel_cli.{module}.free_bytes", lambda device: int(count))

    return make


@pytest.mark.parametrize("way", fitting.possible_ways(CPU)[:-1], ids=lambda way: way.name)
def test_what_a_way_needs_follows_from_the_published_shapes(way):
    for draws, expected in zip((True, False), NEEDS[way.name], strict=True):
        assert fitting.needed_bytes(BagelConfig(), way, draws) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("gigabytes", "draws", "name"),
    [
        (128, True, "float32"),
        (40, True, "bfloat16"),
        (40, False, "float32"),
        (24, True, "int8"),
        (24, False, "bfloat16"),
        (14, True, "4 bits"),
        (14, False, "int8"),
        (8, True, "bfloat16, most of it on the disk"),
        (2, True, "bfloat16, most of it on the disk"),
    ],
)
def test_the_best_way_that_fits_is_chosen_and_said(gigabytes, draws, name, memory, capsys):
    memory(gigabytes * 1e9)
    assert fitting.choose(BagelConfig(), CPU, draws, None, low_memory=False).name == name
    said = capsys.readouterr().err
    assert f"loading in {name}: about " in said and f"of {gigabytes}.0 GB that are free" in said
    assert ("float32 would need" in said) == (name != "float32")
    assert ("more than there is" in said) == (gigabytes == 2)


def test_what_the_user_names_is_taken_and_the_estimate_is_said(memory, capsys):
    memory(20e9)
    assert fitting.choose(BagelConfig(), CPU, True, "float32", low_memory=False).dtype == torch.float32
    said = capsys.readouterr().err
    assert "float32: about 61.4 GB of 20.0 GB" in said and "--low-memory needs less" in said
    assert fitting.choose(BagelConfig(), CPU, True, None, low_memory=True).on_disk
    assert "about 5.0 GB of 20.0 GB" in capsys.readouterr().err


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"dfloat11_config": {"pattern_dict": {}}},
    ],
    ids=["bitsandbytes", "DFloat11"],
)
def test_quantised_weights_stay_as_they_are(settings, low_memory, memory, capsys):
    memory(10e9)
    way = fitting.choose(BagelConfig(**settings), CPU, True, None, low_memory)
    assert way.layer_bytes is None and not way.on_disk
    said = capsys.readouterr().err
    assert "quantised already" in said and ("--low-memory changes nothing" in said) == low_memory


@pytest.mark.parametrize("packing", ["none", "FP8", "GGUF"])
def test_packed_weights_are_not_rounded_again(packing, memory, tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "repo")
    if packing == "FP8":
        tensors = load_file(folder / "ema.safetensors")
        rounded = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items() if "_proj.weight" in name}
        save_file(tensors | rounded, folder / "ema.safetensors")
    if packing == "GGUF":
        (folder / "ema.safetensors").unlink()
        (folder / "bagel.gguf").write_bytes(b"GGUF")
    config = BagelConfig.from_pretrained(CHECKPOINT)
    packed = fitting.are_packed(str(folder), {}, config)
    assert packed == (packing != "none")
    memory(15e9)
    way = fitting.choose(BagelConfig(), CPU, True, None, False, packed)
    assert (way.on_disk, way.name == "4 bits") == (packed, not packed)


def test_free_memory_is_that_of_this_process(monkeypatch):
    whole = fitting.free_bytes(CPU)
    assert 0 < whole <= psutil.virtual_memory().total
    limit = psutil.Process().memory_info().vms + 10**8
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert 0 < fitting.free_bytes(CPU) < min(whole, 2 * 10**8)


@pytest.mark.parametrize(
    ("folder", "limit", "usage", "stat"),
    [
        ("", "memory.max", "memory.current", "anon 10000000\ninactive_file 80000000\n"),
        (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "inactive_file 0\ntotal_inactive_file 80000000\n",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_files_that_the_system_keeps_in_memory_count_as_free(folder, limit, usage, stat, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "CONTROL_GROUP", tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / limit).write_text("100000000\n")
    (tmp_path / folder / usage).write_text("90000000\n")
    assert fitting.free_bytes(CPU) == 10**7
    (tmp_path / folder / "memory.stat").write_text(stat)
    assert fitting.free_bytes(CPU) == 9 * 10**7


def test_free_memory_is_known_where_there_are_no_limits_of_processes(monkeypatch):
    # As on Windows, which has no module of that name.
    monkeypatch.setitem(sys.modules, "resource", None)
    assert not hasattr(fitting, "resource")
    assert 0 < fitting.free_bytes(CPU) <= psutil.virtual_memory().total


def test_the_help_of_low_memory_says_what_drawing_needs(capsys):
    with pytest.raises(SystemExit):
        main(["draw", "--help"])
    need = fitting.needed_bytes(BagelConfig(), fitting.ON_DISK, draws=True)
    assert f"{need / 1e9:.0f} GB are enough" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("layout", ["original", "saved"])
def test_weights_on_the_disk_draw_the_same_picture_and_leave_nothing_behind(layout, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fitting, "RESIDENT", 300_000)
    # As on a system that refuses to map a file larger than its memory.
    monkeypatch.setattr("transformers_bagel.loading._stays_in_files", lambda *args: False)
    model = {"original": str(CHECKPOINT), "saved": saved}[layout]
    pictures = []
    for name, options in (("a", ["--low-memory"]), ("b", ["--dtype", "bfloat16"])):
        output = tmp_path / f"{name}.png"
        settings = ["--height", "64", "--width", "64", "--steps", "2", "--model", model]
        assert main(["draw", "a red circle", "-o", str(output), *settings, *options]) == 0
        pictures.append(np.asarray(PIL.Image.open(output)))
    assert np.array_equal(*pictures)
    assert not list((tmp_path / "home").iterdir())


def test_weights_on_the_disk_answer_the_same(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fitting, "RESIDENT", 300_000)
    monkeypatch.setattr("transformers_bagel.loading._stays_in_files", lambda *args: False)
    answers = []
    for options in (["--low-memory"], ["--dtype", "bfloat16"]):
        arguments = ["ask", *picture(tmp_path), "what?", "--model", saved, "--max-new-tokens", "4", *options]
        assert main(arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()
    assert not list((tmp_path / "home").iterdir())


def test_a_full_disk_is_told_before_anything_is_loaded(memory, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fitting, "HF_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 10}))
    assert main(["ask", *picture(tmp_path), "what?", "--model", str(CHECKPOINT), "--low-memory"]) == 2
    assert "set HF_HOME to a larger disk" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["int8", "4 bits"])
def test_a_way_that_was_chosen_answers(way, saved, memory, monkeypatch, capsys, tmp_path):
    (chosen,) = [each for each in fitting.possible_ways(CPU) if each.name == way]
    monkeypatch.setattr(fitting, "possible_ways", lambda device: [chosen])
    assert main(["ask", *picture(tmp_path), "what?", "--model", saved, "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert f"loading in {way}" in said.err and said.out.strip()


def picture(folder: Path) -> list[str]:
    golden_image("square").save(folder / "in.png")
    return [str(folder / "in.png")]


def test_a_picture_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CommandError, match=r"gone.* could not be written .* the picture is in '(.*)'") as caught:
        save_picture(golden_image("square"), tmp_path / "gone" / "out.png")
    kept = str(caught.value).split("the picture is in '")[1].rstrip("'.")
    assert np.array_equal(np.asarray(PIL.Image.open(kept)), np.asarray(golden_image("square")))


@pytest.mark.parametrize("layout", ["original", "saved"])
def test_info_tells_what_a_repository_holds_and_what_would_fit(layout, saved, memory, capsys):
    memory(1e6)
    model = {"original": str(CHECKPOINT), "saved": saved}[layout]
    assert main(["info", model]) == 0
    said = capsys.readouterr().out
    assert {"original": "the original layout", "saved": "the layout of diffusers"}[layout] in said
    assert ("corrected: max_latent_size is 4, and 8 by the files" in said) == (layout == "original")
    assert "sees and draws" in said and "with 1.0 MB free" in said
    assert "bfloat16: 1.4 MB to draw, too much; 0.9 MB to answer, fits" in said


def test_info_tells_in_which_few_steps_a_model_draws(tmp_path, capsys):
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = BagelConfig.from_pretrained(CHECKPOINT)
    config.few_steps = FewSteps(3, [1.0, 0.6, 0.3], 1.0, 1.0, 3.0).merged()
    (tmp_path / "config.json").unlink()
    config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "by default it draws in 3 steps, of an adapter that is in the weights" in capsys.readouterr().out


def test_info_of_rounded_weights_offers_no_other_rounding(tmp_path, memory, capsys):
    memory(1e9)
    rounded, packed = tmp_path / "rounded", tmp_path / "packed"
    load_model(quantization_config=torchao_int8(), dtype=torch.bfloat16).save_pretrained(rounded)
    shutil.copytree(CHECKPOINT, packed)
    weights = load_file(packed / "ema.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, packed / "ema.safetensors")
    for folder, expected in ((rounded, "loaded as they are"), (packed, "bfloat16:")):
        assert main(["info", str(folder)]) == 0
        said = capsys.readouterr().out
        assert expected in said and "int8:" not in said and "4 bits:" not in said


@pytest.mark.parametrize("files", [{}, {"config.json": "{"}, {"readme.md": "x"}], ids=["empty", "broken", "other"])
def test_info_of_a_folder_without_bagel_is_one_sentence(files, tmp_path, capsys):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["info", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: '{tmp_path}' cannot be read: ")
