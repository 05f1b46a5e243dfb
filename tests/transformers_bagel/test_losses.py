"""Losses and gradients of packed samples: means, weights, missing modalities, frozen parts, samples kept apart."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import load_model, max_error, training_samples, turn
from tests.host_reads import HostReads
from transformers_bagel import BagelForConditionalGeneration, loss_totals
from transformers_bagel.sequence import LATENT_TOKEN
from transformers_bagel.training.collator import fill_rows
from transformers_bagel.training.losses import next_labels


ALL = ("edit", "look", "chat", "draw", "talk")


@pytest.fixture(scope="session")
def loaded() -> BagelForConditionalGeneration:
    return load_model()


@pytest.fixture
def fresh(loaded):
    """A model of one's own, in training mode; settings go into its configuration."""

    def make(**settings) -> BagelForConditionalGeneration:
        model = copy.deepcopy(loaded).train()
        for name, value in settings.items():
            setattr(model.config, name, value)
        return model

    return make


@pytest.fixture
def encode_samples(collate):
    """Samples with fixed choices, and what packs them."""

    def make(*names: str, **kwargs):
        collator = collate(**kwargs)
        return collator, [collator.encode(sample, seed) for seed, sample in enumerate(training_samples(*names))]

    return make


@pytest.fixture
def batch_of(encode_samples):
    def make(*names: str, **kwargs) -> dict:
        collator, samples = encode_samples(*names, **kwargs)
        return dict(collator.pack(samples))

    return make


def gradients(model: BagelForConditionalGeneration) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def backward(model: BagelForConditionalGeneration, batch: dict, **kwargs) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**batch, **kwargs).loss.backward()
    return gradients(model)


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert (grad is None) == (theirs[name] is None), name
        if grad is not None:
            assert max_error(grad, theirs[name]) <= tolerance, name


def errors_by_sample(model, batch: dict) -> tuple[list[list[float]], list[list[float]]]:
    """Cross-entropies and squared errors of every sample, token by token, from the model's plain outputs."""
    with torch.no_grad():
        outputs = model.eval()(**batch)
    documents, labels = batch["document_ids"], batch["labels"]
    count = int(documents.max()) + 1
    texts: list[list[float]] = [[] for _ in range(count)]
    latents: list[list[float]] = [[] for _ in range(count)]
    for row in range(documents.shape[0]):
        for place in range(documents.shape[1] - 1):
            sample, target = int(documents[row, place]), int(labels[row, place + 1])
            if target != -100 and documents[row, place + 1] == sample:
                scores = outputs.logits[row, place]
                texts[sample].append(float(scores.logsumexp(-1) - scores[target]))
    owners = documents[batch["mm_token_type_ids"] == LATENT_TOKEN].tolist()
    lengths = batch["latent_grid_hw"].prod(-1).tolist()
    steps = [step for step, length in zip(batch["timesteps"].tolist(), lengths, strict=True) for _ in range(length)]
    targets = batch["noise"] - batch["latents"]
    for place, (owner, step) in enumerate(zip(owners, steps, strict=True)):
        if step > 0:
            latents[owner].append(float((outputs.velocity[place] - targets[place]).square().mean()))
    return texts, latents


def mean_of(samples: list[list[float]], reduction: str) -> float:
    samples = [errors for errors in samples if errors]
    if reduction == "token":
        return sum(map(sum, samples)) / sum(map(len, samples))
    if reduction == "sample":
        return sum(sum(errors) / len(errors) for errors in samples) / len(samples)
    return sum(sum(errors) / len(errors) ** 0.5 for errors in samples) / sum(len(errors) ** 0.5 for errors in samples)


# ---- Means


