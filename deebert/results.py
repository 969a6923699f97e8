"""`python -m deebert.results` of version 0.5, kept for one version: it is now `deebert results`."""

from deebert.__main__ import renamed

if __name__ == "__main__":
    renamed("results")
