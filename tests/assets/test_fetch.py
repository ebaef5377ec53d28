"""Every bad situation gives one sentence and never a half-done cache. No test uses the network."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import minipeft
from minipeft import assets
from minipeft.assets import __main__ as command
from minipeft.assets import datasets, fetch, sources
from minipeft.assets.fetch import AssetError

YAML = """categories:
- AI
conversations:
- - What is &lt;AI&gt;?
  - No
  - Really?
- - What is &lt;AI&gt;?
  - A branch of science.
"""


def _tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty cache, and a pip that delivers small stand-ins for the archives."""
    rows = "\r\n".join(f"{i}\t{(-1) ** i * 2.5}\tIt''s &amp;  film {i}" for i in range(100))
    many = "\r\n".join(f"{i // 5}_{i % 5}\t{i % 7 - 3}\tsnippet {i}" for i in range(100))
    top = "vaderSentiment-3.3.2"
    inner = {
        f"hutto_ICWSM_2014/{name}": (rows if source in ("movies", "tweets") else many).encode()
        for source, name in sources.REVIEW_FILES.items()
    }
    nested = f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz"
    sdist = _tar({f"{top}/LICENSE.txt": b"MIT", nested: _tar(inner), "../evil": b"no"})
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        for language in sources.LANGUAGES:
            file.writestr(f"chatterbot_corpus/data/{language}/ai.yml", YAML)
        file.writestr("chatterbot_corpus-1.3.3.dist-info/METADATA", "License: BSD")
    archives = {"vaderSentiment": sdist, "chatterbot-corpus": wheel.getvalue()}
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    for name in ("REVIEWS", "DIALOGUES"):
        asset = getattr(sources, name)
        digest = hashlib.sha256(archives[asset.package]).hexdigest()
        monkeypatch.setattr(sources, name, replace(asset, sha256=digest))
    calls = []

    def pip(command, **options):
        calls.append(command)
        asset = next(a for a in (sources.REVIEWS, sources.DIALOGUES) if a.package in command)
        folder = Path(command[command.index("--dest") + 1])
        wanted = Path(command[command.index("--requirement") + 1]).read_text("utf-8")
        found = hashlib.sha256(archives[asset.package]).hexdigest()
        if wanted != f"{asset.package}=={asset.version} --hash=sha256:{found}\n":
            said = f"ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    Got        {found}\n"
            return subprocess.CompletedProcess(command, 1, "", said)
        (folder / asset.filename).write_bytes(archives[asset.package])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return calls


def _fails(monkeypatch, stderr, code=1):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(fetch.subprocess, "run", pip)


