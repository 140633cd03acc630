from __future__ import annotations

import pytest
import reproduce


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures, which take longer than all the rest; some tests draw them nevertheless."""
    monkeypatch.setattr(reproduce, "draw_row", lambda row, folder: [])
