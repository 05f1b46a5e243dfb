"""`examples/train_few_steps.py`: what the student learns, on prompts and on datasets, resumed, and what its file says."""

from __future__ import annotations

import pytest
import torch
import train_few_steps
from bagel_training.distillation import Distillation, DistillingCollator
from peft import LoraConfig

from diffusers_bagel import BagelPipeline
from tests.conftest import golden_image, load_processor, turn
from tests.diffusers_bagel.test_lora import make_pipe
from tests.examples.conftest import (
    PROMPT,
    assert_same,
    checkpoints,
    image,
    saved_weights,
    talk,
    text,
    write_lines,
)
from tests.transformers_bagel.test_adapters import randomise
from transformers_bagel.segments import GENERATION_THINK_PROMPT


GUIDANCE = {"guidance_scale": 4.0, "image_guidance_scale": 2.0}
SAMPLES = {
    "a drawing": [turn("user", "a red circle"), turn("assistant", golden_image("square"))],
    "an edit": [turn("user", golden_image("tall"), "make it green"), turn("assistant", golden_image("wide"))],
    "a plan": [
        turn("system", GENERATION_THINK_PROMPT),
        turn("user", "a red circle"),
        turn("assistant", "a circle", golden_image("square")),
    ],
}


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    """With an adapter that changes what it draws."""
    pipe = make_pipe()
    pipe.transformer.add_adapter(LoraConfig(r=4))
    randomise(pipe.transformer, 0)
    return pipe


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\na blue square\n", encoding="utf-8")
    return str(file)


def collator(pipe: BagelPipeline, num_steps: int, teacher_steps: int) -> DistillingCollator:
    distillation = Distillation(num_steps, teacher_steps, *GUIDANCE.values())
    return DistillingCollator(pipe, distillation, processor=load_processor(), vae_sample_mode="argmax")


def learned(batch: dict) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Of each noised block its sigma, its latents, and the velocity to learn."""
    counts = batch["latent_grid_hw"].prod(-1).tolist()
    rows = zip(batch["timesteps"], batch["latents"].split(counts), batch["noise"].split(counts), strict=True)
    return [
        (float(sigma), (1 - sigma) * clean + sigma * noise, noise - clean) for sigma, clean, noise in rows if sigma > 0
    ]


def steps_of_pipeline(
    pipe: BagelPipeline, prompt: list[dict], batch: dict, num_steps: int, **settings
) -> list[torch.Tensor]:
    """The latents behind each step of a drawing from what stands before the picture, and from the first place's noise."""
    steps = []

    def note(call, step, timestep, tensors):
        steps.append(tensors["latents"][0].clone())
        return tensors

    height, width = (16 * batch["latent_grid_hw"][-1]).tolist()
    settings |= {"height": height, "width": width, "output_type": "latent", "vae_sample_mode": "argmax"}
    noise = learned(batch)[0][1][None]
    pipe(
        messages=prompt,
        latents=noise,
        num_inference_steps=num_steps,
        callback_on_step_end=note,
        **settings,
    )
    return steps