@pytest.mark.parametrize("max_tokens", [None, 200])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["token", "sample", "square_root"])
def test_losses_are_the_means_of_their_reduction(reduction, training, max_tokens, fresh, batch_of):
    batch = batch_of(*ALL, max_tokens=max_tokens, next_action="none")
    assert (len(batch["input_ids"]) > 1) == (max_tokens is not None)
    texts, latents = errors_by_sample(fresh(), batch)
    # Samples of different lengths, or the reductions would agree.
    assert len(set(map(len, filter(None, texts)))) > 2
    assert len(set(map(len, filter(None, latents)))) > 1
    outputs = fresh(loss_reduction=reduction).train(training)(**batch)
    assert outputs.ce_loss.item() == pytest.approx(mean_of(texts, reduction), abs=1e-5)
    assert outputs.mse_loss.item() == pytest.approx(mean_of(latents, reduction), abs=1e-5)
    assert outputs.loss.item() == pytest.approx(outputs.ce_loss.item() + outputs.mse_loss.item(), abs=1e-5)


def test_reductions_differ(fresh, batch_of):
    batch = batch_of(*ALL)
    losses = [fresh(loss_reduction=name)(**batch) for name in ("token", "sample", "square_root")]
    assert len({round(loss.ce_loss.item(), 4) for loss in losses}) == 3
    assert len({round(loss.mse_loss.item(), 4) for loss in losses}) == 3


def test_without_document_ids_a_sequence_is_a_sample(fresh, collate):
    batches = [collate()(training_samples(name)) for name in ("talk", "chat")]
    row = dict(batches[0])
    del row["document_ids"]
    for reduction in ("token", "sample"):
        model = fresh(loss_reduction=reduction)
        assert model(**row).loss.item() == pytest.approx(model(**batches[0]).loss.item(), abs=1e-5)


def test_weights_make_the_loss_of_the_two(fresh, batch_of):
    outputs = fresh(ce_weight=0.25, mse_weight=3.0)(**batch_of("look", "draw"))
    expected = 0.25 * outputs.ce_loss.item() + 3.0 * outputs.mse_loss.item()
    assert outputs.loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sample", "square_root"])
def test_micro_batches_with_their_total_are_one_batch(reduction, fresh, encode_samples):
    collator, samples = encode_samples(*ALL)
    whole = collator.pack(samples)
    parts = [collator.pack(samples[start:stop]) for start, stop in ((0, 1), (1, 3), (3, 5))]
    model = fresh(loss_reduction=reduction)
    totals = sum(loss_totals(part, reduction) for part in parts)
    assert torch.allclose(totals, loss_totals(whole, reduction))
    expected, expected_gradients = model(**whole), copy.deepcopy(backward(model, whole))
    model.zero_grad()
    outputs = [model(**part, loss_totals=totals) for part in parts]
    for name in ("loss", "ce_loss", "mse_loss"):
        ours = sum(getattr(output, name).item() for output in outputs)
        assert ours == pytest.approx(getattr(expected, name).item(), abs=1e-5)
    sum(output.loss for output in outputs).backward()
    assert_close(gradients(model), expected_gradients)


def test_totals_count_targets(batch_of):
    batch = batch_of(*ALL)
    targets = (batch["labels"] != -100).sum().item()
    noised = batch["latent_grid_hw"].prod(-1)[batch["timesteps"] > 0].sum().item()
    assert loss_totals(batch).tolist() == [targets, noised]
    # Three of the five samples have texts to learn, three have drawings.
    assert loss_totals(batch, "sample").tolist() == pytest.approx([3, 3])
    texts, latents = loss_totals(batch_of("look", "talk")).tolist()
    assert texts > 0
    assert latents == 0


def test_a_number_of_items_divides_the_loss_of_texts_alone(fresh, batch_of):
    batch = batch_of("look", "draw")
    model = fresh()
    expected, totals = model(**batch), loss_totals(batch)
    for number in (int(2 * totals[0]), 2 * totals[0], (2 * totals[:1]).unsqueeze(0)):
        outputs = model(**batch, num_items_in_batch=number)
        assert outputs.ce_loss.item() == pytest.approx(expected.ce_loss.item() / 2, abs=1e-6)
        assert outputs.mse_loss.item() == pytest.approx(expected.mse_loss.item(), abs=1e-6)
        assert outputs.loss.item() == pytest.approx(outputs.ce_loss.item() + outputs.mse_loss.item(), abs=1e-6)
    both = model(**batch, num_items_in_batch=2 * totals)
    assert both.loss.item() == pytest.approx(expected.loss.item() / 2, abs=1e-6)


