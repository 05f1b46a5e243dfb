"""Bad arguments and checkpoints are refused by name, before any heavy work, and change nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, conversation, edges, golden_image, load_processor, max_error
from tests.transformers_bagel.test_bad_input import (
    BAD_IMAGES,
    BAD_MESSAGES,
    LARGE_IMAGES,
    PLAIN_TENSOR,
    REFUSED,
    SEEN,
    damage,
    label,
)


NAN, INF = float("nan"), float("inf")
SMALL = {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
WHOLE_NUMBERS = ("height", "width", "num_inference_steps", "num_images_per_prompt", "max_think_tokens")
NUMBERS = ("guidance_scale", "image_guidance_scale", "cfg_renorm_min", "temperature", "guidance_tolerance")

BAD_ARGUMENTS = [
    *((name, value) for name in ("height", "width") for value in (24, 0, -16, 144, 1 << 40)),
    *((name, value) for name in WHOLE_NUMBERS for value in (True, "32", 32.0, [32], NAN)),
    *((name, value) for name in WHOLE_NUMBERS[2:] for value in (0, -1, None)),
    ("max_think_tokens", 5000),
    *((name, 2**31) for name in ("num_inference_steps", "num_images_per_prompt")),
    *((name, 10**30) for name in NUMBERS),
    *((name, value) for name in NUMBERS for value in (-0.1, "1", [1.0], 1j, NAN)),
    *((name, INF) for name in NUMBERS[:3]),
    *((name, None) for name in ("guidance_scale", "cfg_renorm_min", "temperature")),
    ("cfg_renorm_min", 1.1),
    ("guidance_tolerance", 1.1),
    ("temperature", 0),
    *(
        ("cfg_interval", value)
        for value in (
            (1.0, 0.4),
            (-1, 1),
            (NAN, 1),
            (0, NAN),
            (0.4,),
            (0, 0.5, 1),
            (),
            0.4,
            "ab",
            ("0", "1"),
            (None, 1),
        )
    ),
    *(("cfg_renorm_type", value) for value in ("none", "Global", "", 1, ["global"])),
    *(("sigmas", value) for value in ([], [1.5], [0.0], [NAN], ["1"], [None], [[1.0]], 1.0, "abc", [0.2, 0.8])),
    *(("vae_sample_mode", value) for value in ("foo", "", None, ["sample"])),
    *(("output_type", value) for value in ("jpeg", "PIL", None, ["pil"])),
    *(("prompt", value) for value in ([], None, 1, [1], ["a", None], [["a"]], b"a", {"a": 1})),
    *(("generator", value) for value in (0, True, "cuda", [0], [], np.random.default_rng(0))),
    *(("attention_kwargs", value) for value in ("x", 1, [1])),
    *(("callback_on_step_end", value) for value in (1, "x")),
    *((name, torch.ones(2)) for name in ("think", "do_sample", "return_dict")),
    ("return_dict", np.ones((2, 2))),
    *(("callback_on_step_end_tensor_inputs", value) for value in (["prompt_embeds"], "latents", [1], 1)),
    *(
        ("latents", torch.zeros(shape))
        for shape in ((1, 4, 15), (4, 16), (1, 5, 16), (2, 4, 16), (0, 4, 16), (1, 16, 2, 2))
    ),
    *(
        ("latents", torch.zeros(1, 4, 16, dtype=dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64)
    ),
    *(("latents", value) for value in (np.zeros((1, 4, 16), np.float32), [1.0], "x")),
]

SQUARE = golden_image("square")
TWO = {"prompt": ["a", "b"]}
BAD_LISTS = {
    "images_of_two_prompts_for_one": ({"image": [[SQUARE], [SQUARE]]}, "`image`.*`prompt`"),
    "images_of_three_prompts_for_two": (TWO | {"image": [[SQUARE]] * 3}, "`image`.*`prompt`"),
    "images_of_one_prompt_for_two": (TWO | {"image": [[SQUARE]]}, "`image`.*`prompt`"),
    "three_flat_images_for_two_prompts": (TWO | {"image": [SQUARE] * 3}, "`image`.*`prompt`"),
    "batch_of_three_images_for_two_prompts": (TWO | {"image": torch.zeros(3, 3, 32, 32)}, "`image`.*`prompt`"),
    "two_flat_images_for_a_list_of_one_prompt": (
        {"prompt": ["a"], "image": [SQUARE, SQUARE]},
        "`image`.*`prompt`.*for each prompt",
    ),
    "images_three_deep": ({"image": [[[SQUARE]]]}, "`images?`"),
    "no_image_in_list": ({"image": [None]}, "`images?`"),
    "two_generators_for_one_image": ({"generator": [torch.Generator()] * 2}, "`generator`"),
    "one_generator_for_two_prompts": (TWO | {"generator": [torch.Generator()]}, "`generator`"),
    "two_generators_for_four_images": (
        TWO | {"num_images_per_prompt": 2, "generator": [torch.Generator()] * 2},
        "`generator`",
    ),
    "one_generator_for_two_conversations": (
        {"prompt": None, "messages": [conversation(["a"])] * 2, "generator": [torch.Generator()]},
        "`generator`",
    ),
    "latents_of_one_image_for_two": (TWO | {"latents": torch.zeros(1, 4, 16)}, "`latents`"),
    "prompt_and_messages": ({"messages": conversation(["a"])}, "`prompt` and `messages`"),
    "image_and_messages": (
        {"prompt": None, "image": SQUARE, "messages": conversation(["a"])},
        "`image` and `messages`",
    ),
    "image_without_prompt": ({"prompt": None, "image": SQUARE}, "`prompt`"),
    "placeholder_without_image": ({"prompt": SEEN}, "image"),
    "placeholder_beside_image": ({"prompt": SEEN, "image": SQUARE}, "image"),
    "long_prompt": ({"prompt": "abc " * 6000}, "(?i)prompt.*max_position_embeddings"),
    "long_messages": ({"prompt": None, "messages": conversation(["abc " * 6000])}, "max_position_embeddings"),
    "long_second_prompt": ({"prompt": ["a", "abc " * 6000]}, "(?i)prompt.*max_position_embeddings"),
    "bad_second_image": (TWO | {"image": [[SQUARE], [Image.new("RGB", (0, 5))]]}, "`images?`"),
}


HALF_A_CHARACTER = "\ud83d"


def draw(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    return pipe(**(SMALL | {"generator": torch.Generator().manual_seed(0)} | kwargs)).images


@pytest.fixture(scope="module")
def usual(pipe) -> torch.Tensor:
    """What a normal call gives."""
    return draw(pipe)


@pytest.fixture
def idle(pipe, monkeypatch):
    """Make the heavy parts fail if they run, for as long as a context lasts."""

    def late(*args, **kwargs):
        raise AssertionError("the bad input was not refused before the heavy work")

    class Idle:
        def __enter__(self):
            for owner, name in ((pipe.transformer, "forward"), (pipe.transformer, "generate"), (pipe.vae, "encode")):
                monkeypatch.setattr(owner, name, late)

        def __exit__(self, *error):
            monkeypatch.undo()

    return Idle()


@pytest.fixture
def refuse(pipe, idle, usual):
    """Call the pipeline with bad arguments: it must raise, name them, and stay as it was."""

    def call(match: str, pipeline: BagelPipeline = pipe, **kwargs) -> None:
        generator = torch.Generator().manual_seed(3)
        own_state, global_state = generator.get_state(), torch.get_rng_state()
        with idle, pytest.raises(REFUSED, match=match):
            pipeline(**(SMALL | {"generator": generator} | kwargs))
        assert torch.equal(generator.get_state(), own_state)
        assert torch.equal(torch.get_rng_state(), global_state)
        assert max_error(draw(pipe), usual) == 0.0

    return call


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=label)
def test_bad_argument_is_refused(name, value, refuse):
    # A plan is asked for where only its settings are bad.
    think = {"think": True} if name in ("max_think_tokens", "temperature") else {}
    refuse(f"`{name}`", **({name: value} | think))


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_arguments_that_do_not_fit_together_are_refused(kind, refuse):
    kwargs, match = BAD_LISTS[kind]
    refuse(match, **kwargs)


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.parametrize("argument", ["image", "messages"])
def test_bad_image_is_refused(argument, kind, refuse, tmp_path):
    image = BAD_IMAGES[kind](tmp_path)
    if argument == "image":
        refuse("`images?`", image=image)
    else:
        parts = [{"type": "text", "text": "a"}, {"type": "image", "image": image}]
        refuse("`(images?|messages)`", prompt=None, messages=[{"role": "user", "content": parts}])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1000, 3000])
@pytest.mark.parametrize("kind", LARGE_IMAGES)
def test_image_over_the_pixel_limit_is_refused(kind, limit, refuse):
    image = LARGE_IMAGES[kind]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refuse("`images?`.*limit", image=image)


@pytest.mark.parametrize("view", ["vae_size", "size"])
def test_image_larger_than_the_position_table_is_refused(view, pipe, refuse):
    processor = load_processor(**{view: edges([1024, 512, 16])})
    pipeline = BagelPipeline(pipe.transformer, pipe.vae, pipe.scheduler, processor)
    refuse("`images?`", pipeline=pipeline, image=SQUARE)


@pytest.mark.parametrize("content", ["", [], None], ids=repr)
def test_messages_that_say_nothing_are_refused(content, refuse):
    refuse(
        "`messages` holds a conversation without text and image",
        prompt=None,
        messages=[{"role": "user", "content": content}],
    )


@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_bad_messages_are_refused(kind, refuse):
    refuse("`(messages|images?)`", prompt=None, messages=BAD_MESSAGES[kind])


@pytest.mark.parametrize("name", ["interval", "warmup_steps", "max_order"])
@pytest.mark.parametrize("value", [-1, True, "3", 1.5, None], ids=repr)
def test_bad_taylorseer_setting_is_refused(name, value, pipe, usual):
    try:
        with pytest.raises(REFUSED, match=f"`{name}`"):
            pipe.enable_taylorseer(**{name: value})
        assert max_error(draw(pipe), usual) == 0.0
    finally:
        pipe.disable_taylorseer()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("bad_step", [0, 1, 2])
def test_latents_that_become_infinite_stop_the_loop(bad_step, value, pipe, usual):
    steps = []

    def spoil(pipeline, step, timestep, tensors):
        steps.append(step)
        if step == bad_step:
            tensors["latents"][-1, 0, 0] = value
        return tensors

    with pytest.raises(ValueError, match=rf"(NaN|infinite).*step {bad_step}\b"):
        draw(pipe, prompt=["a", "b"], generator=None, callback_on_step_end=spoil)
    assert steps == list(range(bad_step + 1))
    assert max_error(draw(pipe), usual) == 0.0


@pytest.mark.parametrize("value", [NAN, INF])
def test_infinite_noise_stops_the_loop(value, pipe, usual):
    noise = torch.randn(1, 4, 16)
    noise[0, 0, 0] = value
    given = noise.clone()
    with pytest.raises(ValueError, match=r"step 0\b|`latents`"):
        draw(pipe, latents=noise)
    assert torch.equal(noise.nan_to_num(), given.nan_to_num())
    assert max_error(draw(pipe), usual) == 0.0


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """The layout that `save_pretrained` writes."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


