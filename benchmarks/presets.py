"""Every preset at every ratio on the model of params.yaml: perplexity, bytes, time and memory, one JSON object per row.

    python -m benchmarks.presets --texts wikitext2=wiki.test.raw --markdown > rows.md
    python -m benchmarks.presets --table rows.jsonl more.jsonl          # the table of rows measured before

Stands on `dvc repro capture`, which no preset touches and which is never run here: each row calls train_ranks,
update_weights and remap in a scratch folder that links the project's artifacts, with a resume store of its own. So
`seconds` counts those three stages alone, from nothing, and `peak_memory` is the largest resident set of any of them
(on a GPU its own memory is not in it). `bytes` is the size of the checkpoint's safetensors files, `linear_bytes` that
of the compressed linears in them; a quantized model has no file: its count takes the place of the linears in the dense
file. Perplexity: the test windows of `calibrate`, and of every --texts FILE 16 contiguous windows of 1,024 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import preset
from pipeline.config.params import load
from pipeline.data.bos import follow
from pipeline.data.text_file import file_windows, named_file
from pipeline.runtime.artifacts import artifact
from pipeline.runtime.devices import resolve
from pipeline.steps.measure import evaluation_windows, text_perplexities
from pipeline.steps.model_folders import load_model, load_tokenizer
from spectrim.checkpoint.layout import read_bytes
from spectrim.errors import ConfigError, OrchestrationError, SpectrimError
from spectrim.evaluation.perplexity import quantize_model_
from spectrim.models.modules import compressible_linears

Row = dict[str, Any]
CODE = ("spectrim", "pipeline", "stages")
UPSTREAM = ("prepare", "calibrate", "capture")
LINKED = ("sources", *UPSTREAM)  # what the stages of a row read
STAGES = ("train_ranks", "update_weights", "remap")
SEQ_LEN, FILE_WINDOWS = 1024, 16
QUANTIZED = {"RTN int8": (8, None), "RTN int4, groups of 64": (4, 64)}  # (bits, inputs that share a scale)
WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes of a stored weight


class Measure:
    """The dense model's folder, the test windows of every text, and the rows measured on them."""

    def __init__(self, texts: dict[str, Path]) -> None:
        self.params = load()
        self.device = resolve(self.params.runtime.device)
        tokenizer = follow(load_tokenizer(artifact("prepare")), self.params.calibrate.bos)
        self.windows: dict[str, Tensor] = evaluation_windows() | {
            name: file_windows(file, tokenizer, SEQ_LEN, FILE_WINDOWS) for name, file in texts.items()
        }

    def references(self) -> Iterator[Row]:
        """The dense model, and its round-to-nearest quantizations on the same windows."""
        prepared, exclude = artifact("prepare"), self.params.compression.exclude
        model = load_model(prepared, self.device)
        numbers = sum(linear.weight.numel() for linear in compressible_linears(model, exclude).values())
        linear_bytes = numbers * WIDTHS[self.params.prepare.stored_dtype]
        file = sum(path.stat().st_size for path in prepared.glob("*.safetensors"))
        size = {"bytes": file, "linear_bytes": linear_bytes}
        yield {"preset": "dense", "ratio": 1.0, "perplexity": self.perplexity(model, "dense"), **size}
        for name, (n_bits, group_size) in QUANTIZED.items():
            model = load_model(prepared, self.device)
            found = quantize_model_(model, n_bits, group_size=group_size, exclude=exclude)
            size = {"bytes": file - linear_bytes + found["bytes"], "linear_bytes": found["bytes"]}
            yield {"preset": name, "ratio": found["ratio"], "perplexity": self.perplexity(model, name), **size}

    def row(self, name: str, ratio: float) -> Row:
        """One preset at one ratio.

        Raises:
            ConfigError: the preset does not fit params.yaml.
            OrchestrationError: a stage failed; it has said why on stderr.
        """
        text, _ = preset.applied(name, preset.read(name) | {"compression.ratio": ratio})
        with tempfile.TemporaryDirectory(prefix="spectrim-preset-") as scratch:
            folder = Path(scratch)
            (folder / "artifacts").mkdir()
            (folder / "params.yaml").write_text(text, encoding="utf-8")
            for path in (*map(Path, CODE), *map(artifact, LINKED)):
                (folder / path).symlink_to(path.absolute(), target_is_directory=True)
            seconds, peaks = {}, []
            for stage in STAGES:
                seconds[stage], peak = run_stage(stage, folder)
                peaks.append(peak)
            result = folder / "artifacts" / "remap"
            stored = read_bytes(result)
            model = load_model(result, self.device)
            perplexity = self.perplexity(model, f"{name} at {ratio}")
        return {
            "preset": name,
            "ratio": ratio,
            "perplexity": perplexity,
            "bytes": stored["file"],
            "linear_bytes": stored["linears"],
            "file_ratio": stored["ratio"],
            "seconds": round(sum(seconds.values()), 1),
            "seconds_of": {stage: round(value, 1) for stage, value in seconds.items()},
            "peak_memory": max(peaks),
        }

    def perplexity(self, model: Any, desc: str) -> dict[str, float]:
        """Text -> perplexity on its windows."""
        with torch.no_grad():
            found = text_perplexities(model, self.windows, batch_size=self.params.evaluate.batch_size, desc=desc)
        return {name: entry["perplexity"] for name, entry in found.items()}


