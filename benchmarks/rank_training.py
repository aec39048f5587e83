"""Seconds per training step of `gates` against `dobi` on the default model; one JSON line.

Needs artifacts/prepare, artifacts/calibrate and artifacts/capture (`dvc repro capture`). Both methods run on the same
windows in one process; the first step of each is a warm-up and is not counted. The gated factors are the captured
ones, the activation SVDs are of the window length asked for.
"""

import argparse
import json
import statistics
from dataclasses import replace
from typing import Literal

from pipeline.config.params import load
from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact
from pipeline.runtime.devices import resolve
from pipeline.steps.candidates import RankSearch
from spectrim.compression.rank_training import Step


def seconds_per_step(method: Literal["gates", "dobi"], steps: int, seq_len: int) -> float:
    """Median seconds of a step after the first, one window of ``seq_len`` tokens per step."""
    params = load()
    settings = replace(params.train_ranks, method=method, steps=steps + 1, seq_len=seq_len, batch_size=1)
    device = resolve(params.runtime.device)
    search = RankSearch(artifact("prepare"), artifact("capture"), params.compression, settings, device, {}, {})
    curve: list[Step] = []
    windows = load_windows(artifact("calibrate") / "calibration.parquet")[:, :seq_len]
    search.train(windows, {"uniform": search.uniform(), "fisher": search.fisher()}, curve)
    return statistics.median(step.seconds for step in curve[1:])


def main() -> None:
    """Parse arguments, time both methods, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each method (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=None, help="tokens per window (default: train_ranks.seq_len)")
    arguments = parser.parse_args()
    seq_len = arguments.seq_len or load().train_ranks.seq_len
    gates = seconds_per_step("gates", arguments.steps, seq_len)
    dobi = seconds_per_step("dobi", arguments.steps, seq_len)
    print(json.dumps({"seq_len": seq_len, "gates": gates, "dobi": dobi, "dobi_over_gates": dobi / gates}))


if __name__ == "__main__":
    main()
