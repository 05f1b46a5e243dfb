"""Files that others made smaller: FP8, GGUF, DFloat11, auto-round. Each gives what the unpacked model gives."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import CHECKPOINT, max_error
from transformers_bagel import BagelForConditionalGeneration
from transformers_bagel.packed import scaled


WEIGHTS = load_file(CHECKPOINT / "ema.safetensors")
FP8 = torch.float8_e4m3fn
IDS = torch.tensor([[1, 2, 3, 4]])
BAGEL = BagelForConditionalGeneration


def is_layer(name: str) -> bool:
    return "language_model.model.layers." in name and name.endswith("_proj.weight")


@pytest.fixture
def repository(tmp_path):
    """`repository(tensors, name=..., settings=...)`: the golden checkpoint with other weights."""

    def make(tensors: dict, name: str = "ema.safetensors", folder: str = "repo", settings: dict | None = None) -> Path:
        path = tmp_path / folder
        ignored = shutil.ignore_patterns("ema.safetensors", "*.index.json")
        shutil.copytree(CHECKPOINT, path, ignore=ignored)
        save_file(tensors, path / name)
        if settings:
            said = json.loads((path / "config.json").read_text(encoding="utf-8"))
            (path / "config.json").write_text(json.dumps(said | settings), encoding="utf-8")
        return path

    return make


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def drawn(model) -> torch.Tensor:
    """A velocity: what the weights of the other expert give."""
    step = {
        "latents": torch.linspace(-1, 1, 64).reshape(4, 16).to(model.dtype),
        "latent_grid_hw": torch.tensor([[2, 2]]),
        "timesteps": torch.full((1,), 0.5),
        "position_ids": torch.zeros(1, dtype=torch.long),
    }
    with torch.no_grad():
        return model(**step).velocity.float()


def assert_same(packed, whole) -> None:
    assert packed.dtype == whole.dtype
    assert torch.equal(logits(packed), logits(whole))
    assert torch.equal(drawn(packed), drawn(whole))


def fp8_pair(scale: str, suffix: str = "weight_scale") -> tuple[dict, dict]:
    """The tensors of a file in FP8, and those that they stand for."""
    packed, whole = {}, {}
    for name, tensor in WEIGHTS.items():
        if not is_layer(name):
            packed[name] = whole[name] = tensor
            continue
        if scale == "none":
            packed[name] = tensor.to(FP8)
            whole[name] = packed[name].float()
            continue
        parts = {"tensor": 1, "row": tensor.shape[0], "blocks": 2}[scale]
        factors = 0.01 + 0.01 * torch.rand(
            parts, 2 if scale == "blocks" else 1, generator=torch.Generator().manual_seed(1)
        )
        factors = factors[0, 0] if scale == "tensor" else factors
        wide = factors
        if scale == "blocks":
            sides = [2 ** (side // 2 - 1).bit_length() for side in tensor.shape]
            for axis, side in enumerate(sides):
                wide = wide.repeat_interleave(side, axis).narrow(axis, 0, tensor.shape[axis])
        packed[name] = (tensor / wide).to(FP8)
        packed[f"{name.removesuffix('weight')}{suffix}"] = factors
        whole[name] = packed[name].float() * wide
    return packed, whole


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    ("scale", "suffix"),
    [
        ("none", ""),
        ("tensor", "scale_weight"),
        ("tensor", "weight_scale"),
        ("row", "weight_scale"),
        ("blocks", "weight_scale_inv"),
    ],
)
def test_a_file_in_fp8_is_the_model_that_it_stands_for(scale, suffix, dtype, repository):
    packed, whole = fp8_pair(scale, suffix)
    folder = repository(packed, "ema-FP8.safetensors")
    loaded = BAGEL.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert_same(loaded, BAGEL.from_pretrained(repository(whole, folder="whole"), dtype=dtype))


def test_a_whole_file_in_fp8_computes_in_bfloat16(repository):
    """Every tensor is in FP8, and no settings name a type."""
    packed = {name: tensor.to(FP8) for name, tensor in WEIGHTS.items()}
    loaded = BAGEL.from_pretrained(repository(packed, "ema_fp8_e4m3fn.safetensors"))
    assert loaded.dtype == torch.bfloat16 and logits(loaded).isfinite().all()
    settings = {"torch_dtype": "float8_e4m3fn"}
    assert BAGEL.from_pretrained(repository(packed, folder="said", settings=settings)).dtype == torch.bfloat16


def test_factors_of_activations_and_marks_of_fp8_files_are_left_out(repository):
    packed, whole = fp8_pair("tensor", "scale_weight")
    packed |= {
        name.replace("scale_weight", "scale_input"): torch.ones(()) for name in packed if "scale_weight" in name
    }
    packed["scaled_fp8"] = torch.zeros(2).to(FP8)
    assert_same(BAGEL.from_pretrained(repository(packed)), BAGEL.from_pretrained(repository(whole, folder="whole")))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 4), (3, 2)])
def test_factors_of_any_shape_multiply(shape):
    weight, scale = torch.randn(6, 4).to(FP8), torch.rand(shape) + 0.5
    rows = scale.reshape(-1, 1) if len(shape) == 1 else scale
    if shape == (3, 2):
        rows = rows.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(scaled(weight, scale), weight.float() * rows)


def write_gguf(file: Path, tensors: dict[str, torch.Tensor], kind: str, architecture: str = "bagel") -> dict:
    """Write a GGUF whose layers are of a type of the format, and give what they stand for."""
    gguf = pytest.importorskip("gguf")
    writer, whole = gguf.GGUFWriter(file, architecture), {}
    for name, tensor in tensors.items():
        values, quant = tensor.float().numpy(), gguf.GGMLQuantizationType[kind]
        block = gguf.GGML_QUANT_SIZES[quant][0]
        if tensor.dim() == 2 and tensor.shape[-1] % block == 0:
            data = gguf.quants.quantize(values, quant)
            writer.add_tensor(name, data, raw_dtype=quant)
            whole[name] = torch.from_numpy(gguf.quants.dequantize(data, quant).copy()).reshape(tensor.shape)
        else:
            writer.add_tensor(name, values.astype(np.float32))
            whole[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole


@pytest.mark.parametrize("door", ["lone_file", "gguf_file", "path"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_a_gguf_is_the_model_that_it_stands_for(kind, door, repository, tmp_path):
    folder = repository(WEIGHTS, folder="gguf")
    (folder / "ema.safetensors").unlink()
    whole = write_gguf(folder / "bagel-q.gguf", WEIGHTS, kind)
    path = folder / "bagel-q.gguf" if door == "path" else folder
    kwargs = {"gguf_file": "bagel-q.gguf"} if door == "gguf_file" else {}
    loaded = BAGEL.from_pretrained(path, dtype=torch.float32, **kwargs)
    assert_same(loaded, BAGEL.from_pretrained(repository(whole, folder="whole"), dtype=torch.float32))
    assert loaded.config.max_latent_size == 8


def test_a_gguf_alone_takes_the_rest_from_a_base(tmp_path):
    write_gguf(tmp_path / "bagel.gguf", WEIGHTS, "Q8_0")
    loaded = BAGEL.from_pretrained(tmp_path / "bagel.gguf", base=CHECKPOINT)
    assert max_error(logits(loaded), logits(BAGEL.from_pretrained(CHECKPOINT))) < 0.5
    assert_same(BAGEL.from_pretrained(CHECKPOINT, gguf_file=str(tmp_path / "bagel.gguf")), loaded)


def test_several_ggufs_ask_for_one(tmp_path):
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(tmp_path / f"bagel-{kind}.gguf", WEIGHTS, kind)
    with pytest.raises(ValueError, match=r"bagel-Q4_0\.gguf, bagel-Q8_0\.gguf.*`gguf_file=`"):
        BAGEL.from_pretrained(tmp_path, base=CHECKPOINT)


def test_a_gguf_of_a_text_model_is_refused(tmp_path):
    qwen = {"token_embd.weight": torch.zeros(64, 32), "blk.0.attn_q.weight": torch.zeros(32, 32)}
    write_gguf(tmp_path / "qwen2.gguf", qwen, "Q8_0", "qwen2")
    with pytest.raises(
        ValueError, match=r"architecture qwen2, made for llama\.cpp, with token_embd\.weight.*no BAGEL"
    ):
        BAGEL.from_pretrained(tmp_path / "qwen2.gguf", base=CHECKPOINT)


def test_a_broken_gguf_is_named(tmp_path):
    write_gguf(tmp_path / "bagel.gguf", WEIGHTS, "Q8_0")
    (tmp_path / "bagel.gguf").write_bytes((tmp_path / "bagel.gguf").read_bytes()[:-5000])
    with pytest.raises(OSError, match=r"bagel\.gguf' is truncated"):
        BAGEL.from_pretrained(tmp_path, base=CHECKPOINT)


@pytest.mark.parametrize(("name", "package"), [("gguf", "gguf"), ("dfloat11", "dfloat11")])
def test_a_library_that_is_missing_is_named_before_anything_is_read(name, package, repository, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    folder = repository(df11_tensors(), "model.safetensors", settings=DF11_SETTINGS)
    if name == "gguf":
        shutil.copytree(
            CHECKPOINT, tmp_path / "gguf", ignore=shutil.ignore_patterns("ema.safetensors", "*.index.json")
        )
        folder = tmp_path / "gguf"
        (folder / "bagel.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=f"needs the library `{name}`: pip install '{package}"):
        BAGEL.from_pretrained(folder)


# What a DF11 folder says, as its library writes it: several weights of a module in one, or the weight of one module.
LAYER = [f"self_attn.{part}_proj{expert}" for expert in ("", "_moe_gen") for part in "qkvo"]
LAYER += [f"mlp{expert}.{part}_proj" for expert in ("", "_moe_gen") for part in ("gate", "up", "down")]
PATTERNS = {
    r"language_model\.model\.layers\.\d+": LAYER,
    r"language_model\.lm_head": [],
    r"language_model\.model\.embed_tokens": [],
    r"vit_model\.vision_model\.encoder\.layers\.\d+": ["mlp.fc1", "mlp.fc2"],
}
DF11_SETTINGS = {
    "dfloat11_config": {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": PATTERNS,
    }
}


def df11_modules() -> dict[str, list[str]]:
    """The packed modules, and the weights in each."""
    modules = {"language_model.lm_head": [], "language_model.model.embed_tokens": []}
    modules |= {f"language_model.model.layers.{index}": LAYER for index in range(3)}
    modules |= {f"vit_model.vision_model.encoder.layers.{index}": ["mlp.fc1", "mlp.fc2"] for index in range(2)}
    return {name: [f"{name}.{part}.weight" for part in parts] or [f"{name}.weight"] for name, parts in modules.items()}


def df11_tensors() -> dict[str, torch.Tensor]:
    """The golden checkpoint as DF11, with a code of eight bits for every exponent, in which nothing gets smaller."""
    tensors = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    for module, names in df11_modules().items():
        parts = [tensors.pop(name).flatten() for name in names]
        bits = torch.cat(parts).view(torch.int16)
        count = bits.numel()
        blocks = -(-count // 4096)
        table = torch.stack([torch.arange(256), torch.full((256,), 8)]).to(torch.uint8)
        starts = torch.tensor([*range(0, count, 4096), count], dtype=torch.int32)
        tensors |= {
            f"{module}.luts": table,
            f"{module}.encoded_exponent": ((bits >> 7) & 0xFF).to(torch.uint8),
            f"{module}.sign_mantissa": ((bits >> 8) & 0x80 | (bits & 0x7F)).to(torch.uint8),
            f"{module}.output_positions": starts.view(torch.uint8),
            f"{module}.gaps": torch.zeros(blocks * 512 * 5 // 8, dtype=torch.uint8),
            f"{module}.split_positions": torch.tensor([part.numel() for part in parts]).cumsum(0)[:-1],
        }
    return tensors


class StandInForDf11:
    """What the library does on a GPU: it finds modules by the names in the files, takes their weights away, and gives them
    new ones before each forward."""

    @classmethod
    def from_pretrained(cls, folder, device=None, bfloat16_model=None):
        assert device == "cpu"
        settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["dfloat11_config"]
        tensors = {}
        for file in Path(folder).glob("*.safetensors"):
            tensors |= load_file(file)
        state = bfloat16_model.state_dict()
        for name, tensor in tensors.items():
            place, _, leaf = name.rpartition(".")
            if leaf == "encoded_exponent":
                parts = next(
                    parts for pattern, parts in settings["pattern_dict"].items() if re.fullmatch(pattern, place)
                )
                cls.pack(bfloat16_model.get_submodule(place), parts, tensors, place)
            elif not name.startswith(("encoder.", "decoder.")) and leaf not in (
                "luts",
                "sign_mantissa",
                "gaps",
                "output_positions",
                "split_positions",
            ):
                assert torch.equal(state[name], tensor)
        return bfloat16_model

    @staticmethod
    def pack(module: nn.Module, parts: list[str], tensors: dict, place: str) -> None:
        targets = [module.get_submodule(part) for part in parts] or [module]
        shapes = [target.weight.shape for target in targets]
        for target in targets:
            del target.weight

        def decode(*args) -> None:
            exponent = tensors[f"{place}.encoded_exponent"].to(torch.int16)
            rest = tensors[f"{place}.sign_mantissa"].to(torch.int16)
            bits = (exponent << 7) | (rest & 0x7F) | ((rest & 0x80) << 8)
            sides = [shape.numel() for shape in shapes]
            for target, weight, shape in zip(targets, bits.view(torch.bfloat16).split(sides), shapes, strict=True):
                target.weight = weight.view(shape)

        module.register_forward_pre_hook(decode)


@pytest.fixture
def dfloat11(monkeypatch):
    module = types.ModuleType("dfloat11")
    module.DFloat11Model = StandInForDf11
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "dfloat11", module)


@pytest.mark.parametrize("settings_alone", [True, False])
def test_a_df11_folder_gives_what_bfloat16_gives(settings_alone, dfloat11, repository, encode):
    """As published: files of any names, a `config.json` of DF11's settings alone, and the VAE in a folder."""
    folder = repository(df11_tensors(), "language_model_rest.safetensors", settings=DF11_SETTINGS)
    if settings_alone:
        (folder / "config.json").write_text(json.dumps(DF11_SETTINGS), encoding="utf-8")
        (folder / "language_model_rest.safetensors").unlink()
        tensors = df11_tensors()
        for module in df11_modules():
            packed = {name: tensors.pop(name) for name in list(tensors) if name.rpartition(".")[0] == module}
            save_file(packed, folder / f"{module.replace('.', '_')}.safetensors")
        save_file(tensors, folder / "model.safetensors")
    (folder / "vae").mkdir()
    shutil.move(folder / "ae.safetensors", folder / "vae")
    loaded = BAGEL.from_pretrained(folder)
    whole = BAGEL.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    assert_same(loaded, whole)
    inputs = encode(["@wide", "what?"])
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4), whole.generate(**inputs, max_new_tokens=4))


