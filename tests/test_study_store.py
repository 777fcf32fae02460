"""The votes' file: one vote per pair and rater, hidden and balanced sides, and no file but its own."""

import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from full_disk import no_room

from attention_surgery.errors import StudyError
from attention_surgery.study import StudyConfig, StudyReportConfig, study_report
from attention_surgery.study.server import _check_same
from attention_surgery.study.store import CHOICES, StudyStore
from attention_surgery.study.videos import Pair


def make_pairs(count: int) -> list[Pair]:
    return [
        Pair(
            name=f"{index}.mp4",
            prompt=f"{index}",
            caption=None,
            dimensions=(),
            ours_digest=f"o{index}",
            baseline_digest=f"b{index}",
        )
        for index in range(count)
    ]


def make_store(folder: Path, count: int = 6, **options: object) -> StudyStore:
    config = StudyConfig(ours=folder / "ours", baseline=folder / "baseline", **options)
    return StudyStore.create(folder / "v.sqlite", config.fixed_settings(), make_pairs(count))


def vote_through(store: StudyStore, rater: str, choice: str = "left") -> list[str]:
    """Answer everything; returns the names in the order they were asked."""
    state = store.enter(rater)
    names = []
    while state.question:
        found = store.find_video(state.question.left)
        assert found is not None
        names.append(found[1])
        state = store.vote(state.question.token, choice)
    return names


def test_a_vote_is_kept_before_the_next_pair_is_handed_out(tmp_path):
    store = make_store(tmp_path)
    state = store.enter("anna")
    assert (state.done, state.total) == (0, 6)
    for done in range(1, 7):
        assert state.question is not None
        state = store.vote(state.question.token, "none")
        assert len(StudyStore(store.path).votes()) == state.done == done
    assert state.question is None and store.enter("anna") == state


def test_a_pair_has_one_answer_the_first(tmp_path):
    store = make_store(tmp_path)
    first = store.enter("anna").question
    assert first is not None
    second = store.vote(first.token, "left").question
    assert store.vote(first.token, "right").question == second
    assert store.enter("anna").question == second
    assert [vote.side for vote in store.votes()] == ["left"]


def test_the_same_pair_is_shown_again_until_it_is_answered(tmp_path):
    store = make_store(tmp_path)
    assert store.enter("anna") == store.enter(" ANNA ") == StudyStore(store.path).enter("anna")


def test_orders_and_sides_differ_between_raters_and_repeat_with_the_seed(tmp_path):
    stores = []
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        stores.append(make_store(tmp_path / name, 12))
    orders = {rater: [vote_through(store, rater) for store in stores] for rater in ("anna", "ben", "cleo")}
    assert all(one == again for one, again in orders.values())
    assert len({tuple(one) for one, _ in orders.values()}) == 3
    outcomes = [[(vote.rater, vote.name, vote.outcome) for vote in store.votes()] for store in stores]
    assert outcomes[0] == outcomes[1]
    (tmp_path / "seeded").mkdir()
    assert vote_through(make_store(tmp_path / "seeded", 12, seed=1), "anna") != orders["anna"][0]


def test_sides_are_balanced_and_answers_are_unblinded_rightly(tmp_path):
    store = make_store(tmp_path, 12)
    for rater in ("anna", "ben", "cleo"):
        state = store.enter(rater)
        while state.question:
            left, right = store.find_video(state.question.left), store.find_video(state.question.right)
            assert left is not None and right is not None
            assert left[1] == right[1] and {left[0], right[0]} == {"ours", "baseline"}
            state = store.vote(state.question.token, "left" if left[0] == "ours" else "right")
    votes = store.votes()
    assert {vote.outcome for vote in votes} == {"ours"}
    for rater in ("anna", "ben", "cleo"):
        assert Counter(vote.side for vote in votes if vote.rater == rater) == {"left": 6, "right": 6}


def test_pairs_per_rater_spreads_the_votes_over_the_pairs(tmp_path):
    store = make_store(tmp_path, 6, pairs_per_rater=2)
    for rater in ("anna", "ben", "cleo"):
        assert len(vote_through(store, rater)) == 2
    assert sorted(vote.name for vote in store.votes()) == [f"{index}.mp4" for index in range(6)]


def test_many_raters_and_repeated_requests_at_once(tmp_path):
    store = make_store(tmp_path, 8)
    raters = [f"rater-{index}" for index in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda rater: vote_through(store, rater, "right"), raters * 2))
    votes = store.votes()
    assert len(votes) == 32
    assert Counter(vote.rater for vote in votes) == dict.fromkeys(raters, 8)
    assert len({(vote.rater, vote.name) for vote in votes}) == 32


