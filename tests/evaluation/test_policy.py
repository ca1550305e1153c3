"""A policy says exactly what it says: typing errors, contradictions and empty policies are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.policy import KlMean, Policy, default_policy, load_policy, packaged_policies

SOUND = """
version = 1
[[gate]]
id = "kl"
kind = "kl_mean"
max = 0.04
"""

ACCURACY = 'kind = "accuracy_paired"\ntask = "t"\n'
WAIVER = '\n[[waiver]]\ngate = "kl"\nuntil = 2030-01-31\nreason = "waived"\n'


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


def test_every_packaged_policy_is_sound_and_found_by_name() -> None:
    for name, path in packaged_policies().items():
        policy = load_policy(name)
        assert policy == load_policy(path)
        assert policy.name == name
        for profile in policy.profile:
            assert policy.profile[profile].apply(policy.gate)


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
        (SOUND.replace("kl_mean", "dp_tail").replace("max", "max_drop"), "dp_rms"),
        (SOUND.replace('kind = "kl_mean"\nmax = 0.04', ACCURACY + "margin = 0"), "margin above 0"),
        *(
            (
                SOUND.replace('kind = "kl_mean"\nmax = 0.04', f'{ACCURACY}margin = 1\ninterval = "{name}"'),
                "no `interval`",
            )
            for name in ("agresti-min", "tango", "outer")
        ),
        ('suite = "pr"\ndata = "tales_heldout"' + SOUND, "no place beside it"),
        ('suite = "pr"\nseq_len = 64' + SOUND, "no place beside it"),
        ("seq_len = 1" + SOUND, "seq_len"),
        ("looks = 1" + SOUND, "looks"),
        (SOUND.replace('"kl"', '"schemes"'), "profiles use that word"),
        (SOUND + WAIVER.replace('"kl"', '"k"'), "`k`, which the policy does not hold"),
        (SOUND + WAIVER + WAIVER, "two waivers"),
        (SOUND + WAIVER.replace("2030-01-31", '"soon"'), "waiver.0.until"),
        (SOUND + WAIVER.replace("waived", ""), "waiver.0.reason"),
        (SOUND + "[profile.int8]\nkl.max = 0.1", "profile.int8.schemes"),
        (SOUND + '[profile.int8]\nschemes = ["w8*"]\nkll.max = 0.1', "neither `schemes` nor the id of a gate"),
        (SOUND + '[profile.int8]\nschemes = ["w8*"]\nkl.maxx = 0.1', "did you mean `max`"),
        (SOUND + '[profile.int8]\nschemes = ["w8*"]\nkl.max = -1', "greater than 0"),
        (SOUND + '[profile.int8]\nschemes = ["w8*"]\nkl.role = "secondary"', "changes limits only"),
        (SOUND + '[profile.int8]\nschemes = ["w8*"]\nkl = 0.1', "kl.max = 0.1"),
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


KINDS = """
version = 1
gate = [
  {id = "a", kind = "size_ratio", min = 2.0},
  {id = "b", kind = "bytes_max", max = 1000},
  {id = "c", kind = "bits_per_weight_max", max = 4.5},
  {id = "d", kind = "ppl_ratio", max_increase = 0.04, interval = "bca"},
  {id = "e", kind = "kl_mean", max = 0.05, text = "wikitext"},
  {id = "f", kind = "kl_p999", max = 2.0},
  {id = "g", kind = "kl_increase", max_increase = 0.1, baseline = "last"},
  {id = "h", kind = "top1_agreement", min = 0.9, confident = true},
  {id = "i", kind = "dp_rms", max = 0.05},
  {id = "j", kind = "dp_tail", max_drop = 0.2, role = "secondary"},
  {id = "k", kind = "accuracy_paired", task = "lambada", margin = 1.0, max_flips = 0.08},
  {id = "l", kind = "generation_identical", min = 0.5},
  {id = "m", kind = "degenerate", max = 0.1, max_empty = 0.1},
  {id = "n", kind = "speed_ratio", min = 1.0, device = "cpu", what = "prefill"},
  {id = "o", kind = "peak_memory_ratio", max = 1.0},
  {id = "p", kind = "load_time", max = 10.0},
  {id = "q", kind = "no_dense_fallback", role = "secondary"},
]
"""


def test_every_kind_of_gate_can_be_written(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, KINDS))
    assert len({gate.kind for gate in policy.gate}) == len(policy.gate) == 17
    assert policy.texts() == {"wikitext"}
    assert [gate.task for gate in policy.tasks()] == ["lambada"]


PROFILES = (
    SOUND
    + """
[profile.int8]
schemes = ["w8a16*", "w8a8*"]
kl.max = 0.001
[profile.small]
schemes = ["w3*"]
kl.max = 0.1
"""
)


@pytest.mark.parametrize(
    ("scheme", "profile", "limit"),
    [
        ("w8a16-channel", "int8", 0.001),
        ("W8A8-channel", "int8", 0.001),
        ("w3a16-g128", "small", 0.1),
        ("w4a16-g128", None, 0.04),
        ("dense", None, 0.04),
        ("w3a16-g128+w8a16-channel", None, 0.04),  # not all of it is small, so nothing is loosened
        ("w8a16-channel+w8a8-channel", "int8", 0.001),
    ],
)
def test_the_scheme_chooses_the_profile(scheme: str, profile: str | None, limit: float, tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, PROFILES))
    name, gates = policy.for_scheme(scheme)
    assert name == profile
    assert [gate.max for gate in gates] == [limit]  # type: ignore[attr-defined]


def test_two_profiles_that_fit_are_refused(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, PROFILES.replace('"w3*"', '"w*"')))
    assert policy.for_scheme("w3a16-g128")[0] == "small"
    with pytest.raises(UserError, match="int8 and small"):
        policy.for_scheme("w8a8-channel")
