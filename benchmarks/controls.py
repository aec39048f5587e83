# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "llmcompressor==0.14.0.1", "cyllama==0.2.18", "gguf", "compressed-tensors", "datasets", "pyarrow", "torch",
#     "transformers",
# ]
# ///
"""What people quantize with, on the windows of this project: one JSON object per scheme, ready for a table.

    python -m venv ENV && ENV/bin/pip install llmcompressor==0.14.0.1 cyllama==0.2.18 gguf
    ENV/bin/python benchmarks/controls.py [--text FILE] [--gguf FILE]

It runs in an environment of its own, which its first lines declare (`uv run` makes it), since llm-compressor pins other
versions. So it imports nothing of this project.
The model, the calibration windows and the test windows are those of `dvc repro calibrate`; FILE is one more text, 16
windows of it.

    nearest         int4 in groups of 64, symmetric, round to nearest
    gptq            the same by llm-compressor's GPTQ (Frantar et al. 2022, arXiv:2210.17323), its defaults
    gptq-asymmetric with a zero point per group
    q8_0 … q2_k     llama.cpp's formats, made of the model's GGUF file by cyllama, without an importance matrix;
                    embeddings and the head stay in 16 bit. Rows whose inputs 256 does not divide get other formats
                    there than the name says
"""

import argparse
import json
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

GROUP, BITS, SCALE_BITS = 64, 4, 16
SCHEMES = {"nearest": True, "gptq": True, "gptq-asymmetric": False}  # whether it is symmetric
GGUF = {"q8_0": 7, "q6_k": 18, "q4_k_m": 15, "q4_k_s": 14, "iq4_nl": 25, "q4_0": 2, "q3_k_m": 12, "q2_k": 10}
"""llama.cpp's numbers of these formats."""
FLOAT16 = 1  # and of that one
TEXT_WINDOWS = 16
ARTIFACTS = Path("artifacts")


def windows_of(file: Path) -> Tensor:
    """Token windows (windows, seq) that `calibrate` wrote."""
    return torch.tensor(pyarrow.parquet.read_table(file)["input_ids"].to_pylist())


def quantized(folder: Path, scheme: str, calibration: Tensor) -> Any:
    """The model in ``folder``, its linears but for the head quantized."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=BITS, symmetric=SCHEMES[scheme], strategy="group", group_size=GROUP)
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = QuantizationModifier if scheme == "nearest" else GPTQModifier
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=modifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=len(calibration),
        max_seq_length=calibration.shape[1],
        shuffle_calibration_samples=False,
        pipeline="datafree" if scheme == "nearest" else "sequential",
    )
    return model.eval()


def in_gguf(file: Path, scheme: str, folder: Path) -> tuple[Any, float]:
    """The model of a GGUF file in another of its formats, and the bytes of its linears over those in 16 bit."""
    from cyllama.llama import llama_cpp
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    wanted = llama_cpp.LlamaModelQuantizeParams()
    wanted.ftype, wanted.allow_requantize = GGUF[scheme], True
    wanted.token_embedding_type = wanted.output_tensor_type = FLOAT16
    made = folder / f"{scheme}.gguf"
    llama_cpp.model_quantize(str(file), str(made), wanted)
    linears = [part for part in GGUFReader(made).tensors if part.name.startswith("blk.") and len(part.shape) == 2]
    ratio = sum(part.n_bytes for part in linears) / sum(2 * part.n_elements for part in linears)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=made.name, dtype=torch.float32)
    return model.eval(), float(ratio)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean loss over every next token."""
    losses = [cross_entropy(model(input_ids=window[None]).logits[0, :-1].float(), window[1:]) for window in windows]
    return math.exp(float(torch.stack(losses).double().mean()))


def text_windows(folder: Path, file: Path, calibration: Tensor) -> Tensor:
    """The first windows of a text taken as one, as long as those of ``calibration``, and behind BOS where those are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if (calibration[:, 0] == tokenizer.bos_token_id).all() else []
    n_text = calibration.shape[1] - len(bos)
    return torch.tensor([bos + tokens[i * n_text : (i + 1) * n_text] for i in range(TEXT_WINDOWS)])


def main() -> None:
    """Print one line per scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "schemes", nargs="*", choices=[*SCHEMES, *GGUF, []], help="all where none; llama.cpp's only with --gguf"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model, for llama.cpp's formats")
    parser.add_argument("--text", type=Path, metavar="FILE", help="one more text to measure")
    arguments = parser.parse_args()
    schemes = arguments.schemes or [*SCHEMES, *(GGUF if arguments.gguf else ())]
    if not arguments.gguf and (named := [scheme for scheme in schemes if scheme in GGUF]):
        parser.error(f"{', '.join(named)}: made of the model's GGUF file; name it with --gguf")
    model_folder, calibrate = ARTIFACTS / "prepare", ARTIFACTS / "calibrate"
    calibration = windows_of(calibrate / "calibration.parquet")
    texts = {file.stem: windows_of(file) for file in sorted((calibrate / "test").glob("*.parquet"))}
    if arguments.text:
        texts[arguments.text.stem] = text_windows(model_folder, arguments.text, calibration)
    for scheme in schemes:
        start = time.monotonic()
        if scheme in GGUF:
            with TemporaryDirectory() as folder:
                model, ratio = in_gguf(arguments.gguf, scheme, Path(folder))
        else:
            model = quantized(model_folder, scheme, calibration)
            ratio = (BITS + (SCALE_BITS + (0 if SCHEMES[scheme] else BITS)) / GROUP) / SCALE_BITS
        seconds = time.monotonic() - start
        found = {name: round(perplexity(model, windows), 2) for name, windows in texts.items()}
        print(
            json.dumps({"scheme": scheme, "ratio": ratio, "perplexity": found, "seconds": round(seconds)}), flush=True
        )


if __name__ == "__main__":
    main()
