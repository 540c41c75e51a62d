"""Exported folders on the hub of Hugging Face; only where somebody asks for it."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from r1p_dist.errors import InputError, one_line


def check_login(name: str) -> None:
    """Raises InputError, before anything is written, for a name that cannot be one, and where the hub knows no user."""
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"--push {name}: is no name of the hub: {one_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"--push {name}: nobody is logged in; `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise InputError(f"--push {name}: HF_HUB_OFFLINE is set; unset it") from error
    except Exception as error:  # of the network, or what the hub answers
        raise InputError(f"--push {name}: the hub refuses or cannot be reached: {one_line(error)}") from error


def push(folder: Path, name: str) -> str:
    """Uploads a folder as the repository NAME, a private one where there is none yet, and returns its address.

    InputError: the hub refuses or cannot be reached; the folder stays.
    """
    try:
        api = HfApi()
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Export of r1p_dist")
    except Exception as error:  # of the network, or what the hub answers
        raise InputError(
            f"--push {name}: {one_line(error)}; {folder} is written: `hf upload {name} {folder}` tries again"
        ) from error
    return str(repository)