@pytest.mark.parametrize(("name", "numbers"), [("loss_totals", [1.0]), ("num_items_in_batch", [1.0, 2.0, 3.0])])
def test_any_other_number_of_totals_is_named(name, numbers, fresh, batch_of):
    with pytest.raises(ValueError, match=f"`{name}`"):
        fresh()(**batch_of("talk"), **{name: torch.tensor(numbers)})


def test_a_forward_asks_no_other_rank(fresh, batch_of, tmp_path):
    # Of two ranks only this one computes a loss, as a main process does that logs; a collective would wait for ever.
    batch, model = batch_of("look", "draw"), fresh()
    expected = model(**batch).loss.item()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    called = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                called.append(func)
                raise RuntimeError("a collective in forward")
            return func(*args, **(kwargs or {}))

    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        with Mode():
            assert model(**batch).loss.item() == expected
    finally:
        torch.distributed.destroy_process_group()
    assert called == []


# ---- What is to be predicted


@pytest.mark.parametrize("max_tokens", [None, 200])
@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_shifted_labels_are_labels_of_the_token_before(reduction, max_tokens, fresh, batch_of):
    batch = batch_of(*ALL, max_tokens=max_tokens)
    model = fresh(loss_reduction=reduction)
    expected = model(**batch)
    shifted = {name: value for name, value in batch.items() if name != "labels"}
    shifted["shift_labels"] = next_labels(batch["labels"], batch["document_ids"])
    # They win over `labels`, as context parallel needs, which passes both.
    for extra in ({}, {"labels": torch.full_like(batch["labels"], -100)}):
        outputs = model(**shifted, **extra)
        for name in ("loss", "ce_loss", "mse_loss"):
            assert getattr(outputs, name).item() == getattr(expected, name).item()
    assert torch.equal(loss_totals(shifted, reduction), loss_totals(batch, reduction))


def test_placeholders_of_images_never_are_targets(fresh, batch_of):
    batch = batch_of("look", "edit")
    ids, is_text = batch["input_ids"], batch["mm_token_type_ids"] == 0
    model = fresh()
    expected = model(**(batch | {"labels": ids.masked_fill(~is_text, -100)}))
    careless = batch | {"labels": ids}
    assert model(**careless).ce_loss.item() == expected.ce_loss.item()
    assert torch.equal(loss_totals(careless), loss_totals(batch | {"labels": ids.masked_fill(~is_text, -100)}))
    assert loss_totals(careless)[0] < (ids[:, 1:] != -100).sum()
    del careless["labels"]
    careless["shift_labels"] = next_labels(ids, batch["document_ids"])
    assert model(**careless).ce_loss.item() == expected.ce_loss.item()


def test_a_conversation_of_the_processor_trains_on_its_texts_alone(fresh, encode):
    inputs = encode(["@wide", "what is it?"], add_generation_prompt=False)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    assert (types != 0).any()
    model = fresh()
    expected = model(**inputs, labels=ids.masked_fill(types != 0, -100)).loss
    assert model(**inputs, labels=ids).loss.item() == expected.item()


# ---- The layout


@pytest.mark.parametrize("settings", [{}, {"freeze_und": True}, {"loss_reduction": "sample"}])
@pytest.mark.parametrize("names", [ALL, ("talk",), ("draw", "look")])
def test_a_training_step_reads_nothing_back(names, settings, fresh, batch_of):
    batch = batch_of(*names, return_layout=True, max_tokens=200 if names == ALL else None)
    model = fresh(**settings)
    expected = copy.deepcopy(backward(model, batch))
    model.zero_grad()
    with HostReads() as reads:
        placed = reads.put(batch)
        totals = loss_totals(placed, model.config.loss_reduction)
        reads.put(model)(**placed, loss_totals=totals).loss.backward()
    assert reads.found == []
    assert reads.mixed == []
    assert_close(gradients(model), expected)