@pytest.mark.parametrize("name", ["a drawing", "an edit"])
def test_the_only_step_of_a_student_is_the_whole_way_of_the_teacher(pipe, name):
    batch = collator(pipe, 1, 4)([{"messages": SAMPLES[name]}])
    ((sigma, noise, velocity),) = learned(batch)
    scales = GUIDANCE if name == "an edit" else {"guidance_scale": 4.0}
    teacher = steps_of_pipeline(pipe, SAMPLES[name][:-1], batch, 4, attention_kwargs={"scale": 0.0}, **scales)
    assert sigma == 1
    assert (noise - velocity - teacher[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["a drawing", "an edit"])
def test_each_step_begins_where_the_student_comes_to(pipe, name):
    batch = collator(pipe, 3, 2)([{"messages": SAMPLES[name]}])
    sigmas, places, _ = zip(*learned(batch), strict=True)
    assert list(sigmas) == sorted(sigmas, reverse=True) and len(sigmas) == 3
    student = steps_of_pipeline(pipe, SAMPLES[name][:-1], batch, 3, guidance_scale=1.0, image_guidance_scale=1.0)
    assert max((x - after).abs().max() for x, after in zip(places[1:], student[:-1], strict=True)) < 1e-4


def test_a_plan_is_drawn_from_as_the_pipeline_does(pipe):
    asked, thinks = SAMPLES["a plan"][1:2], {"think": True, "max_think_tokens": 8, "attention_kwargs": {"scale": 0.0}}
    plan = pipe(messages=asked, num_inference_steps=1, height=32, width=32, output_type="latent", **thinks).texts[0]
    sample = [*SAMPLES["a plan"][:2], turn("assistant", plan, golden_image("square"))]
    batch = collator(pipe, 1, 4)([{"messages": sample}])
    ((_, noise, velocity),) = learned(batch)
    teacher = steps_of_pipeline(pipe, asked, batch, 4, guidance_scale=4.0, **thinks)
    assert plan
    assert (noise - velocity - teacher[-1]).abs().max() < 1e-4


def test_samples_of_a_batch_learn_what_each_would_alone(pipe):
    samples = [{"messages": messages} for messages in SAMPLES.values()]
    own = collator(pipe, 2, 2)
    together = own.pack([own.with_latents(own.encode(sample, index)) for index, sample in enumerate(samples)])
    alone = [own.pack([own.with_latents(own.encode(sample, index))]) for index, sample in enumerate(samples)]
    expected = [place for batch in alone for place in learned(batch)]
    assert len(expected) == 6
    for (sigma, x, velocity), (own_sigma, own_x, own_velocity) in zip(learned(together), expected, strict=True):
        assert sigma == own_sigma
        assert max((x - own_x).abs().max(), (velocity - own_velocity).abs().max()) < 1e-4


def test_only_the_picture_is_learned(pipe):
    batch = collator(pipe, 2, 1)([{"messages": SAMPLES["a plan"]}])
    assert (batch["labels"] == -100).all()


@pytest.mark.parametrize(
    "messages",
    [
        [turn("user", "hello"), turn("assistant", "hi")],
        [
            turn("user", "a"),
            turn("assistant", golden_image("square")),
            turn("user", "b"),
            turn("assistant", golden_image("wide")),
        ],
        [turn("user", "a"), turn("assistant", golden_image("square"), "there")],
    ],
    ids=["words", "two pictures", "words behind"],
)
def test_other_samples_are_refused(pipe, messages):
    with pytest.raises(ValueError, match="It must end in an answer that is a picture, or a text and a picture"):
        collator(pipe, 2, 1)([{"messages": messages}])


SHORT = {"instance_data_dir": None, "instance_prompt": None, "num_inference_steps": 2, "teacher_steps": 2, "rank": 4}


def test_prompts_alone_train_an_adapter_that_says_its_steps(train, defaults, prompts, tmp_path):
    output_dir = train(train_few_steps, tmp_path / "out", prompt_file=prompts, resolution=32, **SHORT)
    pipe = BagelPipeline.from_pretrained(defaults["pretrained_model_name_or_path"])
    pipe.load_lora_weights(output_dir)
    assert pipe.few_steps.num_inference_steps == 2
    # What writes is as it was.
    assert all("_moe_gen" in name for name in saved_weights(output_dir))


def test_a_dataset_of_drawings_edits_and_plans_trains(train, pictures, tmp_path):
    names = [f"{pictures}/red_circle.png", f"{pictures}/blue_square.png"]
    rows = [
        talk([text("a red circle")], [image(names[0])]),
        talk([image(names[0]), text("make it blue")], [image(names[1])]),
        talk([text("a shape")], [text("a blue square"), image(names[1])]),
    ]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    output_dir = train(train_few_steps, tmp_path / "out", train_data_file=data, **SHORT)
    assert saved_weights(output_dir)


def test_resumed_equals_uninterrupted(train, prompts, tmp_path):
    settings = SHORT | {"prompt_file": prompts, "resolution": 32, "checkpointing_steps": 2, "lora_dropout": 0.2}
    whole = train(train_few_steps, tmp_path / "whole", max_train_steps=4, **settings)
    train(train_few_steps, tmp_path / "two", max_train_steps=2, **settings)
    assert checkpoints(tmp_path / "two") == ["checkpoint-2"]
    halves = train(train_few_steps, tmp_path / "two", max_train_steps=4, resume_from_checkpoint="latest", **settings)
    assert_same(saved_weights(halves), saved_weights(whole))


def test_another_number_of_steps_is_no_resumed_training(train, prompts, tmp_path):
    settings = SHORT | {"prompt_file": prompts, "resolution": 32, "checkpointing_steps": 2}
    train(train_few_steps, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="--num_inference_steps 2, but this training has 3"):
        train(
            train_few_steps, tmp_path / "out", resume_from_checkpoint="latest", **settings | {"num_inference_steps": 3}
        )


def test_validation_draws_in_the_adapters_steps_without_guidance(train, prompts, tmp_path, monkeypatch):
    asked, call = [], BagelPipeline.__call__

    def watched(pipe, **settings):
        asked.append((settings["num_inference_steps"], settings["guidance_scale"]))
        return call(pipe, **settings)

    monkeypatch.setattr(BagelPipeline, "__call__", watched)
    settings = SHORT | {"prompt_file": prompts, "resolution": 32, "validation_prompt": PROMPT}
    settings["validation_inference_steps"] = None
    output_dir = train(train_few_steps, tmp_path / "out", **settings)
    assert asked == [(SHORT["num_inference_steps"], 1.0)]
    assert [file.name for file in (output_dir / "validation").iterdir()] == ["step_2_0.png"]


def test_bad_arguments_are_refused(prompts, tmp_path, capsys):
    line = ["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path / "out")]
    for extra, words in (
        ([], "Pass one of --dataset_name, --train_data_file, --instance_data_dir and --prompt_file, got none"),
        (["--prompt_file", prompts, "--teacher_steps", "0"], "--teacher_steps must be at least 1"),
        (["--prompt_file", prompts, "--teacher_guidance_scale", "nan"], "--teacher_guidance_scale must be finite"),
    ):
        with pytest.raises(SystemExit):
            train_few_steps.parse_args(line + extra)
        assert words in capsys.readouterr().err


def test_an_empty_file_of_prompts_is_refused(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("\n\n", encoding="utf-8")
    line = ["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path / "out"), "--prompt_file", str(file)]
    with pytest.raises(ValueError, match="holds no prompt"):
        train_few_steps.main(train_few_steps.parse_args(line))
