"""Trials of candidates: a check of their vectors, then rounds of measured runs."""

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
StartReplicas = Callable[[Sequence[BackendConfig]], ReplicaGroup]

# Lowest cosine to the reference that a vector may have, by the precision that really runs. The
# limits are those of the golden tests. all-MiniLM-L6-v2 on OpenVINO has a cosine of 0.99995 in
# bfloat16 and of 1.000000 in float32.
FLOOR_FLOAT32, FLOOR_OTHERS = 0.99999, 0.999
# Number of texts whose vectors are compared with the reference.
CHECK_TEXTS = 32
# A candidate that is this many times slower than the fastest is rejected: it cannot win, but would
# take most of the trial's time. An example is the CPU beside a GPU.
MAX_SLOWDOWN = 4.0
NUM_ROUNDS = 5
# Approximate time of a round for the fastest candidate. A round has more texts than fit into this
# time if they are needed to fill the candidates' runs.
ROUND_S = 0.6


@dataclass(frozen=True, slots=True)
class CandidateTrial:
    """Result of one candidate's trial.

    Attributes:
        candidate: The candidate.
        rounds: Texts per second in each round. Round n of all trials ran at about the same time.
        lowest_cosine: Lowest cosine of a text's vector to the reference; None if there are no
            vectors.
        rejected: Reason why the candidate cannot be chosen; empty if it can be chosen.
    """

    candidate: TuningCandidate
    rounds: tuple[float, ...] = ()
    lowest_cosine: float | None = None
    rejected: str = ""

    @property
    def texts_per_s(self) -> float:
        """Median of the rounds; 0 if there are no rounds."""
        return statistics.median(self.rounds) if self.rounds else 0.0


def choose_fastest(trials: Sequence[CandidateTrial]) -> CandidateTrial | None:
    """Choose the fastest trial that is not rejected; None if all are rejected.

    The first trial is the choice of the rules. Another trial is chosen only if it was faster than
    the first in every round. Between equal candidates, this happens once in 32 times by chance with
    five rounds. A faster median would happen every other time.
    """
    left = [trial for trial in trials if not trial.rejected]
    for trial in sorted(left, key=lambda one: -one.texts_per_s):
        if trial is left[0] or all(
            mine > its for mine, its in zip(trial.rounds, left[0].rounds, strict=True)
        ):
            return trial
    return None


def run_trials(
    candidates: Sequence[TuningCandidate],
    samples: SampleTexts,
    reference: FloatArray,
    start: StartReplicas,
    progress: Progress,
) -> list[CandidateTrial]:
    """Check the vectors of all candidates, then measure those with right vectors.

    The processes of all candidates exist at the same time, but only one candidate runs at a time.
    In each round, every candidate runs once. So other load on the machine slows all candidates
    alike.

    Args:
        candidates: The candidates. Candidates with the same processes share one replica group.
        samples: The texts to embed.
        reference: The right vectors of `samples.rows(CHECK_TEXTS)`, float32 [CHECK_TEXTS, dim].
        start: Function that starts the processes of a candidate.
        progress: Callback that gets one line of text at each step.

    Returns:
        One trial for each candidate, in the same order.
    """
    with contextlib.ExitStack() as stack:
        trials = [_Trial(one) for one in candidates]
        groups: dict[tuple[BackendConfig, ...], ReplicaGroup | str] = {}
        for trial in trials:
            candidate, processes = trial.candidate, trial.candidate.processes
            if processes not in groups:
                same = [one for one in candidates if one.processes == processes]
                most = max(one.max_batch_tokens for one in same)
                progress(f"starting {candidate.engine} on {candidate.replicas}")
                try:
                    group = start(candidate.with_tokens(most).configs)
                except FletcherError as error:
                    groups[processes] = f"does not start: {error.message}"
                else:
                    groups[processes] = stack.enter_context(contextlib.closing(group))
            trial.check_vectors(groups[processes], samples, reference)
        _reject_slow(trials)
        _run_rounds([one for one in trials if one.group and not one.rejected], samples, progress)
        return [trial.result() for trial in trials]


