import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline.steps.tasks import load_tasks, run_tasks
from spectrim.errors import DataError
from tests import tiny

QUESTIONS = [
    ("What crosses the valley?", ["the river", "a small harbour", "the capital"], "A"),
    ("What lies near the coast?", ["the old railway", "this village"], "2"),
    ("Who recalls the treaty?", ["every island", "its neighbour", "many birds", "a copper mine"], "C"),
    ("What supplies the museum?", ["the bridge of 1873", "two valleys"], "1"),
    ("What was named after winter?", ["the northern museum", "a copper mine", "the river"], "B"),
]


def arc_rows() -> list[dict[str, object]]:
    """Rows with the columns of the hub's ai2_arc; choices are labelled by letters or by numbers, as there."""
    rows = []
    for question, texts, answer in QUESTIONS:
        labels = [chr(ord("1" if answer.isdigit() else "A") + index) for index in range(len(texts))]
        rows.append({"question": question, "choices": {"text": texts, "label": labels}, "answerKey": answer})
    return rows


def save_jsonl(file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in arc_rows()), encoding="utf-8")
    return file


def save_task(folder: Path, name: str, data: Path, **more: object) -> None:
    """A task file of one's own that asks the same questions without the word Question."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@torch.no_grad()
def naive_accuracy(template: str) -> float:
    """Share of questions whose right answer is the likeliest continuation, by one forward pass per answer."""
    model, tokenizer, right = tiny.model("llama"), tiny.tokenizer(), 0
    for row in arc_rows():
        scores = []
        for text in row["choices"]["text"]:
            context = tokenizer(template.format(row["question"]))["input_ids"]
            whole = tokenizer(template.format(row["question"]) + " " + text)["input_ids"]
            logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += row["choices"]["label"][scores.index(max(scores))] == row["answerKey"]
    return right / len(QUESTIONS)


def test_a_data_file_gives_the_harness_own_task_its_data(tmp_path: Path) -> None:
    data = save_jsonl(tmp_path / "questions.jsonl")
    tasks = load_tasks({"arc_easy": str(data), "arc_challenge": str(data)})
    scores = run_tasks(tiny.model("llama"), tiny.tokenizer(), tasks)
    expected = naive_accuracy("Question: {}\nAnswer:")
    assert scores["arc_easy"]["score"] == scores["arc_challenge"]["score"] == expected
    assert scores["arc_easy"]["metric"] == "acc"
    assert scores["arc_easy"]["n_examples"] == len(QUESTIONS)
    assert set(scores["arc_easy"]["metrics"]) == {"acc", "acc_norm"}
    assert scores["arc_easy"]["stderr"] == pytest.approx((expected * (1 - expected) / (len(QUESTIONS) - 1)) ** 0.5)


def test_parquet_and_jsonl_score_alike_and_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("qwen2"), tiny.tokenizer()
    pq.write_table(pa.Table.from_pylist(arc_rows()), tmp_path / "questions.parquet")
    files = [save_jsonl(tmp_path / "questions.jsonl"), tmp_path / "questions.parquet"]
    first, second = (run_tasks(model, tokenizer, load_tasks({"arc_easy": str(file)})) for file in files)
    assert first == second
    files[0].write_text("".join(files[0].read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    assert run_tasks(model, tokenizer, load_tasks({"arc_easy": str(files[0])}))["arc_easy"]["n_examples"] == 2


def test_only_the_first_examples_count_under_a_limit(tmp_path: Path) -> None:
    data = save_jsonl(tmp_path / "questions.jsonl")
    scores = run_tasks(tiny.model("llama"), tiny.tokenizer(), load_tasks({"arc_easy": str(data)}), limit=3)
    assert scores["arc_easy"]["n_examples"] == 3
    assert scores["arc_easy"]["score"] * 3 == pytest.approx(round(scores["arc_easy"]["score"] * 3))


def test_a_folder_of_task_files_and_a_tag_of_several(tmp_path: Path) -> None:
    data = save_jsonl(tmp_path / "questions.jsonl")
    save_task(tmp_path, "one", data, tag=["both"])
    save_task(tmp_path, "two", data, tag=["both"], doc_to_text="Question: {{question}}\nAnswer:")
    scores = run_tasks(tiny.model("llama"), tiny.tokenizer(), load_tasks({"both": str(tmp_path)}))
    assert {name: score["score"] for name, score in scores.items()} == {
        "one": naive_accuracy("{}"),
        "two": naive_accuracy("Question: {}\nAnswer:"),
    }


def test_batches_do_not_change_a_score(tmp_path: Path) -> None:
    tasks = load_tasks({"arc_easy": str(save_jsonl(tmp_path / "questions.jsonl"))})
    model, tokenizer = tiny.model("opt"), tiny.tokenizer()
    one, many = (run_tasks(model, tokenizer, tasks, batch_size=size) for size in (1, 4))
    assert one == many


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.steps.tasks import load_tasks, run_tasks
from tests import tiny
model, calls = tiny.model("llama"), []
def count(*_):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
model.register_forward_pre_hook(count)
run_tasks(model, tiny.tokenizer(), load_tasks({"arc_easy": sys.argv[1]}), answers=Path(sys.argv[2]))
"""


