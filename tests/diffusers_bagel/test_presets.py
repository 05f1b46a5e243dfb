"""Each row of the table in docs/presets.md is what reaches the model, whatever was called before."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from diffusers_bagel import PRESETS, BagelGuidance, BagelPipeline, BagelSession, Preset, send_all
from tests.conftest import CHECKPOINT, DEVICE, golden_image, load_processor
from tests.diffusers_bagel.conftest import seeded
from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.image_processing_bagel import resized_size


PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
# Unlike sizes, so that each rule gives another one.
IMAGES = [Image.new("RGB", size, "red") for size in ((200, 200), (210, 200))]
PLAN = "You should first think about the planning process in the mind and then generate the image. \n"
UNDERSTANDING = "You should first think about the reasoning process"


def table() -> list[dict[str, str]]:
    """The rows of the page's table, by the names of its columns."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = rows[0]
    assert header[0] == "preset"
    return [dict(zip(header, row, strict=True)) for row in rows[1:] if len(row) == len(header)]


ROWS = table()
DRAWING = [row for row in ROWS if row["makes"] == "image"]
WRITING = [row for row in ROWS if row["makes"] == "text"]


def name_of(row: dict[str, str]) -> str:
    return row["preset"].strip("`")


def one_of(cell: str, has_images: bool) -> str:
    """Of two values, that of texts alone or that with images."""
    values = re.split(r", (?![^(]*\])", cell)
    return values[-1] if has_images else values[0]


def edges(cell: str) -> tuple[int, int]:
    longest, shortest = map(int, cell.split("/"))
    return longest, shortest


@pytest.fixture(scope="module")
def full_size() -> BagelPipeline:
    """As few layers as the tiny checkpoint, and positions for as large images and as long texts as the full-size model."""
    config = BagelConfig.from_pretrained(CHECKPOINT)
    config.text_config.num_hidden_layers, config.text_config.max_position_embeddings = 1, 32768
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.max_latent_size, config.vit_max_num_patch_per_side = 64, 70
    config.vision_config.image_size = 70 * config.vision_config.patch_size
    torch.manual_seed(0)
    model = BagelForConditionalGeneration(config).eval()
    # Whatever is written ends at once.
    model.generation_config.eos_token_id = list(range(config.text_config.vocab_size))
    # Such as those of Qwen's, from which the published code does not read.
    model.generation_config.update(top_k=20, top_p=0.8, repetition_penalty=1.05)
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=load_processor()).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclasses.dataclass
class Seen:
    """What a drawing is made of, up to its first step."""

    contexts: dict = dataclasses.field(default_factory=dict)
    guidance: list[BagelGuidance] = dataclasses.field(default_factory=list)
    sigmas: torch.Tensor | None = None
    images_kwargs: list[dict] = dataclasses.field(default_factory=list)


class _Enough(Exception):
    """What is looked for is known."""


def watch_images(pipe: BagelPipeline, monkeypatch) -> list[dict]:
    """The settings under which images are resized."""
    seen, read = [], pipe.processor.image_processor.preprocess

    def preprocess(images, *args, **kwargs):
        seen.append(kwargs)
        return read(images, *args, **kwargs)

    monkeypatch.setattr(pipe.processor.image_processor, "preprocess", preprocess)
    return seen


def drawn(pipe: BagelPipeline, monkeypatch, **arguments) -> Seen:
    """What a call of a pipeline does, up to its first step."""
    seen = Seen(images_kwargs=watch_images(pipe, monkeypatch))
    apply, prepare = BagelGuidance.__call__, pipe.prepare_contexts

    def guided(guidance, velocities):
        seen.guidance.append(guidance)
        return apply(guidance, velocities)

    def prepared(*args, **kwargs):
        contexts, plans = prepare(*args, **kwargs)
        seen.contexts = contexts[0]
        return contexts, plans

    def stop(call, step, timestep, tensors):
        seen.sigmas = call.scheduler.sigmas.cpu()
        raise _Enough

    monkeypatch.setattr(BagelGuidance, "__call__", guided)
    monkeypatch.setattr(pipe, "prepare_contexts", prepared)
    with pytest.raises(_Enough):
        pipe(callback_on_step_end=stop, output_type="latent", generator=seeded(0), **arguments)
    return seen


def texts(context) -> list[str]:
    return [segment.segment.content for segment in context.segments if segment.grid is None]