def _message(function, *args):
    with pytest.raises(AssetError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _visible(cache):
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") if cache.exists() else []


def test_reviews_are_parsed_cleaned_and_split(mirror, tmp_path):
    reviews = datasets.load_reviews("movies")
    assert {k: len(v) for k, v in reviews.items()} == {"train": 80, "validation": 10, "test": 10}
    row = next(r for r in reviews["train"] if r["label"] == 1)
    number = row["text"].split()[-1]
    assert row["text"] == f'It"s & film {number}' and row["rating"] == 2.5
    assert row["prompt"] == f"Review: {row['text']}\nSentiment:" and row["answer"] == " positive"
    assert {r["answer"] for r in reviews["train"] if r["label"] == 0} == {" negative"}
    assert not (tmp_path / "evil").exists() and not (tmp_path / "cache" / "evil").exists()


def test_documents_never_straddle_and_filters_do_not_move_rows(mirror):
    strict, loose = datasets.load_reviews("amazon", 2.0), datasets.load_reviews("amazon", 0.0)
    document = {f"snippet {i}": i // 5 for i in range(100)}
    seen = {}
    for split, rows in loose.items():
        for row in rows:
            assert seen.setdefault(document[row["text"]], split) == split
            assert row["rating"] != 0
        assert set(strict[split]["text"]) <= set(rows["text"])
        assert all(abs(rating) >= 2 for rating in strict[split]["rating"])
    assert set(seen.values()) == {"train", "validation", "test"}


def test_dialogues_keep_words_and_their_prompts_together(mirror):
    rows = [row for part in datasets.load_dialogues("english").values() for row in part]
    assert {(r["prompt"], r["answer"]) for r in rows} == {
        ("What is <AI>?", "No"), ("No", "Really?"), ("What is <AI>?", "A branch of science."),
    }  # fmt: skip
    homes = [
        split
        for split, part in datasets.load_dialogues("chinese").items()
        for row in part
        if row["prompt"] == "What is <AI>?"
    ]
    assert len(homes) == 2 and len(set(homes)) == 1


def test_unknown_names_are_refused(mirror):
    with pytest.raises(ValueError, match="choose one of"):
        datasets.load_reviews("films")
    with pytest.raises(ValueError, match="choose one of"):
        datasets.load_dialogues("german")
    with pytest.raises(ValueError, match="min_rating"):
        datasets.load_reviews("movies", -1)
    assert not mirror


def test_a_warm_cache_is_silent_and_needs_no_pip(mirror, monkeypatch, capfd):
    datasets.load_reviews("movies")
    assert len(mirror) == 1
    _fails(monkeypatch, "ERROR: no network")
    datasets.load_reviews("tweets")
    assert capfd.readouterr() == ("", "")


def test_cold_cache_without_network(mirror, monkeypatch, tmp_path):
    _fails(monkeypatch, "WARNING: Retrying\nERROR: No matching distribution found for x\n")
    message = _message(datasets.load_reviews, "movies")
    for part in ("reviews", "vaderSentiment==3.3.2", "python -m minipeft.assets", "mirror",
                 "MINIPEFT_CACHE", "No matching distribution"):  # fmt: skip
        assert part in message
    assert _visible(tmp_path / "cache") == []


def test_real_pip_without_any_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert "pip could not download chatterbot-corpus==1.3.3" in _message(datasets.load_dialogues)
    assert _visible(tmp_path) == []


def _evil(tmp_path, monkeypatch, how):
    """Real pip, and a place that has a vaderSentiment whose setup.py and backend leave a trace."""
    trace, top = tmp_path / "trace", "vaderSentiment-3.3.2"
    run = f"open({str(trace)!r}, 'w').close()\n"
    inner = {
        f"hutto_ICWSM_2014/{name}": "".join(f"{i}\t{i % 5 - 2.5}\tfilm {i}\n" for i in range(50))
        for name in sources.REVIEW_FILES.values()
    }
    archive = _tar(
        {
            f"{top}/setup.py": f"{run}from setuptools import setup\nsetup()\n".encode(),
            f"{top}/PKG-INFO": b"Metadata-Version: 1.0\nName: vaderSentiment\nVersion: 3.3.2\n",
            f"{top}/LICENSE.txt": b"MIT",
            f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz": _tar(
                {name: text.encode() for name, text in inner.items()}
            ),
        }
    )
    simple = tmp_path / "simple" / "vadersentiment"
    simple.mkdir(parents=True)
    (simple / sources.REVIEWS.filename).write_bytes(archive)
    link = f'<a href="{sources.REVIEWS.filename}">{sources.REVIEWS.filename}</a>'
    (simple / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    if how == "find-links":
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(simple))
    else:
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    return trace, hashlib.sha256(archive).hexdigest()


@pytest.mark.parametrize("how", ["find-links", "index"])
def test_nothing_of_a_swapped_download_is_run(tmp_path, monkeypatch, how):
    trace, found = _evil(tmp_path, monkeypatch, how)
    message = _message(datasets.load_reviews)
    assert f"has SHA-256 {found} instead of {sources.REVIEWS.sha256}" in message
    assert not trace.exists() and _visible(tmp_path / "cache") == []


def test_nothing_of_the_right_download_is_run_either(tmp_path, monkeypatch):
    trace, found = _evil(tmp_path, monkeypatch, "find-links")
    monkeypatch.setattr(sources, "REVIEWS", replace(sources.REVIEWS, sha256=found))
    assert len(datasets.load_reviews("movies")["train"]) > 20
    assert not trace.exists() and _visible(tmp_path / "cache") == ["reviews-3.3.2"]
    assert "requirements.txt" not in os.listdir(sources.REVIEWS.folder)


def test_a_link_in_an_archive_leads_nowhere(mirror, tmp_path):
    """The right file is asked for by name, and a link in its place is not followed outside."""
    secret = tmp_path / "secret"
    secret.write_text("1\t2.0\tnot yours\n")
    archive, buffer = tmp_path / "archive.tar.gz", io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in sources.REVIEW_FILES.values():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, str(secret)
            tar.addfile(info)
    top = "vaderSentiment-3.3.2"
    nested = f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz"
    archive.write_bytes(_tar({f"{top}/LICENSE.txt": b"MIT", nested: buffer.getvalue()}))
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError):  # fetch makes one sentence of whatever is raised here
        sources.build_reviews(archive, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_download_cut_off_or_swapped(mirror, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "REVIEWS", replace(sources.REVIEWS, sha256="0" * 64))
    message = _message(datasets.load_reviews)
    assert "has SHA-256" in message and "0" * 64 in message
    assert _visible(tmp_path / "cache") == []


def test_pip_is_missing(mirror, monkeypatch):
    _fails(monkeypatch, "/usr/bin/python: No module named pip\n")
    assert "ensurepip" in _message(datasets.load_reviews)


@pytest.mark.parametrize("where", ["pip", "unpacking"])
def test_a_full_disk(mirror, monkeypatch, tmp_path, where):
    if where == "pip":
        _fails(monkeypatch, "ERROR: Could not install: [Errno 28] No space left on device")
    else:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(sources, "_write_rows", full)
    assert "The disk is full" in _message(datasets.load_reviews)
    assert _visible(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(mirror, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in _message(datasets.load_reviews)
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "file" / "below"))
    assert "cannot be written" in _message(datasets.load_reviews)


@pytest.mark.parametrize("harm", ["cut", "gone", "no manifest", "half manifest", "other version"])
def test_a_damaged_cache_is_redone(mirror, harm):
    expected = datasets.load_reviews("movies")["test"]["text"]
    folder = sources.REVIEWS.folder
    if harm == "cut":
        (folder / "movies.jsonl").write_text("{")
    elif harm == "gone":
        (folder / "movies.jsonl").unlink()
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    elif harm == "half manifest":
        (folder / "manifest.json").write_text('{"asset": "rev')
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["layout"] = 0
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert datasets.load_reviews("movies")["test"]["text"] == expected
    assert len(mirror) == 2


def test_verify_finds_a_changed_byte(mirror, monkeypatch):
    datasets.load_reviews("movies")
    path = sources.REVIEWS.folder / "movies.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"x" + before[1:])
    monkeypatch.setattr(sources, "build_model", lambda archive, folder: None)
    monkeypatch.setattr(sources, "MODEL", sources.DIALOGUES)
    datasets.load_dialogues()
    sources.fetch_all(progress=False, verify=True)
    assert path.read_bytes() == before


def test_two_at_once_fetch_once(mirror):
    results = []
    work = [
        threading.Thread(target=lambda: results.append(len(datasets.load_reviews()["train"])))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert results == [80] * 4 and len(mirror) == 1


KILLED = textwrap.dedent(
    """
    import os, shutil, signal, sys
    from minipeft.assets import datasets, fetch, sources
    step = sys.argv[1]
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == "download": fetch._download = die
    if step == "convert":
        def half(archive, folder):
            (folder / "english.jsonl").write_text("{")
            die()
        sources.build_dialogues = half
    if step == "manifest": fetch._write_manifest = die
    if step == "rename": os.rename = die
    if step != "download": fetch._download = lambda *args: sys.argv[2]
    if step in ("manifest", "rename"):
        sources.build_dialogues = lambda a, f: (f / "english.jsonl").write_text("{}")
    datasets.load_dialogues()
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("step", ["download", "convert", "manifest", "rename"])
def test_killed_midway_then_fetched_again(mirror, step, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    # The stand-in for pip lives in this process; Popen is what `run` was built on.
    child = subprocess.Popen([sys.executable, tmp_path / "killed.py", step, "nothing"])
    assert child.wait(60) == -signal.SIGKILL
    assert not sources.DIALOGUES.folder.exists()
    assert sum(map(len, datasets.load_dialogues().values())) == 3
    assert _visible(tmp_path / "cache") == ["dialogues-1.3.3"]  # the scratch folder went


def test_the_command_ends_with_the_sentence(tmp_path):
    env = {**os.environ, "MINIPEFT_CACHE": str(tmp_path), "PIP_NO_INDEX": "1",
           "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}  # fmt: skip
    call = [sys.executable, "-m", "minipeft.assets"]
    done = subprocess.run(call, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: smollm2") and done.stderr.count("\n") == 1


def test_an_argument_that_the_command_does_not_know(capfd, monkeypatch):
    monkeypatch.setattr(command, "fetch_all", None)
    assert command.main(["--verfy"]) == (
        "Error: --verfy is not understood; give nothing, or --verify."
    )


def test_a_home_folder_that_is_not_here(monkeypatch):
    monkeypatch.setenv("MINIPEFT_CACHE", "~nobody-of-that-name/cache")
    assert "names a home folder that is not here" in _message(datasets.load_reviews)


def test_the_cached_data_are_those_of_the_data_card():
    sizes = {s: [len(p) for p in datasets.load_reviews(s).values()] for s in sources.REVIEW_FILES}
    assert sizes == {
        "movies": [7346, 898, 927],
        "amazon": [1978, 262, 207],
        "editorials": [1218, 141, 171],
        "tweets": [2085, 265, 257],
    }
    assert [len(part) for part in datasets.load_dialogues("english").values()] == [992, 121, 115]
    assert [len(part) for part in datasets.load_dialogues("chinese").values()] == [450, 49, 51]


def test_whatever_loads_is_found_in_assets_as_in_the_package():
    loaders = {name for name in minipeft.__all__ if name.startswith("load_")} - {"load_adapter"}
    assert {name for name in assets.__all__ if name.startswith("load_")} == loaders
    assert all(getattr(assets, name) is getattr(minipeft, name) for name in loaders)


def test_grades_are_five_equal_parts_of_the_films_in_the_splits_of_the_reviews():
    grades = datasets.load_grades()
    sizes = {name: len(rows) for name, rows in grades.items()}
    assert sizes == {"train": 9103, "validation": 500, "test": 1000}
    rows = [row for part in grades.values() for row in part]
    assert len({row["text"].casefold() for row in rows}) == len(rows)
    counts = [0] * 5
    ends = [[4.0, -4.0] for _ in range(5)]  # lowest and highest rating of each grade
    for row in rows:
        counts[row["label"]] += 1
        low, high = ends[row["label"]]
        ends[row["label"]] = [min(low, row["rating"]), max(high, row["rating"])]
        assert row["answer"] == datasets.GRADES[row["label"]]
    assert all(abs(count / len(rows) - 0.2) < 0.01 for count in counts)  # ties stay together
    assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))
    tests = [row["label"] for row in grades["test"]]
    assert [tests.count(label) for label in range(5)] == [201, 191, 197, 220, 191]
    reviews = {name: set(part["text"]) for name, part in datasets.load_reviews("movies", 0).items()}
    for name in ("validation", "test"):  # and the snippets rated exactly 0, which these leave out
        own = [row["text"] for row in grades[name] if row["rating"] != 0]
        assert set(own) <= reviews[name] and len(own) > 0.98 * len(grades[name])
