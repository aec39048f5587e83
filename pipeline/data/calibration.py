"""Texts and a tokenizer -> the files of artifacts/calibrate.

The documents of a split, in their order, are joined by a blank line and tokenised as one text; conversations stand one
behind the other as the chat template writes them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.sections import Calibrate, Text
from pipeline.data import texts
from pipeline.data.bos import added_bos, follow
from pipeline.data.conversations import Template, chat_tokens, require_template, written_bos
from pipeline.data.documents import read, split
from pipeline.data.originals import check_context, original_tokenizer
from pipeline.runtime.artifacts import write_json
from pipeline.runtime.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_windows(
    prepared: Path,
    data: Mapping[str, Text],
    settings: Calibrate,
    seed: int,
    commits: Mapping[str, str | None],
    folder: Path,
) -> None:
    """Write the windows of every part, and calibrate.json with their numbers and hashes, into ``folder``.

    Args:
        prepared: folder of `prepare`, for the tokenizer and the model's context.
        data: text name -> its source and the share of its documents that each part gets.
        seed: of the draw of calibration and validation windows.
        commits: text name -> the commit of a hub data set.
    """
    check_context(prepared, settings.seq_len)
    tokenizer = original_tokenizer(prepared)
    require_template(tokenizer, [name for name, text in sorted(data.items()) if text.template == "chat"])
    added, bos = added_bos(tokenizer), dict[str, int]()
    follow(tokenizer, settings.bos)
    tokens: dict[str, dict[str, np.ndarray]] = {"calibration": {}, "validation": {}, "test": {}}
    for name, text in progress(sorted(data.items()), desc="calibrate: texts", total=len(data)):
        for part, chosen in split(read(name, text, commits.get(name)), text.splits, name).items():
            tokens[part][name], own = _stream(tokenizer, chosen, text.template, name, added)
            first = {"auto": own, "always": tokenizer.bos_token_id, "never": None}[settings.bos]
            if first is not None:
                bos[name] = first

    summary: dict[str, dict] = {"test": {}, "bos": {name: str(tokenizer.decode([bos[name]])) for name in sorted(bos)}}
    drawn = {
        "calibration": {"calibration": settings.calibration_windows, "refinement": settings.refinement_windows},
        "validation": {"validation": settings.validation_windows},
    }
    for part, counts in drawn.items():
        windows, names = texts.draw_windows(tokens[part], settings.seq_len, sum(counts.values()), seed, part, bos)
        start = 0
        for kind, count in counts.items():
            if count:
                those = slice(start, start + count)
                summary[kind] = texts.save_windows(folder / f"{kind}.parquet", windows[those], names[those])
                summary[kind]["n_tokens_split"] = sum(map(len, tokens[part].values()))
            start += count
    for name, ids in tokens["test"].items():
        windows = texts.first_windows(name, ids, settings.seq_len, settings.test_windows, bos.get(name))
        summary["test"][name] = texts.save_windows(folder / "test" / f"{name}.parquet", windows, [name] * len(windows))
        written = windows[:, name in bos :]  # what the text itself says
        decoded = tokenizer.decode(written.reshape(-1), clean_up_tokenization_spaces=False)
        summary["test"][name] |= {"n_tokens_split": len(ids), "n_bytes": len(str(decoded).encode())}
    write_json(folder / "calibrate.json", summary)


def _stream(
    tokenizer: "PreTrainedTokenizerBase", documents: Sequence[str], template: Template, name: str, added: int | None
) -> tuple[np.ndarray, int | None]:
    """The tokens of a split's documents, (tokens,) int32, without the BOS token that tokenizer or template begin with.

    That token is returned, too, where there is one; ``added`` is the tokenizer's.
    """
    if template == "none":
        return texts.tokenise(tokenizer, "\n\n".join(documents)), added
    own = written_bos(tokenizer, documents[0], name) if added is None and documents else added
    return chat_tokens(tokenizer, documents, name, own), own
