"""What stands outside the project, as it is in this run: where it is what it was, nothing runs again.

reads   model.source, data.*.source, evaluate.tasks, train_ranks.file
writes  artifacts/sources: model.json, texts.json, tasks.json, ranks.json, with sha256 and commits
params  model, data, evaluate.tasks, train_ranks.{method,file}
"""

from pathlib import Path

from pipeline.config.params import load
from pipeline.data.identity import Sources, tasks_identity
from pipeline.runtime.artifacts import artifact, fresh_folder, write_json
from pipeline.runtime.console import run


def main() -> None:
    """State what model, texts, task files and rank file really are."""
    params, sources = load(), Sources()
    ranks = params.train_ranks.file if params.train_ranks.method == "file" else None
    found = {
        "model": sources.of(params.model.source, params.model.sha256, "model", "model"),
        "texts": {
            name: sources.of(text.source, text.sha256, f"data.{name}", "dataset") for name, text in params.data.items()
        },
        "tasks": tasks_identity(params.evaluate.tasks, sources),
        "ranks": sources.local(Path(ranks).expanduser(), "train_ranks.file") if ranks else {},
    }
    sources.save()
    with fresh_folder(artifact("sources")) as out:
        for kind, identity in found.items():
            write_json(out / f"{kind}.json", identity)


if __name__ == "__main__":
    run(main)