def test_df11_is_bfloat16_alone(dfloat11, repository):
    folder = repository(df11_tensors(), "model.safetensors", settings=DF11_SETTINGS)
    with pytest.raises(ValueError, match=r"`dtype`.*bfloat16"):
        BAGEL.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_layers_of_a_gguf_may_stay_packed(kind, dtype, tmp_path, repository, encode):
    whole = write_gguf(tmp_path / "bagel.gguf", WEIGHTS, kind)
    from diffusers import GGUFQuantizationConfig

    config = GGUFQuantizationConfig(compute_dtype=dtype)
    packed = BAGEL.from_pretrained(tmp_path / "bagel.gguf", base=CHECKPOINT, dtype=dtype, quantization_config=config)
    unpacked = BAGEL.from_pretrained(repository(whole, folder="whole"), dtype=dtype)
    layer = packed.model.language_model.layers[0].mlp_moe_gen.gate_proj.weight
    bits = {"Q8_0": 8.5, "Q4_0": 4.5}[kind]
    assert layer.nbytes == unpacked.model.language_model.layers[0].mlp_moe_gen.gate_proj.weight.numel() * bits / 8
    # diffusers multiplies by the factors of blocks in float16.
    tolerance = 5e-3 if dtype == torch.float32 else 0.05
    assert max_error(logits(packed), logits(unpacked)) <= tolerance
    assert max_error(drawn(packed), drawn(unpacked)) <= tolerance
    inputs = encode(["@wide", "what?"])
    assert packed.generate(**inputs, max_new_tokens=4).shape == unpacked.generate(**inputs, max_new_tokens=4).shape


