"""Original -> Hub -> original: nothing is lost, and both load as the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_bagel_to_hf import convert, main
from convert_hf_to_bagel import convert_back
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, golden_image, load_model, load_processor, run_snippets, turn
from transformers_bagel import BagelConfig, BagelForConditionalGeneration


def test_there_and_back_is_the_same_bit_for_bit(repository, tmp_path):
    convert_back(str(repository), tmp_path / "original")
    for name in ("ema.safetensors", "ae.safetensors"):
        assert (tmp_path / "original" / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "original" / name).read_bytes() == (CHECKPOINT / name).read_bytes()


def test_what_comes_back_says_the_original_less_its_mistakes(repository, tmp_path):
    convert_back(str(repository), tmp_path / "original")
    original = json.loads((CHECKPOINT / "config.json").read_text())
    back = json.loads((tmp_path / "original" / "config.json").read_text())
    original["llm_config"]["bos_token_id"] = 421
    original["max_latent_size"] = 8
    assert back == original
    for key in ("llm_config", "vit_config"):
        assert json.loads((tmp_path / "original" / f"{key}.json").read_text()) == original[key]
    weight_map = json.loads((tmp_path / "original" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"ema.safetensors"}
    # And again: what came back is read as the original.
    again, first = (BagelConfig.from_pretrained(path).to_dict() for path in (tmp_path / "original", CHECKPOINT))
    assert {**again, "_name_or_path": "", "transformers_weights": ""} == {
        **first,
        "_name_or_path": "",
        "transformers_weights": "",
    }


def test_diffusers_own_layout_goes_back_too(repository, tmp_path):
    BagelPipeline.from_pretrained(repository).save_pretrained(tmp_path / "saved")
    convert_back(str(tmp_path / "saved"), tmp_path / "original")
    for name in ("ema.safetensors", "ae.safetensors"):
        back, original = load_file(tmp_path / "original" / name), load_file(CHECKPOINT / name)
        assert back.keys() == original.keys()
        assert all(torch.equal(back[key], original[key]) for key in original)
    pipe = BagelPipeline.from_pretrained(tmp_path / "original", processor=load_processor())
    assert pipe.transformer.config.max_latent_size == 8


def test_every_reader_finds_the_same_model_in_the_repository(repository):
    inputs = load_processor().apply_chat_template(
        [turn("user", golden_image("wide"), "how many shapes?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    original = load_model()
    pipe = BagelPipeline.from_pretrained(repository)
    with torch.no_grad():
        expected = original(**inputs).logits
        for model in (
            BagelForConditionalGeneration.from_pretrained(repository),
            AutoModelForImageTextToText.from_pretrained(repository),
            pipe.transformer,
        ):
            assert torch.equal(model(**inputs).logits, expected)
    assert type(AutoProcessor.from_pretrained(repository)).__name__ == "BagelProcessor"


def test_pictures_are_the_same_through_both_layouts(repository):
    processor = load_processor()
    pictures = []
    for path in (CHECKPOINT, repository):
        pipe = BagelPipeline.from_pretrained(path, processor=processor)
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 3, "output_type": "np", "vae_sample_mode": "argmax"}
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe("make it red", image=golden_image("square"), generator=generator, **settings).images)
    # The VAE's convolutions may add in another order, as its weights lie otherwise in memory.
    assert abs(pictures[0] - pictures[1]).max() < 1e-5


def test_the_configuration_has_both_spellings(repository):
    written = json.loads((repository / "config.json").read_text())
    assert written["architectures"] == ["BagelForConditionalGeneration"] and written["model_type"] == "bagel"
    assert {"llm_config", "vit_config", "vae_config", "text_config", "vision_config"} <= written.keys()
    # The original code builds one layer fewer than it says.
    assert written["vit_config"]["num_hidden_layers"] == 3
    assert written["vision_config"]["num_hidden_layers"] == 2
    assert written["llm_config"]["bos_token_id"] == written["text_config"]["bos_token_id"] == 421
    # A reader of the one spelling and a reader of the other build the same model.
    alone = BagelConfig.from_dict({key: value for key, value in written.items() if key not in ("text_config",)})
    assert alone.text_config.hidden_size == BagelConfig.from_pretrained(repository).text_config.hidden_size


def test_mistakes_of_the_original_json_are_reported(tmp_path, capsys):
    assert main([str(CHECKPOINT), str(tmp_path / "repository")]) == 0
    said = capsys.readouterr().out
    assert "max_latent_size: the JSON says 4, the weights and the tokenizer 8." in said
    assert "llm_config.bos_token_id: the JSON says 420, the weights and the tokenizer 421." in said


def changed(folder: Path, **parts: dict) -> Path:
    """A copy of the golden checkpoint whose JSON says something else."""
    shutil.copytree(CHECKPOINT, folder)
    settings = json.loads((folder / "config.json").read_text())
    for name, values in parts.items():
        settings[name] |= values
        if (folder / f"{name}.json").exists():
            (folder / f"{name}.json").write_text(json.dumps(settings[name]))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_wrong_numbers_of_layers_are_corrected_and_reported(tmp_path, repository, capsys):
    wrong = changed(tmp_path / "wrong", llm_config={"num_hidden_layers": 28}, vit_config={"num_hidden_layers": 27})
    assert main([str(wrong), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "llm_config.num_hidden_layers: the JSON says 28, the weights and the tokenizer 3." in said
    assert "vit_config.num_hidden_layers: the JSON says 27, the weights and the tokenizer 3." in said
    written, right = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", repository))
    assert written == right


def test_generation_stops_at_the_right_tokens(repository):
    settings = json.loads((repository / "generation_config.json").read_text())
    tokenizer = AutoProcessor.from_pretrained(repository).tokenizer
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert [settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == ids


def test_the_repository_says_how_thoughts_are_told_from_words(repository):
    tokenizer = AutoTokenizer.from_pretrained(repository)
    said = tokenizer.parse_response("<think>I count.</think>two<|im_end|>", prefix="")
    assert said == {"role": "assistant", "reasoning_content": "I count.", "content": "two"}


def test_the_first_original_layout_without_a_config_json_gets_all_keys(tmp_path, repository):
    first = Path(shutil.copytree(CHECKPOINT, tmp_path / "first"))
    settings = json.loads((first / "config.json").read_text())
    (first / "config.json").unlink()
    # The publisher's files of the parts do not name the layer.
    del settings["llm_config"]["layer_module"]
    for name in ("llm_config", "vit_config"):
        (first / f"{name}.json").write_text(json.dumps(settings[name]))
    assert main([str(first), str(tmp_path / "out")]) == 0
    written, whole = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", repository))
    assert written["vae_config"] == whole["vae_config"] and written["vit_config"] == whole["vit_config"]


def test_the_type_of_a_repository_is_that_of_most_of_its_weights(tmp_path):
    mixed = Path(shutil.copytree(CHECKPOINT, tmp_path / "mixed"))
    weights = load_file(mixed / "ema.safetensors")
    save_file(
        {name: weight if "pos_embed" in name else weight.bfloat16() for name, weight in weights.items()},
        mixed / "ema.safetensors",
    )
    assert main([str(mixed), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_type_of_the_weights_can_be_chosen(name, tmp_path):
    assert main([str(CHECKPOINT), str(tmp_path / "repository"), "--dtype", name, "--verify"]) == 0
    dtype = getattr(torch, name)
    original = load_file(CHECKPOINT / "ema.safetensors")
    written = load_file(tmp_path / "repository" / "model.safetensors")
    assert all(torch.equal(written[key], original[key].to(dtype)) for key in original)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "repository", dtype="auto")
    assert model.dtype == dtype
    vae = load_file(tmp_path / "repository" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in vae.values()} == {dtype}


def test_the_card_names_what_was_corrected_and_its_snippets_run(repository, tmp_path, monkeypatch):
    card = ModelCard.load(repository / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "any-to-any")
    assert card.data.base_model == "ByteDance-Seed/BAGEL-7B-MoT"
    assert "- `max_latent_size`: 8 instead of 4" in card.text
    shutil.copytree(repository, tmp_path / "repository")
    # The original layout has no settings of images, and the tiny model takes small ones only.
    load_processor().save_pretrained(tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    variables = run_snippets(card.text)
    assert variables["edited"].size == variables["picture"].size


CARD = """---
license: mit
model-index:
- name: tuned
  results:
  - task: {type: text-to-image}
    dataset: {name: GenEval, type: geneval}
    metrics:
    - {type: overall, value: 0.5}
