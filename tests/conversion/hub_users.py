"""What users do with ids of the Hub, each in a process of its own: a fork of `python -m tests.conversion.hub_users`.

A user's findings are written as JSON. Imports of our packages and of diffusers are in the functions, because what is imported
before what is a part of what is tested; and the library reads the Hub's address when it is imported.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def digest(module: Any) -> str:
    """Of all weights, their names, shapes and types."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def digests(pipe: Any) -> dict[str, str]:
    return {name: digest(getattr(pipe, name)) for name in ("transformer", "vae")}


def error_of(action: Callable[[], Any]) -> str:
    """The type and the words of the error of an action, or nothing if it has none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def question() -> list[dict]:
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (32, 48), "red")}, {"type": "text", "text": "what is it?"}]
    return [{"role": "user", "content": content}]


@contextlib.contextmanager
def not_installed(package: str) -> Iterator[None]:
    sys.modules[package] = None  # type: ignore[assignment]  # what Python takes for a module that cannot be found
    yield
    del sys.modules[package]


def saved(thing: Any, folder: str) -> dict[str, list[str]]:
    """The files that `save_pretrained` writes, and those of them that speak of code."""
    thing.save_pretrained(folder)
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    speaking = [file for file in files if file.suffix == ".json" and "auto_map" in file.read_text()]
    return {
        name: [str(file.relative_to(folder)) for file in found]
        for name, found in (("files", files), ("speak of code", speaking))
    }


def model_without_the_package(repo: str, folder: str) -> dict:
    """Somebody who knows transformers only, and begins with the model."""
    from transformers import AutoModelForImageTextToText

    untrusted = error_of(lambda: AutoModelForImageTextToText.from_pretrained(repo))
    with not_installed("transformers_bagel"):
        missing = error_of(lambda: AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True))
    imported = "transformers_bagel" in sys.modules
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    return {
        "untrusted": untrusted,
        "without the package": missing,
        "imported before": imported,
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "digest": digest(model),
        "saved": saved(model, folder),
    }


def processor_without_the_package(repo: str, folder: str) -> dict:
    """Somebody who begins with the processor."""
    from transformers import AutoProcessor

    untrusted = error_of(lambda: AutoProcessor.from_pretrained(repo))
    imported = "transformers_bagel" in sys.modules
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        question(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return {
        "untrusted": untrusted,
        "imported before": imported,
        "class": f"{type(processor).__module__}.{type(processor).__name__}",
        "input_ids": inputs["input_ids"].tolist(),
        "saved": saved(processor, folder),
    }


def transformers_pipeline(repo: str) -> dict:
    """Somebody who asks transformers for a pipeline, and the pipeline about a picture."""
    from transformers import pipeline

    imported = "transformers_bagel" in sys.modules
    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    answer = pipe(text=question(), max_new_tokens=4, do_sample=False, return_full_text=False)
    return {"imported before": imported, "digest": digest(pipe.model), "answer": answer[0]["generated_text"]}


def diffusers_pipeline(repo: str, folder: str) -> dict:
    """Somebody who knows diffusers only."""
    import torch
    import transformers
    from diffusers import DiffusionPipeline

    untrusted = error_of(lambda: DiffusionPipeline.from_pretrained(repo))
    with not_installed("diffusers_bagel"):
        missing = error_of(lambda: DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
    imported = "diffusers_bagel" in sys.modules
    pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
    foreign = [name for name in dir(transformers) if name.startswith("Bagel")]
    rounded = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, dtype=torch.bfloat16)
    return {
        "untrusted": untrusted,
        "without the package": missing,
        "imported before": imported,
        "class": f"{type(pipe).__module__}.{type(pipe).__name__}",
        "digests": digests(pipe),
        "dtypes": [str(rounded.transformer.dtype), str(rounded.vae.dtype)],
        "picture": drawn(pipe),
        "put into transformers": foreign,
        "saved": saved(pipe, folder),
        "model_index": json.loads(Path(folder, "model_index.json").read_text()),
    }


def drawn(pipe: Any) -> list[int]:
    pipe.set_progress_bar_config(disable=True)
    return list(pipe("a red circle", num_inference_steps=2).images[0].size)


def package_user(repo: str, original: str, private: str, gated: str, broken: str) -> dict:
    """Somebody who has imported the package, and who needs to trust nobody."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from diffusers_bagel import BagelPipeline
    from transformers_bagel import BagelForConditionalGeneration, BagelProcessor

    def load(name: str, **kwargs: Any) -> dict[str, str]:
        return digests(BagelPipeline.from_pretrained(name, **kwargs))

    pipe = BagelPipeline.from_pretrained(repo)
    found: dict[str, Any] = {"pipeline": digests(pipe), "picture": drawn(pipe)}
    found["auto"] = digest(AutoModelForImageTextToText.from_pretrained(repo))
    found["auto processor"] = type(AutoProcessor.from_pretrained(repo)).__module__
    found["model"] = digest(BagelForConditionalGeneration.from_pretrained(repo))
    found["processor"] = type(BagelProcessor.from_pretrained(repo)).__name__
    found["from the cache"] = load(repo, local_files_only=True)
    found["branch"] = load(repo, revision="other")
    found["branch's model"] = digest(AutoModelForImageTextToText.from_pretrained(repo, revision="other"))
    found["no such revision"] = {
        "pipeline": error_of(lambda: load(repo, revision="nowhere")),
        "model": error_of(lambda: AutoModelForImageTextToText.from_pretrained(repo, revision="nowhere")),
    }
    found["original"] = load(original, revision="v1")
    found["private without a token"] = {
        "pipeline": error_of(lambda: load(private)),
        "model": error_of(lambda: BagelForConditionalGeneration.from_pretrained(private)),
        "auto": error_of(lambda: AutoModelForImageTextToText.from_pretrained(private)),
        "processor": error_of(lambda: BagelProcessor.from_pretrained(private)),
    }
    found["gated without a token"] = error_of(lambda: load(gated))
    found["private with a token"] = load(private, token=os.environ["TOKEN_OF_THIS_TEST"])
    found["broken"] = load(broken)
    return found


