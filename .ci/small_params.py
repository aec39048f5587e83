"""small_params FILE: rewrites params.yaml with few and short windows; the default model then takes minutes.

With SPECTRIM_EVAL_DATA set, a few examples of a harness task are added.
"""

import os
import sys
from pathlib import Path

import yaml

SMALL = {
    "compression": {"alternatives": ["dense_int4", "int4_residual"]},
    "calibrate": {"seq_len": 128, "calibration_windows": 8, "validation_windows": 2, "test_windows": 2},
    "capture": {"gradient_windows": 4, "gradient_seq_len": 64},
    "train_ranks": {"steps": 4, "seq_len": 64},
    "update_weights": {"windows": 4},
    "update_weights.refinement": {"steps": 2, "seq_len": 64, "validate_every": 1},
    "evaluate": {"new_tokens": 8},
    "speed": {"prefill_tokens": 64, "decode_tokens": 4, "repeats": 1},
}


def main() -> None:
    file = Path(sys.argv[1])
    params = yaml.safe_load(file.read_text(encoding="utf-8"))
    for path, values in SMALL.items():
        section = params
        for name in path.split("."):
            section = section[name]
        section.update(values)
    if data := os.environ.get("SPECTRIM_EVAL_DATA"):
        params["evaluate"].update(tasks={"arc_easy": str(Path(data) / "arc_easy_test.jsonl")}, task_limit=2)
    file.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
