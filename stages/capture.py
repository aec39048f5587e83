"""Second moments of every linear's inputs and output gradients, and the whitened factors made from them.

reads   artifacts/prepare (weights), artifacts/calibrate/calibration.parquet
writes  artifacts/capture: inputs/, gradients/, factors/ with one file per block, spectra.safetensors, and capture.json,
        which names the sha256 of each
params  capture, compression.exclude
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.params import load
from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, files_sha256, fresh_folder, read_json, write_json
from pipeline.runtime.closure import code_digest
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore, key, link_or_copy
from pipeline.steps.spectra_file import Tokens, write_spectra
from pipeline.steps.walk import BlockWalk, Walk, WholeWalk
from spectrim.models.blocks import BlockModel
from spectrim.models.whole import WholeModel

Compute = Callable[[Path], None]


def main() -> None:
    """Capture input Grams, output-gradient Grams and whitened factors, one file per block."""
    params, store = load(), LayerStore()
    settings, exclude = params.capture, params.compression.exclude
    windows = load_windows(artifact("calibrate") / "calibration.parquet")
    prepared = read_json(artifact("prepare") / "prepare.json")
    walk = prepared["walk"] if settings.walk == "auto" else settings.walk
    kind = WholeModel if walk == "whole" else BlockModel
    model = kind(artifact("prepare"), resolve(params.runtime.device), tuple(exclude))
    identity = [
        prepared["model_sha256"],
        read_json(artifact("calibrate") / "calibrate.json")["calibration"]["tokens_sha256"],
        [exclude, settings.gradient_windows, settings.gradient_seq_len, settings.batch_size, str(model.device), walk],
    ]
    walker: Walk
    if isinstance(model, WholeModel):
        walker = WholeWalk(model, windows, settings)
    else:
        name = key("capture", "walk", code_digest(BlockWalk), *identity)
        walker = BlockWalk(model, windows, settings, store, name)

    def phase(name: str, compute: Callable[[int], Compute], order: range, *extra: float, ordered: bool) -> list[Path]:
        """One file per block: what ``compute(index)(folder)`` writes, block by block in ``order``."""
        tasks = [keyed(f"capture.{name}", model.names[i], compute(i), *identity, *extra) for i in order]
        entries = run_layers(f"capture: {name}", tasks, params.runtime, store, ordered=ordered)
        return [entries[block] / f"{i:03}.safetensors" for i, block in enumerate(model.names)]

    forward = range(len(model.names))
    inputs = phase("inputs", partial(partial, walker.inputs), forward, ordered=True)
    gradients = phase("gradients", partial(partial, walker.gradients), forward[::-1], ordered=True)

    def decompose(i: int) -> Compute:
        return partial(walker.factors, i, inputs[i], gradients[i])

    factors = phase("factors", decompose, forward, settings.damping, settings.max_damping, ordered=False)
    with fresh_folder(artifact("capture")) as out:
        spectra: dict[str, Tensor] = {}
        for i in forward:
            for name, files in (("inputs", inputs), ("gradients", gradients), ("factors", factors)):
                link_or_copy(files[i].parent, out / name)
            tensors = load_file(factors[i])
            spectra |= {name: tensors[name] for name in tensors if name.startswith(("two_sided.", "input."))}
        write_spectra(out, spectra, Tokens(windows.numel(), walker.graded.numel()))
        write_json(out / "capture.json", {"walk": walk, "files": files_sha256(out)})
    walker.clear()


if __name__ == "__main__":
    run(main)
