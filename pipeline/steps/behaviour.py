"""What a model answers: scores on the harness's tasks, and a text it goes on with."""

from pathlib import Path

from pipeline.runtime.artifacts import write_json
from pipeline.steps.measure import HELD, VALUE, Load
from pipeline.steps.model_folders import load_tokenizer
from pipeline.steps.tasks import load_tasks, run_tasks


def write_scores(
    load: Load, folder: Path, task: str, data: str, limit: int | None, batch_size: int, answers: Path, out: Path
) -> None:
    """Write task name -> Score of one entry of ``evaluate.tasks``.

    Args:
        folder: of the model, for its tokenizer.
        task, data: the entry; see ``load_tasks``.
        answers: a file where single answers are kept, so that a killed run goes on; removed at the end.
    """
    loaded = load_tasks({task: data})  # before the model: what cannot be read is said at once
    scores = run_tasks(
        HELD(load).model, load_tokenizer(folder), loaded, limit=limit, batch_size=batch_size, answers=answers
    )
    write_json(out / VALUE, scores)
    answers.unlink(missing_ok=True)


def write_generation(load: Load, folder: Path, prompt: str, new_tokens: int, out: Path) -> None:
    """Write the ``prompt`` followed by what the model writes, greedily, in at most ``new_tokens`` tokens."""
    from spectrim.evaluation.perplexity import generate

    write_json(out / VALUE, generate(HELD(load).model, load_tokenizer(folder), prompt, new_tokens))
