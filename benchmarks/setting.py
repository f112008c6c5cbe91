"""Setting of a benchmark: machine, corpus and model."""

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
    """Machine, corpus and model of a benchmark.

    Attributes:
        args: The flags, those of `arguments.add_common` among them.
        machine: Result of `hardware.facts` at the start.
        versions: Result of `hardware.versions`; peers add theirs.
    """

    args: argparse.Namespace
    machine: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """Limits this process to `--cores`, and collects the facts."""
        hardware.limit_cores(args.cores)
        return cls(args, hardware.facts(), hardware.versions())

    @cached_property
    def corpus(self) -> Corpus:
        """The texts, read on first use."""
        return Corpus.load(self.args.corpus)

    @cached_property
    def bundle(self) -> ModelBundle:
        """The bundle of `--model`, downloaded on first use if `--home` lacks it."""
        return Registry(self.args.home / "models").ensure_model(self.args.model, report.say)

    def about(self, benchmark: str) -> dict[str, Any]:
        """First fields of a result's JSON."""
        return {
            "benchmark": benchmark,
            "hardware": self.machine,
            "versions": self.versions,
            "options": as_options(self.args),
        }

    def heading(self) -> str:
        """The machine and the versions, above a table."""
        return report.heading(self.machine, self.versions)
