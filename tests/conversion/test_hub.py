"""Repositories by their ids: users in processes of their own, before a Hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from convert_bagel_to_hf import convert
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_model, load_processor
from tests.conversion.conftest import wide_checkpoint
from tests.conversion.hub_server import TOKEN, LocalHub, downloads
from tests.conversion.hub_users import digests, question
from transformers_bagel import BagelConfig


ROOT = Path(__file__).parents[2]
REPO, ORIGINAL = "org/bagel", "org/original"
PRIVATE, GATED, BROKEN = "org/private", "org/gated", "org/broken"
BASE, TRAINING = "org/base", "org/training"
WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def small_repository(repository, tmp_path_factory) -> Path:
    """The converted checkpoint, with small pictures as the tiny model takes them."""
    folder = Path(shutil.copytree(repository, tmp_path_factory.mktemp("hub") / "repository"))
    settings = json.loads((folder / "processor_config.json").read_text())
    small = load_processor().image_processor
    settings["image_processor"] |= {"size": dict(small.size), "vae_size": dict(small.vae_size)}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def other_repository(small_repository, tmp_path_factory) -> Path:
    """The same with other weights."""
    folder = Path(shutil.copytree(small_repository, tmp_path_factory.mktemp("hub") / "other"))
    weights = load_file(folder / WEIGHTS[2])
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / WEIGHTS[2], {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def wide_repository(tmp_path_factory) -> Path:
    """Weights of more than ten megabytes, which the client writes to the disk before it asks for more."""
    folder = tmp_path_factory.mktemp("hub")
    wide_checkpoint(folder / "wide", repeats=80)
    convert(str(folder / "wide"), folder / "repository")
    return folder / "repository"


@pytest.fixture(scope="module")
def hub(small_repository, other_repository, wide_repository, tmp_path_factory):
    decoys = Path(shutil.copytree(small_repository, tmp_path_factory.mktemp("hub") / "decoys"))
    (decoys / "pytorch_model.bin").write_bytes(b"a pickle")
    (decoys / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (decoys / "picture.png").write_bytes(b"no weights")
    local = LocalHub()
    local.add(REPO, decoys)
    local.add(REPO, other_repository, branch="other")
    local.add(PRIVATE, decoys, private=True)
    local.add(GATED, small_repository, gated=True)
    local.add(BROKEN, wide_repository)
    local.add(ORIGINAL, CHECKPOINT, branch="v1")
    local.add(ORIGINAL, CHECKPOINT)
    local.add(BASE, CHECKPOINT)
    # Of another branch than the one that is asked for, the tokenizer and the weights say something else.
    local.add(ORIGINAL, CHECKPOINT, branch="v1", private=True)
    other = tmp_path_factory.mktemp("hub") / "wide"
    wide_checkpoint(other, repeats=2)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    for token in vocabulary["added_tokens"]:
        token["id"] += 1
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    local.add(ORIGINAL, other)
    training = tmp_path_factory.mktemp("hub") / "training"
    (training / "0002000").mkdir(parents=True)
    for name in ("ema.safetensors", "model.safetensors", "0002000/ema.safetensors", "optimizer.pt"):
        shutil.copy(CHECKPOINT / "ema.safetensors", training / name)
    local.add(TRAINING, training)
    # Only who asks for the other branch can load it.
    del local.repositories[ORIGINAL].files()["ae.safetensors"]
    with local.running():
        yield local


@pytest.fixture(scope="module")
def act(hub, tmp_path_factory) -> Iterator[Callable[..., dict]]:
    """`act("name", *arguments)`: what a user of `hub_users` finds, with an empty cache."""
    home, results = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("results")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TOKEN_OF_THIS_TEST": TOKEN,
    }
    log = results / "log"
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.conversion.hub_users"],
            cwd=ROOT,
            env=clean | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as users,
    ):

        def run(user: str, *arguments: str, **variables: str) -> dict:
            shutil.rmtree(home)
            found = results / f"{user}.json"
            print(json.dumps([user, arguments, variables, str(found)]), file=users.stdin, flush=True)
            assert users.stdout.readline() == "0\n", log.read_text()
            return json.loads(found.read_text())

        yield run


@pytest.fixture(scope="module")
def local(small_repository) -> dict[str, str]:
    return digests(BagelPipeline.from_pretrained(small_repository))


@pytest.fixture(scope="module")
def model_user(act, tmp_path_factory) -> dict:
    return act("model_without_the_package", REPO, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def processor_user(act, tmp_path_factory) -> dict:
    return act("processor_without_the_package", REPO, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def diffusers_user(act, tmp_path_factory) -> dict:
    return act("diffusers_pipeline", REPO, str(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def package_user(act, hub) -> dict:
    hub.requests.clear()
    hub.breaks[f"{BROKEN}/model.safetensors"] = 15_000_000
    return act("package_user", REPO, ORIGINAL, PRIVATE, GATED, BROKEN) | {"requests": list(hub.requests)}


@pytest.fixture(scope="module")
def original_user(act, tmp_path_factory) -> dict:
    return act("original_user", ORIGINAL, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def publisher(act) -> dict:
    return act("publisher", "me/tuned", REPO, HF_TOKEN=TOKEN)


def test_auto_model_is_the_packages_though_nobody_imported_it(model_user, local):
    assert not model_user["imported before"]
    assert model_user["class"] == "transformers_bagel.modeling_bagel.BagelForConditionalGeneration"
    assert model_user["digest"] == local["transformer"]


def test_auto_processor_is_the_packages_though_nobody_imported_it(processor_user):
    assert not processor_user["imported before"]
    assert processor_user["class"] == "transformers_bagel.processing_bagel.BagelProcessor"
    expected = load_processor().apply_chat_template(question(), add_generation_prompt=True, tokenize=True)
    assert processor_user["input_ids"] == expected


def test_transformers_pipeline_answers_though_nobody_imported_the_package(act, local):
    found = act("transformers_pipeline", REPO)
    assert not found["imported before"] and found["digest"] == local["transformer"]
    processor = load_processor()
    inputs = processor.apply_chat_template(
        question(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = load_model().generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["answer"] == answer != ""


def test_diffusion_pipeline_is_the_packages_though_nobody_imported_it(diffusers_user, local):
    assert not diffusers_user["imported before"]
    assert diffusers_user["class"] == "diffusers_bagel.pipeline_bagel.BagelPipeline"
    assert diffusers_user["digests"] == local
    assert diffusers_user["picture"] == [128, 128]
    assert diffusers_user["put into transformers"] == []
    assert diffusers_user["dtypes"] == ["torch.bfloat16", "torch.bfloat16"]


def test_code_of_a_repository_runs_if_it_is_trusted_only(model_user, processor_user, diffusers_user):
    for user in (model_user, processor_user, diffusers_user):
        assert "ValueError" in user["untrusted"] and REPO in user["untrusted"]
        assert "trust_remote_code=True" in user["untrusted"]


def test_missing_package_is_named_as_pip_knows_it(model_user, diffusers_user):
    for user in (model_user, diffusers_user):
        assert user["without the package"].startswith("ImportError: ")
        assert "pip install transformers-bagel" in user["without the package"]


def test_what_is_saved_afterwards_speaks_of_no_code(model_user, processor_user, diffusers_user):
    for user in (model_user, processor_user, diffusers_user):
        assert user["saved"]["speak of code"] == []
        assert not [name for name in user["saved"]["files"] if name.endswith(".py")]
    assert model_user["saved"]["files"] == ["config.json", "generation_config.json", "model.safetensors"]
    assert diffusers_user["model_index"]["_class_name"] == "BagelPipeline"
    component = ["transformers_bagel.modeling_bagel", "BagelForConditionalGeneration"]
    assert diffusers_user["model_index"]["transformer"] == component


def test_with_the_package_nobody_is_to_be_trusted(package_user, local):
    assert package_user["pipeline"] == local and package_user["picture"] == [128, 128]
    assert package_user["auto"] == package_user["model"] == local["transformer"]
    assert package_user["auto processor"] == "transformers_bagel.processing_bagel"
    assert package_user["processor"] == "BagelProcessor"
    loaded_code = [request for request in package_user["requests"] if "modeling_bagel.py" in request.path]
    assert loaded_code == []


def test_the_original_layout_loads_by_id_too(package_user, local):
    assert package_user["original"] == local


def test_the_original_layout_is_corrected_from_the_place_that_is_asked_for(original_user, local):
    def plain(settings: dict) -> dict:
        return json.loads(json.dumps({name: value for name, value in settings.items() if not name.startswith("_")}))

    model = load_model()
    for found in (original_user, original_user["offline"]):
        assert found["config"] == plain(BagelConfig.from_pretrained(CHECKPOINT).to_dict())
        assert found["auto"]["config"] == plain(model.config.to_dict())
        assert found["auto"]["generation"] == json.loads(json.dumps(model.generation_config.to_dict()))
        assert found["digests"] == local | {"auto": local["transformer"]}
        assert found["name"] == ORIGINAL and found["part"] is False and found["stop"] == 422
    assert original_user["default cache"] == []


def test_what_is_in_the_cache_loads_when_the_network_fails(act, local):
    found = act("user_whose_network_fails", REPO, ORIGINAL, "org/unknown")
    assert found["without"] == found["with"]
    assert found["without"] == {"pipeline": local} | dict.fromkeys(("model", "original"), local["transformer"])
    assert found["unknown"].startswith("OSError: 'org/unknown': the Hub cannot be reached (no network)")


def test_a_pipeline_downloads_every_file_once_and_needed_ones_only(package_user):
    tokenizer = ["chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    settings = ["config.json", "generation_config.json", "model_index.json", "model.safetensors.index.json"]
    parts = ["scheduler/scheduler_config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    # The library always takes a repository's `pipeline.py`; it is not run.
    expected = [*WEIGHTS, *tokenizer, *settings, *parts, "pipeline.py"]
    assert Counter(downloads(package_user["requests"], PRIVATE)) == Counter(expected)


def test_what_is_in_the_cache_is_not_downloaded_again(package_user, local, hub):
    assert package_user["from the cache"] == local
    # Of another branch, only what differs there is downloaded.
    again = Counter(downloads(package_user["requests"], REPO)) - Counter(hub.repositories[REPO].files().keys())
    assert again == Counter([WEIGHTS[2]])


def test_broken_download_goes_on_where_it_broke(package_user, wide_repository):
    asked = [
        (request.method, request.status, request.range)
        for request in package_user["requests"]
        if f"/{BROKEN}/" in request.path and request.path.endswith("/model.safetensors")
    ]
    # The client had written one of its pieces, of ten megabytes.
    assert asked == [("HEAD", 200, None), ("GET", 200, None), ("GET", 206, f"bytes={10 * 2**20}-")]
    assert package_user["broken"] == digests(BagelPipeline.from_pretrained(wide_repository))


def test_revision_is_a_branch(package_user, other_repository, local):
    other = digests(BagelPipeline.from_pretrained(other_repository))
    assert package_user["branch"] == other != local
    assert package_user["branch's model"] == other["transformer"]


def test_unknown_revision_is_named(package_user):
    for said in package_user["no such revision"].values():
        assert said.startswith("OSError: nowhere is not a valid git identifier") and REPO in said


def test_private_repository_asks_for_a_token(package_user, local):
    for said in package_user["private without a token"].values():
        assert PRIVATE in said and "token" in said, said
    assert GATED in package_user["gated without a token"] and "gated" in package_user["gated without a token"]
    assert package_user["private with a token"] == local


def test_pushed_model_processor_and_pipeline_load_again(publisher, hub, local):
    assert publisher["pushed"] == publisher["pipeline"] == local
    assert publisher["model"] == publisher["branch"] == local["transformer"]
    assert publisher["processor"] == "BagelProcessor"
    assert "model.safetensors.index.json" in hub.repositories["me/tuned-model"].files("half")
    assert hub.repositories["me/tuned-pipeline"].private


def test_pushed_adapters_load_again_wherever_they_may(publisher):
    pushed, loaded = publisher["adapters"], publisher["loaded"]
    assert pushed["own"] != pushed["peft"]
    assert loaded["own"] == loaded["whole"] == loaded["own in the pipeline"] == loaded["lora in the pipeline"]
    assert loaded["own"] == pushed["own"]
    assert loaded["peft"] == loaded["peft in the pipeline"] == pushed["peft"]
    assert set(publisher["alpha"].values()) == {6}


def test_conversion_by_id_there_and_back(act, hub, tmp_path):
    hub.requests.clear()
    found = act("converter", ORIGINAL, "v1", REPO, PRIVATE, TRAINING, str(tmp_path))
    assert found["training"][0] == 0, found["training"][1]
    # Of a training only the weights that are asked for, of its base only what the training lacks.
    assert downloads(hub.requests, TRAINING) == ["ema.safetensors"]
    weights = [name for name in downloads(hub.requests, BASE) if name.endswith(".safetensors")]
    assert weights == ["ae.safetensors"]
    assert found["there"] == found["back"] == 0
    assert (
        load_file(tmp_path / "there" / "model.safetensors").keys() == load_file(CHECKPOINT / "ema.safetensors").keys()
    )
    for name in ("ema.safetensors", "ae.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    assert not list((tmp_path / "back").glob("*.py"))
    assert "auto_map" not in (tmp_path / "back" / "config.json").read_text()
    for what, name in (("no such revision", "nowhere"), ("private", PRIVATE)):
        code, said = found[what]
        assert code == 2 and name in said, said
    assert "token" in found["private"][1]


@pytest.mark.slow
def test_the_server_of_transformers_takes_a_repository_that_it_may_trust(repository):
    """`transformers serve FOLDER --trust-remote-code`, in a process that never imported this package."""
    script = (
        "import sys; from transformers.cli.serving.model_manager import ModelManager\n"
        "assert 'transformers_bagel' not in sys.modules\n"
        "manager = ModelManager(device='cpu', model_timeout=-1, trust_remote_code=True)\n"
        f"print(manager.get_model_modality(*manager.load_model_and_processor({f'{repository}@main'!r})))\n"
        "manager.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["Modality.MULTIMODAL"], done.stderr
