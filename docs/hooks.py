"""The figure of the last run, from where the graph writes it: the pages need no copy of it."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FIGURES = Path("reports/figures")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every figure of reports/figures as figures/NAME."""
    folder = Path(config.config_file_path).parent / FIGURES
    for figure in sorted(folder.glob("*.svg")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files