WEIGHTS = {
    "original_model": ("original", "ema.safetensors", PLAIN_TENSOR),
    "original_vae": ("original", "ae.safetensors", "decoder.up.1.block.0.conv1.weight"),
    "saved_model": ("saved", "transformer/model.safetensors", PLAIN_TENSOR),
    "saved_vae": ("saved", "vae/diffusion_pytorch_model.safetensors", "decoder.up_blocks.1.resnets.0.conv1.weight"),
}


@pytest.mark.parametrize("how", ["missing", "extra", "misshapen", "truncated"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_damaged_checkpoint_is_refused(weights, how, saved, tmp_path):
    layout, file, tensor = WEIGHTS[weights]
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT if layout == "original" else saved, folder)
    named = damage(folder / file, how, tensor)
    if how in ("missing", "misshapen"):
        # The VAE may be named in diffusers' terms.
        named = tensor.rsplit(".", 2)[-2]
    with pytest.raises(OSError if how == "truncated" else ValueError, match=re.escape(named)):
        BagelPipeline.from_pretrained(folder)


@pytest.mark.parametrize("how", ["missing", "misshapen", "flattened"])
@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.conv_out.weight",
    ],
)
def test_damaged_tensor_that_tells_the_vae_configuration_is_refused(name, how, pipe, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    damage(folder / "ae.safetensors", how, name)
    with pytest.raises(REFUSED, match=r"ae\.safetensors"):
        BagelPipeline.from_pretrained(folder, transformer=pipe.transformer, processor=pipe.processor)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("content", ["absent", "empty", "readme", "file", "no_vae"])
def test_folder_without_checkpoint_is_refused(content, tmp_path, offline):
    folder = tmp_path / content
    if content == "file":
        folder.write_text("no checkpoint", encoding="utf-8")
    elif content == "no_vae":
        shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("ae.safetensors"))
    elif content != "absent":
        folder.mkdir()
    if content == "readme":
        (folder / "README.md").write_text("no checkpoint", encoding="utf-8")
    with pytest.raises(REFUSED, match=re.escape(str(folder))):
        BagelPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nobody/no-such-bagel", None, 1], ids=repr)
