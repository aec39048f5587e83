"""The update of a block on a captured tiny model: every method writes what it says, and reads no more than it needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pipeline.config.params import load
from pipeline.config.sections import Anchor, BlockRefinement, UpdateWeights
from pipeline.data.texts import load_windows
from pipeline.steps.factor_files import read_factors
from pipeline.steps.updates import Update, Variant
from spectrim.compression.methods import UPDATE_METHODS
from spectrim.compression.prefix import prefix_moments
from spectrim.compression.statistics import embedded, forward_block, gram_of, inputs_of
from spectrim.compression.weight_update import closed_form_factors, relative_error, svd_factors, svd_llm_factors
from spectrim.errors import SpectrimError
from spectrim.models.blocks import BlockModel
from tests.tiny import Project

METHODS = tuple(UPDATE_METHODS)
DAMPED = {"two_sided", "svd_llm", "svd_llm_v2"}
BLOCK = 1


def update_of(
    project: Project,
    method: str,
    calibrate: Path | None = None,
    damping: float = 1e-6,
    alpha: float = 0.0,
    shrinkage: float = 0.0,
    block_steps: int = 0,
    stored: Callable[[int], Path] = lambda index: Path(),
) -> Update:
    artifacts = project.folder / "artifacts"
    refinement = load(project.folder / "params.yaml").update_weights.refinement
    settings = UpdateWeights(
        method=method,
        windows=4,
        shrinkage=shrinkage,
        anchor=Anchor(alpha=alpha, damping=1e-2),
        ipca="exact",
        block_refinement=BlockRefinement(steps=block_steps, learning_rate=1e-3),
        refinement=refinement,
        variants={},
    )
    model, folder = BlockModel(artifacts / "prepare"), calibrate or artifacts / "calibrate"
    return Update(
        model, artifacts / "capture", folder, settings, Variant("it", alpha, shrinkage), (damping, 1e-2), 0, stored
    )


def thirds(model: BlockModel, index: int = BLOCK) -> dict[str, int]:
    return {name: min(weight.shape) // 3 for name, weight in model.weights(index).items()}


def write(update: Update, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """The tensors and the metadata that an update writes for one block, every matrix at a third of its rank."""
    update.factors(BLOCK, thirds(update.model), folder)
    with safe_open(folder / f"{BLOCK:03}.safetensors", framework="pt") as file:
        (facts,) = map(json.loads, file.metadata().values())  # one key: the order of several is random
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


@pytest.fixture(scope="module")
def written(captured_llama: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """method -> what it writes."""
    folder = tmp_path_factory.mktemp("updates")
    for method in METHODS:
        (folder / method).mkdir()
    return {method: write(update_of(captured_llama, method), folder / method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_an_update_writes_its_factors_and_their_error(
    method: str, written: dict[str, Any], captured_llama: Project
) -> None:
    model, captured = BlockModel(captured_llama.folder / "artifacts" / "prepare"), captured_llama.folder / "artifacts"
    tensors, facts = written[method]
    assert {name.rsplit(".", 1)[0] for name in tensors} == set(thirds(model)) == set(facts["relative_error"])
    for name, rank in thirds(model).items():
        weight, gram = model.weights(BLOCK)[name].double(), gram_of(captured / "capture", BLOCK, name)
        left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
        assert left.shape == (weight.shape[0], rank) and right.shape == (rank, weight.shape[1])
        assert left.dtype == right.dtype == torch.float32
        lost = weight - left.double() @ right.double()
        expected = (torch.trace(lost @ gram @ lost.T) / torch.trace(weight @ gram @ weight.T)).sqrt()
        assert facts["relative_error"][name] == pytest.approx(float(expected), rel=1e-3)
    assert set(facts["damping"]) == (set(thirds(model)) if method in DAMPED else set())
    assert all(value >= 1e-6 for value in facts["damping"].values())


def test_the_optimum_is_the_optimum_and_the_methods_differ(written: dict[str, Any]) -> None:
    errors = {method: facts["relative_error"] for method, (_, facts) in written.items()}
    for name, best in errors["closed_form"].items():
        for method in METHODS:
            assert best <= errors[method][name] + 1e-6, (method, name)
        for method in ("svd_llm", "svd_llm_v2"):  # optimal in the damped Gram
            assert errors[method][name] == pytest.approx(best, rel=1e-4)
        for method in ("svd", "asvd", "two_sided", "ipca"):
            assert errors[method][name] > 1.0001 * best, (method, name)
        assert errors["svd"][name] != pytest.approx(errors["asvd"][name], rel=1e-3)


def test_the_three_routes_to_the_optimum_agree_on_captured_grams(captured_llama: Project) -> None:
    """Undamped and before rounding: one relative error to 1e-8, which the plain SVD misses (negative control)."""
    artifacts = captured_llama.folder / "artifacts"
    model, captured = BlockModel(artifacts / "prepare"), artifacts / "capture"
    for index in range(len(model.names)):
        weights, input_of = model.weights(index), inputs_of(captured / "inputs" / f"{index:03}.safetensors")
        grams = {owner: gram_of(captured, index, owner) for owner in set(input_of.values())}
        own = {name: grams[input_of[name]] for name in weights}
        ranks = {name: min(weight.shape) // 3 for name, weight in weights.items()}
        best = closed_form_factors(weights, own, ranks)
        plain = svd_factors(weights, ranks)
        for form in ("cholesky", "two_svds"):
            options = {"form": form, "damping": 0.0, "max_damping": 0.0}
            found, damping = svd_llm_factors(weights, grams, input_of, ranks, **options)
            assert set(damping.values()) == {0.0}
            for name, weight in weights.items():
                expected = relative_error(weight, best[name], own[name])
                assert relative_error(weight, found[name], own[name]) == pytest.approx(expected, rel=1e-8)
                assert relative_error(weight, plain[name], own[name]) > (1 + 1e-3) * expected


@pytest.mark.parametrize("method", METHODS)
def test_only_ipca_reads_calibration_windows(
    method: str, written: dict[str, Any], captured_llama: Project, tmp_path: Path
) -> None:
    update = update_of(captured_llama, method, calibrate=tmp_path / "missing")
    if method == "ipca":
        assert update.in_order
        with pytest.raises(SpectrimError, match=r"missing/calibration\.parquet"):
            write(update, tmp_path)
    else:
        write(update, tmp_path)


def test_the_key_holds_what_the_method_depends_on(captured_llama: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(captured_llama.folder)
    identities = {method: update_of(captured_llama, method).identity() for method in METHODS}
    assert len({json.dumps(identity) for identity in identities.values()}) == len(METHODS)
    for method in METHODS:
        other = update_of(captured_llama, method, damping=1e-4).identity()
        assert (other != identities[method]) == (method in ("svd_llm", "svd_llm_v2")), method
        folders = [file.parent.name for file in update_of(captured_llama, method).inputs(BLOCK)]
        assert folders == (["inputs", "factors"] if method == "two_sided" else ["inputs"])
    for method in ("two_sided", "closed_form", "svd_llm", "svd_llm_v2"):
        half, whole = (update_of(captured_llama, method, alpha=alpha) for alpha in (0.5, 1.0))
        assert identities[method] != half.identity() != whole.identity() and half.in_order
        little, much = (update_of(captured_llama, method, shrinkage=share) for share in (0.1, 0.2))
        assert identities[method] != little.identity() != much.identity() and not little.in_order
        trained, longer = (update_of(captured_llama, method, block_steps=steps) for steps in (2, 3))
        assert identities[method] != trained.identity() != longer.identity() and trained.in_order
    for options in ({"alpha": 1.0}, {"shrinkage": 0.1}):
        files = update_of(captured_llama, "two_sided", **options).inputs(0)
        assert [file.parent.name for file in files] == ["inputs", "gradients"]


@pytest.fixture(scope="module")
def first_block(captured_llama: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factors of the block before BLOCK, by the closed form."""
    folder = tmp_path_factory.mktemp("first")
    update_of(captured_llama, "closed_form").factors(0, thirds(update_of(captured_llama, "svd").model, 0), folder)
    return folder / "000.safetensors"


