"""Figures: what they show, that they stand on light and dark paper, and that equal inputs give equal bytes."""

import re
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest

from pipeline.report import figures, sizes, tables
from pipeline.report.matrices import RankedMatrix, read_matrices
from tests import report_project

BLOCKS = 14
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def spectra() -> dict[str, np.ndarray]:
    return report_project.spectra(BLOCKS)


@pytest.fixture(scope="module")
def matrices(spectra: dict[str, np.ndarray]) -> list[RankedMatrix]:
    return read_matrices(report_project.ranks(spectra, 0.8), "float16")


@pytest.fixture(scope="module")
def drawn(spectra: dict[str, np.ndarray], matrices: list[RankedMatrix]) -> dict[str, str]:
    steps = np.arange(20.0)
    curve = {"step": steps, "cross_entropy": 4 - steps / 10, "width": 0.05 - steps / 500}
    metrics = report_project.metrics(BLOCKS)
    return {
        "ranks": figures.ranks_figure(matrices),
        "spectra": figures.spectra_figure(matrices, spectra, "two-sided metric"),
        "training": figures.training_figure(curve, 0.8),
        "refinement": figures.refinement_figure({"step": steps, "loss": steps, "validation_loss": 4 - steps / 10}),
        "size": sizes.size_figure(tables.points(metrics), metrics["bytes"]["dense_linears_16bit"]),
    }


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ["ranks", "spectra", "training", "refinement", "size"])
def test_ink_follows_the_page_and_ids_are_the_figures_own(name: str, drawn: dict[str, str]) -> None:
    svg = drawn[name]
    assert figures.INK not in svg
    assert "currentColor" in svg
    assert "<dc:date>" not in svg
    ids = [node.get("id") for node in ET.fromstring(svg).iter() if node.get("id")]
    assert ids and len(ids) == len(set(ids))
    assert all(str(each).startswith(f"{name}-") for each in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


@pytest.mark.parametrize("name", ["ranks", "spectra", "training", "refinement", "size"])
def test_a_file_of_its_own_has_ink_and_paper_for_both_schemes(name: str, drawn: dict[str, str]) -> None:
    root = ET.fromstring(figures.standalone(drawn[name]))
    assert [child.tag for child in root][:2] == [f"{SVG}style", f"{SVG}rect"]
    assert "prefers-color-scheme:dark" in str(root[0].text)
    assert root.get("width") and root.get("viewBox")


def test_the_heatmap_shows_each_factored_matrix_by_its_rank_and_each_layer(
    drawn: dict[str, str], matrices: list[RankedMatrix]
) -> None:
    shown = Counter(texts(drawn["ranks"]))
    wanted = Counter(str(matrix.rank) for matrix in matrices if not matrix.is_dense)
    wanted += Counter(str(layer) for layer in range(BLOCKS))
    assert sum(wanted.values()) > BLOCKS
    assert not wanted - shown
    assert {"q_proj", "down_proj", "left dense"} <= set(shown)


def test_another_rank_is_another_figure(spectra: dict[str, np.ndarray]) -> None:
    def both(rank: int) -> tuple[str, str]:
        matrix = RankedMatrix("model.layers.3.mlp.up_proj", 3, "mlp.up_proj", 1536, 576, rank, "float16", 0)
        return figures.ranks_figure([matrix]), figures.spectra_figure([matrix], spectra, "two-sided metric")

    before, same, after = both(96), both(96), both(104)
    assert before == same
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_the_dot_of_the_cut_sits_at_the_rank(spectra: dict[str, np.ndarray]) -> None:
    """The axis runs from 0 to its last tick, so equal steps of rank are equal steps across the panel."""
    sigma = spectra["model.layers.3.mlp.up_proj"]

    def at(rank: int) -> float:
        matrix = RankedMatrix("model.layers.3.mlp.up_proj", 3, "mlp.up_proj", 1536, 576, rank, "float16", 0)
        svg = ET.fromstring(figures.spectra_figure([matrix], {matrix.name: sigma}, "two-sided metric"))
        lines = [node for node in svg.iter(f"{SVG}g") if str(node.get("id")).startswith("spectra-line2d")]
        dots = [
            use.get("x") for line in lines for use in line.iter(f"{SVG}use") if "stroke" in (use.get("style") or "")
        ]
        return float(str(dots[-1]))

    first, second, third = at(100), at(200), at(300)
    assert first < second
    assert third - second == pytest.approx(second - first, rel=1e-3)


def test_equal_inputs_give_equal_bytes(
    drawn: dict[str, str], matrices: list[RankedMatrix], spectra: dict[str, np.ndarray]
) -> None:
    assert figures.spectra_figure(matrices, spectra, "two-sided metric") == drawn["spectra"]
    assert figures.ranks_figure(matrices) == drawn["ranks"]


def test_drawing_leaves_the_settings_of_matplotlib_alone(matrices: list[RankedMatrix]) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.ranks_figure(matrices[:3])
    assert dict(mpl.rcParams) == before


def test_every_model_is_named_at_its_point(drawn: dict[str, str]) -> None:
    shown = " ".join(texts(drawn["size"]))
    assert all(name in shown for name in ("Spectrim", "RTN int8", "RTN int4", "dense, 16 bit", "35.13", "21.96"))


@pytest.mark.parametrize("sigma", [np.zeros(192), np.r_[1.0, np.zeros(191)], np.ones(192)])
@pytest.mark.parametrize(("rank", "format"), [(1, "float16"), (8, "float16"), (192, "dense")])
def test_degenerate_spectra_are_drawn(sigma: np.ndarray, rank: int, format: str) -> None:
    matrix = RankedMatrix("m.0.k_proj", 0, "k_proj", 192, 576, rank, format, 0)  # type: ignore[arg-type]
    assert "k_proj" in texts(figures.spectra_figure([matrix], {matrix.name: sigma}, "input metric"))


def test_one_training_step_is_drawn() -> None:
    one = {name: np.array([1.0]) for name in ("step", "cross_entropy", "width")}
    assert "Width of the gates" in texts(figures.training_figure(one, 0.8))


def test_very_deep_models_are_drawn_without_figures_in_the_cells() -> None:
    deep = [RankedMatrix(f"m.{layer}.k_proj", layer, "k_proj", 192, 576, 96, "float16", 0) for layer in range(120)]
    shown = texts(figures.ranks_figure(deep))
    assert "96" not in shown
    assert "115" in shown


def test_layers_are_spread_from_the_first_to_the_last(matrices: list[RankedMatrix]) -> None:
    group = [matrix for matrix in matrices if matrix.kind == "mlp.up_proj"]
    layers = [matrix.layer for matrix in figures.spread(group, 5)]
    assert layers[0] == 0 and layers[-1] == BLOCKS - 1 and layers == sorted(set(layers)) and len(layers) == 5
    assert figures.spread(group, 100) == group


def test_the_running_mean_keeps_straight_lines_and_flattens_noise() -> None:
    line = np.linspace(3, 1, 60)
    np.testing.assert_allclose(figures.smooth(line)[3:-3], line[3:-3])
    noise = np.random.default_rng(0).standard_normal(400)
    assert figures.smooth(noise).std() < 0.3 * noise.std()
