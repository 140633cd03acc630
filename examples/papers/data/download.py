"""Downloads whose MD5 is checked before anything of them is unpacked or gets its final name."""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from .publishers import Download

CHUNK = 1 << 18
TIMEOUT = 60
"""Seconds without an answer."""


def fetch(one: Download, folder: Path) -> None:
    """Puts the files of a download below ``folder``, over what has their names, once all of them are there and right.

    Until then they are in a temporary folder inside ``folder``, which goes whatever happens.

    Raises:
        ValueError: no answer, another MD5 than the publisher's, a file that the archive has not, or a folder that
            cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            got = Path(name) / "download"
            _stream(one, got)
            _place(_unpacked(one, got) if one.url.endswith(".tar.gz") else {one.files[0]: got}, folder)
    except (OSError, http.client.HTTPException, tarfile.TarError) as error:
        raise ValueError(f"cannot get {one.url} into {folder} ({error or type(error).__name__})") from None


def _stream(one: Download, file: Path) -> None:
    from tqdm import tqdm  # reading what is there needs none

    digest = hashlib.md5(usedforsecurity=False)
    name = one.url.rpartition("/")[2]
    with urllib.request.urlopen(one.url, timeout=TIMEOUT) as answer, file.open("wb") as out:
        length = answer.headers.get("Content-Length")
        with tqdm(total=int(length) if length else None, unit="B", unit_scale=True, desc=name) as bar:
            while chunk := answer.read(CHUNK):
                digest.update(chunk)
                bar.update(out.write(chunk))
    if digest.hexdigest() != one.md5:
        had = f"{file.stat().st_size} bytes with MD5 {digest.hexdigest()}"
        raise ValueError(f"{one.url} gave {had}, must have MD5 {one.md5}; nothing of it was kept")


def _unpacked(one: Download, archive: Path) -> dict[str, Path]:
    """The archive's members of those names, unpacked beside it. Its other members are left alone."""
    beside = archive.parent / "unpacked"
    found: dict[str, Path] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name in one.files and member.isreg():
                tar.extract(member, beside, filter="data")
                found[member.name] = beside / member.name
            if len(found) == len(one.files):
                return found
    absent = ", ".join(name for name in one.files if name not in found)
    raise ValueError(f"{one.url} must hold the files {absent}, which it does not")


def _place(files: Mapping[str, Path], folder: Path) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        os.replace(file, folder / name)