def run_stage(stage: str, folder: Path) -> tuple[float, int]:
    """Seconds and largest resident set in bytes of `python -m stages.STAGE` in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}  # the folder's own store
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OrchestrationError(f"stage {stage} failed (exit code {process.returncode}); the reason stands above")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def require_capture() -> None:
    """Raise ConfigError unless DVC says that what every row stands on is up to date."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *UPSTREAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError([f"dvc status: {' '.join(done.stderr.split())}"])
    if changed := json.loads(done.stdout):
        raise ConfigError([f"{', '.join(changed)}: not up to date; run `dvc repro capture` first"])


def table(rows: Sequence[Row]) -> str:
    """The rows as markdown: references first, then by ratio from the largest, the better perplexity first."""
    texts = list(dict.fromkeys(name for row in rows for name in row["perplexity"]))
    head = ["method", "ratio", "bytes of the linears", "file", *texts, "seconds", "peak memory"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    references = [row for row in rows if "seconds" not in row]
    measured = [row for row in rows if "seconds" in row]
    measured.sort(key=lambda row: (-row["ratio"], row["perplexity"].get(texts[-1], float("inf"))))
    for row in (*references, *measured):
        cells = [
            row["preset"],
            f"{row['ratio']:.3g}",
            f"{row['linear_bytes'] / 1e6:.1f} MB",
            f"{row['bytes'] / 1e6:.1f} MB",
        ]
        cells += [f"{row['perplexity'][text]:,.2f}" if text in row["perplexity"] else "–" for text in texts]
        cells += [f"{row['seconds']:.0f}" if "seconds" in row else "–"]
        cells += [f"{row['peak_memory'] / 1e9:.1f} GB" if "peak_memory" in row else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    note = "Seconds and peak memory: train_ranks, update_weights and remap; what all share (capture) is not in them."
    return "\n".join([*lines, "", note])


def main() -> int:
    """Parse arguments and print the rows as they are measured; 1 when a row failed, the others are still measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = sorted(file.stem for file in preset.PRESETS.glob("*.yaml"))
    parser.add_argument("--presets", nargs="*", choices=available, default=available, help="(default: all)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.6], help="(default: 0.9 0.8 0.6)")
    parser.add_argument(
        "--texts", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="further test texts"
    )
    parser.add_argument("--no-references", action="store_true", help="no rows of the dense and the quantized model")
    parser.add_argument("--markdown", action="store_true", help="print the table too, after the rows")
    parser.add_argument("--table", type=Path, nargs="+", metavar="ROWS", help="only the table of rows in these files")
    arguments = parser.parse_args()
    if arguments.table:
        lines = [line for file in arguments.table for line in file.read_text(encoding="utf-8").splitlines()]
        print(table([json.loads(line) for line in lines if line.startswith("{")]))
        return 0
    rows: list[Row] = []
    failed = 0
    try:
        require_capture()
        measure = Measure(dict(arguments.texts))
        for row in () if arguments.no_references else measure.references():
            rows.append(row)
            print(json.dumps(row), flush=True)
    except SpectrimError as error:
        sys.exit(f"error: {error}")
    for ratio in arguments.ratios:
        for name in arguments.presets:
            try:
                rows.append(measure.row(name, ratio))
            except SpectrimError as error:
                failed = 1
                print(f"error: {name} at {ratio}: {error}", file=sys.stderr)
                continue
            print(json.dumps(rows[-1]), flush=True)
    if arguments.markdown:
        print(table(rows))
    return failed


if __name__ == "__main__":
    sys.exit(main())
