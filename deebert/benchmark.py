"""`python -m deebert.benchmark` of version 0.5, kept for one version: it is now `deebert benchmark`."""

from deebert.__main__ import renamed

if __name__ == "__main__":
    renamed("benchmark")