---
# tuned

Not taken over.

## Training details

4 steps.

## Benchmarks

| a | b |
|---|---|
| 1 | 2 |

## Usage

Not taken over.
"""


def test_the_card_takes_over_licence_training_and_evaluation(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "tuned")
    (tmp_path / "tuned" / "README.md").write_text(CARD)
    assert main([str(tmp_path / "tuned"), str(tmp_path / "repository"), "--repo-id", "org/tuned"]) == 0
    card = ModelCard.load(tmp_path / "repository" / "README.md")
    assert (card.data.license, card.data.model_name) == ("mit", "org/tuned")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("geneval", "overall", 0.5)
    assert "What follows is from the card of `tuned`." in card.text and str(tmp_path) not in card.content
    assert "## Training details\n\n4 steps.\n\n## Benchmarks\n\n| a | b |" in card.text
    assert "Not taken over" not in card.text


VAES = {
    "of_another_width": {"block_out_channels": (32, 64), "layers_per_block": 1},
    "without_attention_and_with_quantising_layers": {
        **{"block_out_channels": (32, 32, 64), "mid_block_add_attention": False},
        **{"use_quant_conv": True, "use_post_quant_conv": True},
    },
}


@pytest.mark.parametrize("kind", VAES)
def test_every_vae_that_the_original_layout_can_hold_goes_there_and_comes_back(kind, repository, tmp_path):
    settings = {"layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    settings |= {"use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024} | VAES[kind]
    levels = len(settings["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    vae = AutoencoderKL(down_block_types=down, up_block_types=up, **settings)
    source = Path(shutil.copytree(repository, tmp_path / "source"))
    shutil.rmtree(source / "vae")
    vae.save_pretrained(source / "vae")
    convert_back(str(source), tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "forth")
    there = AutoencoderKL.from_pretrained(tmp_path / "forth" / "vae").state_dict()
    assert there.keys() == vae.state_dict().keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in vae.state_dict().items())
