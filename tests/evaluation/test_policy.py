"""A policy says exactly what it says: typing errors, contradictions and empty policies are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.policy import KlMean, Policy, default_policy, load_policy

SOUND = """
version = 1
[[gate]]
id = "kl"
kind = "kl_mean"
max = 0.04
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, SOUND))
    assert policy.gate == [KlMean(id="kl", kind="kl_mean", max=0.04)]
    assert (policy.alpha, policy.on_inconclusive, policy.data, policy.gate[0].role) == (
        0.05,
        "inconclusive",
        None,
        "primary",
    )


def test_the_default_policy_is_sound() -> None:
    policy = load_policy(default_policy())
    assert {gate.kind for gate in policy.gate if gate.role == "primary"} == {
        "size_ratio",
        "ppl_ratio",
        "kl_mean",
        "top1_agreement",
    }
    assert policy.data == "tales_heldout"


def test_inline_gates_read_the_same(tmp_path: Path) -> None:
    inline = 'version = 1\ngate = [{id = "kl", kind = "kl_mean", max = 0.04}]  # a comment'
    other = load_policy(write(tmp_path, inline))
    assert other.sha256() == load_policy(write(tmp_path, SOUND)).sha256()
    looser = load_policy(write(tmp_path, SOUND.replace("0.04", "0.05")))
    assert looser.sha256() != other.sha256()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SOUND + "maximum = 0.1", "gate.0.maximum"),
        (SOUND.replace("max", "min"), "gate.0.min"),
        ("alhpa = 0.1" + SOUND, "did you mean `alpha`"),
        (SOUND.replace("kl_mean", "kl_man"), "did you mean `kl_mean`"),
        (SOUND.replace("version = 1", "version = 2"), "version"),
        (SOUND.replace("version = 1", ""), "version"),
        ("version = 1", "gate"),
        ("version = 1\ngate = []", "gate"),
        (SOUND.replace("0.04", "nan"), "finite"),
        (SOUND.replace("0.04", "0"), "greater than 0"),
        (SOUND.replace("0.04", "inf"), "finite"),
        ("alpha = 0.5" + SOUND, "alpha"),
        ("alpha = 0" + SOUND, "alpha"),
        ('on_inconclusive = "pass"' + SOUND, "on_inconclusive"),
        (SOUND + 'role = "secondary"', "no gate is primary"),
        (SOUND + SOUND.replace("version = 1", ""), "`kl` occurs twice"),
        (SOUND.replace('"kl"', '"k l"'), "gate.0.id"),
        (SOUND.replace('kind = "kl_mean"\nmax = 0.04', 'kind = "top1_agreement"\nmin = 90'), "less than or equal to 1"),
        ("version = ", "not TOML"),
    ],
)
def test_unsound_policies_are_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_policy(write(tmp_path, text))
    assert words in caught.value.message


def test_missing_policy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the policy"):
        load_policy(tmp_path / "nothing.toml")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_policy(write(tmp_path, "alpha = 2" + SOUND.replace("max = 0.04", "max = -1") + "extra = 1"))
    assert all(word in caught.value.message for word in ("alpha", "gate.0.max", "gate.0.extra"))


def test_a_policy_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="no gate is primary"):
        Policy(version=1, gate=[KlMean(id="a", kind="kl_mean", max=1, role="secondary")])
