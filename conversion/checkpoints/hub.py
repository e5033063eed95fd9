"""Uploading a finished checkpoint."""

from pathlib import Path

from huggingface_hub import HfApi

from ..errors import ConversionError


def check_hub(repository: str) -> None:
    """Finds a missing login before hours of work, not after them.

    Raises:
        ConversionError: when nobody is logged in, or the Hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except Exception as error:
        raise ConversionError(f"push_to_hub={repository}: {_reason(error)}; log in with `hf auth login`") from error


def push(folder: Path, repository: str) -> None:
    """Uploads the folder, private unless the repository exists already and is public.

    Raises:
        ConversionError: naming the command that uploads what is complete on disk.
    """
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Expert-choice conversion")
    except Exception as error:  # the HTTP library has errors of its own, and the disk has the checkpoint
        raise ConversionError(
            f"push_to_hub={repository}: {_reason(error)}. The checkpoint is complete in {folder}; upload it with "
            f"`hf upload-large-folder {repository} {folder}`"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
