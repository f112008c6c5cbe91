"""What a benchmark measures on: a machine, a corpus and a model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks import hardware, report
from benchmarks.arguments import as_options
from benchmarks.corpus import Corpus
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry


@dataclass(frozen=True)
class Setting:
    """What all benchmarks begin with.

    Attributes:
        args: The flags, those of `arguments.add_common` among them.
        machine: As `hardware.facts` says it, at the start.
        versions: As `hardware.versions` says it; peers add theirs.
    """

    args: argparse.Namespace
    machine: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """Keeps this process on `--cores`, and looks around."""
        hardware.limit_cores(args.cores)
        return cls(args, hardware.facts(), hardware.versions())

    @cached_property
    def corpus(self) -> Corpus:
        """The texts, read when first asked for."""
        return Corpus.load(self.args.corpus)

    @cached_property
    def bundle(self) -> ModelBundle:
        """`--model`, downloaded when first asked for, where it is not in `--home`."""
        return Registry(self.args.home / "models").ensure(self.args.model, report.say)

    def about(self, benchmark: str) -> dict[str, Any]:
        """What the JSON of a result begins with."""
        return {
            "benchmark": benchmark,
            "hardware": self.machine,
            "versions": self.versions,
            "options": as_options(self.args),
        }

    def heading(self) -> str:
        """The machine and the versions, above a table."""
        return report.heading(self.machine, self.versions)
