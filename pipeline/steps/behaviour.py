"""What a model answers: scores on the harness's tasks, and a text it goes on with."""

from pathlib import Path

from pipeline.data.bos import Rule, follow
from pipeline.runtime.artifacts import write_json
from pipeline.steps.measure import HELD, VALUE, Load
from pipeline.steps.model_folders import load_tokenizer
from pipeline.steps.tasks import load_tasks, run_tasks


def write_scores(
    load: Load,
    folder: Path,
    bos: Rule,
    task: str,
    data: str,
    limit: int | None,
    batch_size: int,
    answers: Path,
    out: Path,
) -> None:
    """Write task name -> Score of one entry of ``evaluate.tasks``.

    Args:
        folder: of the model, for its tokenizer.
        bos: whether a question begins with its BOS token, ``calibrate.bos``.
        task, data: the entry; see ``load_tasks``.
        answers: a file where single answers are kept, so that a killed run goes on; removed at the end.
    """
    loaded = load_tasks({task: data})  # before the model: what cannot be read is said at once
    tokenizer = follow(load_tokenizer(folder), bos)
    scores = run_tasks(HELD(load).model, tokenizer, loaded, limit=limit, batch_size=batch_size, answers=answers)
    write_json(out / VALUE, scores)
    answers.unlink(missing_ok=True)


def write_generation(load: Load, folder: Path, bos: Rule, prompt: str, new_tokens: int, out: Path) -> None:
    """Write the ``prompt`` followed by what the model writes, greedily, in at most ``new_tokens`` tokens.

    The prompt begins with a BOS token as ``bos``, ``calibrate.bos``, says.
    """
    from spectrim.evaluation.perplexity import generate

    write_json(out / VALUE, generate(HELD(load).model, follow(load_tokenizer(folder), bos), prompt, new_tokens))
