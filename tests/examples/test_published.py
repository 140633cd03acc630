"""What the papers report, checked against what their texts say of it."""

from __future__ import annotations

import pytest
from papers import published
from papers.published import Cell
from papers.published.gradreg import SIZES

PEERS = ("double-back", "spect-reg", "confidence-penalty")
"""JacReg's."""


def best(table: str) -> dict[str, str]:
    """By row, the method of the highest accuracy of the paper, or of the replication where it alone has any."""
    return {
        row: max(methods, key=lambda name: methods[name].accuracy or methods[name].replication or 0.0)
        for row, methods in published.CELLS.items()
        if row.startswith(f"{table}/")
    }


def test_all_numbers_are_fractions_and_deviations_stand_beside_means() -> None:
    for methods in published.CELLS.values():
        for cell in methods.values():
            means, deviations = (cell.accuracy, cell.replication), (cell.accuracy_std, cell.replication_std)
            assert any(mean is not None for mean in means)
            assert all(mean is None or 0 < mean < 1 for mean in means)
            assert cell.gap is None or 0 < cell.gap < 0.4
            for mean, deviation in zip(means, deviations, strict=True):
                assert deviation is None or (mean is not None and 0 < deviation < 0.01)


def test_the_best_are_where_the_papers_print_them_bold() -> None:
    snr = best("snr")
    assert [snr[row] for row in snr if row.endswith("b4096")] == ["snr"] * 4
    assert [snr[row] for row in snr if row.endswith("b64")] == ["snr", "weight-decay", "weight-decay", "snr"]
    assert list(best("normscale").values()) == ["frobenius", "spectral", "frobenius", "frobenius"]


def test_the_paper_has_nothing_of_our_methods_and_rows() -> None:
    assert published.cell("snr/vgg-cifar10-b64", "cap") is None
    assert published.cell("snr/vgg-cifar10-b512", "snr") is None
    assert published.cell("gradreg/c2-baseline", "spectral") is None
    assert published.cell("normscale/resnet34", "spectral-published") == Cell(0.7179, loss=1.78)


def test_a_row_has_the_methods_that_its_own_table_compares() -> None:
    assert published.methods("snr/vgg-cifar10-b512") == published.METHODS["snr"]
    assert published.methods("gradreg/c2-dropout") == ("none", "spect-reg", "double-back")
    assert "frob-reg" in published.methods("gradreg/c6") and "double-back" not in published.methods("gradreg/c6")
    rows = [row for row in published.CELLS if row.startswith("gradreg/")]
    assert {method for row in rows for method in published.methods(row)} == set(published.METHODS["gradreg"])


def test_gradient_regularization_has_the_papers_and_the_replications_figures() -> None:
    assert published.cell("gradreg/c2-baseline", "spect-reg") == Cell(0.9759, 0.0013, 0.9661, 0.0067)
    assert published.cell("gradreg/c2-batchnorm", "none") == Cell(0.9689, 0.0023, 0.9713, 0.0016)
    assert published.cell("gradreg/c2-dropout", "double-back") == Cell(0.9798, 0.0012, 0.9130, 0.0035)
    assert published.cell("gradreg/c4-500", "jac-reg") == Cell(replication=0.9383, replication_std=0.0041)
    assert published.cell("gradreg/c4-20000", "confidence-penalty") == Cell(replication=0.9826, replication_std=0.0015)
    assert published.cell("gradreg/c6", "frob-reg") == Cell(0.9776, 0.0013, 0.9662, 0.0022)
    assert published.cell("gradreg/c4-500", "none") is published.cell("gradreg/c6", "none") is None


def test_accuracy_of_the_replication_rises_with_the_training_set_for_every_method() -> None:
    for method in published.methods("gradreg/c4-500")[1:]:
        cells = [published.cell(f"gradreg/c4-{size}", method) for size in SIZES]
        found = [cell.replication for cell in cells if cell is not None and cell.replication is not None]
        assert len(found) == 9 and found == sorted(found)


def test_the_replications_verdicts_are_those_that_its_own_means_allow() -> None:
    assert set(best_at_sizes()) - {"double-back"}, "(b) not held: DoubleBack is not the best at all sizes"
    lead = [mean(size, "spect-reg") - mean(size, "confidence-penalty") for size in SIZES]
    assert min(lead[:3]) < 0 and max(lead[-3:]) > 0, "(c) not held: behind at a small size, ahead at a large one"
    below = [mean(size, "jac-reg") < sum(mean(size, name) for name in PEERS) / 3 for size in SIZES]
    lowest = [mean(size, "jac-reg") < min(mean(size, name) for name in PEERS) for size in SIZES]
    assert (sum(below), sum(lowest)) == (6, 3), "(d) held for most sizes, of the mean of the peers"
    means = [published.CELLS["gradreg/c6"][name].replication or 0.0 for name in ("spect-reg", "jac-reg", "frob-reg")]
    assert max(means) - min(means) < 0.0015, "(e) held"


def best_at_sizes() -> list[str]:
    return [found for row, found in best("gradreg").items() if "/c4-" in row]


def mean(size: int, method: str) -> float:
    found = published.CELLS[f"gradreg/c4-{size}"][method].replication
    assert found is not None
    return found


def test_every_penalty_of_a_row_has_its_optimal_lambda_and_nothing_else_has_one() -> None:
    for row in (row for row in published.CELLS if row.startswith("gradreg/")):
        assert set(published.LAMBDAS[row]) == set(published.methods(row)) - {"none"}
        assert all(0 < found <= 50 for found in published.LAMBDAS[row].values())
    assert published.LAMBDAS["gradreg/c2-batchnorm"] == {"spect-reg": 0.001, "double-back": 0.001}
    assert published.LAMBDAS["gradreg/c4-5000"] == {
        "double-back": 20, "spect-reg": 0.003, "jac-reg": 1, "confidence-penalty": 0.1
    }  # fmt: skip
    assert published.LAMBDAS["gradreg/c6"]["jac-reg"] == 1


@pytest.mark.parametrize("letter", "abcde")
def test_every_claim_of_gradient_regularization_has_the_replications_verdict(letter: str) -> None:
    assert "held" in published.REPLICATED[f"gradreg ({letter})"]
