"""Values behave as frozen dataclasses do, except that the type checker alone keeps them from being changed."""

import pickle
from dataclasses import dataclass, field, fields, replace

import pytest

from flaskd.values import value


@value
class Asked:
    reply: object = field(default="nothing", kw_only=True, repr=False)


@value
class Moved(Asked):
    where: str
    when: float = field(default=0.0, compare=False)


@value
class Named:
    where: str

    def __repr__(self):
        return "named"


@dataclass(frozen=True)
class Frozen:
    where: str
    when: float = 0.0


def test_values_are_compared_by_their_fields():
    """Those of the same class are equal if all fields that count are; other objects are never equal."""
    assert Moved("a") == Moved("a", 1.0) != Moved("b")
    assert Moved("a") != Moved("a", reply=None)
    assert Moved("a") != Named("a") != "a"
    assert {Moved("a"), Moved("a", 3.0), Moved("b")} == {Moved("b"), Moved("a")}


def test_values_are_shown_as_dataclasses_are():
    """With the name of the class and those fields that are to be shown, unless the class has a __repr__ of its own."""
    assert repr(Moved("a", 2.5)) == "Moved(where='a', when=2.5)"
    assert repr(Moved("a", 2.5)).removeprefix("Moved") == repr(Frozen("a", 2.5)).removeprefix("Frozen")
    assert repr(Named("a")) == "named"


def test_values_are_dataclasses():
    """They are made with defaults and keywords, matched, replaced, pickled and taken apart as dataclasses are."""
    match Moved("a", 2.0):
        case Moved(where, when):
            assert (where, when) == ("a", 2.0)
        case _:
            pytest.fail("it does not match")
    assert replace(Moved("a"), where="b") == Moved("b")
    assert [each.name for each in fields(Moved)] == ["reply", "where", "when"]
    assert pickle.loads(pickle.dumps(Moved("a"))) == Moved("a")
    with pytest.raises(TypeError):
        Moved()