def test_layers_of_other_files_are_not_packed_as_those_of_a_gguf():
    with pytest.raises(ValueError, match="no layer in .* is packed as one"):
        BAGEL.from_pretrained(CHECKPOINT, quantization_config={"quant_method": "gguf"})


class FourBits(nn.Module):
    """A layer as auto-round writes it in GPTQ's packing: eight numbers in one of 32 bits, factors of groups."""

    def __init__(self, columns: int, rows: int, group: int):
        super().__init__()
        self.group = group
        self.register_buffer("qweight", torch.zeros(columns // 8, rows, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(columns // group, rows // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(columns // group, rows))
        self.register_buffer("bias", None)

    def weight(self) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4)
        values = (self.qweight[:, None] >> shifts[:, None]) & 15
        return ((values.reshape(-1, values.shape[-1]) - 8) * self.scales.repeat_interleave(self.group, 0)).T

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight().to(inputs.dtype).T


def four_bits(weight: torch.Tensor, group: int) -> FourBits:
    layer = FourBits(weight.shape[1], weight.shape[0], group)
    layer.scales = weight.T.unflatten(0, (-1, group)).abs().amax(1) / 7
    values = (weight.T / layer.scales.repeat_interleave(group, 0)).round().clamp(-8, 7).to(torch.int32) + 8
    parts = values.unflatten(0, (-1, 8))
    layer.qweight = sum((parts[:, index] << (4 * index) for index in range(8)), torch.zeros_like(layer.qweight))
    return layer


@pytest.fixture
def auto_round(monkeypatch):
    """What the library does before weights are loaded: it replaces the layers that the settings name."""

    def convert_hf_model(model, device):
        settings = model.config.quantization_config
        blocks, extra = settings.block_name_to_quantize, settings.extra_config
        assert all(name in dict(model.named_modules()) for name in [*blocks, *extra])
        for name, module in list(model.named_modules()):
            whole = extra.get(name, {}).get("bits") == 16
            if isinstance(module, nn.Linear) and name.startswith(tuple(blocks)) and not whole:
                parent, _, leaf = name.rpartition(".")
                layer = FourBits(module.in_features, module.out_features, settings.group_size)
                setattr(model.get_submodule(parent), leaf, layer.to("meta"))
        return model, []

    contents = {"convert_hf_model": convert_hf_model, "infer_target_device": lambda device_map: "cpu"}
    modules = {name: types.ModuleType(name) for name in ("auto_round", "auto_round.inference")}
    modules["auto_round.inference.convert_model"] = types.ModuleType("auto_round.inference.convert_model")
    vars(modules["auto_round.inference.convert_model"]).update(contents, post_init=lambda model, backends: None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.quantizers.quantizer_auto_round.is_auto_round_available", lambda: True)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq"])