def test_the_counter_sees_what_is_read_without_a_layout(fresh, batch_of):
    batch = batch_of("look", "draw")
    with HostReads() as reads:
        reads.put(fresh())(**reads.put(batch))
        assert reads.mixed == []
        seen = len(reads.found)
        assert seen > 4
        flags = reads.put(batch["labels"]) != -100
        for read in (
            lambda: flags.any().item(),
            lambda: bool(flags.any()),
            lambda: flags.tolist(),
            lambda: flags.cpu(),
            lambda: flags.to("cpu"),
            lambda: flags.numpy(),
            lambda: flags.nonzero(),
            lambda: flags[flags],
            lambda: flags.unique(),
            lambda: flags[0].repeat_interleave(flags[0].long()),
        ):
            before = len(reads.found)
            read()
            assert len(reads.found) == before + 1
        flags + batch["labels"]
        assert len(reads.mixed) == 1


@pytest.mark.parametrize("names", [ALL, ("talk",), ("draw",)])
def test_a_layout_changes_no_number(names, fresh, batch_of):
    batch = batch_of(*names, return_layout=True)
    plain = {name: value for name, value in batch.items() if name != "layout"}
    model = fresh()
    assert torch.equal(model(**batch).loss, model(**plain).loss)
    assert torch.equal(loss_totals(batch), loss_totals(plain))


@pytest.mark.parametrize(
    "name",
    ["input_ids", "mm_token_type_ids", "document_ids", "image_grid_hw", "latent_grid_hw", "labels", "timesteps"],
)
def test_a_layout_of_another_batch_is_refused(name, fresh, batch_of):
    batch = batch_of("edit", "look", return_layout=True)
    if name == "input_ids":
        batch[name] = batch[name][:, :-1]
    elif name == "timesteps":
        batch[name] = batch[name].flip(0)
    else:
        batch[name] = batch[name] + 1
    with pytest.raises(ValueError, match=r"`layout` is that of another batch"):
        fresh()(**batch)


def test_a_layouts_labels_are_not_lost(fresh, batch_of):
    batch = batch_of("look", "draw", return_layout=True)
    del batch["labels"]
    with pytest.raises(ValueError, match="`labels` were not passed"):
        fresh()(**batch)


# ---- The velocity


def test_velocity_learns_noise_minus_clean_from_their_mixture(fresh, batch_of):
    batch = batch_of("edit")
    model, seen = fresh(), {}
    hook = model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**batch)
    hook.remove()
    condition, drawn = seen["latents"].split(batch["latent_grid_hw"].prod(-1).tolist())
    sigma = batch["timesteps"][1]
    assert torch.equal(condition, batch["latents"][: len(condition)])
    clean, noise = batch["latents"][len(condition) :], batch["noise"][len(condition) :]
    assert torch.allclose(drawn, clean + sigma * (noise - clean), atol=1e-6)


def test_one_of_two_losses_may_be_asked_for(fresh, batch_of):
    batch = batch_of("look", "edit")
    both = fresh()(**batch)
    texts = fresh()(**{name: value for name, value in batch.items() if name != "noise"})
    assert texts.mse_loss is None
    assert texts.loss.item() == texts.ce_loss.item()
    latents = fresh()(**{name: value for name, value in batch.items() if name != "labels"})
    assert latents.ce_loss is None
    assert latents.mse_loss.item() == pytest.approx(both.mse_loss.item(), abs=1e-6)
    assert latents.loss.item() == latents.mse_loss.item()
    assert fresh()(**{name: value for name, value in batch.items() if name not in ("noise", "labels")}).loss is None


