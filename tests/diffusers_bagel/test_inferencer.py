"""The published inferencer's interface: equal to what its own code computed (set `a`), and to the pipeline."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_bagel import InterleaveInferencer
from diffusers_bagel.inferencer import ImageTransform
from tests.conftest import CASES, GOLDEN, golden_image, max_error
from tests.diffusers_bagel.conftest import golden_arguments


# Of `interleave_inference`, by the published names.
SMALL = {"num_timesteps": 3, "image_shapes": (48, 64)}


@pytest.fixture
def inferencer(pipe) -> InterleaveInferencer:
    inferencer = InterleaveInferencer(pipe)
    # The golden set encodes the mean.
    inferencer.vae_sample_mode = "argmax"
    return inferencer


def inputs(case: dict) -> list[str | Image.Image]:
    return [
        Image.open(GOLDEN / "inputs" / f"{item[1:]}.png") if item.startswith("@") else item for item in case["inputs"]
    ]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("case", CASES["image"], ids=lambda case: case["key"])
def test_pictures_are_the_published_ones_and_those_of_the_pipeline(case, inferencer, golden, forwards):
    settings = case["params"] | {"image_shapes": case["shape"], "think": case.get("think", False)}
    if settings["think"]:
        settings["max_think_token_n"] = case["max_think_tokens"]
    seen = forwards(inferencer.pipe)
    torch.manual_seed(case["noise_seed"])
    *texts, image = inferencer.interleave_inference(inputs(case), **settings)
    assert (
        max_error(seen.denoising[0]["latents"][: len(golden[f"{case['key']}.noise"])], golden[f"{case['key']}.noise"])
        == 0
    )
    assert np.abs(levels(image) - golden[f"{case['key']}.image"].numpy().astype(int)).max() <= 1
    assert texts == ([case["think_text"]] if case.get("think") else [])

    shim_branches, pipe = sum(seen.branches), copy.copy(inferencer.pipe)
    if settings.get("enable_taylorseer"):
        pipe.enable_taylorseer()
    torch.manual_seed(case["noise_seed"])
    ours = pipe(**golden_arguments(case), timestep_shift=settings["timestep_shift"]).images[0]
    assert np.abs(levels(image) - levels(ours)).max() <= 1
    # A branch that equals the full context is computed once, though it was read by itself.
    assert sum(seen.branches) == 2 * shim_branches


@pytest.mark.parametrize("case", CASES["text"], ids=lambda case: case["key"])
def test_texts_are_the_published_ones(case, inferencer):
    settings = {"understanding_output": True, "think": case.get("think", False)}
    answer = inferencer.interleave_inference(inputs(case), max_think_token_n=case["max_length"], **settings)
    assert answer == [case["text"]]


@pytest.mark.parametrize("case", CASES["image"], ids=lambda case: case["key"])
def test_contexts_have_the_published_lengths_and_positions(case, inferencer):
    """By the methods that scripts of their own call, copies in between."""
    full, no_image = inferencer.init_gen_context(), inferencer.init_gen_context()
    no_text = copy.deepcopy(full)
    if case.get("think"):
        prompt = "You should first think about the planning process in the mind and then generate the image. \nThe planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
        full, no_image = (inferencer.update_context_text(prompt, context) for context in (full, no_image))
    for item in inputs(case):
        if isinstance(item, str):
            no_text = copy.deepcopy(full)
            full, no_image = (inferencer.update_context_text(item, context) for context in (full, no_image))
        else:
            full = inferencer.update_context_image(
                inferencer.vae_transform.resize_transform(item.convert("RGB")), full
            )
            no_text = copy.deepcopy(full)
    if case.get("think"):
        text = inferencer.gen_text(full, case["max_think_tokens"], do_sample=False)
        assert text == case["think_text"]
        full = inferencer.update_context_text(text, full)
    for name, context in (("gen", full), ("no_text", no_text), ("no_image", no_image)):
        assert (context["kv_lens"], context["ropes"]) == ([case["kv_lens"][name]], [case["ropes"][name]])


def test_a_call_gives_a_dict_with_what_there_is(inferencer, caplog):
    image = golden_image("wide")
    assert inferencer(text="a", **SMALL)["image"].size == (64, 48) and inferencer(text="a", **SMALL)["text"] is None
    thought = inferencer(image=image, text="a", think=True, max_think_token_n=4, **SMALL)
    assert thought["text"] and thought["image"].size == (128, 80)
    seen = inferencer(image=image, text="what?", understanding_output=True, max_think_token_n=4)
    assert seen["image"] is None and seen["text"]
    assert inferencer() == {"image": None, "text": None}


def test_defaults_are_the_published_ones():
    published = {
        "interleave_inference": {
            "think": False,
            "understanding_output": False,
            "max_think_token_n": 1000,
            "do_sample": False,
            "text_temperature": 0.3,
            "cfg_text_scale": 3.0,
            "cfg_img_scale": 1.5,
            "cfg_interval": (0.4, 1.0),
            "timestep_shift": 3.0,
            "num_timesteps": 50,
            "cfg_renorm_min": 0.0,
            "cfg_renorm_type": "global",
            "image_shapes": (1024, 1024),
            "enable_taylorseer": False,
        },
        "gen_image": {
            "cfg_text_scale": 4.0,
            "cfg_img_scale": 1.5,
            "cfg_text_precontext": None,
            "cfg_img_precontext": None,
            "cfg_interval": (0.4, 1.0),
            "cfg_renorm_min": 0.0,
            "cfg_renorm_type": "global",
            "num_timesteps": 50,
            "timestep_shift": 3.0,
            "enable_taylorseer": False,
        },
        "gen_text": {"max_length": 500, "do_sample": True, "temperature": 1.0},
        "update_context_image": {"vae": True, "vit": True},
        "__call__": {"image": None, "text": None},
    }
    for name, expected in published.items():
        parameters = inspect.signature(getattr(InterleaveInferencer, name)).parameters.values()
        assert {own.name: own.default for own in parameters if own.default is not own.empty} == expected
    names = ["model", "vae_model", "tokenizer", "vae_transform", "vit_transform", "new_token_ids"]
    assert list(inspect.signature(InterleaveInferencer).parameters) == names


def test_a_context_stays_while_copies_of_it_grow(inferencer):
    context = inferencer.update_context_text("a red circle", inferencer.init_gen_context())
    before = inferencer.gen_text(context, 8, do_sample=False)
    copied = copy.deepcopy(context)
    inferencer.update_context_image(golden_image("tall"), copied)
    assert copied["kv_lens"][0] > context["kv_lens"][0]
    assert inferencer.gen_text(context, 8, do_sample=False) == before
    assert inferencer.update_context_text("b", context) is context


def test_images_are_read_as_asked_for(inferencer):
    lengths = {}
    for name, settings in {"vae": {"vit": False}, "vit": {"vae": False}, "both": {}}.items():
        context = inferencer.update_context_image(golden_image("wide"), inferencer.init_gen_context(), **settings)
        lengths[name] = context["kv_lens"][0]
        assert context["ropes"] == [2 if name == "both" else 1]
    assert lengths["both"] == lengths["vae"] + lengths["vit"]


def test_transforms_of_the_caller_count(pipe, forwards):
    inferencer = InterleaveInferencer(
        pipe,
        pipe.vae,
        pipe.processor.tokenizer,
        ImageTransform(64, 32, 16),
        ImageTransform(56, 28, 14),
        {"bos_token_id": 0},
    )
    seen = forwards(pipe)
    image = inferencer(image=golden_image("wide"), text="a", num_timesteps=2)["image"]
    assert max(image.size) == 64
    assert inferencer.new_token_ids == CASES["token_ids"]
    layouts = [own["layout"] for own in seen.reading if len(own["layout"].image_grid_hw)]
    assert max(layouts[0].image_grid_hw[0].tolist()) == 4 and max(layouts[0].latent_grid_hw[0].tolist()) == 4


def test_sampled_texts_follow_torch_and_the_temperature_alone(own_pipe):
    inferencer = InterleaveInferencer(own_pipe)
    context = inferencer.update_context_text("a", inferencer.init_gen_context())

    def sampled(seed: int) -> str:
        torch.manual_seed(seed)
        return inferencer.gen_text(context, 12)

    expected = sampled(1)
    assert sampled(2) != expected
    # Of one of these the likeliest token would be left.
    config = own_pipe.transformer.generation_config
    config.top_k, config.top_p, config.repetition_penalty = 1, 0.01, 5.0
    assert sampled(1) == expected


def test_taylorseer_belongs_to_a_call(own_pipe):
    inferencer = InterleaveInferencer(own_pipe)

    def drawn(**settings) -> np.ndarray:
        torch.manual_seed(0)
        return levels(inferencer(text="a red circle", num_timesteps=12, image_shapes=(64, 64), **settings)["image"])

    exact = drawn()
    assert (drawn(enable_taylorseer=True) != exact).any()
    assert (drawn() == exact).all()
    own_pipe.enable_taylorseer()
    assert (drawn() == exact).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_lists": ["a", 3]}, ValueError, "`input_lists` must hold texts and PIL images, got 3"),
        ({"num_timesteps": 1}, ValueError, "`num_timesteps` must be at least 2"),
        ({"image_shapes": (50, 64)}, ValueError, "`image_shape` must be a multiple of 16"),
        ({"image_shapes": 64}, TypeError, "`image_shape` must be a height and a width"),
        ({"cfg_renorm_type": "local"}, ValueError, "`cfg_renorm_type` must be one of global, channel, text_channel"),
        ({"cfg_interval": 0.4}, TypeError, "`cfg_interval` must be a pair"),
        ({"timestep_shift": 0}, ValueError, "`timestep_shift` must be a number of at least"),
        ({"max_think_token_n": 1}, ValueError, "`max_length` must be at least 2"),
        ({"do_sample": True, "text_temperature": 0}, ValueError, "`temperature` must be a number of at least"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(arguments, error, message, inferencer, forwards):
    seen = forwards(inferencer.pipe)
    with pytest.raises(error, match=message):
        inferencer.interleave_inference(**({"input_lists": ["a"]} | SMALL | arguments))
    assert not (seen.reading or seen.writing or seen.denoising)


def test_a_temperature_of_nothing_is_that_of_the_likeliest_tokens(inferencer):
    asked = {"text": "a", "understanding_output": True, "max_think_token_n": 6}
    assert inferencer(**asked, text_temperature=0) == inferencer(**asked)


def test_misuse_is_named(inferencer, model):
    with pytest.raises(TypeError, match="`model` must be a `BagelPipeline`"):
        InterleaveInferencer(model)
    with pytest.raises(ValueError, match="`vit_transform` must have the model's stride of 14, got 16"):
        InterleaveInferencer(inferencer.pipe, vit_transform=ImageTransform(64, 32, 16))
    context = inferencer.init_gen_context()
    with pytest.raises(ValueError, match="`vae` and `vit` are both false"):
        inferencer.update_context_image(golden_image("wide"), context, vae=False, vit=False)
    with pytest.raises(ValueError, match="`cfg_text_precontext` is needed"):
        inferencer.gen_image((48, 64), context)
    with pytest.raises(ValueError, match="`cfg_img_precontext` is needed"):
        inferencer.gen_image((48, 64), context, cfg_text_precontext=context)
    assert inferencer.gen_image((48, 64), context, cfg_text_scale=1.0, num_timesteps=2).size == (64, 48)
