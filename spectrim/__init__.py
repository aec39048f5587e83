"""Spectrim: low-rank compression of Hugging Face language models.

After ``import spectrim``, in either order with ``import transformers``, ``AutoModelForCausalLM.from_pretrained`` loads
Spectrim checkpoints. ``spectrim.to_dense(model)`` turns a loaded model back into plain ``nn.Linear``.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectrim.checkpoint.loading import to_dense
    from spectrim.formats.lowrank_linear import LowRankLinear

__all__ = ["LowRankLinear", "__version__", "to_dense"]
__version__ = "0.1.0"

_FORMATS = "transformers.quantizers.auto"  # where transformers keeps its table of checkpoint formats


def __getattr__(name: str) -> Any:
    homes = {"LowRankLinear": "spectrim.formats.lowrank_linear", "to_dense": "spectrim.checkpoint.loading"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


class _RegisterAtImport(MetaPathFinder):
    """Registers the checkpoint format as soon as transformers has a table of formats.

    Importing transformers takes seconds, which whoever only wants ``spectrim.errors`` should not pay.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _FORMATS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("spectrim.checkpoint.loading")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _FORMATS in sys.modules:
    importlib.import_module("spectrim.checkpoint.loading")
else:
    sys.meta_path.insert(0, _RegisterAtImport())