def test_a_repository_of_auto_round_is_the_model_that_it_stands_for(packing, auto_round, repository):
    """As its library writes a BAGEL: the understanding MLPs in four bits, names of the original code in the settings, and in
    the file all buffers and the VAE."""
    group, packed, whole = 32, {}, {}
    for name, tensor in WEIGHTS.items():
        packed[name] = whole[name] = tensor
        if is_layer(name) and ".mlp." in name:
            layer, stem = four_bits(packed.pop(name), group), name.removesuffix("weight")
            packed |= {stem + part: value for part, value in layer.state_dict().items()}
            whole[name] = layer.weight().contiguous()
    packed |= {"language_model.model.rotary_emb.inv_freq": torch.zeros(8), "encoder.conv_in.weight": torch.zeros(2)}
    spared = [name.removesuffix(".weight") for name in whole if is_layer(name) and ".mlp." not in name]
    spared += [name.removesuffix(".weight") for name in whole if name.endswith("_proj_moe_gen.weight")]
    settings = {
        "quant_method": "auto-round",
        **{"bits": 4, "group_size": group, "sym": True, "data_type": "int", "packing_format": packing},
        "block_name_to_quantize": "language_model.model.layers",
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in spared},
    }
    folder = repository(
        packed, "model.safetensors", settings={"quantization_config": settings, "torch_dtype": "float32"}
    )
    loaded = BAGEL.from_pretrained(folder)
    assert sum(isinstance(module, FourBits) for module in loaded.modules()) == 9
    unpacked = BAGEL.from_pretrained(repository(whole, folder="whole"))
    assert max_error(logits(loaded), logits(unpacked)) <= 1e-5
    assert max_error(drawn(loaded), drawn(unpacked)) <= 1e-5