@pytest.mark.parametrize("method", ["two_sided", "closed_form", "svd_llm", "svd_llm_v2"])
def test_anchored_factors_bring_back_what_the_prefix_lost(
    method: str, written: dict[str, Any], first_block: Path, captured_llama: Project, tmp_path: Path
) -> None:
    """‖Y − X' W'ᵀ‖ on the windows of the walk: smaller than that of the factors made for the original inputs."""
    update = update_of(captured_llama, method, alpha=1.0, stored=lambda index: first_block)
    tensors, facts = write(update, tmp_path)
    assert set(facts["damping"]) == (set(thirds(update.model)) if method in DAMPED else set())
    windows = load_windows(captured_llama.folder / "artifacts" / "calibrate" / "calibration.parquet")[:4]
    hidden = embedded(update.model, windows)
    entering = [forward_block(update.model, 0, hidden, 1, read) for read in (None, read_factors(first_block))]
    input_of = inputs_of(captured_llama.folder / "artifacts" / "capture" / "inputs" / f"{BLOCK:03}.safetensors")
    moments = prefix_moments(update.model, BLOCK, input_of, *entering)

    def error(weight: torch.Tensor, factors: dict[str, torch.Tensor], name: str) -> float:
        """‖Y‖² is left out: it is the same for both."""
        cut = factors[f"{name}.left"].double() @ factors[f"{name}.right"].double()
        cross, gram = moments[input_of[name]]
        return float(torch.trace(cut @ gram @ cut.T) - 2 * torch.trace(weight @ cross @ cut.T))

    for name, weight in update.model.weights(BLOCK).items():
        assert error(weight.double(), tensors, name) < error(weight.double(), written[method][0], name), name


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"block_steps": 3}])
def test_an_update_behind_blocks_goes_on_from_those_that_are_done(
    options: dict[str, Any], first_block: Path, captured_llama: Project, tmp_path: Path
) -> None:
    """A killed run walks again through what it had finished, and ends in the same bytes."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    stored = tmp_path / "whole/000.safetensors"
    whole = update_of(captured_llama, "two_sided", **options, stored=lambda index: stored)
    whole.factors(0, thirds(whole.model, 0), tmp_path / "whole")
    whole.factors(BLOCK, thirds(whole.model), tmp_path / "whole")
    resumed = update_of(captured_llama, "two_sided", **options, stored=lambda index: stored)
    resumed.factors(BLOCK, thirds(resumed.model), tmp_path / "resumed")
    file = f"{BLOCK:03}.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    other = update_of(captured_llama, "two_sided", **options, stored=lambda index: first_block)
    other.factors(BLOCK, thirds(other.model), tmp_path)
    assert (tmp_path / file).read_bytes() != (tmp_path / "whole" / file).read_bytes()


def test_a_refined_block_comes_closer_to_the_original(
    written: dict[str, Any], first_block: Path, captured_llama: Project, tmp_path: Path
) -> None:
    update = update_of(captured_llama, "two_sided", block_steps=24, stored=lambda index: first_block)
    tensors, facts = write(update, tmp_path)
    (block,) = facts["block_error"]
    assert block == update.model.names[BLOCK]
    assert facts["block_error"][block] < facts["block_error_before"][block]
    assert set(tensors) == set(written["two_sided"][0])
    assert any(not torch.equal(tensors[name], written["two_sided"][0][name]) for name in tensors)


@pytest.mark.parametrize("method", ["two_sided", "closed_form", "svd_llm", "svd_llm_v2"])
def test_shrinkage_goes_from_the_metric_to_none(
    method: str, written: dict[str, Any], captured_llama: Project, tmp_path: Path
) -> None:
    """A little changes little, and the whole way leaves the plain SVD of the weight."""
    weights = BlockModel(captured_llama.folder / "artifacts" / "prepare").weights(BLOCK)
    products = {}
    for share in (1e-9, 0.5, 1.0):
        tensors, _ = write(update_of(captured_llama, method, shrinkage=share), tmp_path)
        products[share] = {name: tensors[f"{name}.left"] @ tensors[f"{name}.right"] for name in weights}
    plain, captured = (written[which][0] for which in ("svd", method))
    for name in weights:
        expected = {1e-9: captured, 1.0: plain}
        for share, found in expected.items():
            product = found[f"{name}.left"] @ found[f"{name}.right"]
            torch.testing.assert_close(products[share][name], product, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(products[0.5][name], product, rtol=1e-2, atol=1e-4), (share, name)