def expected_sizes(row: dict[str, str]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows and columns of the latents, and of the patches, of the images, by the row."""
    latents, patches = [], []
    pixels = int(row["most pixels"])
    for image in IMAGES:
        size = resized_size(*image.size, *edges(row["VAE"]), 16, pixels)
        seen = size if row["of"] == "VAE" else image.size
        width, height = resized_size(*seen, *edges(row["ViT"]), 14, pixels)
        latents.append([size[1] // 16, size[0] // 16])
        patches.append([height // 14, width // 14])
    return latents, patches


def check_contexts(row: dict[str, str], contexts: dict, has_images: bool, thinks: bool, num_images: int = 2) -> None:
    """What the model has read, and what guidance compares it with."""
    full = texts(contexts["full"])
    assert full[0].startswith(PLAN) is thinks and len(full) == (3 if thinks else 1) and full[thinks] == "make it green"
    before = 0 if row["no text"] == "nothing" else thinks + 2 * num_images * has_images
    assert len(contexts["no_text"].segments) == before
    if has_images:
        is_told = thinks and row["no image"] == "no plan"
        assert texts(contexts["no_image"]) == (full[:-1] if is_told else full)
        assert len(contexts["no_image"].segments) == len(texts(contexts["no_image"]))


def check_texts(row: dict[str, str], written: dict) -> None:
    """What `generate` is asked for: as many tokens, drawn or not, and nothing of the generation config."""
    assert written["max_new_tokens"] == int(row["longest text"]) - 1 and written["repetition_penalty"] == 1.0
    if row["sampling"] == "greedy":
        assert written["do_sample"] is False
    else:
        assert written["do_sample"] is True and written["temperature"] == float(row["sampling"])
        assert written["top_k"] == 0 and written["top_p"] == 1.0


def check_hidden_states(row: dict[str, str], forwards: list[dict]) -> None:
    expected = None if row["hidden states"] == "weights" else torch.float32
    assert forwards and all(kwargs.get("residual_dtype") == expected for kwargs in forwards)


def test_the_table_holds_all_presets_and_their_sources():
    assert [name_of(row) for row in ROWS] == list(PRESETS)
    page = PAGE.read_text(encoding="utf-8")
    for row in ROWS:
        preset = PRESETS[name_of(row)]
        letter, files = row["source"].split(": ")
        repository, *paths = preset.source.split(", ")
        assert row["makes"] == preset.output and preset.description
        assert [path.strip("`") for path in files.split(", ")] == paths
        assert f"{letter} is\n[{repository.removeprefix('github.com/')}]" in page.replace(
            f"{letter} is [", f"{letter} is\n["
        )


# Where the task decides, with images and without.
CASES = [
    pytest.param(row, has_images, id=f"{name_of(row)}{'-edit' if has_images else ''}")
    for row in DRAWING
    for has_images in ((False, True) if ", " in row["renorm"] else (row["VAE"] != "–",))
]


@pytest.mark.parametrize(("row", "has_images"), CASES)
def test_what_a_row_says_reaches_the_model(row, has_images, full_size, forwards, monkeypatch):
    asked, images = forwards(full_size), IMAGES if has_images else None
    seen = drawn(full_size, monkeypatch, prompt="make it green", image=images, preset=name_of(row))
    steps, shift = int(row["steps"]), float(row["shift"])
    times = torch.linspace(1, 0, steps + 1)
    torch.testing.assert_close(seen.sigmas, shift * times / (1 + (shift - 1) * times))
    low, high = map(float, one_of(row["interval"], has_images).strip("(]").split(", "))
    scales = float(row["text scale"]), float(one_of(row["image scale"], has_images))
    renorm = one_of(row["renorm"], has_images), float(row["renorm min"])
    assert set(seen.guidance) == {BagelGuidance(*scales, (low, high), *renorm)}
    check_contexts(row, seen.contexts, has_images, row["thinks"] == "yes")
    check_hidden_states(row, [*asked.reading, *asked.writing, *asked.denoising])

    grid = [64, 64]
    if has_images:
        layout = asked.reading[0]["layout"]
        latents, patches = expected_sizes(row)
        assert (layout.latent_grid_hw.tolist(), layout.image_grid_hw.tolist()) == (latents, patches)
        assert {kwargs["max_pixels"] for kwargs in seen.images_kwargs} == {int(row["most pixels"])}
        grid = latents[{"first": 0, "last": -1}[row["size like"]]]
    assert asked.denoising[0]["latent_grid_hw"][0].tolist() == grid


@pytest.mark.parametrize("row", DRAWING, ids=name_of)
def test_plans_are_as_the_row_says(row, full_size, forwards, monkeypatch):
    """Also those of rows that do not think by themselves."""
    asked, has_images = forwards(full_size), row["VAE"] != "–"
    arguments = {"image": IMAGES[0] if has_images else None, "think": None if row["thinks"] == "yes" else True}
    # Images are small here.
    arguments["images_kwargs"] = {"vae_size": {"longest_edge": 64, "shortest_edge": 64}} if has_images else None
    seen = drawn(full_size, monkeypatch, prompt="make it green", preset=name_of(row), **SIZE, **arguments)
    check_texts(row, asked.writing[0])
    check_contexts(row, seen.contexts, has_images, True, num_images=1)


@pytest.mark.parametrize("row", WRITING, ids=name_of)
def test_what_a_row_of_answers_says_reaches_the_model(row, full_size, forwards, monkeypatch):
    asked, seen = forwards(full_size), watch_images(full_size, monkeypatch)
    reply = BagelSession(full_size).send([IMAGES[0], "what?"], preset=name_of(row), vae_sample_mode="argmax")
    assert [part["type"] for part in reply.content] == ["text"]
    check_texts(row, asked.writing[0])
    check_hidden_states(row, asked.reading)
    seen_size = IMAGES[0].size
    pixels = int(row["most pixels"])
    if row["of"] == "VAE":
        seen_size = resized_size(*seen_size, *edges(row["VAE"]), 16, pixels)
    width, height = resized_size(*seen_size, *edges(row["ViT"]), 14, pixels)
    assert asked.reading[0]["layout"].image_grid_hw.tolist() == [[height // 14, width // 14]]
    assert {kwargs["max_pixels"] for kwargs in seen} == {pixels}
    prompt = full_size.processor.decode(asked.writing[0]["input_ids"][0])
    assert (UNDERSTANDING in prompt) is (row["thinks"] == "yes")


# Arguments that make a drawing small, and short.
SIZE = {"height": 32, "width": 32}
FEW = {"num_inference_steps": 2, "do_sample": False, "max_think_tokens": 6, "vae_sample_mode": "argmax"}


@pytest.mark.parametrize("name", [name_of(row) for row in DRAWING])
def test_a_session_draws_what_the_pipeline_draws(name, pipe):
    images = [golden_image("wide"), golden_image("tall")]
    short = dict(FEW)
    expected = pipe("make it green", image=images, preset=name, generator=seeded(3), **short)
    short["max_new_tokens"] = short.pop("max_think_tokens") - 1
    reply = BagelSession(pipe).send([*images, "make it green"], preset=name, generator=seeded(3), **short)
    drawn_images = (np.asarray(own).astype(int) for own in (reply.images[0], expected.images[0]))
    difference = abs(next(drawn_images) - next(drawn_images)).max()
    assert difference <= 1
    assert [part["text"] for part in reply.content if part["type"] == "text"] == (expected.texts or [])


def test_the_order_of_calls_changes_nothing(own_pipe):
    """Each preset between others, in the pipeline and in the session, and calls without one, give what they give first."""
    names = ["kris", "wise", "demo", "gedit", None]
    images = [golden_image("wide"), golden_image("tall")]

    def draw(name: str | None) -> torch.Tensor:
        given = {} if name in ("wise", None) else {"image": images}
        out = own_pipe("a circle", preset=name, generator=seeded(5), output_type="latent", **given, **FEW)
        return out.images[0]

    def answer(name: str | None) -> list:
        preset = "vqa" if name is None else name
        short = {key: value for key, value in FEW.items() if key != "max_think_tokens"} | {"max_new_tokens": 4}
        reply = BagelSession(own_pipe).send([images[0], "a circle"], preset=preset, generator=seeded(5), **short)
        return [
            part["text"] if part["type"] == "text" else np.asarray(part["image"]).tolist() for part in reply.content
        ]

    first = {name: (draw(name), answer(name)) for name in names}
    for name in [*reversed(names), *names]:
        drawing, answered = draw(name), answer(name)
        assert torch.equal(drawing, first[name][0]) and answered == first[name][1]
    assert len({own[0].sum().item() for own in first.values()}) == len(names)


def test_what_the_caller_passes_wins(full_size, monkeypatch):
    given = {"num_inference_steps": 7, "image_guidance_scale": 1.25, "cfg_interval": (0.1, 0.9), "timestep_shift": 1.0}
    given |= {
        "images_kwargs": {"size": {"longest_edge": 140, "shortest_edge": 56}},
        "size_like": "last",
        "think": False,
    }
    seen = drawn(
        full_size, monkeypatch, prompt="a", image=IMAGES, preset="kris", guidance_scale=None, height=32, **given
    )
    assert len(seen.sigmas) == 8 and torch.equal(seen.sigmas, torch.linspace(1, 0, 8))
    assert set(seen.guidance) == {BagelGuidance(4.0, 1.25, (0.1, 0.9), "text_channel", 0.0)}
    kwargs = seen.images_kwargs[0]
    assert kwargs["size"] == given["images_kwargs"]["size"] and kwargs["vae_size"]["longest_edge"] == 1024
    assert kwargs["resize_before_vit"] is False and texts(seen.contexts["full"]) == ["a"]


def test_a_preset_says_what_an_answer_is_made_of_unless_the_caller_does(pipe):
    image = golden_image("wide")
    short = {"num_inference_steps": 2, "max_new_tokens": 3}
    assert BagelSession(pipe).send([image, "a"], preset="gedit", **short).images
    assert not BagelSession(pipe).send([image, "a"], "text", preset="gedit", **short).images
    assert not BagelSession(pipe).send([image, "a"], preset="vqa", max_new_tokens=3).images
    replies = send_all([(BagelSession(pipe), [image, "a"]) for _ in range(2)], preset="imgedit", **short)
    assert all(reply.images for reply in replies)


def test_a_preset_of_ones_own(pipe):
    mine = Preset("image", "Mine.", "here", {"num_inference_steps": 3, "timestep_shift": 5.0})
    sigmas = []

    def note(call, step, timestep, tensors):
        sigmas.append(call.scheduler.sigmas)
        return tensors

    pipe("a", preset=mine, height=32, width=32, callback_on_step_end=note)
    assert len(sigmas) == 3 and sigmas[0][1].item() == pytest.approx(5 * (2 / 3) / (1 + 4 * (2 / 3)))
    assert pipe.scheduler.shift == 3.0


def test_smaller_models_have_smaller_images(pipe):
    settings = PRESETS["gedit"].of_pipeline(pipe.transformer.config)["images_kwargs"]
    assert settings["vae_size"] == {"longest_edge": 128, "shortest_edge": 128}
    assert PRESETS["gedit"].settings["images_kwargs"]["vae_size"] == {"longest_edge": 1024, "shortest_edge": 512}


def test_images_of_a_preset_are_saved_with_a_session(pipe, tmp_path):
    session = BagelSession(pipe)
    session.send([golden_image("wide"), "a"], preset="imgedit", num_inference_steps=2, generator=seeded(0))
    session.save_pretrained(tmp_path)
    restored = BagelSession.from_pretrained(tmp_path, pipe)
    assert restored.contexts["full"].length == session.contexts["full"].length
    plain = BagelSession(pipe)
    plain.send([golden_image("wide"), "a"], "image", num_inference_steps=2, generator=seeded(0))
    assert plain.contexts["full"].length != session.contexts["full"].length


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "genval"}, ValueError, "`preset` must be one of demo, notebook, geneval, wise.*got 'genval'"),
        ({"preset": 3}, TypeError, "`preset` must be a name or a `Preset`, got 3"),
        ({"timestep_shift": -1}, ValueError, "`timestep_shift` must be a number of at least"),
        ({"timestep_shift": "3"}, TypeError, "`timestep_shift` must be a number"),
        ({"images_kwargs": 3}, TypeError, "`images_kwargs` must be a dict, got 3"),
        ({"images_kwargs": {"sizes": 3}}, ValueError, "`images_kwargs` must hold vae_size, size.*only, got 'sizes'"),
        ({"size_like": "middle"}, ValueError, "`size_like` must be one of first, last, got 'middle'"),
        ({"residual_dtype": "bfloat16"}, ValueError, "`residual_dtype` must be \"float32\".*got 'bfloat16'"),
        ({"plan_in_no_image": torch.ones(2)}, TypeError, "`plan_in_no_image` must be true or false"),
        ({"empty_no_text": torch.ones(2)}, TypeError, "`empty_no_text` must be true or false"),
        ({"temperature_only": torch.ones(2)}, TypeError, "`temperature_only` must be true or false"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(arguments, error, message, pipe, forwards):
    seen = forwards(pipe)
    session = BagelSession(pipe)
    for call in (lambda: pipe("a", **arguments), lambda: session.send("a", "image", **arguments)):
        with pytest.raises(error, match=message):
            call()
    assert not (seen.reading or seen.denoising or session.messages)


def test_the_pipeline_takes_no_preset_for_words(pipe):
    with pytest.raises(ValueError, match="`preset` is for answers in words.*choose one of demo, notebook"):
        pipe("a", preset="vqa")


def test_a_scheduler_without_a_shift_is_named(own_pipe):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    own_pipe.scheduler = DPMSolverMultistepScheduler(**flow)
    with pytest.raises(ValueError, match="`timestep_shift` was passed, but DPMSolverMultistepScheduler takes none"):
        own_pipe("a", timestep_shift=2.0)