@dataclass(slots=True)
class _Trial:
    """State of a candidate's trial while the trial runs."""

    candidate: TuningCandidate
    group: ReplicaGroup | None = None
    rejected: str = ""
    lowest_cosine: float | None = None
    first_rate: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def result(self) -> CandidateTrial:
        rounds = () if self.rejected else tuple(self.rounds)
        return CandidateTrial(self.candidate, rounds, self.lowest_cosine, self.rejected)

    def check_vectors(
        self, group: ReplicaGroup | str, samples: SampleTexts, reference: FloatArray
    ) -> None:
        """Compare the candidate's vectors with the reference, and estimate its speed."""
        if isinstance(group, str):
            self.rejected = group
            return
        self.group = group
        tokens = self.candidate.max_batch_tokens
        try:
            # The first run also does work that the warm-up missed, so its time is not used.
            embed(group, samples, CHECK_TEXTS, tokens)
            embeddings, elapsed_s = embed(group, samples, CHECK_TEXTS, tokens)
        except FletcherError as error:
            self.rejected = f"failed: {error.message}"
            return
        self.first_rate = CHECK_TEXTS / elapsed_s
        self.lowest_cosine = lowest_cosine(embeddings, reference)
        floor = FLOOR_FLOAT32 if group.precision == "float32" else FLOOR_OTHERS
        if not self.lowest_cosine >= floor:  # rejects NaN too
            self.rejected = (
                f"refused: cosine {self.lowest_cosine:.6f} to float32, at least {floor} for "
                f"{group.precision}"
            )

    def run_round(self, samples: SampleTexts, num_texts: int) -> None:
        assert self.group is not None
        try:
            _, elapsed_s = embed(self.group, samples, num_texts, self.candidate.max_batch_tokens)
        except FletcherError as error:
            self.rejected = f"failed: {error.message}"
        else:
            self.rounds.append(num_texts / elapsed_s)


def _reject_slow(trials: Sequence[_Trial]) -> None:
    fastest = max((one.first_rate for one in trials if not one.rejected), default=0.0)
    for trial in trials:
        if not trial.rejected and trial.first_rate * MAX_SLOWDOWN < fastest:
            slowdown = fastest / trial.first_rate
            trial.rejected = f"{slowdown:.1f} times slower than the fastest in the vector check"


def _run_rounds(trials: Sequence[_Trial], samples: SampleTexts, progress: Progress) -> None:
    if not trials:
        return
    # Enough texts for two full runs on each runner of every candidate. With fewer texts, the gain
    # of a larger `max_batch_tokens` would not show.
    most = max(
        one.group.concurrency * one.candidate.max_batch_tokens for one in trials if one.group
    )
    enough = 2 * most / samples.mean_tokens
    fastest = max(one.first_rate for one in trials)
    num_texts = math.ceil(max(enough, fastest * ROUND_S))
    for number in range(NUM_ROUNDS):
        progress(
            f"round {number + 1} of {NUM_ROUNDS}: {len(trials)} candidates, {num_texts} texts each"
        )
        first = number % len(trials)
        for trial in (*trials[first:], *trials[:first]):
            if not trial.rejected:
                trial.run_round(samples, num_texts)


def embed(
    group: ReplicaGroup, samples: SampleTexts, num_texts: int, max_batch_tokens: int
) -> tuple[FloatArray, float]:
    """Embed `samples.rows(num_texts)` on a replica group.

    Returns:
        The embeddings, float32 [num_texts, dim], in the order of the rows, and the time in seconds.

    Raises:
        FletcherError: A replica failed or died.
    """
    places, batches = samples.micro_batches(
        samples.rows(num_texts), max_batch_tokens=max_batch_tokens, num_runners=group.concurrency
    )
    results, elapsed_s = group.embed_batches(batches)
    embeddings = np.concatenate([one.embeddings for one in results])
    return embeddings[np.argsort(np.concatenate(places))], elapsed_s


def lowest_cosine(embeddings: FloatArray, reference: FloatArray) -> float:
    """Lowest cosine between rows with the same index; NaN if a vector has norm 0."""
    ours, right = embeddings.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(right, axis=1)
        return float(((ours * right).sum(axis=1) / norms).min())
