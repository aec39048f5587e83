"""Every key of params.yaml, with values that must be refused."""

from typing import Any

import yaml

from tests.tiny import REPOSITORY

ANCHOR = {"alpha": 0.0, "windows": 16, "damping": 1e-2}
REFINEMENT = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))["update_weights"]["refinement"]

REFUSED: dict[str, list[Any]] = {
    "model.source": [None, 3, "", "foo:bar", "pypi:a==1/../b"],
    "model.sha256": ["abc", "G" * 64, 7],
    "compression.ratio": [0, -0.1, 1.5, "0.8", None, float("nan")],
    "compression.memory_ratio": [0, 1.5, "0.5"],
    "compression.format": ["int4", "float32", None],
    "compression.alternatives": ["pifa", ["dense"], ["int4"], None],
    "compression.align": [0, 1.5, "8"],
    "compression.tie": ["yes", 1, None],
    "compression.exclude": ["*.down_proj", [1]],
    "compression.seed": [-1, 0.5, True, 2**70],
    "runtime.engine": ["celery"],
    "runtime.workers": [0, -2, 1.5],
    "runtime.retries": [-1],
    "runtime.device": ["gpu", "cuda:7"],
    "prepare.stored_dtype": ["int8"],
    "prepare.load_dtype": ["float64"],
    "prepare.perturb": [-0.1, 11, "0.3", None],
    "calibrate.seq_len": [0, 1, "1024"],
    "calibrate.bos": [True, "yes", None],
    "calibrate.calibration_windows": [0],
    "calibrate.refinement_windows": [-1, 0.5],
    "calibrate.validation_windows": [0],
    "calibrate.test_windows": [0],
    "capture.walk": ["layers", None],
    "capture.gradient_windows": [0, 10**6],
    "capture.gradient_seq_len": [1, 10**6],
    "capture.batch_size": [0],
    "capture.damping": [0, -1e-6, 0.5, "small"],
    "capture.max_damping": [1e-9, 2.0],
    "train_ranks.method": ["svd", ""],
    "train_ranks.file": ["", 3],
    "train_ranks.file_sha256": ["abc", "G" * 64, 7],
    "train_ranks.objective": ["mse", None],
    "train_ranks.keep": ["last", None, True],
    "train_ranks.whitening": ["output"],
    "train_ranks.steps": [0],
    "train_ranks.seq_len": [1, 10**6],
    "train_ranks.batch_size": [0],
    "train_ranks.learning_rate": [0, -0.1, float("nan"), float("inf")],
    "train_ranks.width": [0, -0.1, float("inf")],
    "train_ranks.beta": [0, -10, float("inf")],
    "train_ranks.taylor_terms": [0],
    "train_ranks.taylor_threshold": [0, 1, 1.5],
    "train_ranks.row_dampings": [[], [0.0], [0.03, 2.0], 0.3, None],
    "update_weights.method": ["gates", ""],
    "update_weights.anchor": [
        {**ANCHOR, key: value} for key, value in (*(("alpha", -0.1), ("alpha", 1.5), ("damping", 0), ("gamma", 1.0)),)
    ],
    "update_weights.ipca": ["batch"],
    "update_weights.windows": [0, 10**6],
    "update_weights.shrinkage": [[], [0.0], -0.1, 1.1],
    "update_weights.variants": [[], {"a": {"shrinkage": 1.5}}, {"a": {"damping": 0.1}}, {"": {"alpha": 0.5}}],
    "update_weights.block_refinement": [
        {"steps": -1, "learning_rate": 1e-4},
        {"steps": 0, "learning_rate": 0.0},
        {"steps": 0, "learning_rate": 1e-4, "seq_len": 8},
    ],
    "update_weights.refinement": [
        {**REFINEMENT, key: value}
        for key, value in (
            *(("steps", -1), ("batch_size", 0), ("seq_len", 1), ("learning_rate", 0.0), ("kl_weight", 1.5)),
            *(("validate_every", 0), ("patience", 0), ("checkpointing", "yes"), ("rate", 1.0)),
        )
    ],
    "remap.format": ["float32"],
    "remap.max_shard_size": [5, "", "large", "-1GB"],
    "baseline.quantization": [["int2"], ["bitsandbytes_fp4"], "int8"],
    "baseline.group_size": [0],
    "evaluate.batch_size": [0],
    "evaluate.tasks": [["piqa"], {"piqa": 1}],
    "evaluate.task_limit": [0, -5],
    "evaluate.prompt": ["", None],
    "evaluate.new_tokens": [0],
    "speed.dtype": ["int8"],
    "speed.prefill_tokens": [0],
    "speed.decode_tokens": [0],
    "speed.repeats": [0],
    "report.title": [1],
}
"""section.key -> values."""