def test_unknown_repository_is_refused(name, offline):
    with pytest.raises(REFUSED, match=re.escape(str(name))):
        BagelPipeline.from_pretrained(name)


@pytest.mark.parametrize(
    "given", [{"prompt": HALF_A_CHARACTER}, {"prompt": None, "messages": conversation([HALF_A_CHARACTER])}]
)
def test_text_that_is_no_unicode_is_refused(given, pipe, idle):
    with idle, pytest.raises(ValueError, match="A text holds half a character"):
        draw(pipe, **given)


@pytest.mark.parametrize("returned", [None, [], "latents"])
def test_what_a_callback_returns_is_checked(returned, pipe):
    with pytest.raises(TypeError, match="`callback_on_step_end` must return a dict"):
        draw(pipe, callback_on_step_end=lambda *args: returned)


@pytest.mark.parametrize("name", ["num_inference_steps", "attention_kwargs", "callback_on_step_end", "output_type"])
def test_errors_are_not_filled_with_data(name, pipe):
    with pytest.raises((TypeError, ValueError), match=name) as raised:
        draw(pipe, **{name: "a" * 5000})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_a_pipeline_without_a_vae_is_told_so_before_the_steps(output_type, own_pipe):
    own_pipe.register_modules(vae=None)
    steps = []

    def note(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    settings = {"height": 48, "width": 64, "num_inference_steps": 2, "callback_on_step_end": note}
    with pytest.raises(ValueError, match="no `vae` to decode with"):
        own_pipe("x", output_type=output_type, **settings)
    with pytest.raises(ValueError, match="encoded without a `vae`"):
        own_pipe("x", image=golden_image("square"), output_type="latent", **settings)
    assert not steps
    own_pipe("x", output_type="latent", **settings)
    assert steps == [0, 1]
