"""Downloads from a server of the test's own: what has the right MD5 is kept, anything else leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from papers.data import cifar, load, publishers
from papers.data.download import fetch
from papers.data.publishers import SOURCES, Download
from papers.data.reading import Counts

from tests.examples import formats

Member = tuple[str, bytes] | tarfile.TarInfo


class Server:
    """Serves ``content`` by path, with a length header that may promise more, and notes what was asked for."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.promised = 0
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = outer.content.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"") + outer.promised))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def archive(*members: Member) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return packed.getvalue()


def served(server: Server, content: bytes, files: tuple[str, ...], name: str = "/some.tar.gz") -> Download:
    server.content[name] = content
    return Download(server.url + name, md5(content), files)


def everything(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def test_a_file_lands_under_its_name_and_nothing_beside_it(server: Server, tmp_path: Path) -> None:
    fetch(served(server, b"content", ("a/raw/x.gz",), "/x.gz"), tmp_path / "new" / "data")
    assert everything(tmp_path) == {"new", "new/data", "new/data/a", "new/data/a/raw", "new/data/a/raw/x.gz"}
    assert (tmp_path / "new/data/a/raw/x.gz").read_bytes() == b"content"


def test_only_the_members_asked_for_are_unpacked(server: Server, tmp_path: Path) -> None:
    content = archive(("d/readme.html", b"no"), ("d/x.bin", b"x" * 999), ("d/y.bin", b"y"), ("e/z.bin", b"no"))
    fetch(served(server, content, ("d/x.bin", "d/y.bin")), tmp_path)
    assert everything(tmp_path) == {"d", "d/x.bin", "d/y.bin"}
    assert (tmp_path / "d/x.bin").read_bytes() == b"x" * 999


def test_what_was_unpacked_can_be_read_by_those_who_read_other_new_files(server: Server, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    fetch(served(server, b"content", ("x.gz",), "/x.gz"), tmp_path)
    assert (tmp_path / "x.gz").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_an_altered_download_leaves_nothing_and_tells_both_sums(server: Server, tmp_path: Path) -> None:
    one = served(server, archive(("d/x.bin", b"x")), ("d/x.bin",))
    altered = archive(("d/x.bin", b"z"))
    server.content["/some.tar.gz"] = altered
    with pytest.raises(ValueError, match=f"{re.escape(one.url)} gave .*{md5(altered)}, must have MD5 {one.md5}"):
        fetch(one, tmp_path)
    assert everything(tmp_path) == set()


def test_nothing_is_unpacked_before_the_sum_is_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = served(server, archive(("d/x.bin", b"x")), ("d/x.bin",))
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="must have MD5"):
        fetch(one._replace(md5="0" * 32), tmp_path)


@pytest.mark.parametrize("cut", [1, 100], ids=["nearly-all", "a-part"])
def test_a_partial_download_leaves_nothing(cut: int, server: Server, tmp_path: Path) -> None:
    content = archive(("d/x.bin", formats.noise(500).tobytes()))
    one = served(server, content, ("d/x.bin",))
    server.content["/some.tar.gz"], server.promised = content[:-cut], cut
    with pytest.raises(ValueError, match=re.escape(one.url)):
        fetch(one, tmp_path)
    assert everything(tmp_path) == set()


def test_an_interrupted_download_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(served(server, archive(("d/x.bin", b"x")), ("d/x.bin",)), tmp_path)
    assert everything(tmp_path) == set()


def test_a_failed_download_leaves_what_was_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.bin").write_bytes(b"old")
    one = served(server, archive(("d/x.bin", b"new")), ("d/x.bin", "d/y.bin"))
    with pytest.raises(ValueError, match=re.escape(f"{one.url} must hold the files d/y.bin, which it does not")):
        fetch(one, tmp_path)
    assert everything(tmp_path) == {"d", "d/x.bin"}
    assert (tmp_path / "d/x.bin").read_bytes() == b"old"


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_plain_file_is_refused(kind: bytes, server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    one = served(server, archive(link("d/x.bin", kind, str(secret))), ("d/x.bin",))
    with pytest.raises(ValueError, match=r"must hold the files d/x\.bin"):
        fetch(one, tmp_path / "data")
    assert everything(tmp_path / "data") == set()


def test_a_member_behind_a_link_does_not_leave_the_folder(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    content = archive(link("d", tarfile.SYMTYPE, str(outside)), ("d/x.bin", b"x"), ("../y.bin", b"y"))
    fetch(served(server, content, ("d/x.bin",)), tmp_path / "data")
    assert everything(outside) == set()
    assert everything(tmp_path) == {"outside", "data", "data/d", "data/d/x.bin"}


def test_members_of_names_that_leave_the_folder_are_refused(server: Server, tmp_path: Path) -> None:
    one = served(server, archive(("../y.bin", b"y")), ("../y.bin",))
    with pytest.raises(ValueError, match="outside the destination"):
        fetch(one, tmp_path / "data")
    assert everything(tmp_path) == {"data"}


def test_no_answer_is_an_error_with_the_address(server: Server, tmp_path: Path) -> None:
    one = Download(f"{server.url}/nothing.gz", "0" * 32, ("x.gz",))
    with pytest.raises(ValueError, match=re.escape(f"cannot get {one.url} into {tmp_path} (HTTP Error 404")):
        fetch(one, tmp_path)
    gone = one._replace(url="http://127.0.0.1:1/x.gz")
    with pytest.raises(ValueError, match=re.escape(f"cannot get {gone.url} into {tmp_path} (")):
        fetch(gone, tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_asked_for(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(f"into {tmp_path / 'file' / 'below'} (")):
        fetch(served(server, b"x", ("x.gz",), "/x.gz"), tmp_path / "file" / "below")
    assert server.asked == []


def test_a_progress_bar_counts_the_bytes(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(served(server, bytes(3000), ("x.gz",), "/x.gz"), tmp_path)
    told = capsys.readouterr().err
    assert "x.gz: 100%" in told
    assert "3.00k/3.00k" in told


# --- through load --------------------------------------------------------------------------------------------------


def publish_cifar100(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = formats.write_cifar100(tmp_path / "published")
    names = SOURCES["cifar100"].downloads[0].files
    content = archive(*((name, (files / Path(name).name).read_bytes()) for name in names))
    read = partial(cifar.read100, counts=Counts(110, 101))
    source = SOURCES["cifar100"]._replace(read=read, downloads=(served(server, content, names),))
    monkeypatch.setitem(publishers.SOURCES, "cifar100", source)


def test_load_downloads_what_is_missing_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_cifar100(server, tmp_path, monkeypatch)
    data = tmp_path / "data"
    with pytest.raises(ValueError, match="download=True"):
        load("cifar100", data)
    assert server.asked == []
    for _ in range(2):
        assert len(load("cifar100", data, download=True).train_x) == 110
    assert server.asked == ["/some.tar.gz"]
    assert everything(data) == {"cifar-100-binary", "cifar-100-binary/train.bin", "cifar-100-binary/test.bin"}
    assert len(load("cifar100", data).test_x) == 101


def test_load_gets_a_deleted_file_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_cifar100(server, tmp_path, monkeypatch)
    data = tmp_path / "data"
    load("cifar100", data, download=True)
    (data / "cifar-100-binary/test.bin").unlink()
    assert len(load("cifar100", data, download=True).test_x) == 101


@pytest.mark.parametrize("unpacked", [True, False])
def test_load_downloads_only_those_idx_files_that_are_missing(
    unpacked: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = formats.write_mnist(tmp_path / "published")
    downloads = [
        served(server, (published / Path(one.files[0]).name).read_bytes(), one.files, f"/{Path(one.files[0]).name}")
        for one in SOURCES["mnist"].downloads
    ]
    read = partial(SOURCES["mnist"].read, counts=Counts(40, 30))
    monkeypatch.setitem(publishers.SOURCES, "mnist", SOURCES["mnist"]._replace(read=read, downloads=tuple(downloads)))
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    name = "train-labels-idx1-ubyte"
    content = (published / f"{name}.gz").read_bytes()
    (raw / (name if unpacked else f"{name}.gz")).write_bytes(gzip.decompress(content) if unpacked else content)
    assert len(load("mnist", tmp_path / "data", download=True).train_x) == 40
    assert len(server.asked) == 3
    assert f"/{name}.gz" not in server.asked


def test_every_source_has_a_sum_and_files_in_its_own_folder() -> None:
    for source in SOURCES.values():
        for one in source.downloads:
            assert re.fullmatch(r"[0-9a-f]{32}", one.md5)
            assert re.match(r"https?://", one.url)
            assert all(name.startswith(source.folder + "/") for name in one.files)
    sums = [one.md5 for source in SOURCES.values() for one in source.downloads]
    assert len(set(sums)) == len(sums)
