"""transformers loads a model with early exit through a copy of this file in its folder (trust_remote_code=True)."""

try:
    import deebert
except ImportError as error:
    raise ImportError(
        "this model needs the package deebert; install it from its repository (pip install '.[train]' in a checkout)"
    ) from error


def __getattr__(name: str):  # config.json names a class of this file
    return getattr(deebert, name)