def user_whose_network_fails(repo: str, original: str, unknown: str) -> dict:
    """Somebody who has loaded once, without having said that there is no network."""
    from huggingface_hub.utils import httpx, set_client_factory

    from diffusers_bagel import BagelPipeline
    from transformers_bagel import BagelForConditionalGeneration

    def loaded() -> dict:
        models = {"model": (repo, None), "original": (original, "v1")}
        found = {
            name: digest(BagelForConditionalGeneration.from_pretrained(place, revision=revision))
            for name, (place, revision) in models.items()
        }
        return found | {"pipeline": digests(BagelPipeline.from_pretrained(repo))}

    def refuse(request: Any) -> None:
        raise httpx.ConnectError("no network", request=request)

    found = {"with": loaded()}
    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(refuse)))
    found["without"] = loaded()
    from transformers_bagel.files import file_names

    found["unknown"] = error_of(lambda: file_names(unknown))
    return found


def original_user(repo: str, folder: str) -> dict:
    """Somebody with a token for a private repository of the original layout, one of its branches, and a cache elsewhere."""
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    from diffusers_bagel import BagelPipeline
    from transformers_bagel import BagelConfig

    place = {"revision": "v1", "token": os.environ["TOKEN_OF_THIS_TEST"], "cache_dir": folder}

    def settings(config: Any) -> dict:
        return {name: value for name, value in config.to_dict().items() if not name.startswith("_")}

    def loaded() -> dict:
        model = AutoModelForImageTextToText.from_pretrained(repo, **place)
        return {
            "config": settings(BagelConfig.from_pretrained(repo, **place)),
            "auto": {"config": settings(model.config), "generation": model.generation_config.to_dict()},
            "name": model.name_or_path,
            "part": AutoModel.from_pretrained(repo, visual_gen=False, **place).config.visual_gen,
            "digests": digests(BagelPipeline.from_pretrained(repo, **place)) | {"auto": digest(model)},
            "stop": AutoProcessor.from_pretrained(repo, **place).tokenizer.eos_token_id,
        }

    found = loaded()
    place["local_files_only"] = True
    found["offline"] = loaded()
    found["default cache"] = [path.name for path in Path(os.environ["HF_HOME"]).rglob("*.safetensors")]
    return found


