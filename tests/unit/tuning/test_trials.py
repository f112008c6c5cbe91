import numpy as np
import pytest

from fletcher.core.batches import TokenBatch
from fletcher.errors import BackendError
from fletcher.tuning import trials as races
from fletcher.tuning.candidates import TuningCandidate
from fletcher.tuning.sample_texts import SampleTexts, shipped_texts
from fletcher.tuning.trials import LOOK_TEXTS, CandidateTrial, choose, embed, lowest_cosine, race

ENGINES = ("openvino", "onnxruntime")


@pytest.fixture
def probe():
    lengths = np.random.default_rng(5).integers(3, 60, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32) % 97
    tokens = TokenBatch(ids, offsets, np.zeros(40, np.bool_))
    return SampleTexts(tokens, np.argsort(lengths, kind="stable"))


@pytest.fixture
def run(probe, fake_group):
    """Races candidates whose crews are given, or an error instead of one."""
    reference, _ = embed(fake_group(), probe, LOOK_TEXTS, 64)

    def start(candidates, *groups):
        waiting = list(groups)

        def next_group(configs):
            group = waiting.pop(0)
            if isinstance(group, Exception):
                raise group
            return group

        return race(candidates, probe, reference, next_group, lambda line: None)

    return start


def trial(candidate, *turns, out=""):
    return CandidateTrial(candidate, turns, 1.0, out)


def test_the_fastest_in_every_turn_is_chosen(candidate):
    rule, other = candidate(), candidate("onnxruntime")
    assert choose([trial(rule, 10, 11, 12), trial(other, 13, 12, 13)]).candidate is other


def test_the_rules_own_stays_where_noise_may_have_decided(candidate):
    rule, noisy, third = candidate(), candidate("onnxruntime"), candidate(tokens=512)
    trials = [trial(rule, 10, 11, 12), trial(noisy, 30, 30, 11), trial(third, 11, 12, 13)]
    # The median of the second is the highest, the third was faster each time.
    assert choose(trials).candidate is third
    assert choose(trials[:2]).candidate is rule


def test_who_is_out_is_never_chosen(candidate):
    fast, slow = trial(candidate(), 99, 99, out="wrong"), trial(candidate("onnxruntime"), 1, 1)
    assert choose([fast, slow]) is slow
    assert choose([fast]) is None
    assert choose([]) is None


def test_wrong_vectors_are_refused_however_fast(candidate, run, fake_group):
    right, wrong = candidate(), candidate("onnxruntime", "float32")
    fast = fake_group(seconds=(0.0001,), noise=0.01)  # cosine 0.99995
    trials = run([right, wrong], fake_group(), fast)
    assert trials[1].out.startswith("refused: cosine 0.9999")
    assert trials[1].turns == ()
    assert choose(trials).candidate is right
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
    assert (one.out == "") is is_right


def test_candidates_of_the_same_processes_share_them(candidate, run, fake_group):
    small, large = candidate(tokens=64), candidate(tokens=128)
    trials = run([small, large], fake_group())  # a second start would find no crew
    assert [len(one.turns) for one in trials] == [races.TURNS, races.TURNS]


def test_what_does_not_start_or_fails_is_out_and_the_others_go_on(candidate, run, fake_group):
    unlike = [candidate(threads=threads) for threads in (1, 2, 3, 4)]
    breaks = fake_group(fails_at=4)
    trials = run(
        unlike, BackendError("no such provider"), fake_group(), fake_group(fails_at=0), breaks
    )
    assert [one.out for one in trials] == [
        "does not start: no such provider",
        "",
        "failed: out of memory",
        "failed: out of memory",
    ]
    assert choose(trials).candidate is unlike[1]


def test_the_hopelessly_slow_takes_no_turns(candidate, run, fake_group):
    trials = run([candidate(), candidate("onnxruntime")], fake_group(), fake_group(seconds=(0.05,)))
    assert trials[1].out == "5.0 times slower at the first look"
    assert len(trials[0].turns) == races.TURNS


def test_a_slow_spell_hits_one_turn_and_not_the_median(candidate, run, fake_group):
    spell = fake_group(seconds=(0.01, 0.01, 0.5, 0.01))
    (one,) = run([candidate()], spell)
    assert one.texts_per_s == pytest.approx(100)
    assert min(one.turns) == pytest.approx(2)


def test_vectors_come_back_in_the_order_of_the_texts(probe, fake_group):
    together, _ = embed(fake_group(), probe, 10, 64)
    ids, offsets = probe.tokens.input_ids, probe.tokens.offsets
    for place, row in enumerate(probe.rows(10).tolist()):
        angle = float(ids[offsets[row] : offsets[row + 1]].sum())
        assert together[place] == pytest.approx([np.cos(angle), np.sin(angle)], abs=1e-4)


def test_a_choice_of_texts_has_the_spread_of_all(probe):
    lengths = probe.tokens.token_count
    few = lengths[probe.rows(9)]
    assert (few.min(), few.max()) == (lengths.min(), lengths.max())
    assert (np.diff(few) >= 0).all()
    assert np.bincount(probe.rows(80), minlength=40).max() <= 3


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
