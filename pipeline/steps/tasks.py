"""evaluate.tasks -> scores of the Language Model Evaluation Harness, with the harness's own settings of every task.

A task reads one of three kinds of data:
  hub       what the harness itself reads, from the hub or from the local cache of the `datasets` library;
  a file    .jsonl, .json or .parquet with the columns of the task's hub data set: only the data is replaced;
  a folder  task files (.yaml) of one's own; code they name with !function runs, as it does in the harness.
The harness takes seconds to import, so that happens only where there is a task to run.
"""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from spectrim.errors import DataError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SEED = 1234  # the harness's own default; it draws few-shot examples
BOOTSTRAP = 1000  # of the standard error, where a metric has no formula for it


class Score(TypedDict):
    """``score`` = the metric named ``metric``: plain accuracy where the task has one, else its first metric."""

    score: float
    metric: str
    stderr: float | None
    n_examples: int
    metrics: dict[str, float]


def load_tasks(tasks: Mapping[str, str]) -> dict[str, list[Any]]:
    """The harness's task objects of every entry of ``evaluate.tasks``, their data read; a tag or group holds several.

    Raises:
        DataError: an unknown task, a missing or unsuitable file, or a data set that cannot be had; names the entry.
    """
    if not tasks:
        return {}
    check_tasks(tasks)
    _quiet()
    return {name: _load(name, data) for name, data in tasks.items()}


def check_tasks(tasks: Mapping[str, str]) -> None:
    """Raise DataError for files and folders of ``evaluate.tasks`` that are missing or unsuitable, all at once."""
    problems = [f"evaluate.tasks.{name}: {text}" for name, data in tasks.items() if (text := _problem(data))]
    if problems:
        raise DataError("; ".join(problems))


def run_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Mapping[str, Sequence[Any]],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    answers: Path | None = None,
) -> dict[str, Score]:
    """Task name -> Score of ``model`` on tasks from ``load_tasks``.

    Args:
        model: a causal language model on its device.
        tokenizer: the model's.
        tasks: what ``load_tasks`` returned.
        limit: examples per task, the first ones; None: all.
        batch_size: requests per forward pass.
        answers: a file where every answer is kept, and taken from where it stands there already.
    """
    loaded = [task for group in tasks.values() for task in group]
    if not loaded:
        return {}
    import torch
    from lm_eval import evaluate  # simple_evaluate adds nothing but a pip list of this machine, which takes seconds
    from lm_eval.api.model import CachingLM
    from lm_eval.models.huggingface import HFLM

    _quiet()
    torch.manual_seed(SEED)
    for task in loaded:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = evaluate(
        lm=CachingLM(harness, str(answers)) if answers else harness,
        task_dict={"tasks": {task.task_name: task for task in loaded}},
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
    )
    if results is None:
        raise DataError("evaluate.tasks: the harness returned no results; run it in one process, not under torchrun")
    samples = results["n-samples"]
    return {name: _score(values, samples[name]["effective"]) for name, values in results["results"].items()}


def _problem(data: str) -> str | None:
    path = Path(data)
    if data == "hub":
        return None
    if not path.exists():
        return f"{data} not found; give hub, a .jsonl or .parquet file, or a folder of task files"
    if path.is_file() and path.suffix not in LOADERS:
        return f"{data} is a {path.suffix or 'nameless'} file; {', '.join(LOADERS)} are read"
    if path.is_dir() and not any(path.rglob("*.yaml")):
        return f"the folder {data} holds no .yaml task file"
    return None


def _load(name: str, data: str) -> list[Any]:
    from lm_eval.tasks import TaskManager

    path = Path(data)
    folder = path if data != "hub" and path.is_dir() else None
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else _harness(name)
    if name not in manager.task_index:
        source = folder or "the installed lm-eval"
        raise DataError(
            f"evaluate.tasks.{name}: {source} has no task of that name; "
            "`lm-eval ls tasks` lists the harness's own, a task file names its own in `task:`"
        )
    try:
        if data == "hub" or folder:
            return list(manager.load([name])["tasks"].values())
        return _load_file(manager, name, path)
    except DataError:
        raise
    except Exception as error:  # the harness, its templates and the data library raise anything; the entry is to blame
        cause = " ".join(str(error).split())[:300]
        raise DataError(
            f"evaluate.tasks.{name}: cannot read {data} ({type(error).__name__}: {cause}); "
            "the columns must be those of the task's hub data set, and `hub` needs a network or a filled cache"
        ) from error


def _load_file(manager: "TaskManager", name: str, file: Path) -> list[Any]:
    """The harness's task ``name`` with nothing but its data replaced: its evaluated split is ``file``."""
    import yaml

    entry = manager.task_index[name]
    config = entry.cfg or {}
    if entry.yaml_path is None or "class" in config or isinstance(config.get("task"), list):
        raise DataError(f"evaluate.tasks.{name}: a group, tag or Python task takes no data file; use hub or a folder")
    samples = (config.get("fewshot_config") or {}).get("samples")
    if config.get("num_fewshot") and not samples:
        raise DataError(
            f"evaluate.tasks.{name}: the harness shows {config['num_fewshot']} examples of another split first, "
            "and one file has one split; use hub or a folder with a task file that names both"
        )
    split = config.get("test_split") or config.get("validation_split")
    with tempfile.TemporaryDirectory() as folder:
        override = {
            "include": str(entry.yaml_path),
            "task": name,
            "dataset_path": LOADERS[file.suffix],
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(file.resolve())},
                "cache_dir": folder,  # read anew every time: an edited file is never answered from a cache
                "keep_in_memory": True,
            },
            "custom_dataset": None,
            "training_split": None,
            "fewshot_split": None,
            "validation_split": None,
            "test_split": None,
            **{key: split for key in ("test_split", "validation_split") if config.get(key) == split},
        }
        task_file = Path(folder) / "task.yaml"
        task_file.write_text(yaml.safe_dump(override), encoding="utf-8")
        return list(manager.load([str(task_file)])["tasks"].values())


def _harness(name: str) -> "TaskManager":
    """An index of the harness's tasks that holds ``name``: of its folder where one file defines it, else of all."""
    from lm_eval.tasks import TaskManager

    folders = _defining_folders().get(name, ())
    if len(folders) == 1:
        return TaskManager(include_path=str(folders[0]), include_defaults=False)
    return TaskManager()


@cache
def _defining_folders() -> dict[str, list[Path]]:
    """Task name -> folders of the harness's files that define it; the full index takes 15 s, this search 1 s."""
    import lm_eval.tasks

    line = re.compile(r"^task:[ \t]*['\"]?([\w.-]+)['\"]?[ \t]*$", re.MULTILINE)
    folders: dict[str, list[Path]] = {}
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        for name in line.findall(file.read_text(encoding="utf-8")):
            folders.setdefault(name, []).append(file.parent)
    return folders


def _score(values: Mapping[str, Any], n_examples: int) -> Score:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():  # "acc,none" or "acc_stderr,none", and texts
        metric, _, rest = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, int | float) or not rest:
            continue
        target = errors if metric.endswith("_stderr") else metrics
        label = metric.removesuffix("_stderr")
        target[label if rest == "none" else f"{label}, {rest}"] = float(value)
    metric = "acc" if "acc" in metrics else next(iter(metrics))
    return {
        "score": metrics[metric],
        "metric": metric,
        "stderr": errors.get(metric),
        "n_examples": n_examples,
        "metrics": metrics,
    }


def _quiet() -> None:
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
