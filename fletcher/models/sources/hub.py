"""Models from the Hugging Face hub, downloaded as checked files of one commit."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.bundle.files import sha256
from fletcher.models.bundle.spec import ModelSpec
from fletcher.models.checkpoint.output_kind import COLBERT
from fletcher.models.checkpoint.sentence_config import SENTENCE_CONFIGS
from fletcher.models.sources.folder import Build, Progress, build_from_folder
from fletcher.util.locks import FileLock

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")

# Files of a checkpoint that are downloaded: JSON, weights and the model card, but no code.
# The files are at the top of the repository, or in folders such as 0_Transformer and 1_Pooling.
_JSON = (
    *("config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens"),
    *("adapter_config", *(name.removesuffix(".json") for name in SENTENCE_CONFIGS)),
)
_WANTED = re.compile(
    rf"(\d+_[A-Za-z]+/)?({'|'.join(_JSON)})\.json"
    rf"|modules\.json|config_sentence_transformers\.json|README\.md|{re.escape(COLBERT)}"
)
# Weights by their format. A folder's pickled weights are downloaded only if it has no others.
_SAFE = re.compile(
    r"(\d+_[A-Za-z]+/)?model((-\d+-of-\d+)?\.safetensors|\.safetensors\.index\.json)"
)
_PICKLED = re.compile(r"(\d+_[A-Za-z]+/)?pytorch_model((-\d+-of-\d+)?\.bin|\.bin\.index\.json)")


def _is_wanted(name: str, every: Collection[str]) -> bool:
    """Whether a file belongs to the checkpoint of a repository with the files `every`."""
    if _PICKLED.fullmatch(name):
        folder = name.rpartition("/")[0]
        safe = (one for one in every if _SAFE.fullmatch(one))
        return all(one.rpartition("/")[0] != folder for one in safe)
    return bool(_WANTED.fullmatch(name) or _SAFE.fullmatch(name))


def parse(repository: str) -> tuple[str, Build]:
    """Parse `ORG/NAME[@REVISION]` into a model's name and the builder of its bundle.

    `repository` is the part of a source after `hub:`.

    Raises:
        ModelError: `repository` has another form.
    """
    match = _REPOSITORY.fullmatch(repository)
    if match is None:
        raise ModelError(
            f"`source` is hub:{repository[:200]}, expected hub:ORG/NAME or hub:ORG/NAME@REVISION",
            field="source",
        )
    return match[1].rpartition("/")[2], partial(_build, match[1], match[2])


def _build(
    repo_id: str, revision: str | None, staging: Path, exits: Sequence[int], progress: Progress
) -> ModelSpec:
    # The download is kept until the bundle is complete, so that an interrupted one can resume.
    download = staging.parent / f".download-{repo_id.replace('/', '~')}"
    with FileLock(download.with_name(f"{download.name}.lock"), wait=True):
        commit = _download(repo_id, revision, download, progress)
        spec = build_from_folder(download, f"hub:{repo_id}@{commit}", staging, exits, progress)
        shutil.rmtree(download)
    return spec


def _download(repo_id: str, revision: str | None, folder: Path, progress: Progress) -> str:
    """Download one commit's files of its checkpoint; return the commit's id."""
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            "models from the hub need the extra `hub`: pip install 'longbow-fletcher[hub]'"
        ) from None
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        listed = info.siblings or []
        every = {one.rfilename for one in listed}
        wanted = [one for one in listed if _is_wanted(one.rfilename, every)]
        # Delete files that an older, interrupted download of another commit has left.
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            name = path.relative_to(folder).as_posix()
            if not name.startswith(".cache/") and name not in {one.rfilename for one in wanted}:
                path.unlink()
        for one in wanted:
            progress(f"downloading {one.rfilename} of {repo_id} ({one.size or 0:,} bytes)")
            path = Path(
                huggingface_hub.hf_hub_download(
                    repo_id, one.rfilename, revision=info.sha, local_dir=folder
                )
            )
            _check(path, one)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  (errors of its HTTP library, which differs by version)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"hub:{repo_id} could not be downloaded: {lines[0][:300]}; check the name, the network "
            "and, for a gated model, HF_TOKEN"
        ) from None
    return str(info.sha)


def _check(path: Path, listed: Any) -> None:
    """Check a file's checksum from the hub: SHA-256 for LFS files, else Git's blob id."""
    if listed.lfs is not None:
        matches = sha256(path) == listed.lfs.sha256
    else:
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        matches = blob.hexdigest() == listed.blob_id
    if not matches:
        path.unlink()
        raise ModelError(
            f"{listed.rfilename} has another checksum than the hub lists; add the model again"
        )
