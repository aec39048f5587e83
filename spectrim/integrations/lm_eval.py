"""The lm-evaluation-harness command line with Spectrim's checkpoint format registered.

    python -m spectrim.integrations.lm_eval --model hf --model_args pretrained=artifacts/remap --tasks arc_easy

It takes every option of ``lm_eval`` and needs the extra ``spectrim[pipeline]``.
"""

from lm_eval.__main__ import cli_evaluate

import spectrim  # noqa: F401 - registers the format

if __name__ == "__main__":
    cli_evaluate()
