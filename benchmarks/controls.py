# /// script
# requires-python = ">=3.11"
# dependencies = ["llmcompressor==0.14.0.1", "compressed-tensors", "datasets", "pyarrow", "torch", "transformers"]
# ///
"""What people quantize with, on the windows of this project: one JSON object per scheme, ready for a table.

    python -m venv ENV && ENV/bin/pip install llmcompressor==0.14.0.1
    ENV/bin/python benchmarks/controls.py [--text FILE]

It runs in an environment of its own, which its first lines declare (`uv run` makes it), since llm-compressor pins other
versions. So it imports nothing of this project.
The model, the calibration windows and the test windows are those of `dvc repro calibrate`; FILE is one more text, 16
windows of it.

    nearest         int4 in groups of 64, symmetric, round to nearest
    gptq            the same by llm-compressor's GPTQ (Frantar et al. 2022, arXiv:2210.17323), its defaults
    gptq-asymmetric with a zero point per group
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

GROUP, BITS, SCALE_BITS = 64, 4, 16
SCHEMES = {"nearest": True, "gptq": True, "gptq-asymmetric": False}  # whether it is symmetric
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


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean loss over every next token."""
    losses = [cross_entropy(model(input_ids=window[None]).logits[0, :-1].float(), window[1:]) for window in windows]
    return math.exp(float(torch.stack(losses).double().mean()))


def text_windows(folder: Path, file: Path, seq_len: int) -> Tensor:
    """The first windows of a text taken as one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor(tokens[: TEXT_WINDOWS * seq_len]).view(TEXT_WINDOWS, seq_len)


def main() -> None:
    """Print one line per scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", choices=[*SCHEMES, []], default=list(SCHEMES), help="all where none")
    parser.add_argument("--text", type=Path, metavar="FILE", help="one more text to measure")
    arguments = parser.parse_args()
    model_folder, calibrate = ARTIFACTS / "prepare", ARTIFACTS / "calibrate"
    calibration = windows_of(calibrate / "calibration.parquet")
    texts = {file.stem: windows_of(file) for file in sorted((calibrate / "test").glob("*.parquet"))}
    if arguments.text:
        texts[arguments.text.stem] = text_windows(model_folder, arguments.text, calibration.shape[1])
    for scheme in arguments.schemes:
        start = time.monotonic()
        model = quantized(model_folder, scheme, calibration)
        seconds = time.monotonic() - start
        zero_point = 0 if SCHEMES[scheme] else BITS
        found = {name: round(perplexity(model, windows), 2) for name, windows in texts.items()}
        ratio = (BITS + (SCALE_BITS + zero_point) / GROUP) / SCALE_BITS
        print(
            json.dumps({"scheme": scheme, "ratio": ratio, "perplexity": found, "seconds": round(seconds)}), flush=True
        )


if __name__ == "__main__":
    main()
