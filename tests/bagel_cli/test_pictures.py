"""Files of pictures say how they were drawn."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image

from bagel_cli import main
from bagel_cli.files import description


def test_a_drawn_png_holds_its_prompt_and_settings(saved, tmp_path):
    file = tmp_path / "out.png"
    asked = ["draw", "ein roter Kreis, größer als 2 €", "--model", saved, "--seed", "3", "--steps", "2"]
    asked += ["--height", "64", "--width", "64", "--guidance-tolerance", "0.01"]
    assert main([*asked, "-o", str(file)]) == 0
    with PIL.Image.open(file) as image:
        assert image.info["prompt"] == "ein roter Kreis, größer als 2 €"
        settings = json.loads(image.info["settings"])
        assert image.info["model"] == "/".join(Path(saved).parts[-2:])
    assert settings == {"seed": 3, "num_inference_steps": 2, "height": 64, "width": 64, "guidance_tolerance": 0.01}


def test_formats_without_a_place_for_it_are_written_all_the_same(saved, tmp_path):
    file = tmp_path / "out.jpg"
    size = ["--height", "64", "--width", "64"]
    assert main(["draw", "a circle", "--model", saved, "--steps", "2", *size, "-o", str(file)]) == 0
    assert PIL.Image.open(file).format == "JPEG"


def test_a_model_in_a_folder_is_called_by_its_last_names():
    chunks = dict(chunk[1].split(b"\0", 1) for chunk in description("x", "/home/somebody/models/mine", {}).chunks)
    assert chunks[b"model"] == b"models/mine"
