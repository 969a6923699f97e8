"""Whether a model's name is a folder, a model on the hub, or a typing error: known within seconds."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from deebert.utils.errors import InputError

HUB_SECONDS = 5.0


def check_exists(name_or_path: str, cache_dir: str | None = None, files: Sequence[str] = ("config.json",)) -> None:
    """Raises InputError where there is neither such a folder nor such a model on the hub.

    One request goes to the hub, with a short time limit: transformers repeats its requests for a model that is not
    there. A model of which one of these files was fetched before needs no hub.
    """
    if Path(name_or_path).exists():
        return
    if is_path(name_or_path):
        raise InputError(f"{name_or_path}: no such folder")
    try:
        if any(isinstance(try_to_load_from_cache(name_or_path, file, cache_dir=cache_dir), str) for file in files):
            return
        HfApi().model_info(name_or_path, timeout=HUB_SECONDS)
    except HFValidationError:  # no name that the hub allows
        raise InputError(f"{name_or_path}: no such folder") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name_or_path}: no such folder here, and no such model on the hub, or a private one"
        ) from None
    except Exception as error:  # the client's errors, and those of the packages below it, have no common base
        raise InputError(
            f"{name_or_path}: no such folder here, and the hub cannot be reached ({type(error).__name__}); "
            "check the path, or the connection"
        ) from None


def is_path(name_or_path: str) -> bool:
    """Whether a folder is meant: the hub's names are `model` and `owner/model`, and few owners are folders here."""
    parts, text = Path(name_or_path).parts, str(name_or_path)
    local = len(parts) == 2 and Path(parts[0]).is_dir()
    return text.startswith((".", "/", "~")) or text.endswith("/") or len(parts) > 2 or local
