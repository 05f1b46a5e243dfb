"""Doors of transformers through which clients come: pipelines, automatic classes, the server's choice of a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, Modality
from transformers.utils import import_utils

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, conversation, golden_image, load_model, turn
from tests.transformers_bagel.test_messages import URI
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "checkpoint"
DRAWING = {"num_inference_steps": 3, "guidance_scale": 3.0}
SHORT = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


@pytest.fixture
def torchvision(monkeypatch):
    """The any-to-any pipeline asks for torchvision, of which BAGEL needs nothing."""
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "torchvision", (lambda: True, ""))


@pytest.fixture
def any_to_any(torchvision):
    return pipeline("any-to-any", model=str(SHAPES))


@pytest.fixture(scope="module")
def own_pipe() -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answer(pipe: BagelPipeline, messages: list) -> str:
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = pipe.transformer.generate(**inputs, max_new_tokens=SHORT["max_new_tokens"], do_sample=False)
    return pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


QUESTION = [turn("user", golden_image("square"), "what colour is the square?")]


class TestPictures:
    """`pipeline("any-to-any")(..., generation_mode="image")`."""

    @pytest.mark.parametrize(
        "messages",
        [
            conversation(["a large red circle"]),
            [turn("user", golden_image("square"), "make the square red")],
            [
                turn("system", "x"),
                turn("user", golden_image("wide"), golden_image("tall"), "join"),
                turn("user", "now"),
            ],
        ],
        ids=["prompt", "edit", "several_images"],
    )
    def test_are_those_of_our_pipeline(self, messages, any_to_any, own_pipe):
        settings = DRAWING | {"height": 64, "width": 64}
        (made,) = any_to_any(
            text=messages, generation_mode="image", generate_kwargs=settings | {"generator": seeded()}
        )
        expected = own_pipe(messages=messages, generator=seeded(), **settings).images[0]
        assert np.array_equal(np.asarray(made["generated_image"]), np.asarray(expected))

    def test_of_plain_words_and_several_of_them(self, any_to_any, own_pipe):
        made = any_to_any(
            text=["a red circle", "a blue cross"],
            generation_mode="image",
            generate_kwargs=DRAWING | {"num_return_sequences": 2, "generator": [seeded(seed) for seed in range(4)]},
        )
        expected = own_pipe(
            prompt=["a red circle", "a blue cross"],
            num_images_per_prompt=2,
            generator=[seeded(seed) for seed in range(4)],
            **DRAWING,
        ).images
        assert [record["input_text"] for record in made] == ["a red circle"] * 2 + ["a blue cross"] * 2
        for record, picture in zip(made, expected, strict=True):
            assert np.array_equal(np.asarray(record["generated_image"]), np.asarray(picture))

    def test_texts_of_the_same_pipeline_are_what_generate_writes(self, any_to_any, own_pipe):
        assert any_to_any(text=QUESTION, **SHORT)[0]["generated_text"] == answer(own_pipe, QUESTION)

    def test_of_the_original_layout(self, torchvision):
        draws = pipeline("any-to-any", model=str(CHECKPOINT))
        settings = {"num_inference_steps": 2, "height": 32, "width": 48}
        (made,) = draws(text=conversation(["a"]), generation_mode="image", generate_kwargs=settings)
        assert made["generated_image"].size == (48, 32)

    def test_are_drawn_by_generate(self, own_pipe):
        model, processor = own_pipe.transformer, own_pipe.processor
        messages = [
            [turn("user", golden_image("square"), "make it red")],
            [turn("user", golden_image("wide"), "and it")],
        ]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", generation_mode="image"
        )
        drawn = model.generate(**inputs, generation_mode="image", generator=[seeded(0), seeded(1)], **DRAWING)
        expected = own_pipe(messages=messages, generator=[seeded(0), seeded(1)], **DRAWING).images
        for ours, theirs in zip(
            processor.post_process_multimodal_output(drawn, generation_mode="image"), expected, strict=True
        ):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))

    def test_in_one_batch_whatever_the_sizes_of_their_images(self, any_to_any, own_pipe):
        messages = [
            [turn("user", golden_image("square"), "make it red")],
            [turn("user", golden_image("wide"), "and it")],
        ]
        made = any_to_any(
            text=messages,
            generation_mode="image",
            batch_size=2,
            generate_kwargs=DRAWING | {"generator": [seeded(0), seeded(1)]},
        )
        expected = own_pipe(messages=messages, generator=[seeded(0), seeded(1)], **DRAWING).images
        for (record,), picture in zip(made, expected, strict=True):
            assert np.array_equal(np.asarray(record["generated_image"]), np.asarray(picture))

    def test_by_arguments_of_generate_as_others_pass_them(self, own_pipe):
        """Those that are left open, and the output with a name."""
        inputs = own_pipe.processor.apply_chat_template(
            conversation(["a red circle"]),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            generation_mode="image",
        )
        arguments = inputs | DRAWING | {"generation_mode": "image"}
        drawn = own_pipe.transformer.generate(**arguments, generator=seeded())
        again = own_pipe.transformer.generate(
            **arguments, generator=seeded(), streamer=None, stopping_criteria=None, return_dict_in_generate=True
        )
        assert torch.equal(again.sequences, drawn)


class TestRefusedPictures:
    @pytest.fixture
    def inputs(self, own_pipe):
        return own_pipe.processor.apply_chat_template(
            QUESTION, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def test_from_images_whose_pixels_are_missing(self, own_pipe, inputs):
        with pytest.raises(ValueError, match=r"`vae_pixel_values`.*return_vae_pixel_values=True"):
            own_pipe.transformer.generate(**inputs, generation_mode="image")

    def test_by_a_setting_that_nobody_knows(self, own_pipe, inputs):
        with pytest.raises(ValueError, match=r"num_inference_step: known settings.*num_inference_steps"):
            own_pipe.transformer.generate(**inputs, generation_mode="image", num_inference_step=2)

    @pytest.mark.parametrize("mode", ["video", ["image"]], ids=str)
    def test_of_another_kind(self, mode, own_pipe, inputs):
        with pytest.raises(ValueError, match="`generation_mode` must be one of"):
            own_pipe.transformer.generate(**inputs, generation_mode=mode)

    def test_of_a_model_from_nowhere(self, own_pipe):
        model = BagelForConditionalGeneration(load_model().config)
        model.name_or_path = ""
        with pytest.raises(ValueError, match="not loaded from anywhere"):
            model.generate(torch.tensor([[1, 2]]), generation_mode="image")


@pytest.mark.parametrize("folder", [SHAPES, CHECKPOINT], ids=["diffusers_layout", "original_layout"])
def test_a_causal_language_model_is_loaded(folder):
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), BagelForConditionalGeneration)


def test_the_text_generation_pipeline_writes_what_generate_writes(own_pipe, caplog):
    writes = pipeline("text-generation", model=str(SHAPES))
    assert "not supported" not in caplog.text
    messages = conversation(["a large red circle"])
    assert writes(messages, **SHORT)[0]["generated_text"] == answer(own_pipe, messages)
    silent = [{"role": "system", "content": ""}, {"role": "user", "content": "a large red circle"}]
    assert writes(silent, **SHORT)[0]["generated_text"] == answer(own_pipe, messages)


def test_the_image_text_to_text_pipeline_sees(own_pipe):
    sees = pipeline("image-text-to-text", model=str(SHAPES))
    assert sees(text=QUESTION, **SHORT)[0]["generated_text"] == answer(own_pipe, QUESTION)


def test_pipelines_give_thoughts_apart_from_words(any_to_any):
    """What comes back as messages: `return_full_text` is the libraries' default."""
    settings = {"max_new_tokens": 40, "do_sample": False}
    said = any_to_any(text=[turn("user", "a large red circle")], **settings)[0]["generated_text"][-1]
    assert (said["role"], said["content"]) == ("assistant", "")
    assert said["reasoning_content"].startswith("a large red circle at the")
    said = any_to_any(text=QUESTION, **settings)[0]["generated_text"]
    assert said[-1] == {"role": "assistant", "content": said[-1]["content"]}
    again = [*said, turn("user", "what size is it?")]
    assert any_to_any(text=again, **settings)[0]["generated_text"][-1]["content"] in ("small", "medium", "large")


