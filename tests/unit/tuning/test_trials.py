import numpy as np
import pytest

from fletcher.core.batches import TokenBatch
from fletcher.errors import BackendError
from fletcher.tuning.candidates import TuningCandidate
from fletcher.tuning.sample_texts import SampleTexts, shipped_texts
from fletcher.tuning.trials import (
    CHECK_TEXTS,
    NUM_ROUNDS,
    CandidateTrial,
    choose_fastest,
    embed,
    lowest_cosine,
    run_trials,
)

ENGINES = ("openvino", "onnxruntime")


@pytest.fixture
def samples():
    lengths = np.random.default_rng(5).integers(3, 60, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32) % 97
    tokens = TokenBatch(ids, offsets, np.zeros(40, np.bool_))
    return SampleTexts(tokens, np.argsort(lengths, kind="stable"))


@pytest.fixture
def run(samples, fake_group):
    """Tries candidates whose replica groups are given, or an error instead of one."""
    reference, _ = embed(fake_group(), samples, CHECK_TEXTS, 64)

    def start(candidates, *groups):
        waiting = list(groups)

        def next_group(configs):
            group = waiting.pop(0)
            if isinstance(group, Exception):
                raise group
            return group

        return run_trials(candidates, samples, reference, next_group, lambda line: None)

    return start


def trial(candidate, *rounds, rejected=""):
    return CandidateTrial(candidate, rounds, 1.0, rejected)


def test_the_fastest_in_every_round_is_chosen(candidate):
    rule, other = candidate(), candidate("onnxruntime")
    assert choose_fastest([trial(rule, 10, 11, 12), trial(other, 13, 12, 13)]).candidate is other


def test_the_rules_choice_stays_if_noise_may_have_decided(candidate):
    rule, noisy, third = candidate(), candidate("onnxruntime"), candidate(tokens=512)
    trials = [trial(rule, 10, 11, 12), trial(noisy, 30, 30, 11), trial(third, 11, 12, 13)]
    # The median of the second is the highest, the third was faster each time.
    assert choose_fastest(trials).candidate is third
    assert choose_fastest(trials[:2]).candidate is rule


def test_a_rejected_candidate_is_never_chosen(candidate):
    fast, slow = trial(candidate(), 99, 99, rejected="wrong"), trial(candidate("onnxruntime"), 1, 1)
    assert choose_fastest([fast, slow]) is slow
    assert choose_fastest([fast]) is None
    assert choose_fastest([]) is None


def test_wrong_vectors_are_refused_however_fast(candidate, run, fake_group):
    right, wrong = candidate(), candidate("onnxruntime", "float32")
    fast = fake_group(seconds=(0.0001,), noise=0.01)  # cosine 0.99995
    trials = run([right, wrong], fake_group(), fast)
    assert trials[1].rejected.startswith("refused: cosine 0.9999")
    assert trials[1].rounds == ()
    assert choose_fastest(trials).candidate is right
    assert fast.closed


@pytest.mark.parametrize(
    ("precision", "noise", "is_right"),
    [
        ("float32", 0.003, True),
        ("float32", 0.005, False),
        ("bfloat16", 0.04, True),
        ("bfloat16", 0.05, False),
        ("tf32", 0.04, True),
        ("float16", np.nan, False),
    ],
)
def test_how_far_vectors_may_be_off_depends_on_the_precision(
    candidate, run, fake_group, precision, noise, is_right
):
    (one,) = run([candidate()], fake_group(precision, noise=noise))
    assert (one.rejected == "") is is_right


def test_candidates_of_the_same_processes_share_them(candidate, run, fake_group):
    small, large = candidate(tokens=64), candidate(tokens=128)
    trials = run([small, large], fake_group())  # a second start would find no group
    assert [len(one.rounds) for one in trials] == [NUM_ROUNDS, NUM_ROUNDS]


def test_what_does_not_start_or_fails_is_rejected_and_the_others_go_on(candidate, run, fake_group):
    unlike = [candidate(threads=threads) for threads in (1, 2, 3, 4)]
    breaks = fake_group(fails_at=4)
    trials = run(
        unlike, BackendError("no such provider"), fake_group(), fake_group(fails_at=0), breaks
    )
    assert [one.rejected for one in trials] == [
        "does not start: no such provider",
        "",
        "failed: out of memory",
        "failed: out of memory",
    ]
    assert choose_fastest(trials).candidate is unlike[1]


def test_a_much_slower_candidate_runs_no_rounds(candidate, run, fake_group):
    trials = run([candidate(), candidate("onnxruntime")], fake_group(), fake_group(seconds=(0.05,)))
    assert trials[1].rejected == "5.0 times slower than the fastest in the vector check"
    assert len(trials[0].rounds) == NUM_ROUNDS


def test_a_slow_spell_hits_one_round_and_not_the_median(candidate, run, fake_group):
    spell = fake_group(seconds=(0.01, 0.01, 0.5, 0.01))
    (one,) = run([candidate()], spell)
    assert one.texts_per_s == pytest.approx(100)
    assert min(one.rounds) == pytest.approx(2)


def test_vectors_come_back_in_the_order_of_the_texts(samples, fake_group):
    together, _ = embed(fake_group(), samples, 10, 64)
    ids, offsets = samples.tokens.input_ids, samples.tokens.offsets
    for place, row in enumerate(samples.rows(10).tolist()):
        angle = float(ids[offsets[row] : offsets[row + 1]].sum())
        assert together[place] == pytest.approx([np.cos(angle), np.sin(angle)], abs=1e-4)


def test_a_choice_of_texts_has_the_spread_of_all(samples):
    lengths = samples.tokens.token_count
    few = lengths[samples.rows(9)]
    assert (few.min(), few.max()) == (lengths.min(), lengths.max())
    assert (np.diff(few) >= 0).all()
    assert np.bincount(samples.rows(80), minlength=40).max() <= 3


def test_cosines_are_those_of_the_worst_row():
    right = np.eye(2, dtype=np.float32)
    assert lowest_cosine(3 * right, right) == pytest.approx(1)
    assert lowest_cosine(right[[0, 0]], right) == 0
    assert np.isnan(lowest_cosine(0 * right, right))


def test_the_shipped_texts_are_real_and_varied():
    texts = shipped_texts()
    assert len(set(texts)) == len(texts) == 192
    assert all(texts)
    assert max(map(len, texts)) > 5 * np.mean([len(text) for text in texts])


def test_a_candidate_says_what_it_is(candidate):
    two = TuningCandidate(candidate(threads=1).configs * 2)
    assert str(two) == "openvino bfloat16 on cpu: 1+1 cores, 1024 tokens a run"
