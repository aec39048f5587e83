"""stages/prepare.py and stages/calibrate.py on tiny models: a local folder, a local .gguf file, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import params
from pipeline.data import originals, texts
from spectrim.errors import DataError, ModelError, SourceError
from stages import calibrate, prepare, sources
from tests import tiny

Change = Callable[..., dict[str, Any]]


@pytest.fixture
def project(
    tmp_path: Path, model_folders: dict[str, Path], corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Change:
    """Work in an empty folder; returns what rewrites params.yaml: ``change(section__key=value)``."""
    monkeypatch.chdir(tmp_path)
    content = tiny.tiny_params(str(model_folders["llama"]), str(corpus_file))

    def change(**values: Any) -> dict[str, Any]:
        for name, value in values.items():
            section, key = name.split("__")
            content[section][key] = value
        Path("params.yaml").write_text(yaml.safe_dump(content))
        params.load.cache_clear()
        return content

    change()
    yield change
    params.load.cache_clear()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 42)[None]).logits


def to_gguf(model: Any, tokenizer: Any, file: Path) -> Path:
    """A Llama with grouped queries as llama.cpp stores it, in float32: q and k rows in its rotary order."""
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        if n := {"q_proj": heads, "k_proj": groups}.get(name.split(".")[-2], 0):
            rows, columns = array.shape
            array = array.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def run(stage: ModuleType) -> None:
    """The stage behind `sources`, as DVC runs them."""
    sources.main()
    stage.main()


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize(("stored", "load"), [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_prepare_a_folder(family: str, stored: str, load: str, project: Change, model_folders: dict[str, Path]) -> None:
    project(model__source=str(model_folders[family]), prepare__stored_dtype=stored, prepare__load_dtype=load)
    run(prepare)
    folder = Path("artifacts/prepare")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {getattr(torch, stored)}
    model = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=torch.float32)
    tied = bool(original.config.tie_word_embeddings)
    assert ("lm_head.weight" in names) is not tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.dtype == getattr(torch, load)
    for (name, found), wanted in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(found.float(), wanted.to(getattr(torch, stored)).to(getattr(torch, load)).float()), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the river 1873").input_ids == tiny.tokenizer()("the river 1873").input_ids


def test_prepare_records_and_repeats(project: Change, model_folders: dict[str, Path]) -> None:
    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in Path("artifacts/prepare").iterdir()}

    run(prepare)
    first, record = files(), json.loads(Path("artifacts/prepare/prepare.json").read_text())
    assert record["source"] == str(model_folders["llama"])
    assert set(record["files"]) == set(first) - {"prepare.json"}
    assert record["n_parameters"] == tiny.model("llama").num_parameters()
    run(prepare)
    assert files() == first
    project(prepare__stored_dtype="bfloat16")
    run(prepare)
    assert json.loads(Path("artifacts/prepare/prepare.json").read_text())["model_sha256"] != record["model_sha256"]


def test_prepare_moves_the_weights_of_linears_alone(project: Change, model_folders: dict[str, Path]) -> None:
    found = []
    for share in (0.0, 0.3, 0.3):
        project(model__source=str(model_folders["llama"]), prepare__perturb=share)
        run(prepare)
        found.append(load_file("artifacts/prepare/model.safetensors"))
        assert json.loads(Path("artifacts/prepare/prepare.json").read_text())["perturb"] == share
    plain, moved, again = found
    changed = {name for name in plain if not torch.equal(plain[name], moved[name])}
    assert changed == {name for name in plain if name.endswith("_proj.weight")}
    assert all(torch.equal(moved[name], again[name]) for name in plain)


def test_prepare_keeps_generation_config_and_chat_template(
    project: Change, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "with-extras"
    model, tokenizer = tiny.model("llama"), AutoTokenizer.from_pretrained(model_folders["llama"])
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    project(model__source=str(folder))
    run(prepare)
    prepared = AutoModelForCausalLM.from_pretrained("artifacts/prepare")
    assert prepared.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained("artifacts/prepare").chat_template == tokenizer.chat_template
    assert str(tmp_path) not in Path("artifacts/prepare/config.json").read_text()


def test_prepare_a_gguf_file(project: Change, tmp_path: Path) -> None:
    original = tiny.model("llama")
    file = to_gguf(original, tiny.tokenizer(), tmp_path / "tiny.gguf")
    project(model__source=str(file), prepare__stored_dtype="float32")
    run(prepare)
    model = AutoModelForCausalLM.from_pretrained("artifacts/prepare")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained("artifacts/prepare")
    for text in tiny.corpus(3):
        assert tokenizer(text, add_special_tokens=False).input_ids == tiny.tokenizer()(text).input_ids
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    run(calibrate)


def broken_copy(folder: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), rf"1 weights .* missing from the file, first {DOWN}"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "unknown to the architecture but present in the file"),
        (
            lambda tensors: tensors.update({DOWN: torch.ones(3, 3)}),
            r"1 weights .* of another shape in the file, first .*down_proj",
        ),
        (
            lambda tensors: tensors[DOWN].view(-1)[7].fill_(1e6),
            rf"{DOWN}: 1 of 6,144 weights are not finite in .*float16",
        ),
        (lambda tensors: tensors[DOWN].fill_(float("nan")), rf"{DOWN}: 6,144 of 6,144 weights are not finite"),
    ],
)
def test_prepare_refuses_a_broken_model(
    edit: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    project: Change,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    run(prepare)
    before = {file.name: file.read_bytes() for file in Path("artifacts/prepare").iterdir()}
    project(model__source=str(broken_copy(model_folders["llama"], tmp_path / "broken", edit)))
    with pytest.raises(ModelError, match=message):
        run(prepare)
    assert {file.name: file.read_bytes() for file in Path("artifacts/prepare").iterdir()} == before
    assert sorted(path.name for path in Path("artifacts").iterdir()) == ["prepare", "sources"]


def test_prepare_refuses_what_is_no_model(project: Change, model_folders: dict[str, Path], tmp_path: Path) -> None:
    empty, pickled, quantized, cut = (tmp_path / name for name in ("empty", "pickled", "quantized", "cut"))
    empty.mkdir()
    broken_copy(model_folders["llama"], pickled, lambda tensors: None)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    broken_copy(model_folders["llama"], quantized, lambda tensors: None)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    (tmp_path / "junk.gguf").write_bytes(b"GGUF no")
    file = to_gguf(tiny.model("llama"), tiny.tokenizer(), tmp_path / "cut.gguf")
    file.write_bytes(file.read_bytes()[:-50_000])
    broken_copy(model_folders["llama"], cut, lambda tensors: None)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-50_000])
    (tmp_path / "model.bin").write_bytes(b"x")
    for source, kind, message in (
        (empty, SourceError, r"empty/config\.json: not found"),
        (pickled, SourceError, r"pytorch_model\.bin: .* not a whole file of tensors"),
        (quantized, ModelError, "compressed with gptq"),
        (tmp_path / "junk.gguf", SourceError, r"junk\.gguf: no tokenizer .* not a whole GGUF file; get it whole"),
        (tmp_path / "cut.gguf", SourceError, r"cut\.gguf: no tokenizer .* not a whole GGUF file; get it whole"),
        (cut, SourceError, r"cut/model\.safetensors: .* not a whole safetensors file .* get it whole"),
        (tmp_path / "model.bin", SourceError, r"a model is a folder .* or a \.gguf file"),
        (tmp_path / "nowhere", SourceError, "no such file or folder"),
    ):
        project(model__source=str(source))
        with pytest.raises(kind, match=message):
            run(prepare)
    assert not Path("artifacts/prepare").exists()


def test_prepare_refuses_a_tokenizer_that_is_too_large(
    project: Change, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = broken_copy(model_folders["llama"], tmp_path / "larger", lambda tensors: None)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["brand", "new"])
    tokenizer.save_pretrained(copy)
    project(model__source=str(copy))
    with pytest.raises(ModelError, match="the tokenizer has 322 tokens, the model embeds 320"):
        run(prepare)


def test_calibrate(project: Change, corpus_file: Path, tmp_path: Path) -> None:
    raw = tmp_path / "book.txt"
    raw.write_text("\n\n".join(tiny.corpus(12)[::-1]) + "\n")
    content = project()
    content["data"]["book"] = content["data"]["corpus"] | {"source": str(raw), "splits": {"test": 1.0}}
    project(calibrate__test_windows=4)
    run(prepare)
    run(calibrate)
    folder = Path("artifacts/calibrate")
    summary = json.loads((folder / "calibrate.json").read_text())
    tokenizer = tiny.tokenizer()
    book = tokenizer(raw.read_text(), add_special_tokens=False).input_ids
    windows = texts.load_windows(folder / "test" / "book.parquet")
    assert windows.reshape(-1).tolist() == book[: 4 * 32]
    assert summary["test"]["book"]["n_tokens_split"] == len(book)
    assert summary["test"]["book"]["n_bytes"] == len(tokenizer.decode(book[: 4 * 32]).encode())
    assert texts.load_windows(folder / "test" / "corpus.parquet").shape == (4, 32)
    drawn = {part: texts.load_windows(folder / f"{part}.parquet") for part in ("calibration", "validation")}
    assert drawn["calibration"].shape == (12, 32) and drawn["validation"].shape == (2, 32)
    for part, loaded in drawn.items():
        assert summary[part]["tokens_sha256"] == texts._sha256(loaded.numpy())
        assert summary[part]["texts"] == {"corpus": len(loaded)}
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    project(calibrate__test_windows=4, calibrate__refinement_windows=7)
    run(calibrate)
    more = texts.load_windows(folder / "refinement.parquet").tolist()
    assert len(more) == 7 and not any(window in drawn["calibration"].tolist() for window in more)
    assert (folder / "calibration.parquet").read_bytes() == before[folder / "calibration.parquet"]
    project(calibrate__test_windows=4, calibrate__refinement_windows=0)
    run(calibrate)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    project(compression__seed=1)
    run(calibrate)
    assert not torch.equal(texts.load_windows(folder / "calibration.parquet"), drawn["calibration"])
    assert (folder / "test" / "corpus.parquet").read_bytes() == before[folder / "test" / "corpus.parquet"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibrate__calibration_windows": 100_000}, "the calibration split has .* tokens"),
        ({"calibrate__validation_windows": 9_999}, "the validation split has .* needs 319,968"),
        ({"calibrate__test_windows": 9_999}, "the test split has"),
        ({"calibrate__seq_len": 129}, "129 tokens per window, but the model has 128 positions"),
    ],
)
def test_calibrate_refuses(values: dict[str, Any], message: str, project: Change) -> None:
    run(prepare)
    run(calibrate)
    before = Path("artifacts/calibrate/calibrate.json").read_bytes()
    project(**values)
    with pytest.raises(DataError, match=message):
        run(calibrate)
    assert Path("artifacts/calibrate/calibrate.json").read_bytes() == before
    assert sorted(path.name for path in Path("artifacts").iterdir()) == ["calibrate", "prepare", "sources"]


def test_a_models_own_code_is_never_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w')\nfrom transformers import PretrainedConfig as Config\n")
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"unheard-of' is not one of transformers .* code\.Config, is not run"):
        originals.load_original(folder, torch.float16)
    with pytest.raises(ValueError, match="custom code"):
        originals.check_context(folder, 8)
    assert not trace.exists()
