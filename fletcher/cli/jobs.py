"""`fletcher jobs`: list, show, resume and cancel jobs of `fletcher ingest`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import click

from fletcher.cli.command_line import CommandGroup
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.terminal import cut, print_json, print_table, printable, terminal_width
from fletcher.config.server import ServeConfig
from fletcher.errors import ConfigError
from fletcher.jobs.manifest import (
    HOME_JOBS,
    MANIFEST,
    STORE_JOBS,
    JobState,
    read_manifest,
    running_process,
)
from fletcher.jobs.records import Fragment, fragment_name

cli = CommandGroup(
    name="jobs",
    help="List, show, resume and cancel jobs of fletcher ingest.\n\n"
    "A job has a manifest, which says what is stored of which file. It is beside the dataset if "
    "the store is a folder, else in the home folder, FLETCHER_HOME/jobs.",
    sections={
        "Commands": {
            "list": "List jobs with their rows and what is left.",
            "show": "Show a job's options and files.",
            "resume": "Run a job's command again.",
            "cancel": "Stop a job that runs.",
        }
    },
)
cli.examples = (
    "fletcher jobs list --store lance:vectors",
    "fletcher jobs show articles --json",
)
_job_argument = click.argument("job", metavar="JOB")


@cli.subcommand("list", "fletcher jobs list", "fletcher jobs list --store lance:vectors --json")
@json_option()
@config_options("home", "store")
def list_jobs(flags: ConfigFlags, as_json: bool) -> None:
    """List the jobs of the given stores and of the home folder."""
    config = flags.resolve(("home", "store")).config
    found = [_describe(folder, read_manifest(folder)) for folder in _folders(config)]
    if as_json:
        print_json({"jobs": found})
        return
    if not found:
        print("there is no job")
        return
    header = ("job", "state", "files", "rows", "failed rows", "last change", "folder")
    rows = [
        (
            *(one["job"], one["state"], f"{one['files']:,}", f"{one['rows']:,}"),
            *(f"{one['rows_failed']:,}", one["changed"], one["folder"]),
        )
        for one in found
    ]
    print_table(rows, header=header, right=(2, 3, 4))


@cli.subcommand("show", "fletcher jobs show articles --store lance:vectors")
@_job_argument
@json_option()
@config_options("home", "store")
def show_job(flags: ConfigFlags, job: str, as_json: bool) -> None:
    """Show a job's options, and the state of each of its fragments.

    A fragment is a file, some lines of one, or several small files.

    Args:
        job: Name of the job, or folder of its manifest.
    """
    folder = job_folder(flags.resolve(("home", "store")).config, job)
    state = read_manifest(folder)
    about = _describe(folder, state)
    fragments = [_fragment(one, state) for one in state.fragments.values()]
    if as_json:
        print_json(about | {"fragments": fragments})
        return
    shown = ("state", "dataset", "store", "server", "model", "options", "rows", "command", "folder")
    print_table([(name, str(about[name])) for name in shown if about[name] not in (None, {})])
    print()
    for one in fragments:
        error = f": {printable(one['error'])}" if one["error"] else ""
        line = f"{one['state']:<8} {one['rows']:>9,} rows  {printable(one['name'])}{error}"
        print(cut(line, terminal_width()))


@cli.subcommand("resume", "fletcher jobs resume articles")
@_job_argument
@config_options("home", "store")
def resume_job(flags: ConfigFlags, job: str) -> int:
    """Run a job's command again, in the folder where it was begun.

    Args:
        job: Name of the job, or folder of its manifest.
    """
    from fletcher.cli import main

    record = read_manifest(job_folder(flags.resolve(("home", "store")).config, job)).job
    if record is None or not record.command:
        raise ConfigError(f"`job` is {job!r}, which was not begun by a command", field="job")
    try:
        os.chdir(record.folder)
    except OSError as error:
        raise ConfigError(
            f"the job was begun in {record.folder}, which cannot be entered: {error.strerror}",
            field="job",
        ) from None
    return main(record.command)


@cli.subcommand("cancel", "fletcher jobs cancel articles")
@_job_argument
@config_options("home", "store")
def cancel_job(flags: ConfigFlags, job: str) -> int:
    """Stop a job that runs on this machine, as Ctrl-C does.

    What is stored stays. The same command, or fletcher jobs resume, continues the job.

    Args:
        job: Name of the job, or folder of its manifest.
    """
    folder = job_folder(flags.resolve(("home", "store")).config, job)
    process = running_process(folder)
    if process is None:
        print(f"the job {folder.name} does not run")
        return 1
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(process, signal.SIGINT)
    print(f"told process {process} to stop")
    return 0


def _folders(config: ServeConfig) -> list[Path]:
    """Folders of jobs in the home folder and beside datasets."""
    from fletcher.stores.address import folder_of

    stores = map(folder_of, config.store_addresses.values())
    roots = [config.home / HOME_JOBS, *(folder / STORE_JOBS for folder in stores if folder)]
    return [path.parent for root in roots for path in sorted(root.glob(f"*/{MANIFEST}"))]


def job_folder(config: ServeConfig, job: str) -> Path:
    """Folder of a job, by the job's name or path.

    Raises:
        ConfigError: There is no such job, or there are several.
    """
    if (Path(job) / MANIFEST).exists():
        return Path(job).absolute()
    folders = _folders(config)
    found = [folder for folder in folders if folder.name == job]
    if len(found) != 1:
        names = ", ".join(str(folder) for folder in found or folders[:20]) or "none"
        reason = "names several jobs" if found else "is no job"
        raise ConfigError(f"`job` is {job!r}, which {reason}; known: {names}", field="job")
    return found[0]


def _describe(folder: Path, state: JobState) -> dict[str, Any]:
    current = state.current()
    states = Counter(state.state(one) for one in current)
    unfinished = states.total() - states["done"]
    is_running = running_process(folder) is not None
    job = state.job
    name = "running" if is_running else "done" if job and not unfinished else "unfinished"
    counts = [state.states[one.id] for one in current]
    return {
        "job": folder.name,
        "state": name,
        "dataset": job and job.dataset,
        "store": job and (job.store or (None if job.server else str(folder.parent.parent))),
        "server": job and job.server,
        "model": job and job.model,
        "options": job.options if job else {},
        "command": " ".join(["fletcher", *job.command]) if job else None,
        "files": len({file.path for one in current for file in one.files}),
        "fragments_by_state": dict(states),
        "rows": sum(one.rows for one in counts),
        "rows_failed": sum(one.rows_failed for one in counts),
        "changed": max((one.at for one in state.states.values()), default=job and job.created),
        "folder": str(folder),
    }


def _fragment(one: Fragment, state: JobState) -> dict[str, Any]:
    now = state.states[one.id]
    return {
        "name": fragment_name(one.files[0].path, len(one.files), one.lines),
        "files": [file.path for file in one.files],
        "state": now.state,
        "rows": now.rows,
        "rows_stored": now.rows_stored,
        "rows_failed": now.rows_failed,
        "error": now.error,
        "upload_id": one.upload_id,
    }
