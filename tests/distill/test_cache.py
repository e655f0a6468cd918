"""The teacher's cache: asked once, the same numbers, bounded, and never for another teacher."""

import pytest
import torch

from compresskit.distill import TeacherCache
from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import make_batch
from compresskit.distill.features import Feature
from compresskit.distill.objective import bind
from compresskit.distill.teacher import Teacher
from compresskit.errors import CacheError, OptionError
from tests.distill.tiny import collate, compressed, examples, model, objective, trainer

GOAL = objective("hidden-states", "attention-scores", "embeddings")


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_a_second_epoch_does_not_run_the_teacher(tmp_path):
    teacher = model()
    cache = tmp_path / "cache"
    first = trainer(teacher, compressed(teacher), GOAL, tmp_path, cache=TeacherCache(cache), max_steps=3)
    first.train()
    assert first.teacher.forwards == 3  # 12 examples in batches of 4
    longer = trainer(teacher, compressed(teacher), GOAL, tmp_path, cache=TeacherCache(cache), max_steps=9)
    longer.train()
    assert longer.teacher.forwards == 0
    alone = trainer(teacher, compressed(teacher), GOAL, tmp_path, cache=TeacherCache(tmp_path / "new"), max_steps=9)
    alone.train()
    assert alone.teacher.forwards == 3
    torch.testing.assert_close(alone.model.state_dict(), longer.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("task", "goal"),
    [
        (None, GOAL),
        ("sequence", objective("logits", "relations")),
        ("question-answering", objective("logits")),
        ("token", objective("logits", "ffn-outputs")),
        ("pretraining", objective("logits")),
    ],
    ids=["encoder", "sequence", "question-answering", "token", "pretraining"],
)
@pytest.mark.parametrize(("stored", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_what_is_found_is_what_was_computed(task, goal, stored, tolerance, tmp_path):
    """Whatever the padding and the company, on the side of the real tokens."""
    anatomy = Anatomy(model(task), "teacher")
    wanted = bind(goal, Anatomy(model(task, seed=1), "student"), anatomy).teacher_features()
    cached = Teacher(anatomy, wanted, cache=TeacherCache(tmp_path, stored=stored))
    rows = examples(count=5)
    cached(make_batch(collate(rows[:3]), causal=False))
    batch = make_batch(collate(rows, length=14), causal=False)
    found, computed = cached(batch), Teacher(anatomy, wanted)(batch)
    assert cached.forwards == 2
    assert set(found) == set(computed) == set(wanted)
    for feature, tensor in found.items():
        assert tensor.shape == computed[feature].shape
        assert tensor.dtype == torch.float32
        per_token = tensor.shape[:2] == batch.mask.shape
        pick = batch.mask if per_token else slice(None)
        torch.testing.assert_close(tensor[pick], computed[feature][pick], rtol=tolerance, atol=tolerance)
    again = cached(make_batch(collate(rows[2:4], left=False), causal=False))
    assert cached.forwards == 2
    assert len(again) == len(wanted)


def test_only_what_the_objective_needs_is_stored(tmp_path):
    """Queries and keys of 4 layers, not the scores themselves, which grow with the square of the length."""
    teacher = model()
    training = trainer(
        teacher, compressed(teacher), objective("attention-scores"), tmp_path, cache=TeacherCache(tmp_path / "c")
    )
    assert set(training.teacher.features) == {Feature(r, i) for r in ("query", "key") for i in range(4)}
    training.train()
    tokens = sum(len(row["input_ids"]) for row in examples())
    (path,) = files(tmp_path / "c")
    numbers = tokens * 8 * 48 * 2  # 2 bytes each
    assert numbers < path.stat().st_size < numbers * 1.2 + 20_000


@pytest.mark.parametrize("change", ["weights", "features", "stored"])
def test_another_teacher_or_question_finds_nothing(change, tmp_path):
    batch = make_batch(collate(examples(count=3)), causal=False)
    features, cache = (Feature("hidden", 1),), TeacherCache(tmp_path)
    Teacher(Anatomy(model(), "teacher"), features, cache=cache)(batch)
    other = model()
    if change == "weights":
        with torch.no_grad():
            other.pooler.dense.bias[0] += 1e-3
    if change == "features":
        features = (Feature("hidden", 0),)
    if change == "stored":
        cache = TeacherCache(tmp_path, stored="bfloat16")
    asked = Teacher(Anatomy(other, "teacher"), features, cache=cache)
    asked(batch)
    assert asked.forwards == 1


def test_two_writers_share_a_folder(tmp_path):
    anatomy, features = Anatomy(model(), "teacher"), (Feature("hidden", 1),)
    one, two = (Teacher(anatomy, features, cache=TeacherCache(tmp_path)) for _ in range(2))
    batch = make_batch(collate(examples(count=3)), causal=False)
    one(batch)
    two(make_batch(collate(examples(count=3, seed=2)), causal=False))
    one.flush()
    two.flush()
    two(batch)
    assert two.forwards == 1
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("share", [0, 0.5])
def test_what_does_not_fit_is_computed_each_time(share, tmp_path):
    """With the same result as with a cache that holds all."""
    teacher = model()
    whole, partly = compressed(teacher), compressed(teacher)
    partly.load_state_dict(whole.state_dict())
    trainer(teacher, whole, GOAL, tmp_path / "whole", cache=TeacherCache(tmp_path / "all")).train()
    needed = sum(path.stat().st_size for path in files(tmp_path / "all"))
    limit = 10_000 if share == 0 else int(share * needed)
    cache = TeacherCache(tmp_path / "some", max_bytes=limit)
    if share:  # the first shard, which another run has written
        shared = trainer(teacher, compressed(teacher), GOAL, tmp_path / "first", cache=cache)
        shared.args.max_steps = 1
        shared.train()
    training = trainer(teacher, partly, GOAL, tmp_path / "partly", cache=cache)
    with pytest.warns(
        UserWarning, match=f"limited to {limit:,} bytes and keeps the answers of {'[1-9]' if share else 0}"
    ):
        training.train()
    assert sum(path.stat().st_size for path in files(tmp_path / "some")) <= limit
    assert bool(files(tmp_path / "some")) == bool(share)
    for ours, theirs in zip(partly.parameters(), whole.parameters(), strict=True):
        assert ours.equal(theirs)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    teacher = model()
    with torch.no_grad():
        teacher.encoder.layer[3].output.LayerNorm.bias[0] = 1e6
    batch = make_batch(collate(examples(count=3)), causal=False)
    features = (Feature("hidden", 3),)
    with pytest.raises(CacheError, match=r"teacher's hidden.3 holds 1e\+06, which torch.float16 cannot hold"):
        Teacher(Anatomy(teacher, "teacher"), features, cache=TeacherCache(tmp_path))(batch)
    Teacher(Anatomy(teacher, "teacher"), features, cache=TeacherCache(tmp_path, stored="bfloat16"))(batch)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(OptionError, match="max_bytes is positive"):
        TeacherCache(tmp_path, max_bytes=0)
    with pytest.raises(OptionError, match="float16, bfloat16 or float32, got 'int8'"):
        TeacherCache(tmp_path, stored="int8")
