"""What reproduce.py reports, records and renders, and what it refuses before anything is run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import reproduce
from papers.recipe import SCALES
from papers.tables import page, records
from papers.tables.row_figures import draw_row

from tests.examples.faked import MLP, Fake, reproduced
from tests.examples.results_samples import made_row

pytestmark = pytest.mark.usefixtures("without_figures")


def test_the_report_has_the_tables_claims_and_figures_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "draw_row", draw_row)
    text = reproduced(Fake(), tmp_path, "--rows", "mlp-5*", "--seeds", "2")
    assert "| none | 2 | 0.2512 | 0.505 ± 0.007 |" in text
    assert text.count("| normscale (") == 5
    addresses = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(addresses) == 3
    for address in addresses:
        assert (tmp_path / "tiny" / address).read_bytes().startswith(b"\x89PNG")


def test_recording_and_rendering_give_the_page_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs, recorded = tmp_path / "docs", tmp_path / "recorded"
    docs.mkdir()
    (docs / "results.md").write_text(reproduce.PAGE.read_text())
    monkeypatch.setattr(reproduce, "PAGE", docs / "results.md")
    text = reproduced(Fake(), tmp_path, "--rows", "mlp-5*", "--seeds", "2", "--record", recorded)
    assert [path.name for path in recorded.iterdir()] == ["normscale-mlp-5x2000-tiny.json"]
    reproduce.main(["--render", "--record", str(recorded)])
    rendered = (docs / "results.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("| none | 2"))
    assert table and table in rendered
    for address in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", rendered):
        assert (docs / address).exists()
    assert rendered.count("- `snr/") == 16 and "- `normscale/resnet34`" in rendered
    reproduce.main(["--render", "--record", str(recorded)])
    assert (docs / "results.md").read_text() == rendered


def test_the_page_is_what_the_recorded_results_render_and_its_figures_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = re.compile(r"\n\n!\[[^\]]+\]\(([^)]+)\)")
    text = reproduce.PAGE.read_text()
    monkeypatch.setattr(page, "draw_row", lambda row, folder: [])
    monkeypatch.setattr(page, "draw_grid", lambda grid, rows, folder: [])
    assert page.rendered(text, reproduce.RECORDED, tmp_path) == picture.sub("", text)
    assert all((reproduce.PAGE.parent / address).exists() for address in picture.findall(text))


def test_rows_of_one_grid_are_reported_recorded_and_rendered_with_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "draw_row", lambda row, folder: [])
    words = ("--rows", "c4-500", "c4-2000", "--seeds", "2", "--record", tmp_path / "kept")
    report = reproduced(Fake(), tmp_path, *words, table="gradreg")
    blocks = "\n".join(
        f"<!-- {block} -->\n<!-- end -->" for block in ("table: gradreg", "claims: gradreg", "standing: all")
    )
    rendered = page.rendered(blocks, tmp_path / "kept", tmp_path)
    for text, folder in ((report, tmp_path / "tiny"), (rendered, tmp_path)):
        (address,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert address.endswith("gradreg-c4-tiny.png") and (folder / address).exists()
        assert "### C4: the size of the training set, tiny scale" in text and "- `gradreg/c6`" in text
        assert "| gradreg (b) | DoubleBack is best at all sizes (C4) | not held | **undecided** (" in text
        assert "| `gradreg/c4-2000`, tiny scale | cap (ours) |" in text


def test_a_block_of_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a table block must be of snr or normscale or gradreg, got 'digits'"):
        page.rendered("<!-- table: digits -->\n<!-- end -->", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="a standing block must be of all, got 'snr'"):
        page.rendered("<!-- standing: snr -->\n<!-- end -->", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "TABLE must be one of snr, normscale, gradreg, where --render is not given"),
        (("digits",), "invalid choice: 'digits'"),
        (("snr", "--rows", "vgg-cifar11*"), "rows must match one of the table's, got 'snr/vgg-cifar11*'; near: snr/"),
        (("snr", "--methods", "srn"), "methods must match one of the table's, got 'srn'; near: snr"),
        (("snr", "--seeds", "0"), "--seeds must be 1 or more, got 0"),
        (("snr", "--budget", "-1"), "--budget must be 0 or more, got -1"),
        (("snr", "--budget", "nan"), "--budget must be 0 or more, got nan"),
        (("snr", "--epochs", "0"), "--epochs must be 1 or more, got 0"),
        (("snr", "--device", "gpu"), "device must be auto or one of cpu"),
        (("snr", "--out", "/proc/none"), "--out /proc/none: cannot write there"),
        (("snr", "--record", "/proc/none"), "--record /proc/none: cannot write there"),
        (("--render", "--record", "/proc/none"), "--record /proc/none: no folder with recorded results to be rendered"),
        (("--render", "--rows", "mlp-5*"), "--rows and --methods are of a TABLE"),
        (("--render", "--seeds", "0"), "--seeds must be 1 or more, got 0"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_run(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake = Fake()
    out = () if "--out" in words else ("--out", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        reproduce.main([*words, *out], fake.tools)
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert fake.trained == [] and list(tmp_path.iterdir()) == []


def test_a_record_of_another_protocol_is_told_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records.record(tmp_path, made_row(MLP, {"none": {}}, scale=replace(SCALES["tiny"], train=512)))
    fake = Fake()
    with pytest.raises(SystemExit):
        reproduced(fake, tmp_path / "out", "--rows", "mlp-5*", "--record", tmp_path)
    assert "holds runs with" in capsys.readouterr().err and fake.trained == []