def test_the_server_of_transformers_loads_it_as_a_multimodal_model():
    """What `transformers serve` does with the folder that it is given, before it answers."""
    manager = ModelManager(device="cpu", model_timeout=-1)
    model, processor = manager.load_model_and_processor(f"{SHAPES}@main")
    assert isinstance(model, BagelForConditionalGeneration)
    assert isinstance(processor, BagelProcessor)
    assert manager.get_model_modality(model, processor) is Modality.MULTIMODAL
    manager.shutdown()


def test_what_the_server_makes_of_openais_messages_is_read(own_pipe):
    """Text, an image as a data URI, history, nothing said, tools: what comes in means what it meant."""
    sent = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": None},
        {"role": "user", "content": ""},
        {"role": "tool", "tool_call_id": "1", "content": "red"},
    ]
    handed = BaseHandler.get_processor_inputs_from_messages(sent, Modality.MULTIMODAL)
    arguments = {"add_generation_prompt": True, "tools": None, "load_audio_from_video": False}
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    read = own_pipe.processor.apply_chat_template(handed, **arguments, **settings)
    ours = [turn("user", "be brief", golden_image("square"), "what?", "red")]
    expected = own_pipe.processor.apply_chat_template(ours, add_generation_prompt=True, **settings)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_command_line_of_transformers_runs_with_bagel():
    done = subprocess.run(
        [sys.executable, "-m", "transformers_bagel", "serve", "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "--trust-remote-code" in done.stdout


def test_a_picture_in_a_process_that_imported_no_pipeline_of_diffusers():
    """All pipelines of diffusers are imported by none but those who ask for an AutoPipeline: some want torchvision."""
    script = f"""
import sys
from transformers import pipeline
from transformers.utils import import_utils
import_utils.BACKENDS_MAPPING["torchvision"] = (lambda: True, "")
import transformers_bagel
draws = pipeline("any-to-any", model={str(SHAPES)!r})
words = [{{"role": "user", "content": "a large red circle"}}]
(made,) = draws(text=words, generation_mode="image", generate_kwargs={{"num_inference_steps": 1}})
assert made["generated_image"].size == (64, 64)
assert "diffusers.pipelines.auto_pipeline" not in sys.modules
del import_utils.BACKENDS_MAPPING["torchvision"]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