def test_logits_are_left_out_in_training(fresh, batch_of):
    batch, model = batch_of("look", "draw"), fresh()
    losses = {}
    for training, skip_logits, has_logits in (
        (True, None, False),
        (True, False, True),
        (False, None, True),
        (False, True, False),
    ):
        outputs = model.train(training)(**batch, skip_logits=skip_logits)
        expected = (*batch["input_ids"].shape, model.config.text_config.vocab_size) if has_logits else None
        assert getattr(outputs.logits, "shape", None) == expected
        losses[training, skip_logits] = outputs.loss.item()
    assert max(losses.values()) - min(losses.values()) <= 1e-6
    # Without labels there is nothing else to return.
    ids = batch_of("talk")["input_ids"]
    assert model.train()(input_ids=ids).logits.shape[:-1] == ids.shape


# ---- Missing modalities


@pytest.mark.parametrize(
    "names", [("talk",), ("look",), ("draw",), ("edit",), ("talk", "look"), ("draw", "talk"), ALL]
)
@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_gets_a_gradient_whatever_a_batch_lacks(names, training, fresh, batch_of):
    batch = batch_of(*names)
    model = fresh()
    outputs = model(**batch)
    assert all(value is None or value.isfinite() for value in (outputs.loss, outputs.ce_loss, outputs.mse_loss))
    # A part that is absent changes nothing: evaluation adds no empty images.
    assert outputs.loss.item() == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-5)
    found = backward(model.train(), batch)
    assert [name for name, grad in found.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in found.values())
    moved = {name for name, grad in found.items() if grad.abs().sum() > 0}
    draws = bool({"draw", "edit", "chat"} & set(names))
    sees = bool({"look", "edit", "chat"} & set(names))
    assert any("_moe_gen" in name for name in moved) == draws
    assert any("vision_tower" in name for name in moved) == sees
    assert any("lm_head" in name for name in moved) == (names not in (("draw",), ("edit",)))


def test_a_drawing_without_any_condition_trains(fresh, batch_of):
    batch = batch_of("edit", text_dropout=1.0, vit_dropout=1.0, vae_dropout=1.0)
    assert set(batch["mm_token_type_ids"].unique().tolist()) == {0, LATENT_TOKEN}
    assert batch["timesteps"].numel() == 1
    found = backward(fresh(), batch)
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize(("left_out", "names"), [("visual_gen", ("talk", "look")), ("visual_und", ("talk", "draw"))])
def test_a_model_without_modules_trains(left_out, names, batch_of):
    batch = batch_of(*names)
    model = load_model(**{left_out: False}).train()
    whole = load_model().train()
    assert model(**batch).loss.item() == pytest.approx(whole(**batch).loss.item(), abs=1e-5)
    assert all(grad is not None for grad in backward(model, batch).values())


# ---- Frozen parts


PARTS = {
    "vit": ["vision_tower."],
    "connector": ["connector."],
    "gen": ["_moe_gen", "vae2llm.", "llm2vae.", "time_embedder."],
}


def part_of(name: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "und")


@pytest.mark.parametrize(
    "towers", [(), ("vit",), ("connector",), ("und",), ("gen",), ("vit", "und"), ("vit", "connector", "und")]
)
@pytest.mark.parametrize("names", [ALL, ("talk",), ("draw",)])
def test_frozen_parts_get_no_gradient_and_all_others_get_one(towers, names, fresh, batch_of):
    model = fresh()
    model.freeze(*towers)
    found = backward(model, batch_of(*names))
    # Freezing the understanding expert also stops what would go through it (point 35), so the tower is frozen too.
    frozen = {*towers, "vit", "connector"} if "und" in towers else set(towers)
    seen = [grad for name, grad in found.items() if part_of(name) == "vit" and "vit" not in frozen]
    assert any(grad.any() for grad in seen) == bool(seen and names == ALL)
    assert {part_of(name) for name in found} == {"vit", "connector", "gen", "und"}
    assert {name for name, grad in found.items() if grad is None} == {
        name for name in found if part_of(name) in frozen
    }


