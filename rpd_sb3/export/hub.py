"""Uploading an export to Hugging Face. Nothing else in the library needs the network for an export."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rpd_sb3.export import runtime


class UploadError(RuntimeError):
    """The export is complete, but could not be uploaded."""


def check_upload(repo_id: str) -> str:
    """The token to upload with.

    :param repo_id: ``USER/NAME``
    :raises ValueError: if there is no token, ``repo_id`` is not of that form, or huggingface_hub is not installed
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--push-to-hub {repo_id!r} must be of the form USER/NAME, e.g. --push-to-hub me/pushcube")
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise ValueError(f"--push-to-hub needs huggingface_hub: pip install 'rpd_sb3[export]' ({error})") from error
    token = get_token()  # of HF_TOKEN, or of a login
    if not token:
        raise ValueError("--push-to-hub needs a token with write access: set HF_TOKEN, or run `hf auth login`")
    return token


def upload(folder: Path, repo_id: str, token: str) -> str:
    """Upload the files of an export as a model.

    :param folder: of the export
    :param repo_id: ``USER/NAME``
    :param token: of :func:`check_upload`
    :return: its address
    :raises UploadError: if it fails
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="rpd_sb3")
    try:
        api.create_repo(repo_id, exist_ok=True)
        files = [*runtime.read_manifest(folder)["files"], runtime.MANIFEST]
        url = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="Export")
    except Exception as error:  # the library beneath huggingface_hub, and with it the exceptions, differ by version
        raise UploadError(
            f"the export is complete in {folder}, but could not be uploaded to {repo_id}: {type(error).__name__}: "
            f"{str(error).strip() or 'no reason given'}; once it works: hf upload {repo_id} {folder}"
        ) from error
    return str(url)
