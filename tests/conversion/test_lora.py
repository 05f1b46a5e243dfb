"""LoRAs merged into repositories and taken from one format to the other: nothing of them is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from convert_lora import main as convert_lora
from huggingface_hub import ModelCard
from merge_lora import main as merge_lora
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_processor, max_error, run_snippets
from tests.diffusers_bagel.test_few_steps import save_adapter, steps_of
from tests.diffusers_bagel.test_lora import draw, make_pipe, save_diffusers, save_peft
from tests.transformers_bagel.test_adapter_checks import SPOILT, WRONG_SETTINGS, changed_lora
from tests.transformers_bagel.test_adapters import VARIANTS, adapted_model
from transformers_bagel import LORA_TARGETS, BagelForConditionalGeneration


def pipe_of(folder) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(folder, processor=load_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def files(folder) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_repository_draws_what_the_lora_drew(variant, repository, tmp_path):
    lora = save_peft(tmp_path / "lora", **VARIANTS[variant])
    assert merge_lora([str(repository), str(tmp_path / "merged"), "--loras", lora]) == 0
    pipe = make_pipe()
    plain = draw(pipe)
    pipe.load_lora_weights(lora)
    adapted = draw(pipe)
    assert max_error(adapted, plain) > 1e-2
    assert max_error(draw(pipe_of(tmp_path / "merged")), adapted) < 1e-4


def test_several_loras_are_weighted_and_rounded_once(repository, tmp_path):
    """The second one is in the other format, of another rank, and adapts other layers too."""
    first = save_peft(tmp_path / "first", seed=1, r=3, target_modules=LORA_TARGETS["gen"])
    second = save_diffusers(tmp_path / "second", adapted_model())
    command = [str(repository), str(tmp_path / "merged"), "--loras", first, second, "--scales", "0.5", "-1.5"]
    assert merge_lora(command) == 0
    pipe = make_pipe()
    pipe.load_lora_weights(first, adapter_name="first")
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, -1.5])
    pipe.fuse_lora(adapter_names=["first", "second"])
    pipe.unload_lora_weights()
    merged = BagelForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    fused = pipe.transformer.state_dict()
    assert max(max_error(merged[name], fused[name]) for name in fused) < 1e-5


def test_layers_without_a_lora_are_copied_bit_for_bit_and_so_is_the_rest(repository, tmp_path):
    lora = save_peft(tmp_path / "lora", target_modules=r".*layers\.1\.self_attn\.q_proj_moe_gen")
    assert merge_lora([str(repository), str(tmp_path / "merged"), "--loras", lora]) == 0
    assert files(tmp_path / "merged") == files(repository)
    changed = set()
    for file in sorted(repository.glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert before.keys() == after.keys()
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"}
    for name in ("config.json", "model_index.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (repository / name).read_bytes()


def test_coarse_weights_are_summed_in_float32(repository, tmp_path):
    lora = save_peft(tmp_path / "lora")
    model = BagelForConditionalGeneration.from_pretrained(repository, dtype=torch.bfloat16)
    pipe = make_pipe(model)
    pipe.save_pretrained(tmp_path / "coarse")
    assert merge_lora([str(tmp_path / "coarse"), str(tmp_path / "merged"), "--loras", lora]) == 0
    exact = make_pipe(
        BagelForConditionalGeneration.from_pretrained(tmp_path / "coarse" / "transformer", dtype=torch.float32)
    )
    exact.load_lora_weights(lora)
    exact.fuse_lora()
    exact.unload_lora_weights()
    merged = BagelForConditionalGeneration.from_pretrained(tmp_path / "merged" / "transformer", dtype="auto")
    assert merged.dtype == torch.bfloat16
    for name, weight in exact.transformer.state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight.to(torch.bfloat16)), name


@pytest.mark.parametrize("layout", ["flat", "in parts"])
@pytest.mark.parametrize(("scales", "steps"), [(["1", "1"], 3), (["0", "1"], 2), (["1", "0"], 3)], ids=str)
def test_a_merge_draws_in_the_steps_that_its_first_lora_was_made_for(
    layout, scales, steps, repository, tmp_path, capsys
):
    source = repository
    if layout == "in parts":
        source = tmp_path / "repository"
        pipe_of(repository).save_pretrained(source)
    loras = [save_adapter(tmp_path / f"of {number}", number) for number in (3, 2)]
    command = [str(source), str(tmp_path / "merged"), "--loras", *loras, "--scales", *scales]
    assert merge_lora(command) == 0
    assert len(steps_of(pipe_of(tmp_path / "merged"))) == steps
    told = capsys.readouterr()
    assert f"By default it draws in {steps} steps." in told.out and "other weights" not in told.err
    assert ("were each made for few steps" in told.err) == (scales == ["1", "1"])
    assert f"draw in {steps} steps, guidance included" in (tmp_path / "merged" / "README.md").read_text()


def test_a_merge_of_a_merge_keeps_the_steps_and_tells_what_is_of_another_model(repository, tmp_path, capsys):
    lora, plain = save_adapter(tmp_path / "lora", 3), save_peft(tmp_path / "plain")
    assert merge_lora([str(repository), str(tmp_path / "once"), "--loras", lora]) == 0
    assert merge_lora([str(tmp_path / "once"), str(tmp_path / "twice"), "--loras", plain]) == 0
    assert capsys.readouterr().out.count("By default it draws in 3 steps.") == 2
    assert len(steps_of(pipe_of(tmp_path / "twice"))) == 3
    assert merge_lora([str(tmp_path / "once"), str(tmp_path / "thrice"), "--loras", lora]) == 0
    assert "was made for a model with other weights" in capsys.readouterr().err


def test_a_few_step_lora_keeps_its_steps_from_format_to_format(tmp_path):
    lora = save_adapter(tmp_path / "lora", 3)
    assert convert_lora([lora, str(tmp_path / "peft"), "--to", "peft", "--base-model", "bagel"]) == 0
    assert convert_lora([str(tmp_path / "peft"), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    pipes = [make_pipe() for _ in range(3)]
    for pipe, folder in zip(pipes, (lora, tmp_path / "peft", tmp_path / "back"), strict=True):
        pipe.load_lora_weights(folder)
    assert pipes[0].few_steps == pipes[1].few_steps == pipes[2].few_steps
    assert len(steps_of(pipes[1])) == 3
    assert torch.equal(draw(pipes[0]), draw(pipes[1])) and torch.equal(draw(pipes[0]), draw(pipes[2]))


@pytest.mark.parametrize("layout", ["flat", "in parts"])
def test_the_card_of_a_merge_says_of_what_and_its_snippets_run(layout, repository, tmp_path, monkeypatch):
    source, lora = repository, save_peft(tmp_path / "lora")
    if layout == "in parts":
        source = tmp_path / "repository"
        pipe_of(repository).save_pretrained(source)
    assert merge_lora([str(source), str(tmp_path / "merged"), "--loras", lora, "--scales", "0.7"]) == 0
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == ["repository", "lora"] and card.data.base_model_relation == "merge"
    assert "- `lora`, 0.7 times its own strength" in card.text
    # Said by the source's card, if there is one.
    assert card.data.license == ("apache-2.0" if layout == "flat" else None)
    if layout == "flat":
        load_processor().save_pretrained(tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    assert {"edited", "ids"} <= run_snippets(card.text).keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_peft_to_diffusers_and_back_every_tensor_and_setting_is_the_same(variant, tmp_path):
    first = save_peft(tmp_path / "first", **VARIANTS[variant])
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert_lora([first, str(there), "--to", "diffusers", "--base-model", str(CHECKPOINT)]) == 0
    assert files(there) == {"pytorch_lora_weights.safetensors", "README.md"}
    assert convert_lora([str(there), str(back), "--to", "peft"]) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "first", back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    pictures = []
    for folder in (first, there, back):
        pipe = make_pipe()
        pipe.load_lora_weights(str(folder))
        pictures.append(draw(pipe))
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])


def test_what_is_exported_loads_in_peft_itself(tmp_path):
    from peft import PeftModel

    model = adapted_model()
    lora = save_diffusers(tmp_path / "lora", model)
    assert convert_lora([lora, str(tmp_path / "peft"), "--to", "peft", "--base-model", str(CHECKPOINT)]) == 0
    wrapped = PeftModel.from_pretrained(BagelForConditionalGeneration.from_pretrained(CHECKPOINT), tmp_path / "peft")
    assert max_error(draw(make_pipe(wrapped.get_base_model())), draw(make_pipe(model))) < 1e-5


def test_alphas_among_the_tensors_are_multiplied_in(tmp_path):
    lora = save_diffusers(tmp_path / "lora", adapted_model(), metadata=False)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    modules = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}
    save_file(weights | {f"{module}.alpha": torch.tensor(12.0) for module in modules}, file)
    assert convert_lora([lora, str(tmp_path / "peft"), "--to", "peft", "--base-model", str(CHECKPOINT)]) == 0
    pictures = []
    for folder in (lora, str(tmp_path / "peft")):
        pipe = make_pipe()
        pipe.load_lora_weights(folder)
        pictures.append(draw(pipe))
    assert max_error(pictures[0], pictures[1]) < 1e-5


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_the_card_shows_prompts_and_pictures_and_its_snippets_run(to, repository, tmp_path, monkeypatch):
    shutil.copytree(repository, tmp_path / "base")
    load_processor().save_pretrained(tmp_path / "base")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "star.png")
    monkeypatch.chdir(tmp_path)
    lora = save_peft(tmp_path / "lora")
    sample = ["--sample", 'a sign | that says "red"', "star.png", "--sample", "another", "star.png"]
    assert convert_lora([lora, "coal", "--to", to, "--base-model", "base", *sample]) == 0
    card = ModelCard.load("coal/README.md")
    assert (card.data.base_model, card.data.library_name) == ("base", to)
    assert {"lora", "bagel"} <= set(card.data.tags)
    assert [
        entry.output_url if hasattr(entry, "output_url") else entry["output"]["url"] for entry in card.data.widget
    ] == [
        "pictures/0.png",
        "pictures/1.png",
    ]
    assert r'| a sign \| that says "red" | ![a sign \| that says "red"](pictures/0.png) |' in card.text
    assert (tmp_path / "coal" / "pictures" / "1.png").read_bytes() == (tmp_path / "star.png").read_bytes()
    assert ("model" in run_snippets(card.text)) == (to == "peft")


def failed(command, arguments: list[str], folder, capsys) -> str:
    assert command(arguments) == 2
    assert not folder.exists() and not list(folder.parent.glob("*.unfinished"))
    return capsys.readouterr().err


def test_bad_loras_are_refused_and_nothing_is_written(repository, tmp_path, capsys):
    merged = tmp_path / "merged"
    nowhere, elsewhere = str(tmp_path / "nowhere"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file(
        {"transformer.some.layer.lora_A.weight": torch.zeros(2, 2)}, elsewhere / "pytorch_lora_weights.safetensors"
    )
    for lora, message in ((nowhere, "no LoRA weights"), (str(elsewhere), "transformer's layers")):
        assert message in failed(merge_lora, [str(repository), str(merged), "--loras", lora], merged, capsys)
    assert "no LoRA weights" in failed(convert_lora, [nowhere, str(merged), "--to", "peft"], merged, capsys)


def test_a_lora_that_breaks_the_weights_is_refused_and_nothing_is_written(repository, tmp_path, capsys):
    lora = tmp_path / "lora"
    save_peft(lora)
    weights = load_file(lora / "adapter_model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, lora / "adapter_model.safetensors")
    merged = tmp_path / "merged"
    assert "NaN" in failed(merge_lora, [str(repository), str(merged), "--loras", str(lora)], merged, capsys)


def test_arguments_are_checked_before_anything_is_read(repository, tmp_path, capsys):
    merged = tmp_path / "merged"
    lora = save_peft(tmp_path / "lora")
    with pytest.raises(SystemExit):
        merge_lora([str(repository), str(merged), "--loras", lora, "--scales", "1", "2"])
    assert "one number for each LoRA: 1, got 2" in capsys.readouterr().err
    arguments = [lora, str(merged), "--to", "peft"]
    assert "no picture" in failed(convert_lora, [*arguments, "--sample", "a", "nowhere.png"], merged, capsys)
    without = save_diffusers(tmp_path / "without", adapted_model(), metadata=False)
    assert "--base-model" in failed(convert_lora, [without, *arguments[1:]], merged, capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    assert merge_lora([str(repository), str(tmp_path / "mine"), "--loras", lora]) == 2
    assert convert_lora([lora, str(tmp_path / "mine"), "--to", "peft", "--base-model", "base"]) == 2
    assert capsys.readouterr().err.count("is not empty") == 2


def test_a_link_out_of_a_loras_folder_is_refused(repository, tmp_path, capsys):
    lora = tmp_path / "lora"
    save_peft(lora)
    shutil.move(lora / "adapter_model.safetensors", tmp_path / "outside")
    (lora / "adapter_model.safetensors").symlink_to(tmp_path / "outside")
    merged = tmp_path / "merged"
    assert "leads out" in failed(merge_lora, [str(repository), str(merged), "--loras", str(lora)], merged, capsys)
    assert "leads out" in failed(convert_lora, [str(lora), str(merged), "--to", "diffusers"], merged, capsys)


def test_pickles_are_not_read_as_loras(repository, tmp_path, capsys):
    torch.save({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.bin")
    merged = tmp_path / "merged"
    assert "no LoRA weights" in failed(
        merge_lora,
        [str(repository), str(merged), "--loras", str(tmp_path / "pytorch_lora_weights.bin")],
        merged,
        capsys,
    )


@pytest.mark.parametrize("what", [*SPOILT, *WRONG_SETTINGS])
def test_what_is_wrong_with_a_lora_stops_merging_and_converting(what, repository, tmp_path, capsys):
    save_peft(tmp_path / "right")
    weights = SPOILT[what][0] if what in SPOILT else None
    settings = WRONG_SETTINGS[what][0] if what in WRONG_SETTINGS else None
    lora = str(changed_lora(tmp_path / "right", tmp_path / "lora", weights, settings))
    message = (SPOILT | WRONG_SETTINGS)[what][1]
    merged = tmp_path / "merged"
    assert re.search(message, failed(merge_lora, [str(repository), str(merged), "--loras", lora], merged, capsys))
    if what == "a layer of another model":
        # Without the base nobody knows how many layers it has, and those between are missing.
        message = r"layers\.10\..* missing"
    assert re.search(message, failed(convert_lora, [lora, str(merged), "--to", "diffusers"], merged, capsys))


def test_missing_layers_are_accepted_by_name(repository, tmp_path):
    save_peft(tmp_path / "right")
    lora = str(changed_lora(tmp_path / "right", tmp_path / "lora", SPOILT["one expert"][0]))
    merged, converted = tmp_path / "merged", tmp_path / "converted"
    assert merge_lora([str(repository), str(merged), "--loras", lora, "--allow-missing-layers"]) == 0
    assert convert_lora([lora, str(converted), "--to", "diffusers", "--allow-missing-layers"]) == 0
    pipe = make_pipe()
    pipe.load_lora_weights(converted, allow_missing_layers=True)
    assert max_error(draw(pipe_of(merged)), draw(pipe)) < 1e-4


def test_a_source_that_lacks_an_adapted_tensor_is_not_merged(repository, tmp_path, capsys):
    source = Path(shutil.copytree(repository, tmp_path / "source"))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        save_file({key: weight for key, weight in weights.items() if key != name}, file, {"format": "pt"})
    merged = tmp_path / "merged"
    command = [str(source), str(merged), "--loras", save_peft(tmp_path / "lora")]
    assert "self_attn.q_proj.weight" in failed(merge_lora, command, merged, capsys)


def test_sums_that_the_weights_cannot_hold_are_refused(repository, tmp_path, capsys):
    model = BagelForConditionalGeneration.from_pretrained(repository, dtype=torch.float16)
    make_pipe(model).save_pretrained(tmp_path / "coarse")
    lora = save_peft(tmp_path / "lora")
    merged = tmp_path / "merged"
    command = [str(tmp_path / "coarse"), str(merged), "--loras", lora, "--scales", "1e7"]
    assert "beyond the numbers of torch.float16" in failed(merge_lora, command, merged, capsys)
    with pytest.raises(SystemExit):
        merge_lora([*command[:-1], "nan"])