def test_an_unknown_part_is_named(fresh):
    with pytest.raises(ValueError, match="got llm"):
        fresh().freeze("vit", "llm")


def test_parts_can_all_be_frozen_but_one(fresh, batch_of):
    # The tower and the connector learn through the understanding expert only.
    for kept in ("und", "gen"):
        model = fresh()
        model.freeze(*({"vit", "connector", "und", "gen"} - {kept}))
        trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {kept}


def test_freeze_und_keeps_the_losses_and_stops_every_gradient_of_the_understanding(fresh, batch_of):
    batch = batch_of(*ALL)
    plain, frozen = fresh(), fresh(freeze_und=True)
    assert frozen(**batch).loss.item() == plain(**batch).loss.item()
    ours, theirs = backward(frozen, batch), backward(plain, batch)
    for name, grad in ours.items():
        assert theirs[name].any(), name
        if part_of(name) == "gen":
            assert grad.any(), name
        elif name != "lm_head.weight":
            # The head is behind the expert, and learns unless its weights are frozen.
            assert grad is None or not grad.any(), name


def test_freeze_und_detaches_the_activations_layer_by_layer(fresh, batch_of):
    batch = batch_of("edit", "chat")
    frozen = backward(fresh(freeze_und=True), batch)
    plain = fresh()
    through = copy.deepcopy(backward(plain, batch))

    def detached(module, args, kwargs, output=None):
        # Expert order has the understanding tokens first.
        states, split = args[0] if output is None else output, kwargs["routing"].num_und
        states = torch.cat([states[:split].detach(), states[split:]])
        return ((states, *args[1:]), kwargs) if output is None else states

    for layer in plain.model.language_model.layers:
        layer.register_forward_pre_hook(detached, with_kwargs=True)
        layer.register_forward_hook(detached, with_kwargs=True)
    expected = backward(plain, batch)
    gen = [name for name in frozen if part_of(name) == "gen"]
    assert_close({name: frozen[name] for name in gen}, {name: expected[name] for name in gen}, 1e-6)
    # It is more than `requires_grad=False`: that lets gradients through the text to the latents before it.
    assert max(max_error(frozen[name], through[name]) for name in gen) > 1e-4


# ---- Samples keep apart


@pytest.mark.parametrize("max_tokens", [None, 200])
def test_packed_samples_are_as_each_alone(max_tokens, fresh, encode_samples):
    model = fresh().eval()
    collator, samples = encode_samples(*ALL, max_tokens=max_tokens)
    batch = collator.pack(samples)
    # Rows change the order of the samples.
    order = [index for row in fill_rows([len(sample) for sample in samples], max_tokens) for index in row]
    assert (order == sorted(order)) == (max_tokens is None)
    with torch.no_grad():
        together = model(**batch)
        alone = [model(**collator.pack([sample])) for sample in samples]
    velocity = []
    for number, index in enumerate(order):
        logits = together.logits[batch["document_ids"] == number]
        assert max_error(logits, alone[index].logits[0]) <= 1e-5
        if alone[index].velocity is not None:
            velocity.append(alone[index].velocity)
    assert max_error(together.velocity, torch.cat(velocity)) <= 1e-5
    assert (batch["document_ids"] < 0).any() == (max_tokens is not None)


def test_gradients_of_packed_samples_are_those_of_its_samples(fresh, encode_samples):
    collator, samples = encode_samples(*ALL)
    batch = collator.pack(samples)
    model = fresh()
    expected = copy.deepcopy(backward(model, batch))
    model.zero_grad()
    totals = loss_totals(batch)
    for sample in samples:
        model(**collator.pack([sample]), loss_totals=totals).loss.backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changed", [0, 1, 2, 3, 4])