def test_tensors_that_a_quantiser_adds_are_not_missed(model):
    """As those of Quanto, which keeps factors of activations beside every weight."""
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    try:

        @register_quantization_config("factors")
        class Config(QuantizationConfigMixin):
            def __init__(self, **kwargs):
                self.quant_method = "factors"

        @register_quantizer("factors")
        class Quantizer(HfQuantizer):
            is_trainable = False

            def is_serializable(self):
                return False

            def _process_model_before_weight_loading(self, model, **kwargs):
                for module in list(model.modules()):
                    if isinstance(module, nn.Linear):
                        module.register_buffer("input_scale", torch.ones((), device="meta"))

            def _process_model_after_weight_loading(self, model, **kwargs):
                return model

        loaded = BAGEL.from_pretrained(CHECKPOINT, quantization_config=Config())
        assert torch.equal(logits(loaded), logits(model))
        assert "model.connector.fc1.input_scale" in loaded.state_dict()
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop("factors", None)
        AUTO_QUANTIZER_MAPPING.pop("factors", None)


@pytest.mark.parametrize("name", ["weight_zero_point", "weight_scale_2", "scale_shift"])
@pytest.mark.parametrize("ignored", [True, False])
def test_what_is_beside_a_weight_in_fp8_and_not_known_is_refused(name, ignored, repository):
    """As of a tool with another scheme: without what is beside them the weights are others."""
    packed, _ = fp8_pair("tensor")
    layer = "language_model.model.layers.0.self_attn.q_proj."
    with pytest.raises(ValueError, match=f"'{layer}{name}' is beside a weight in FP8.*not known"):
        BAGEL.from_pretrained(repository(packed | {layer + name: torch.ones(())}), ignore_unexpected_keys=ignored)


