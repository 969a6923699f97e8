"""Logistic regression on a frozen encoder: that it learns, and that its features have no part of the padding."""

import csv

import frozen_encoder
import numpy as np
import pytest
from support.tiny import sentences


def test_texts_are_encoded_alone_as_in_a_batch(tiny_checkpoints):
    texts = [text for text, _ in sentences(5, 1)] + ["good"]
    features = frozen_encoder.mean_features(texts, str(tiny_checkpoints["bert"]), 32)
    alone = np.concatenate([frozen_encoder.mean_features([text], str(tiny_checkpoints["bert"]), 32) for text in texts])
    np.testing.assert_allclose(features, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("names", [("bad", "good"), ("bad", "good", "odd")], ids=["two labels", "three"])
def test_the_scores_are_those_of_the_test_file(tmp_path, monkeypatch, capsys, names):
    """With features that show the label of each text, but for one text whose label in the test file is wrong."""
    for name in ("train", "test"):
        rows = [(f"text {i} {label}", label) for i in range(20) for label in names]
        rows[0] = (rows[0][0], names[-1]) if name == "test" else rows[0]
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])

    def features(texts, *_):
        return np.array([[text.endswith(name) for name in names] for text in texts], float)

    monkeypatch.setattr(frozen_encoder, "mean_features", features)
    files = [f"--{name}_file={tmp_path / name}.csv" for name in ("train", "test")]
    monkeypatch.setattr("sys.argv", ["frozen_encoder.py", "--model=none", *files])
    frozen_encoder.main()
    assert capsys.readouterr().out.startswith(f"acc {100 * (1 - 1 / (20 * len(names))):.2f}, f1_macro ")
