"""Tiny models, texts and projects, built from code: what every test of more than one kernel stands on.

`FAMILIES` covers the structures that break compressors: grouped-query attention with tied embeddings (llama), biases
everywhere and learned positions (opt), biases on q/k/v only and untied embeddings (qwen2).
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests import warm_programs
from tests.stage_process import run_stage

REPOSITORY = Path(__file__).resolve().parent.parent
STAGES = (
    *("sources", "prepare", "calibrate", "capture", "train_ranks", "update_weights", "remap"),
    *("baseline", "evaluate", "speed", "report"),
)
VOCABULARY = 320
END = "<|endoftext|>"  # the Qwen2 tokenizer class adds it where it is missing
SEED = 20
DOCUMENTS = 30

SUBJECTS = ("the river", "a small harbour", "the old railway", "every island", "this village", "the northern museum")
VERBS = ("crosses", "borders", "recalls", "was named after", "supplies", "lies east of", "once ruled")
OBJECTS = ("two valleys", "the capital", "a copper mine", "its neighbour", "the bridge of 1873", "many birds")
TAILS = ("in winter", "since the treaty", "for most travellers", "near the coast", "without any doubt")


def document(seed: int, n_sentences: int = 12) -> str:
    """A paragraph of plain sentences, the same for the same seed on every machine."""
    draw = random.Random(seed)
    sentences = (
        f"{draw.choice(SUBJECTS).capitalize()} {draw.choice(VERBS)} {draw.choice(OBJECTS)} {draw.choice(TAILS)}."
        for _ in range(n_sentences)
    )
    return " ".join(sentences)


def corpus(n_documents: int = DOCUMENTS) -> list[str]:
    """Documents 0, 1, … of `document`."""
    return [document(seed) for seed in range(n_documents)]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, trained on the corpus."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=END, pad_token=END)


def _llama() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def _opt() -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=VOCABULARY, hidden_size=48, word_embed_proj_dim=48, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, init_std=0.1, dropout=0.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def _qwen2() -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


FAMILIES: Mapping[str, Callable[[], PreTrainedConfig]] = {"llama": _llama, "opt": _opt, "qwen2": _qwen2}


def model(family: str, seed: int = SEED) -> PreTrainedModel:
    """A randomly initialised float32 model of a family; biases are drawn too, so that a lost one shows."""
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return built.eval()


def save_model(family: str, folder: Path) -> Path:
    """The model of a family and the tokenizer as a Hugging Face folder."""
    model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_corpus(file: Path) -> Path:
    """The corpus as jsonl with the column `text`, one document per line."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()), encoding="utf-8")
    return file


def tiny_params(model_source: str, text_source: str) -> dict[str, Any]:
    """The repository's params.yaml, cut down until every stage takes seconds; low rank alone, by gates, at 0.8."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    params["model"] = {"source": model_source, "sha256": None}
    splits = {"calibration": 0.6, "validation": 0.2, "test": 0.2}
    row = {"column": "text", "template": "none"}
    params["data"] = {"corpus": {"source": text_source, "sha256": None, **row, "splits": splits}}
    refinement = {**params["update_weights"]["refinement"], "steps": 4, "seq_len": 24, "validate_every": 2}
    small: dict[str, dict[str, Any]] = {
        "compression": {"ratio": 0.8, "format": "pifa", "alternatives": []},
        "runtime": {"engine": "inline", "workers": 2, "device": "cpu"},
        "calibrate": {"seq_len": 32, "calibration_windows": 12, "validation_windows": 2, "test_windows": 3},
        "capture": {"gradient_windows": 6, "gradient_seq_len": 24},
        "train_ranks": {"method": "gates", "steps": 3, "seq_len": 16},
        "update_weights": {"windows": 4, "refinement": refinement},
        "baseline": {"group_size": 16},
        "evaluate": {"new_tokens": 4},
        "speed": {"prefill_tokens": 16, "decode_tokens": 2, "repeats": 1},
    }
    for section, values in small.items():
        params[section].update(values)
    return params


def tree(folder: Path) -> dict[str, bytes]:
    """relative path -> bytes of every file under a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Project:
    """A project folder with the repository's code and graph, tiny parameters, and git and DVC of its own."""

    folder: Path

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder with this interpreter's programs first on the PATH; output is captured."""
        done = subprocess.run(
            command, cwd=self.folder, env=process_environment(**environment), capture_output=True, text=True
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def stage(self, name: str, check: bool = True, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run one stage without DVC, behind `sources`, which DVC runs in every run; see `run_stage`."""
        done = None if name == "sources" else run_stage("sources", self.folder, process_environment())
        if done is None or done.returncode == 0:
            done = run_stage(name, self.folder, process_environment(), **how)
        return _succeeded(name, done) if check else done

    def stages(self, *names: str) -> None:
        """Run one stage after the other without DVC, behind one run of `sources`."""
        for name in ("sources", *(name for name in names if name != "sources")):
            _succeeded(name, run_stage(name, self.folder, process_environment()))

    def repro(self, *arguments: str) -> set[str]:
        """`dvc repro`; returns the stages that were computed (neither skipped nor restored from the run cache)."""
        return computed_stages(self.dvc("repro", *arguments).stdout)

    def dvc(self, *arguments: str, program: Sequence[str] = ("dvc",)) -> subprocess.CompletedProcess[str]:
        """`dvc`, and the stages that it starts, quickly; see `warm_programs`. `run("dvc", …)` is a user's."""
        path = os.pathsep.join([str(warm_programs.folder()), process_environment()["PATH"]])
        return self.run(*program, *arguments, PATH=path)

    def change(self, **values: Any) -> None:
        """Set parameters, `compression__ratio=0.6` for `compression.ratio`."""
        file = self.folder / "params.yaml"
        params = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, value in values.items():
            section, key = name.split("__")
            params[section][key] = value
        file.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)

    def copy(self, folder: Path) -> "Project":
        """The same project elsewhere, with its artifacts and caches."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)


def _succeeded(name: str, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode:
        raise AssertionError(f"stages.{name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def process_environment(**extra: str) -> dict[str, str]:
    """This process's environment for a child: our programs, one torch thread, no hub, no telemetry, no Prefect API."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "DVC_ROOT")}
    programs = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    quiet = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**inherited, "PATH": programs, "OMP_NUM_THREADS": "1", **quiet, **offline, **extra}


def computed_stages(output: str) -> set[str]:
    """The stages that `dvc repro` says it ran."""
    prefix = "Running stage '"
    return {line[len(prefix) :].split("'")[0] for line in output.splitlines() if line.startswith(prefix)}


def make_project(folder: Path, model_folder: Path, text_file: Path) -> Project:
    """Copy the code and the graph, write tiny params.yaml, start git and DVC."""
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in ("spectrim", "pipeline", "stages"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=skipped)
    for name in ("dvc.yaml", ".gitignore", ".dvcignore", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(REPOSITORY / ".dvc" / name, folder / ".dvc" / name)
    params = tiny_params(str(model_folder), str(text_file))
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    project = Project(folder)
    project.run("git", "init", "--quiet")
    project.run("git", "config", "user.name", "Spectrim tests")
    project.run("git", "config", "user.email", "tests@localhost")
    project.commit("tiny project")
    return project
