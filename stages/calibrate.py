"""Token windows for calibration, validation and test.

reads   data.*.source, artifacts/prepare (tokenizer and config.json)
writes  artifacts/calibrate: calibration.parquet, validation.parquet, test/TEXT.parquet, calibrate.json
params  data, calibrate, compression.seed
"""

import numpy as np

from pipeline.config.params import load
from pipeline.data import texts
from pipeline.data.documents import read, split
from pipeline.data.originals import check_context, load_tokenizer
from pipeline.runtime.artifacts import artifact, fresh_folder, write_json
from pipeline.runtime.console import run
from pipeline.runtime.progress import progress


def main() -> None:
    """Divide the texts by document, tokenise them and write windows."""
    params = load()
    settings, seed = params.calibrate, params.compression.seed
    check_context(artifact("prepare"), settings.seq_len)
    tokenizer = load_tokenizer(artifact("prepare"))
    tokens: dict[str, dict[str, np.ndarray]] = {"calibration": {}, "validation": {}, "test": {}}
    for name, text in progress(sorted(params.data.items()), desc="calibrate: texts", total=len(params.data)):
        for part, chosen in split(read(name, text), text.splits, name).items():
            tokens[part][name] = texts.tokenise(tokenizer, "\n\n".join(chosen))

    with fresh_folder(artifact("calibrate")) as out:
        summary: dict[str, dict] = {"test": {}}
        for part, count in (
            ("calibration", settings.calibration_windows),
            ("validation", settings.validation_windows),
        ):
            windows, names = texts.draw_windows(tokens[part], settings.seq_len, count, seed, part)
            summary[part] = texts.save_windows(out / f"{part}.parquet", windows, names)
            summary[part]["n_tokens_split"] = sum(map(len, tokens[part].values()))
        for name, ids in tokens["test"].items():
            windows = texts.first_windows(name, ids, settings.seq_len, settings.test_windows)
            summary["test"][name] = texts.save_windows(out / "test" / f"{name}.parquet", windows, [name] * len(windows))
            decoded = tokenizer.decode(windows.reshape(-1), clean_up_tokenization_spaces=False)
            summary["test"][name] |= {"n_tokens_split": len(ids), "n_bytes": len(str(decoded).encode())}
        write_json(out / "calibrate.json", summary)


if __name__ == "__main__":
    run(main)
