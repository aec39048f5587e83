"""Every causal type of transformers that can be built small: it works from statistics to checkpoint, or is refused."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import spectrim  # noqa: F401 - registers the checkpoint format
from benchmarks.families import share_reached, small_model
from spectrim.checkpoint.layout import Matrix
from spectrim.checkpoint.loading import to_dense
from spectrim.checkpoint.saving import assemble
from spectrim.compression import expert_statistics
from spectrim.compression.moments import unpack_symmetric
from spectrim.compression.probe import probe
from spectrim.errors import ModelError
from spectrim.maths.quantization import dequantize, round_to_nearest
from spectrim.models.linearise import linearise
from spectrim.models.modules import UNREACHED, compressible_linears
from tests import reference
from tests.checkpoints import packed_weight
from tests.compression.test_statistics import stream, summed_whole

NOT_SMALL = {
    *(
        "bailing_hybrid",
        "blt",
        "cohere_compass_text",
        "dbrx",
        "dots3_note",
        "emu3",
        "gemma3",
        "gemma3n",
        "gemma3n_text",
    ),
    *("gemma4_assistant", "gemma4_unified_assistant", "git", "got_ocr2", "kimi_linear", "mllama", "musicgen"),
    *("moss_transcribe_diarize", "musicgen_melody", "phi4_multimodal", "qwen4_exp", "qwen4_exp_text", "xlstm", "zamba"),
    "zamba2",
}
"""Types that benchmarks/families.py cannot build."""

LOOKS_AHEAD, CACHE, BLOCKS, HEAD = "looks ahead", "generating with a cache", "lists of .* blocks", "behind its blocks"
REFUSED = {
    **dict.fromkeys(("cpmant", "xlnet"), LOOKS_AHEAD),
    "rwkv": CACHE,
    **dict.fromkeys(("hrm_text", "longcat_flash", "xlm"), BLOCKS),
    "reformer": HEAD,
}
"""With what the refusal says."""

WHOLE = {"deepseek_v4", "gemma4", "gemma4_text", "inkling2_text", "prophetnet", "youtu", "zaya"}
"""Types whose blocks cannot be run one by one."""

DECODERS = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("trocr", "whisper"),
)
PARTLY = {
    **dict.fromkeys(DECODERS, 0.615),  # their attention to an encoder is never called
    **dict.fromkeys(("mamba", "falcon_mamba"), 0.87),
    "recurrent_gemma": 0.88,
    "deepseek_v4": 0.877,
    "prophetnet": 0.703,
    "hy_v4": 0.8,
}
"""Share of the blocks that is reached, where it is below nine tenths."""
TOKENS = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randint(3, 120, (3, 32), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither transformers' bars and warnings, nor the shrinkage of experts but for those that saw no token."""
    monkeypatch.setattr(expert_statistics, "ENOUGH", 1e-9)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.enable_progress_bar()


def saved(kind: str, folder: Path) -> PreTrainedModel:
    model = small_model(kind)
    model.save_pretrained(folder, save_original_format=False)
    return model


def note_unreached(folder: Path, names: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {UNREACHED: names}))


def loaded(folder: Path) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max()
    difference = float((found - expected).abs().max() / scale.clamp(min=1e-20))
    assert difference < 1e-4, f"{what}: {difference:.2g} of the largest"


def check_statistics(folder: Path, walk: Callable[..., Any]) -> None:
    """Grams of the walk against hooks on the whole model."""
    whole = loaded(folder)
    linearise(whole)
    model, statistics, owners, _ = walk(folder, tokens=CALIBRATION)
    inputs, gradients = reference.activations(whole, CALIBRATION)
    for index, linears in enumerate(model.linears):
        for name in linears.keys() & inputs.keys():  # some experts see no token
            gram = unpack_symmetric(statistics[index][f"gram.{owners[index][name]}"])
            assert_near(gram, inputs[name].T @ inputs[name], f"inputs of {name}")
            found = unpack_symmetric(statistics[index][f"gradient_gram.{name}"])
            assert_near(found, gradients[name].T @ gradients[name], f"gradients of {name}")


def check_checkpoint(dense: Path, folder: Path) -> None:
    """A checkpoint in int8 against the dense model with rounded weights put in by hand; generated from; saved again."""
    twin, packed, matrices = loaded(dense), {}, {}
    linearise(twin)
    for name, linear in compressible_linears(twin).items():
        matrices[name] = Matrix("dense_int8", min(linear.weight.shape))
        packed[name] = packed_weight(linear.weight.detach(), "dense_int8")
        linear.weight.data = dequantize(round_to_nearest(linear.weight.data, 8, None))
    assemble(dense, folder / "compressed", packed, matrices, ratio_target=0.5, provenance={})
    model = loaded(folder / "compressed")
    assert_near(logits(model), logits(twin), "logits")
    prompt: Any = {"inputs": TOKENS, "attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(**prompt), twin.generate(**prompt))
    expected = logits(model)
    model.save_pretrained(folder / "again")
    assert torch.equal(logits(loaded(folder / "again")), expected)
    to_dense(model).save_pretrained(folder / "plain")
    plain = loaded(folder / "plain")
    assert_near(logits(plain), expected, "logits of the plain model")
    assert {name: part.shape for name, part in plain.state_dict().items()} == {
        name: part.shape for name, part in loaded(dense).state_dict().items()
    }


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_SMALL - REFUSED.keys()))
def test_a_type_works(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "dense")
    unreached, obstacle = probe(tmp_path / "dense")
    assert bool(obstacle) == (kind in WHOLE)
    note_unreached(tmp_path / "dense", unreached)
    share = share_reached(model, unreached)
    assert share == pytest.approx(PARTLY[kind], abs=0.01) if kind in PARTLY else share > 0.9
    check_statistics(tmp_path / "dense", summed_whole if obstacle else stream)
    check_checkpoint(tmp_path / "dense", tmp_path)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_type_is_refused(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    with pytest.raises(ModelError, match=REFUSED[kind]):
        probe(tmp_path)
