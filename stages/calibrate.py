"""Token windows for calibration, validation and test.

reads   data.*.source, artifacts/sources/texts.json, artifacts/prepare (tokenizer and config.json)
writes  artifacts/calibrate: calibration.parquet, validation.parquet, test/TEXT.parquet, calibrate.json, and where
        calibrate.refinement_windows asks for it refinement.parquet
params  data, calibrate, compression.seed
"""

from functools import partial

from pipeline.config.params import load
from pipeline.data.calibration import write_windows
from pipeline.runtime.artifacts import artifact, fresh_folder, read_json
from pipeline.runtime.console import run
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore, link_or_copy


def main() -> None:
    """Divide the texts by document, tokenise them and write windows."""
    params, store = load(), LayerStore()
    identities = read_json(artifact("sources", "texts.json"))
    files = read_json(artifact("prepare", "prepare.json"))["files"]
    reader = {name: sha256 for name, sha256 in files.items() if not name.endswith(".safetensors")}
    commits = {name: identity.get("commit") for name, identity in identities.items()}
    values = (params.data, params.calibrate, params.compression.seed)
    compute = partial(write_windows, artifact("prepare"), *values, commits)
    task = keyed("calibrate", "windows", compute, *values, identities, reader)
    entries = run_layers("calibrate", [task], params.runtime, store, ordered=True)
    with fresh_folder(artifact("calibrate")) as out:
        link_or_copy(entries["windows"], out)


if __name__ == "__main__":
    run(main)
