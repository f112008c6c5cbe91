"""Candidates against each other: who is right, and how fast, turn about."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fletcher.core.batches import FloatArray
from fletcher.errors import FletcherError
from fletcher.inference.backend import BackendConfig
from fletcher.tuning.candidates import TuningCandidate
from fletcher.tuning.replica_group import ReplicaGroup
from fletcher.tuning.sample_texts import SampleTexts

Progress = Callable[[str], None]
StartCrew = Callable[[Sequence[BackendConfig]], ReplicaGroup]

# Lowest cosine to the reference that a vector may have, by the precision that really runs: those
# that the golden tests ask for. all-MiniLM-L6-v2 on OpenVINO: 0.99995 in bfloat16, 1.000000 in
# float32.
FLOOR_FLOAT32, FLOOR_OTHERS = 0.99999, 0.999
# Texts of the first look, in which vectors are compared.
LOOK_TEXTS = 32
# Who is so many times slower than the fastest at the first look would take most of the time, such
# as the CPU beside a GPU, and not win.
SLOWER = 4.0
TURNS = 5
# About what the fastest takes for a turn; more when its runs would not be full.
TURN_S = 0.6


@dataclass(frozen=True, slots=True)
class CandidateTrial:
    """What came of a candidate.

    Attributes:
        candidate: It.
        turns: Texts per second in each turn; turn n of all trials was run at about the same time.
        lowest_cosine: To the reference, of the worst text; None where there was no vector.
        out: Why it is out of the race; empty where it is not.
    """

    candidate: TuningCandidate
    turns: tuple[float, ...] = ()
    lowest_cosine: float | None = None
    out: str = ""

    @property
    def texts_per_s(self) -> float:
        """The median turn; 0 where there was none."""
        return statistics.median(self.turns) if self.turns else 0.0


def choose(trials: Sequence[CandidateTrial]) -> CandidateTrial | None:
    """The fastest that is still in the race; None where none is.

    The first, which is what the rules take, gives way only to one that was faster in every turn:
    five such turns between equals happen once in 32 times, a faster median every other time.
    """
    left = [trial for trial in trials if not trial.out]
    for trial in sorted(left, key=lambda one: -one.texts_per_s):
        if trial is left[0] or all(
            mine > its for mine, its in zip(trial.turns, left[0].turns, strict=True)
        ):
            return trial
    return None


def race(
    candidates: Sequence[TuningCandidate],
    probe: SampleTexts,
    reference: FloatArray,
    start: StartCrew,
    progress: Progress,
) -> list[CandidateTrial]:
    """Compares the vectors of all candidates with the reference, then times those that are right.

    All replicas are alive together and idle but for the one whose turn it is, and candidates take
    turns, so that what else the machine does hits all of them alike.

    Args:
        candidates: Some; those that share their processes are run by the same ones.
        probe: The texts.
        reference: float32 [LOOK_TEXTS, dim], right vectors of `probe.rows(LOOK_TEXTS)`.
        start: Starts the processes of a candidate.
        progress: Gets a line now and then.

    Returns:
        A trial for each candidate, in their order.
    """
    with contextlib.ExitStack() as stack:
        runners = [_Runner(one) for one in candidates]
        groups: dict[tuple[BackendConfig, ...], ReplicaGroup | str] = {}
        for runner in runners:
            candidate = runner.candidate
            if candidate.processes not in groups:
                most = max(
                    one.max_batch_tokens
                    for one in candidates
                    if one.processes == candidate.processes
                )
                progress(f"starting {candidate.engine} on {candidate.replicas}")
                try:
                    group = start(candidate.with_tokens(most).configs)
                except FletcherError as error:
                    groups[candidate.processes] = f"does not start: {error.message}"
                else:
                    stack.callback(group.close)
                    groups[candidate.processes] = group
            runner.look(groups[candidate.processes], probe, reference)
        _drop_the_slow(runners)
        _take_turns([one for one in runners if one.group and not one.out], probe, progress)
        return [runner.trial() for runner in runners]


@dataclass(slots=True)
class _Runner:
    """A candidate in the race."""

    candidate: TuningCandidate
    group: ReplicaGroup | None = None
    out: str = ""
    lowest_cosine: float | None = None
    first_rate: float = 0.0
    turns: list[float] = field(default_factory=list)

    def trial(self) -> CandidateTrial:
        turns = () if self.out else tuple(self.turns)
        return CandidateTrial(self.candidate, turns, self.lowest_cosine, self.out)

    def look(self, group: ReplicaGroup | str, probe: SampleTexts, reference: FloatArray) -> None:
        """The first look: are its vectors right, and about how fast is it?"""
        if isinstance(group, str):
            self.out = group
            return
        self.group = group
        try:
            # The first run finds what is made on demand, whatever the warm-up did.
            embed(group, probe, LOOK_TEXTS, self.candidate.max_batch_tokens)
            embeddings, elapsed_s = embed(group, probe, LOOK_TEXTS, self.candidate.max_batch_tokens)
        except FletcherError as error:
            self.out = f"failed: {error.message}"
            return
        self.first_rate = LOOK_TEXTS / elapsed_s
        self.lowest_cosine = lowest_cosine(embeddings, reference)
        floor = FLOOR_FLOAT32 if group.precision == "float32" else FLOOR_OTHERS
        if not self.lowest_cosine >= floor:  # NaN is not, either
            self.out = (
                f"refused: cosine {self.lowest_cosine:.6f} to float32, at least {floor} for "
                f"{group.precision}"
            )

    def take_turn(self, probe: SampleTexts, num_texts: int) -> None:
        assert self.group is not None
        try:
            _, elapsed_s = embed(self.group, probe, num_texts, self.candidate.max_batch_tokens)
        except FletcherError as error:
            self.out = f"failed: {error.message}"
        else:
            self.turns.append(num_texts / elapsed_s)


def _drop_the_slow(runners: Sequence[_Runner]) -> None:
    fastest = max((one.first_rate for one in runners if not one.out), default=0.0)
    for runner in runners:
        if not runner.out and runner.first_rate * SLOWER < fastest:
            runner.out = f"{fastest / runner.first_rate:.1f} times slower at the first look"


def _take_turns(runners: Sequence[_Runner], probe: SampleTexts, progress: Progress) -> None:
    if not runners:
        return
    # Two full runs for everybody's every core, or a larger budget could not show what it gives.
    most = max(
        one.group.concurrency * one.candidate.max_batch_tokens for one in runners if one.group
    )
    enough = 2 * most / probe.mean_tokens
    fastest = max(one.first_rate for one in runners)
    num_texts = math.ceil(max(enough, fastest * TURN_S))
    for turn in range(TURNS):
        progress(f"turn {turn + 1} of {TURNS}: {len(runners)} candidates, {num_texts} texts each")
        first = turn % len(runners)
        for runner in (*runners[first:], *runners[:first]):
            if not runner.out:
                runner.take_turn(probe, num_texts)


def embed(
    group: ReplicaGroup, probe: SampleTexts, num_texts: int, max_batch_tokens: int
) -> tuple[FloatArray, float]:
    """float32 [num_texts, dim], vectors of `probe.rows(num_texts)`, and the seconds they took.

    Raises:
        FletcherError: A replica failed or died.
    """
    places, batches = probe.cut(
        probe.rows(num_texts), max_batch_tokens=max_batch_tokens, num_runners=group.concurrency
    )
    results, elapsed_s = group.run(batches)
    embeddings = np.concatenate([one.embeddings for one in results])
    return embeddings[np.argsort(np.concatenate(places))], elapsed_s


def lowest_cosine(embeddings: FloatArray, reference: FloatArray) -> float:
    """The least cosine between rows of the same index; NaN where a vector has no direction."""
    ours, right = embeddings.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(right, axis=1)
        return float(((ours * right).sum(axis=1) / norms).min())