def publisher(repo: str, base: str) -> dict:
    """Somebody with a token, who publishes a model, a processor, a pipeline and adapters, and loads them again."""
    import torch
    from huggingface_hub import create_repo, upload_folder
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from diffusers_bagel import BagelPipeline
    from transformers_bagel import LORA_TARGETS, BagelForConditionalGeneration

    pipe = BagelPipeline.from_pretrained(base)
    found: dict[str, Any] = {"pushed": digests(pipe)}
    pipe.transformer.push_to_hub(f"{repo}-model")
    pipe.processor.push_to_hub(f"{repo}-model")
    found["model"] = digest(AutoModelForImageTextToText.from_pretrained(f"{repo}-model"))
    found["processor"] = type(AutoProcessor.from_pretrained(f"{repo}-model")).__name__
    pipe.transformer.push_to_hub(f"{repo}-model", revision="half", max_shard_size="500KB")
    found["branch"] = digest(BagelForConditionalGeneration.from_pretrained(f"{repo}-model", revision="half"))
    pipe.push_to_hub(f"{repo}-pipeline", private=True)
    found["pipeline"] = digests(BagelPipeline.from_pretrained(f"{repo}-pipeline"))

    def adapter(model: Any, name: str = "default") -> str:
        weights = get_peft_model_state_dict(model, adapter_name=name)
        names = {key: key.removeprefix("base_model.model.").replace(".", "/") for key in weights}
        return digest(torch.nn.ParameterDict({names[key]: value for key, value in weights.items()}))

    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=LORA_TARGETS["gen"], init_lora_weights=False)
    # Of the library's own integration, of peft, and in diffusers' format: as docs/lora.md has them.
    own = BagelForConditionalGeneration.from_pretrained(base)
    own.add_adapter(settings)
    own.push_to_hub(f"{repo}-own")
    trained = get_peft_model(BagelForConditionalGeneration.from_pretrained(base), settings)
    trained.push_to_hub(f"{repo}-peft")
    BagelPipeline.save_lora_weights(
        f"{os.environ['HF_HOME']}/lora",
        transformer_lora_layers=get_peft_model_state_dict(own),
        transformer_lora_adapter_metadata=own.peft_config["default"].to_dict(),
    )
    create_repo(f"{repo}-lora")
    upload_folder(repo_id=f"{repo}-lora", folder_path=f"{os.environ['HF_HOME']}/lora")
    found["adapters"] = {"own": adapter(own), "peft": adapter(trained)}

    again = BagelForConditionalGeneration.from_pretrained(base)
    again.load_adapter(f"{repo}-own")
    whole = AutoModelForImageTextToText.from_pretrained(f"{repo}-own")
    wrapped = PeftModel.from_pretrained(BagelForConditionalGeneration.from_pretrained(base), f"{repo}-peft")
    found["loaded"] = {"own": adapter(again), "whole": adapter(whole), "peft": adapter(wrapped)}
    for name in ("own", "peft", "lora"):
        pipe.load_lora_weights(f"{repo}-{name}", adapter_name=name)
        found["loaded"][f"{name} in the pipeline"] = adapter(pipe.transformer, name)
        found.setdefault("alpha", {})[name] = pipe.transformer.peft_config[name].lora_alpha
    return found


def converter(original: str, revision: str, converted: str, private: str, training: str, folder: str) -> dict:
    """Somebody who converts by id, there and back, and a training with the original repository as its base."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "conversion"))
    import convert_bagel_to_hf
    import convert_hf_to_bagel

    def said(main: Callable, *arguments: str) -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            return main(list(arguments)), stderr.getvalue()

    there, back = f"{folder}/there", f"{folder}/back"
    return {
        "there": said(convert_bagel_to_hf.main, original, there, "--revision", revision)[0],
        "back": said(convert_hf_to_bagel.main, converted, back)[0],
        "training": said(convert_bagel_to_hf.main, training, f"{folder}/trained", "--base", "org/base"),
        "no such revision": said(convert_bagel_to_hf.main, original, f"{folder}/none", "--revision", "nowhere"),
        "private": said(convert_hf_to_bagel.main, private, f"{folder}/none"),
    }


def serve() -> None:
    """Answer each line of the standard input, `[user, arguments, variables, file]`, with the exit code of its process."""
    # And with it torch and transformers, which nobody's findings depend on and which take longer than most users do.
    import peft  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        user, arguments, variables, file = json.loads(line)
        if (child := os.fork()) == 0:
            # What the library prints is not for who reads the codes; what it asks, nobody answers.
            os.dup2(2, 1)
            sys.stdin = open(os.devnull)
            os.environ.update(variables)
            Path(file).write_text(json.dumps(globals()[user](*arguments)))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