def test_factors_that_are_not_finite_are_refused(repository):
    packed, _ = fp8_pair("row")
    name = "language_model.model.layers.1.mlp.up_proj.weight_scale"
    packed[name][3] = float("nan")
    with pytest.raises(ValueError, match=f"not finite in {name}"):
        BAGEL.from_pretrained(repository(packed))


EXTRA = {
    "a_table_of_the_code": {"language_model.model.rotary_emb.inv_freq": torch.zeros(8)},
    "a_buffer_of_integers": {"encoder.counts": torch.zeros(2, dtype=torch.int64)},
}


@pytest.mark.parametrize("kind", EXTRA)
def test_the_type_of_a_file_is_that_of_the_models_tensors(kind, repository):
    """A file in FP8 and float16, whose first wider tensor is none of the model's."""
    packed = {name: tensor.to(FP8) if is_layer(name) else tensor.half() for name, tensor in WEIGHTS.items()}
    loaded = BAGEL.from_pretrained(repository(packed | EXTRA[kind]), ignore_unexpected_keys=True)
    assert loaded.dtype == torch.float16


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_packed_layers_compute_in_the_type_of_their_config(dtype, tmp_path):
    from diffusers import GGUFQuantizationConfig

    write_gguf(tmp_path / "bagel.gguf", WEIGHTS, "Q8_0")
    kwargs = {"base": CHECKPOINT, "quantization_config": GGUFQuantizationConfig(compute_dtype=torch.bfloat16)}
    if dtype is None:
        loaded = BAGEL.from_pretrained(tmp_path / "bagel.gguf", **kwargs)
        assert loaded.dtype == torch.bfloat16 and logits(loaded).isfinite().all()
        return
    with pytest.raises(ValueError, match="`compute_dtype`.*bfloat16.*`dtype`.*float32"):
        BAGEL.from_pretrained(tmp_path / "bagel.gguf", dtype=dtype, **kwargs)


def test_a_pipeline_without_a_type_takes_that_of_df11(dfloat11, repository):
    from diffusers_bagel import BagelPipeline

    folder = repository(df11_tensors(), "model.safetensors", settings=DF11_SETTINGS)
    assert BagelPipeline.from_pretrained(folder).transformer.dtype == torch.bfloat16