def test_a_changed_sample_changes_no_bit_of_the_others(changed, training, fresh, encode_samples):
    collator, samples = encode_samples(*ALL)
    batch = dict(collator.pack(samples))
    model = fresh().train(training)
    other = {name: value.clone() for name, value in batch.items()}
    own = other["document_ids"] == changed
    other["input_ids"][own & (other["mm_token_type_ids"] == 0)] += 1
    for packed, grid, kind in (("pixel_values", "image_grid_hw", 1), ("latents", "latent_grid_hw", LATENT_TOKEN)):
        other[packed][own[batch["mm_token_type_ids"] == kind]] += 1.0
    with torch.no_grad():
        plain, perturbed = model(**batch, skip_logits=False), model(**other, skip_logits=False)
    assert torch.equal(plain.logits[~own], perturbed.logits[~own])
    assert not torch.equal(plain.logits[own], perturbed.logits[own])
    latent = own[batch["mm_token_type_ids"] == LATENT_TOKEN]
    assert torch.equal(plain.velocity[~latent], perturbed.velocity[~latent])


def test_nothing_but_its_own_block_sees_noise(fresh, batch_of):
    # A drawing that goes on: later turns see the clean copy only.
    batch = batch_of("chat")
    other = batch | {"noise": batch["noise"].clone()}
    other["noise"][: int(batch["latent_grid_hw"][0].prod())] += 1.0
    latents = (batch["mm_token_type_ids"][0] == LATENT_TOKEN).nonzero().flatten()
    # The block has a marker on either side.
    first, length = int(latents[0]) - 1, int(batch["latent_grid_hw"][0].prod()) + 2
    model = fresh().eval()
    with torch.no_grad():
        plain, perturbed = model(**batch).logits[0], model(**other).logits[0]
    changed = (plain != perturbed).any(-1).nonzero().flatten().tolist()
    assert changed == list(range(first, first + length))


def test_what_padding_holds_changes_nothing(fresh, batch_of):
    batch = batch_of(*ALL, max_tokens=200)
    padding = batch["document_ids"] < 0
    assert padding.any()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 7)}
    other["position_ids"] = batch["position_ids"].masked_fill(padding, 3)
    model = fresh()
    ours, theirs = backward(model, batch), copy.deepcopy(backward(model, other))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, model(**other).loss)
    embeddings = "model.language_model.embed_tokens.weight"
    assert_close(ours, theirs)
    assert ours[embeddings][model.config.text_config.pad_token_id].abs().sum() == 0


@pytest.mark.parametrize("names", [ALL, ("talk", "look", "talk"), ("talk", "talk")])
def test_flex_attention_sees_the_same(names, fresh, batch_of):
    batch = batch_of(*names, max_tokens=200)
    plain, flex = fresh().eval(), load_model(attn_implementation="flex_attention")
    asked = []
    hook = flex.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(type(kwargs["attention_mask"]).__name__), with_kwargs=True
    )
    # Compiling takes half a minute; the attention and its mask are the same without.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected, outputs = plain(**batch), flex(**batch)
    hook.remove()
    assert asked == ["NoneType"], "one sparse mask for the whole sequence, not samples one by one"
    own = batch["document_ids"] >= 0
    assert max_error(outputs.logits[own], expected.logits[own]) <= 1e-5
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    if expected.velocity is not None:
        assert max_error(outputs.velocity, expected.velocity) <= 1e-5


def test_a_model_with_flex_attention_trains_on_a_cpu(fresh, batch_of):
    batch = batch_of(*ALL)
    flex = load_model(attn_implementation="flex_attention").train()
    flex.model.vision_tower.set_attn_implementation("sdpa")
    assert_close(backward(flex, batch), backward(fresh(), batch))


