"""Remove from the store what no run needed for some time.

python -m pipeline.prune [--keep-days 30]
"""

from pipeline.runtime.console import run
from pipeline.runtime.store import LayerStore, default_root


def main(keep_days: float = 30.0) -> None:
    """Prune the resume store: what no run used for --keep-days days, and the leftovers of killed runs."""
    removed, freed = LayerStore().gc(keep_days)
    print(f"{default_root()}: {removed} entries removed, {freed / 1e6:,.1f} MB freed")


if __name__ == "__main__":
    run(main)
