"""A checkpoint that is spread over devices, or offloaded, computes what it computes in one place."""

from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.errors import ModelError
from spectrim.formats.coded_linear import CodedLinear
from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.formats.shared_input import SharedInput
from spectrim.formats.stored_linear import StoredLinear
from spectrim.maths.budget import Format
from spectrim.models.modules import decoder_blocks
from tests.checkpoints import FORMATS, TOKENS, Folders, Made, logits

SOME: tuple[Format, ...] = ("float16", "pifa_int8", "int4_residual", "dense_int4_asym", "coded")
EVERYTHING = {"": "disk"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Made(tmp_path_factory.mktemp("checkpoints"))


def device_map(folder: Path, first: str | int, rest: str | int) -> dict[str, str | int]:
    """The first block on one device, all else on another."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prefix, _ = decoder_blocks(model)
    holders = [name for name, part in model.named_modules() if part._parameters or part._buffers]
    return {name: first if name.startswith(f"{prefix}.0.") else rest for name in holders}


def check(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """``model`` computes, twice, and generates what the checkpoint does without a device map."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = logits(plain)
    # 16 bits: where four-bit integers are offloaded torch's kernel does not multiply them
    near = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=near)
    if dtype == torch.float32:
        generated = [one.generate(TOKENS, max_new_tokens=3, do_sample=False) for one in (plain, model)]
        assert torch.equal(*generated)


def away(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
def test_every_format_computes_from_the_disk(format: Format, mixed: bool, folders: Folders, tmp_path: Path) -> None:
    folder = folders["llama", format]
    places = device_map(folder, "disk", "cpu") if mixed else EVERYTHING
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    before = away(model)
    assert before and (not mixed or all(name.startswith("model.layers.0.") for name in before))
    check(folder, model)
    assert away(model) == before


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_other_architectures_do(family: str, format: Format, folders: Folders, tmp_path: Path) -> None:
    folder = folders[family, format]
    for places in (EVERYTHING, device_map(folder, "disk", "cpu")):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
        assert away(model)
        check(folder, model)


@pytest.mark.parametrize("format", SOME)
def test_16_bit_models_do(format: Format, folders: Folders, tmp_path: Path) -> None:
    folder = folders["llama", format]
    places = device_map(folder, "disk", "cpu")
    options = {"device_map": places, "offload_folder": tmp_path, "dtype": torch.bfloat16}
    check(folder, AutoModelForCausalLM.from_pretrained(folder, **options), torch.bfloat16)


@pytest.mark.parametrize("format", ["float16", "coded"])
def test_what_stays_in_memory_is_decoded_and_shared(format: Format, folders: Folders, tmp_path: Path) -> None:
    folder = folders["llama", format]
    places = device_map(folder, "disk", "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    logits(model)
    for block, offloaded in ((0, True), (1, False)):
        query = model.model.layers[block].self_attn.q_proj
        if isinstance(query, CodedLinear):
            assert query.decoded != offloaded
        else:
            assert isinstance(query, LowRankLinear) and isinstance(query.shared, SharedInput)
            assert (query.shared.weight is None) == offloaded


def test_a_loaded_model_that_is_offloaded_gives_back_its_memory(folders: Folders) -> None:
    folder = folders["llama", "int8"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits(model)  # puts q, k and v together
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    check(folder, model)
    shared = [module.shared for module in model.modules() if isinstance(module, LowRankLinear) and module.shared]
    assert shared and all(isinstance(one, SharedInput) and one.weight is None and one.scale is None for one in shared)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with tied and untied embeddings
def test_an_offloaded_model_is_saved_byte_for_byte(
    family: str, format: Format, folders: Folders, tmp_path: Path
) -> None:
    folder = folders[family, format]
    for index, places in enumerate((EVERYTHING, device_map(folder, "disk", "cpu"))):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
        logits(model)
        saved = tmp_path / str(index)
        model.save_pretrained(saved)
        assert (saved / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_offloaded_model_has_no_plain_weights(folders: Folders, tmp_path: Path) -> None:
    folder = folders["llama", "pifa"]
    places = device_map(folder, "disk", "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    n_stored = sum(isinstance(module, StoredLinear) for module in model.modules())
    for change in (spectrim.to_dense, lambda model: model.dequantize()):
        with pytest.raises(ModelError, match=r"model\.layers\.0\..*offloaded, as those of 7 of .*without device_map"):
            change(model)
    assert sum(isinstance(module, StoredLinear) for module in model.modules()) == n_stored
    check(folder, model)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_transformers_chooses_the_devices(family: str, format: Format, folders: Folders, tmp_path: Path) -> None:
    folder = folders[family, format]
    check(folder, AutoModelForCausalLM.from_pretrained(folder, device_map="auto").cpu())
    options = {"device_map": "auto", "max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path}
    small = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert away(small)
    check(folder, small)


def test_decoded_weights_are_counted_when_devices_are_chosen(folders: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama", "coded"])
    coded = {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}
    assert coded
    for name, module in coded.items():
        for suffix, stored in module.state_dict().items():
            counted = model.hf_quantizer.param_element_size(model, f"{name}.{suffix}", stored) * stored.numel()
            assert counted == pytest.approx(getattr(module, suffix).nbytes), f"{name}.{suffix}"
        assert module.weight.nbytes != module.state_dict()["weight"].nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_and_another_device(format: Format, folders: Folders, tmp_path: Path) -> None:
    folder = folders["llama", format]
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    for first, rest in [("cpu", 0), (0, "cpu"), ("disk", 0), (0, 1)]:
        if rest == 1 and torch.cuda.device_count() < 2:
            continue
        places = device_map(folder, first, rest)
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
        assert bool(away(model)) == ("cpu" in (first, rest) or "disk" in (first, rest))
        torch.testing.assert_close(logits(model).cpu(), expected, rtol=1e-3, atol=1e-3)
        assert model.generate(TOKENS.cuda(), max_new_tokens=3, do_sample=False).shape == (2, 23)