def test_masks_grow_with_samples_not_with_the_square_of_all_tokens(encode_samples):
    collator, samples = encode_samples("edit", "talk", return_layout=True)
    for count in (1, 4):
        batch = collator.pack(samples * count)
        # A text is causal by itself.
        assert [None if mask is None else tuple(mask.shape) for _, _, mask in batch["layout"].sample_masks()] == [
            (len(samples[0]),) * 2,
            None,
        ] * count


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                # A view that is expanded takes no memory.
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_no_tensor_of_a_step_grows_with_the_square_of_the_sequence(fresh, collate):
    collator = collate()
    samples = training_samples("edit") * 4 + [{"messages": [turn("user", "a" * 40), turn("assistant", "b" * 8)]}] * 12
    batch = collator(samples)
    tokens = batch["input_ids"].shape[1]
    model = fresh()
    with Largest() as largest:
        model(**batch).loss.backward()
    # The widest layer, not the mask or the scores of a whole sequence.
    assert tokens > 1000
    assert largest.numel < tokens**2 / 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, {"freeze_und": True}, {"loss_reduction": "sample"}])
def test_gradient_checkpointing_gives_identical_gradients(settings, reentrant, fresh, batch_of):
    batch = batch_of(*ALL)
    plain, other = fresh(**settings), fresh(**settings)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    layer = other.model.language_model.layers[0].mlp
    layer.register_forward_hook(lambda *args: runs.append(1))
    ours, theirs = backward(other, batch), backward(plain, batch)
    assert len(runs) == 2, "the layer runs again for the backward"
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert (grad is None) == (theirs[name] is None), name
        assert grad is None or torch.equal(grad, theirs[name]), name


def test_the_numbers_of_documents_are_free(fresh, batch_of):
    batch = batch_of(*ALL, max_tokens=200)
    rows = batch["document_ids"]
    # Every row counts from 0 again, as rows that were packed one by one do.
    again = torch.where(rows < 0, rows, rows - rows.masked_fill(rows < 0, 99).min(-1, keepdim=True).values)
    assert len(rows) > 1
    assert not torch.equal(rows, again)
    model = fresh(loss_reduction="sample")
    expected, outputs = model(**batch), model(**(batch | {"document_ids": again}))
    for name in ("ce_loss", "mse_loss"):
        assert getattr(outputs, name).item() == pytest.approx(getattr(expected, name).item(), abs=1e-6)


def test_positions_of_packed_samples_need_not_be_passed(fresh, batch_of):
    batch = batch_of(*ALL, max_tokens=200)
    model = fresh()
    expected = model(**batch).loss.item()
    del batch["position_ids"]
    assert model(**batch).loss.item() == pytest.approx(expected, abs=1e-6)


def test_packed_samples_refuse_a_cache(fresh, batch_of):
    batch = batch_of("talk", "look")
    with pytest.raises(ValueError, match=re.escape("`document_ids`")):
        fresh().eval()(**batch, use_cache=True)


# ---- Found in review


def test_a_number_that_comes_again_stands_for_two_samples_in_the_loss_too(fresh, batch_of):
    # Attention, positions and labels take each run of a number as a sample; the weights of the losses merge them.
    batch = batch_of("talk", "edit", "look", "draw")
    documents = batch["document_ids"]
    again = torch.where(documents == 2, 0, torch.where(documents == 3, 1, documents))
    for reduction in ("sample", "square_root"):
        model = fresh(loss_reduction=reduction)
        expected, outputs = model(**batch), model(**(batch | {"document_ids": again}))
        for name in ("ce_loss", "mse_loss"):
            assert getattr(outputs, name).item() == pytest.approx(getattr(expected, name).item(), abs=1e-6)


def test_an_attention_mask_beside_document_ids_still_hides_padding(fresh, batch_of):
    batch = batch_of("talk")
    ids = batch["input_ids"]
    padded = torch.nn.functional.pad(ids, (5, 0), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    model = fresh().eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        logits = model(input_ids=padded, attention_mask=mask, document_ids=torch.zeros_like(padded)).logits
    assert max_error(logits[:, 5:], expected) <= 1e-5


def test_freeze_und_is_not_saved(fresh, tmp_path):
    # Or the next training of the saved model would learn nothing of the understanding expert, without a word.
    model = fresh()
    model.freeze("und")
    assert model.config.freeze_und
    model.save_pretrained(tmp_path)
    assert not type(model).from_pretrained(tmp_path).config.freeze_und
