"""The token before a text, BOS: where a tokenizer puts one, and what ``calibrate.bos`` makes of that.

Windows, the prompt of the generated sample and the harness's questions all follow the one rule. Models that were
trained with a BOS before every text, Gemma above all, are lost without it; for others it is a token they never saw.
"""

from typing import TYPE_CHECKING, Literal

from spectrim.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rule = Literal["auto", "always", "never"]


def added_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The BOS token, where ``tokenizer`` begins a text with it; None where it does not, or has none."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else None


def follow(tokenizer: "PreTrainedTokenizerBase", rule: Rule) -> "PreTrainedTokenizerBase":
    """``tokenizer`` itself, which from then on begins a text with its BOS token as ``calibrate.bos`` says.

    Raises:
        DataError: ``always``, and it has no BOS token; or a kind of tokenizer whose beginning cannot be set.
    """
    wanted = rule == "always"
    if rule == "auto" or wanted == (added_bos(tokenizer) is not None):
        return tokenizer
    if wanted and tokenizer.bos_token_id is None:
        raise DataError(
            "calibrate.bos: always, but the tokenizer has no BOS token; set calibrate.bos to auto or never, or give a "
            "model whose tokenizer names one"
        )
    tokenizer.add_bos_token = wanted
    if wanted != (added_bos(tokenizer) is not None):
        raise DataError(
            f"calibrate.bos: {rule}, but a {type(tokenizer).__name__} begins every text in its own way; set "
            "calibrate.bos to auto"
        )
    return tokenizer