def test_on_a_full_disk_no_file_is_left_and_no_vote_lost(tmp_path):
    with no_room(4096), pytest.raises(StudyError, match=r"v\.sqlite cannot be written"):
        make_store(tmp_path)
    assert not any(tmp_path.iterdir())
    store = make_store(tmp_path)
    state = store.enter("anna")
    store.vote(state.question.token, "left")
    with no_room(4096), pytest.raises(StudyError, match=r"v\.sqlite cannot be used"):
        store.vote(store.enter("anna").question.token, "right")
    assert [vote.side for vote in StudyStore(store.path).votes()] == ["left"]
    assert store.vote(store.enter("anna").question.token, "right").done == 2


@pytest.mark.parametrize("rater", ["", "  ", "x" * 65, "two words", "<script>", "a/b", "../etc"])
def test_rater_ids_that_are_refused(tmp_path, rater):
    store = make_store(tmp_path)
    with pytest.raises(StudyError, match="letters, digits"):
        store.enter(rater)
    assert store.enter("Zoë.M_1-a@x").rater == "zoë.m_1-a@x"


def test_tokens_and_answers_that_were_never_offered(tmp_path):
    store = make_store(tmp_path)
    question = store.enter("anna").question
    assert question is not None
    with sqlite3.connect(store.path) as connection:
        future = connection.execute("SELECT token, left_token FROM assignment WHERE shown_at IS NULL").fetchone()
    for token in ("", "x", question.left, future[0]):
        with pytest.raises(StudyError, match="not of this study"):
            store.vote(token, "left")
    for choice in ("", "LEFT", "ours", "'; DROP TABLE vote; --"):
        with pytest.raises(StudyError, match="expected one of"):
            store.vote(question.token, choice)
    assert store.find_video(future[1]) is None and store.find_video(question.token) is None
    assert store.votes() == [] and set(CHOICES) == {"left", "right", "none"}


def test_nothing_in_a_token_tells_the_method(tmp_path):
    store = make_store(tmp_path)
    for rater in ("anna", "ben"):
        vote_through(store, rater)
    with sqlite3.connect(store.path) as connection:
        tokens = [
            value
            for row in connection.execute("SELECT token, left_token, right_token FROM assignment")
            for value in row
        ]
    assert len(set(tokens)) == len(tokens) == 36 and all(len(token) == 22 for token in tokens)


def spoil(path: Path, kind: str) -> None:
    if kind == "missing":
        return
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("rater,choice\n" * 20)
    elif kind == "foreign":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE vote (token TEXT)")
    else:
        make_store(path.parent, 200)
        whole = path.read_bytes()
        if kind == "newer":
            path.write_bytes(whole[:60] + (2).to_bytes(4) + whole[64:])
        elif kind == "cut":
            path.write_bytes(whole[: len(whole) // 2])
        elif kind == "damaged":
            path.write_bytes(whole[:4096] + b"\xff" * 8192 + whole[12288:])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "is an empty file"),
        ("text", "not an SQLite file"),
        ("foreign", "another program"),
        ("newer", "format 2; this version reads 1"),
        ("cut", "damaged|cannot be used"),
        ("damaged", "damaged|cannot be used"),
    ],
)
def test_files_that_are_no_study(tmp_path, kind, message):
    path = tmp_path / "v.sqlite"
    spoil(path, kind)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(StudyError, match=message):
        study_report(StudyReportConfig(database=path, output_dir=tmp_path / "report"))
    assert not (tmp_path / "report").exists()
    assert (path.read_bytes() if path.exists() else None) == before


def test_settings_and_videos_are_fixed_once_the_file_is_made(tmp_path):
    store = make_store(tmp_path, margin=0.1)
    options = {"ours": tmp_path / "ours", "baseline": tmp_path / "baseline", "database": store.path}
    _check_same(StudyConfig(**options, margin=0.1, port=1234, host="0.0.0.0"), store, make_pairs(6))
    for changed, message in (
        ({"margin": 0.2}, "margin = 0.1, now it is 0.2"),
        ({"margin": None}, "margin = 0.1, now it is None"),
        ({"margin": 0.1, "seed": 3}, "seed = 0, now it is 3"),
        ({"margin": 0.1, "ours_name": "new"}, "ours_name = 'ours', now it is 'new'"),
    ):
        with pytest.raises(StudyError, match=message):
            _check_same(StudyConfig(**options, **changed), store, make_pairs(6))
    for pairs, message in ((make_pairs(5), "'5.mp4' is missing"), (make_pairs(7), "'6.mp4' is new")):
        with pytest.raises(StudyError, match=message):
            _check_same(StudyConfig(**options, margin=0.1), store, pairs)