def test_a_kill_inside_a_task_costs_the_answer_that_was_under_way(tmp_path: Path) -> None:
    data, answers = save_jsonl(tmp_path / "questions.jsonl"), tmp_path / "answers"
    tasks = load_tasks({"arc_easy": str(data)})
    whole = run_tasks(tiny.model("llama"), tiny.tokenizer(), tasks)
    command = [sys.executable, "-c", KILLED, str(data), str(answers)]
    done = subprocess.run(command, cwd=tiny.REPOSITORY, env=tiny.process_environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, calls = tiny.model("llama"), list[int]()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert run_tasks(model, tiny.tokenizer(), tasks, answers=answers) == whole
    n_answers = sum(len(texts) for _, texts, _ in QUESTIONS)
    assert len(calls) <= n_answers - 6, "answers that were kept were asked for again"  # 7 done, the last on its way


def test_every_bad_entry_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    bad = {"piqa": str(tmp_path / "gone.jsonl"), "arc_easy": str(tmp_path / "table.csv"), "x": str(tmp_path / "empty")}
    with pytest.raises(DataError) as caught:
        load_tasks(bad)
    assert [f"evaluate.tasks.{name}: " in str(caught.value) for name in bad] == [True, True, True]


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    data = save_jsonl(tmp_path / "questions.jsonl")
    save_task(tmp_path, "one", data)
    with pytest.raises(DataError, match=r"evaluate\.tasks\.three: .* has no task of that name"):
        load_tasks({"three": str(tmp_path)})


def test_a_file_without_the_columns_of_the_task_is_refused(tmp_path: Path) -> None:
    data = save_jsonl(tmp_path / "questions.jsonl")
    with pytest.raises(DataError, match=r"evaluate\.tasks\.piqa: .*columns must be those"):
        load_tasks({"piqa": str(data)})
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluate\.tasks\.arc_easy: cannot read .*broken\.jsonl"):
        load_tasks({"arc_easy": str(tmp_path / "broken.jsonl")})


def test_a_task_that_shows_examples_of_another_split_takes_no_single_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.tasks\.gsm8k: the harness shows 5 examples of another split"):
        load_tasks({"gsm8k": str(save_jsonl(tmp_path / "questions.jsonl"))})


def test_without_tasks_the_harness_is_not_imported() -> None:
    code = (
        "import sys; from pipeline.steps.tasks import load_tasks, run_tasks; "
        "assert run_tasks(None, None, load_tasks({})) == {}; "
        "assert not {'lm_eval', 'datasets', 'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tiny.REPOSITORY, check=True)


@pytest.mark.skipif("SPECTRIM_EVAL_DATA" not in os.environ, reason="SPECTRIM_EVAL_DATA names no folder of task data")
def test_real_data_files_score_as_the_task_files_beside_them() -> None:
    folder = Path(os.environ["SPECTRIM_EVAL_DATA"])
    names = {"piqa": "validation", "arc_easy": "test", "winogrande": "xl_validation", "openbookqa": "test"}
    entries = {name: str(folder / f"{name}_{split}.jsonl") for name, split in names.items()}
    tasks = load_tasks({**entries, "local_mc": str(folder / "lm_eval_tasks")})
    model = tiny.model("llama")
    model.config.max_position_embeddings = 2048  # rotary positions have no end; the harness asks the config
    scores = run_tasks(model, tiny.tokenizer(), tasks, limit=20, batch_size=4)
    for name in names:
        assert scores[name] == scores[f"local_{name}"]
