"""Input files at paths, patterns and URIs."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from fletcher.errors import ConfigError, InvalidCommandError
from fletcher.readers.files import FORMATS, Format, InputFile, format_of
from fletcher.readers.folders import Notice, files_below
from fletcher.readers.http_files import HttpFile
from fletcher.readers.source_files import LocalFile, SourceFile
from fletcher.util.paths import is_uri

log = logging.getLogger(__name__)

__all__ = ["Notice", "find_files", "list_files"]

STDIN = "-"
_HTTP = ("https", "http")
SCHEMES = ("s3", "gs", "hf", *_HTTP)


def list_files(
    spec: str | Path,
    *,
    notice: Notice = log.info,
    excluded: Sequence[Path] = (),
    every: bool = False,
) -> list[SourceFile]:
    """List the input files at a path, a pattern or a URI.

    A pattern may have `*`, `?`, `[...]`, and `**` for folders of any depth. It matches files alone,
    not folders. A path that exists is no pattern. The files of a folder or pattern are sorted by
    path, and hidden ones are left out. Credentials come from the environment or a profile.

    Args:
        spec: File, folder or pattern, also below `s3://`, `gs://` and `hf://`, or the `https://`
            or `http://` address of a file.
        notice: Called with a message about what is left out of a folder.
        excluded: Folders to leave out of a folder or pattern, such as that of a store.
        every: Take a folder's files of unknown formats, too.

    Raises:
        InvalidCommandError: A path or a folder cannot be read, or there is no file to read.
        ConfigError: The URI has credentials or no host, a package is missing, or the scheme is
            unknown.
    """
    text = str(spec)
    if is_uri(text):
        return _remote_files(text.strip(), notice, every=every)
    path = Path(spec)
    if glob.has_magic(text) and "\0" not in text and not path.exists():
        # `Path.glob` takes no absolute pattern.
        found = [Path(one) for one in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
        left_out = {one.resolve() for one in excluded}
        files = [
            LocalFile.at_path(one)
            for one in found
            if not one.is_dir() and not (left_out and left_out & {*one.resolve().parents})
        ]
        if not files:
            raise InvalidCommandError(f"no file matches {text!r}; a pattern matches files alone")
        return list(files)
    if path.is_dir():
        return list(files_below(path, notice, excluded, every=every))
    return [LocalFile.at_path(path)]


def check_scheme(uri: str) -> None:
    """Refuse a URI whose scheme is not one of SCHEMES.

    Raises:
        ConfigError: The message does not repeat the URI, which may hold a password.
    """
    scheme = uri.strip().partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ConfigError(
            f"`paths` has a URI of {scheme}://, expected a path or a URI of "
            f"{', '.join(f'{one}://' for one in SCHEMES)}",
            field="paths",
            allowed=SCHEMES,
        )


def _remote_files(uri: str, notice: Notice, *, every: bool) -> list[SourceFile]:
    check_scheme(uri)
    scheme, _, rest = uri.partition("://")
    scheme = scheme.lower()
    options = re.search(r"\?[\w.-]+=", rest) if scheme not in _HTTP else None
    if options or "@" in re.split(r"[/?#]", rest, maxsplit=1)[0]:
        raise ConfigError(
            f"`paths` has a {scheme}:// URI with credentials or options in it; give the URI "
            "without them, and credentials by the environment or a profile",
            field="paths",
        )
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\](:\d+)?|[^\[\]]+", place):
        raise ConfigError(
            f"`paths` has a {scheme}:// URI with {place!r} after {scheme}://, expected the name of "
            f"a {'host' if scheme in _HTTP else 'bucket'}",
            field="paths",
        )
    if scheme in _HTTP:
        return [HttpFile.at_url(f"{scheme}://{rest}")]
    from fletcher.readers.object_stores import list_objects  # loads libraries of object stores

    return list(list_objects(scheme, rest, notice, every=every))


def find_files(
    paths: Iterable[str | Path],
    format_name: str | None = None,
    notice: Notice = log.info,
    *,
    whole_files: bool = False,
    excluded: Sequence[Path] = (),
) -> list[InputFile]:
    """List the inputs at some paths, with their formats.

    Args:
        paths: As of `list_files`, or `-` for standard input (at most once).
        format_name: One of FORMATS, for all files. None: the file name decides the format, or the
            first bytes if the name does not.
        notice: Called with a message about what is left out of a folder.
        whole_files: Whether each file is one text, so that files of every kind are taken.
        excluded: Folders inside the given ones to leave out, such as that of a store.

    Raises:
        InvalidCommandError: As `list_files`, or no path is given, `-` is given twice, or the format
            is unknown.
    """
    if format_name is not None and format_name not in FORMATS:
        raise InvalidCommandError(
            f"`format` is {format_name!r}, expected one of {', '.join(FORMATS)}",
            field="format",
            allowed=FORMATS,
        )
    chosen = cast("Format | None", "text" if whole_files else format_name)
    inputs: list[InputFile] = []
    for path in paths:
        if str(path) == STDIN:
            inputs.append(InputFile(None, chosen))
            continue
        files = list_files(path, notice=notice, excluded=excluded, every=whole_files)
        inputs += [InputFile(file, chosen or format_of(file.name)) for file in files]
    if not inputs:
        raise InvalidCommandError("no file to read was given; name a file, a folder or `-`")
    if sum(one.file is None for one in inputs) > 1:
        raise InvalidCommandError("standard input (`-`) was given twice; it can be read once")
    return inputs
