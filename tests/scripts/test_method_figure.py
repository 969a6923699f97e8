import method_figure
from support.helpers import ROOT


def test_the_figure_is_drawn_and_is_the_one_in_docs(tmp_path, monkeypatch):
    """The file in docs may come from another version of matplotlib, so only the sizes are compared."""
    monkeypatch.setattr("sys.argv", ["method_figure.py", str(tmp_path / "method.png")])
    method_figure.main()
    drawn, stored = (path.read_bytes() for path in (tmp_path / "method.png", ROOT / "docs/figures/method.png"))
    assert drawn[:24] == stored[:24]  # a PNG of this width and height
    assert len(stored) < 100_000
